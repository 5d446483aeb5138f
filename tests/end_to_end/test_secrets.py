"""A life of identities, and everything that is said and kept about it: nowhere is a secret in that."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from parallax.runtime.passphrase import FILE_VARIABLE, VARIABLE
from parallax.runtime.policy import Policy
from parallax.runtime.policy_text import read_policy
from parallax.sdk import exits
from parallax.security.bundle import parse_certificates
from parallax.security.identity import control_plane
from parallax.security.keys import generate_key, key_to_pem
from parallax.security.possession import Wish
from parallax.security.request import new_request
from parallax.security.root_pin import RootPin
from tests.end_to_end.test_enroll_command import Invitation, Shell
from tests.end_to_end.test_enrollment import Answer, body
from tests.end_to_end.test_enrollment import ask as ask_edge
from tests.end_to_end.test_exchange import Device
from tests.end_to_end.test_policy import asks

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children

PASSPHRASE: Final = "correct horse battery staple"
WRONG: Final = "incorrect horse battery staple"  # a slip tells most of what is right
LISTS: Final = (
    ("token", "list", "--json"),
    ("certs", "list", "--ledger", "--json"),
    ("certs", "pins", "--json"),
    ("certs", "revoked", "--json"),
    ("agents", "list", "--json"),
    ("agents", "pending", "--json"),
    ("audit", "list", "--json"),
    ("audit", "verify"),
)


def forms(pem: bytes) -> set[str]:
    """How what is private of the key in *pem* could be spelled: line by line, or as a number."""
    lines = pem.decode().split("-----")[2].split()
    key = load_pem_private_key(pem, PASSPHRASE.encode() if b"ENCRYPTED" in pem else None)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        number = key.private_numbers().private_value
    else:
        assert isinstance(key, rsa.RSAPrivateKey)
        number = key.private_numbers().d
    raw = number.to_bytes((number.bit_length() + 7) // 8)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    private = {line for line in lines if len(line) > 20 and b64decode(line) not in public}
    return {*private, str(number), raw.hex(), raw.decode("latin-1")}


@dataclass
class Life:
    """What is to stay hidden, and all that could show it."""

    directory: Path
    children: Children
    hidden: set[str] = field(default_factory=lambda: {PASSPHRASE, WRONG})
    seen: list[str] = field(default_factory=list)
    processes: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = self.directory / "policy.toml"
        self.policy.write_text(asks("*", who="client/*"))
        (self.directory / "home").mkdir()
        settings = {
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
            "PARALLAX_CERTS_DIR": str(self.directory / "certs"),
            "PARALLAX_DATA_DIR": str(self.directory / "data"),
            FILE_VARIABLE: str(self.keep("passphrase", f"{PASSPHRASE}\n")),
            "PARALLAX_POLICY_FILE": str(self.policy),
            "PARALLAX_HTTP_LISTEN": "127.0.0.1:0",
            "LOG_LEVEL": "debug",
        }
        self.admin = Shell(self.directory, settings)
        self.http_port = 0

    @property
    def newcomer(self) -> Shell:
        """Where there is no certificate at first."""
        own = {"PARALLAX_CERTS_DIR": str(self.directory / "elsewhere"), "HOME": str(self.directory / "home")}
        return Shell(self.directory, self.admin.environment | own)

    @property
    def where(self) -> tuple[str, ...]:
        """Where one enrolls, as the command is told."""
        (root,) = parse_certificates((self.directory / "certs" / "ca" / "cert.pem").read_bytes())
        return "--pin", str(RootPin.of(root)), "--url", f"https://localhost:{self.http_port}"

    def keep(self, name: str, secret: str) -> Path:
        """A file that nobody else reads, with a *secret* in it."""
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(secret)
        return path

    async def token(self, name: str, *words: str) -> tuple[str, Invitation]:
        """The file with a new token: `token create` alone shows it, so what that wrote is not looked at."""
        made = await self.admin.administer("token", "create", *words)
        invitation = Invitation.read(made)
        self.hidden |= {invitation.secret, invitation.secret.split("_", 2)[2]}
        self.seen.append(made.err)
        return str(self.keep(name, invitation.secret)), invitation

    async def start(self, process: Child, event: str) -> dict[str, Any]:
        """What *process* says of *event*; all else that it says is looked at in the end."""
        self.processes.append(process)
        return await process.said(event)

    @property
    def files(self) -> Iterator[Path]:
        """All that lie there, whatever comes and goes meanwhile."""
        for directory, _, names in os.walk(self.directory):
            yield from (Path(directory, name) for name in names)

    @property
    def running(self) -> list[Child]:
        return [each for each in self.processes if each.process.poll() is None]

    async def begin(self) -> Child:
        """A control plane."""
        plane = self.children.start_control_plane(self.admin.environment)
        ready = await self.start(plane, "control plane ready")
        self.admin.environment["PARALLAX_CONTROL_PLANE"] = f"localhost:{ready['port']}"
        self.http_port = ready["http_port"]
        return plane

    async def scrape(self) -> None:
        """Read what all processes tell of themselves."""
        for each in self.running:
            for ready in (*each.records("control plane ready"), *each.records("metrics ready")):
                self.seen.append(await scrape(ready["metrics_port"]))

    async def stop(self) -> None:
        """Stop all processes that run."""
        for each in self.running:
            assert await each.stop() == 0

    def look(self) -> None:
        """Learn of the keys that lie there now, and read how all processes below us were started."""
        for path in self.files:
            with suppress(FileNotFoundError):  # another has taken its place
                if path.is_file() and path.suffix != ".db" and b"PRIVATE KEY" in (pem := path.read_bytes()):
                    self.hidden |= forms(pem)
        for process in psutil.Process().children(recursive=True):
            with suppress(OSError):  # it has ended
                line = Path(f"/proc/{process.pid}/cmdline").read_text()
                if "\0--token\0" not in line:  # where whoever types it shows it himself
                    self.seen.append(line)

    async def run(self, shell: Shell, *words: str, code: int = 0, stdin: str = "") -> str:
        """What a command says that ends with *code*; it is looked at, and so is how it was started."""
        process = await shell.start(*words)
        asyncio.get_running_loop().call_later(0.2, self.look)
        async with asyncio.timeout(60):
            said = [each.decode() for each in await process.communicate(stdin.encode())]
        self.seen += said
        assert process.returncode == code, (words, said)
        self.look()
        return "".join(said)

    async def administer(self, *words: str, code: int = 0) -> str:
        return await self.run(self.admin, *words, "--identity", "client/admin", code=code)

    async def ask(self, path: str, content: bytes | None, code: int = 200) -> Answer:
        """What is answered where one enrolls, with the status *code*."""
        method = "GET" if content is None else "POST"
        answer = await asyncio.to_thread(ask_edge, self.http_port, content, method=method, path=path)
        assert answer.status == code, answer
        return answer

    def found(self) -> list[str]:
        """Which secrets are in what was said, in what the control plane keeps or is open to others."""
        everything = self.everything()
        return [each for each in self.hidden if each in everything]

    def everything(self) -> str:
        texts = list(filter(None, map(self._read, self.files)))
        assert texts
        return "\n".join([*self.seen, *texts, *(line for each in self.processes for line in each.lines)])

    def _read(self, path: Path) -> str | None:
        """What *path* holds, if others may read it or the control plane keeps it; None if it is gone."""
        try:
            is_open = bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
            is_read = path.is_file() and (is_open or path.is_relative_to(self.directory / "data"))
            return path.read_bytes().decode("latin-1") if is_read else None
        except FileNotFoundError:
            return None


async def scrape(port: int) -> str:
    """What the metrics listener says of itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()


def mistyped(secret: str) -> str:
    """As *secret*, but for one character of it."""
    return f"{secret[:-9]}{'A' if secret[-9] != 'A' else 'B'}{secret[-8:]}"


# The chapters of a life: each has a control plane of its own.


async def enroll(life: Life) -> None:
    """In vain, in every way that the secret could be told in; then it succeeds, once."""
    token, invitation = await life.token("token", "agent-7", "--label", "zone=a")
    words = ("enroll", "agent-7", "--token-file", token)
    waiting = await life.newcomer.start(*words, "--pin", invitation.pin, "--url", "https://localhost:1")
    assert waiting.stderr is not None
    life.seen.append((await waiting.stderr.readline()).decode())  # it runs, with the token in its memory
    life.look()
    waiting.send_signal(signal.SIGINT)
    life.seen += [each.decode() for each in await waiting.communicate()]
    await life.run(
        life.newcomer, "enroll", "agent-8", *words[2:], *invitation.where, code=exits.NO_PERMISSION
    )
    wrong = ("--pin", f"sha256:{'0' * 64}", "--url", invitation.url)
    await life.run(life.newcomer, *words, *wrong, code=exits.NO_PERMISSION)
    for path, status in ((f"enrollments?token={invitation.secret}", 400), (invitation.secret, 404)):
        life.seen.append(str((await life.ask(f"/v1/{path}", b"{}", status)).body))
    await life.run(life.newcomer, *words, *invitation.where, "--json")
    await life.run(life.newcomer, *words, *invitation.where, code=exits.NO_PERMISSION)
    assert sha256(invitation.secret.encode()).hexdigest() in life.everything()  # which is what is kept of it


async def give_token(life: Life) -> None:
    """In each way that there is, wrong at first."""
    for number, way in enumerate(("--token", "PARALLAX_TOKEN", "--token-file", "-")):
        name = f"agent-{number}"
        file, invitation = await life.token(f"token-{number}", name)
        wrong = mistyped(invitation.secret)
        life.hidden |= {wrong, wrong.split("_", 2)[2]}
        for secret, code in ((wrong, exits.NO_PERMISSION), (invitation.secret, 0)):
            life.keep(f"token-{number}", secret)
            words = {"--token": (way, secret), "--token-file": (way, file), "-": ("--token-file", way)}
            more = {way: secret} if way == "PARALLAX_TOKEN" else {}
            shell = Shell(life.directory, life.newcomer.environment | more)
            asking = ("enroll", name, *words.get(way, ()), *invitation.where)
            await life.run(shell, *asking, code=code, stdin=secret if way == "-" else "")


async def give_passphrase(life: Life) -> None:
    """In each way that there is, wrong at first, to a command and to a control plane."""
    others = {name: value for name, value in life.admin.environment.items() if name != FILE_VARIABLE}
    for way in (VARIABLE, FILE_VARIABLE):
        for secret, code in ((WRONG, exits.CONFIG), (PASSPHRASE, 0)):
            await life.stop()
            given = secret if way == VARIABLE else str(life.keep("passphrase", secret))
            life.admin.environment = others | {way: given}
            name = f"agent-{way[-4:].lower()}"
            await life.run(life.admin, "certs", "issue", name, "--kind", "agent", code=code)
            plane = await life.begin()
            if code:
                await plane.said("a crl is not published")
            await life.run(life.admin, "certs", "renew", "agent-1", code=code)


async def be_approved(life: Life) -> None:
    """Ask without a token: one is let in, the other is not."""
    for name, verdict, code in (("agent-7", "approve", 0), ("agent-8", "reject", exits.NO_PERMISSION)):
        asking = ("enroll", name, "--request", *life.where)
        said = await life.run(life.newcomer, *asking, "--wait", "0", code=exits.UNAVAILABLE)
        fingerprint = re.search("sha256:[0-9a-f]{64}", said)
        assert fingerprint
        await life.administer("agents", "pending")
        await life.administer("agents", verdict, fingerprint[0])
        await life.run(life.newcomer, *asking, code=code)


async def work(life: Life) -> None:
    """Be called, renew, see the root rotated, whose key has a passphrase; be revoked, and reinstated."""
    agent = life.children.start_agent(life.admin.environment)
    await life.start(agent, "connected")
    await life.administer("call", "agent-1", "echo", "1")
    await life.administer("call", "agent-9", "echo", "1", code=exits.FAILED)
    await life.run(life.admin, "certs", "renew", "agent-1")
    await life.administer("ca", "rotate")
    await life.administer("certs", "revoke", "agent/agent-1", "--reason", "key-compromise")
    await agent.said("not connected")
    await life.administer("call", "agent-1", "echo", "1", code=exits.FAILED)
    await life.run(life.admin, "certs", "renew", "agent-1", code=exits.NO_PERMISSION)
    await life.administer("certs", "reinstate", "agent/agent-1")
    await change_policy(life)


async def change_policy(life: Life) -> None:
    """To one that is none, and to another that is."""
    plane = life.processes[0]
    life.policy.write_text("[[rule]]\nname = 1\n")
    await plane.said("the policy cannot be used, what was in force stays so")
    rules = asks("agent-7", "agent-8", who="client/*")
    life.policy.write_text(rules)
    new = read_policy(rules)
    assert isinstance(new, Policy)
    await plane.said("policy in force", hash=new.hash.hex()[:16])


async def listen(life: Life) -> None:
    """Be dialled, renew meanwhile, and be sent a secret by somebody who has mistaken the port."""
    own = {"PARALLAX_LISTEN": "127.0.0.1:0", "SESSION": "no", "PARALLAX_METRICS_LISTEN": "127.0.0.1:0"}
    agent = life.children.start_agent(life.admin.environment | own)
    endpoint = (await life.start(agent, "registered"))["endpoint"]
    await agent.said("metrics ready")
    await life.administer("call", "agent-1", "echo", "1")
    _, invitation = await life.token("token", "agent-7")
    with suppress(OSError, HTTPException):
        port = int(endpoint.rpartition(":")[2])
        await asyncio.to_thread(ask_edge, port, body(invitation.secret))
    await life.run(life.admin, "certs", "renew", "agent-1")
    await life.administer("call", "agent-1", "echo", "1")


async def pin(life: Life) -> None:
    """Have a certificate pinned; another one cannot be."""
    token, invitation = await life.token("device-token", "--device")
    words = ("enroll", "--device", "--layout", "home", "--self-signed", "--token-file", token)
    await life.run(life.newcomer, *words, *invitation.where)
    issued = life.directory / "certs" / "agent-1" / "cert.pem"
    await life.administer("certs", "pin", "agent/agent-1", "--file", str(issued), code=exits.CONFIG)


async def exchange(life: Life) -> None:
    """Prove over HTTPS that the key of a pinned certificate is one's own: in vain at first, then once."""
    device, new = Device.make(), generate_key()
    life.hidden |= forms(key_to_pem(device.key)) | forms(key_to_pem(new))
    certificate = life.directory / "device.pem"
    certificate.write_bytes(device.certificate.public_bytes(Encoding.PEM))
    await life.administer("certs", "pin", device.who.short, "--file", str(certificate))
    for key, code in ((new, 403), (device.key, 200)):
        nonce = str((await life.ask("/v1/nonce", None)).body["nonce"])
        proof = Wish(control_plane(), nonce, new_request(device.who, new)).sign(device.certificate, key)
        life.hidden |= {nonce, proof, *proof.split(".")[1:]}
        await send(life, device, proof, code)
    for useless in (proof, f"{proof}.{proof}"):
        await send(life, device, useless, 400)
    ca = str(life.directory / "certs" / "ca" / "cert.pem")
    await life.run(life.newcomer, "certs", "self-sign", "agent/agent-5", "--ca", ca)
    renew = ("certs", "renew", "agent-5", *life.where[2:])
    await life.run(life.newcomer, *renew, code=exits.NO_PERMISSION)  # it is not pinned


async def send(life: Life, device: Device, proof: str, code: int) -> None:
    """Ask for the exchange with *proof*; the answer, with the status *code*, is looked at."""
    content = json.dumps({"identity": device.who.short, "proof": proof}).encode()
    life.seen.append(str((await life.ask("/v1/exchanges", content, code)).body))


CHAPTERS: dict[Callable[[Life], Awaitable[None]], tuple[str, ...]] = {
    enroll: ("certificate/enrolled", "agent-7"),
    give_token: ("certificate/enrolled", "agent-3"),
    give_passphrase: ("wrong passphrase", "certificate/renewed"),
    be_approved: ("certificate/enrolled", "has rejected this request"),
    work: ("certificate/renewed", "root/"),
    listen: ("certificate/renewed", "registered", "parallax_tls_handshakes_total"),
    pin: ("pin/added",),
    exchange: ("pin/exchanged", "certificate/renewed"),
}
"""And what is said in each, so that it is known to be looked at."""


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE.encode()], ids=["plain", "encrypted"])
def test_a_key_would_be_found_in_its_file_and_as_a_number(passphrase: bytes | None) -> None:
    key = generate_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    pem = key_to_pem(key, passphrase)
    hidden = forms(pem)
    assert [each for each in hidden if each in pem.decode()]
    assert f"{key.private_numbers().private_value:x}" in {each.lstrip("0") for each in hidden}


def in_the_log(life: Life) -> None:
    life.processes.append(life.children.start("/bin/echo", PASSPHRASE))
    life.processes[-1].process.wait()


def in_what_is_kept(life: Life) -> None:
    (life.directory / "data").mkdir(mode=0o700)
    (life.directory / "data" / "kept").touch(mode=0o600)
    (life.directory / "data" / "kept").write_bytes(b"\0\xff" + PASSPHRASE.encode())


def in_an_open_file(life: Life) -> None:
    (life.directory / "passphrase").chmod(0o640)


def in_a_command_line(life: Life) -> None:
    life.children.start("/bin/sh", "-c", "sleep 60", PASSPHRASE)
    life.look()


@pytest.mark.parametrize("plant", [in_the_log, in_what_is_kept, in_an_open_file, in_a_command_line])
def test_a_secret_would_be_found(children: Children, tmp_path: Path, plant: Callable[[Life], None]) -> None:
    life = Life(tmp_path, children)
    assert life.found() == []
    plant(life)
    assert life.found() == [PASSPHRASE]


@pytest.mark.timeout(120)  # an eighth of that, on a machine that is not busy
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.__name__)
async def test_no_secret_is_where_others_read(
    children: Children, tmp_path: Path, chapter: Callable[[Life], Awaitable[None]]
) -> None:
    life = Life(tmp_path, children)
    await life.run(life.admin, "certs", "generate")
    await life.begin()
    await chapter(life)
    await life.scrape()
    for words in LISTS:
        await life.administer(*words)
    await life.stop()
    everything = life.everything()
    assert [each for each in (*CHAPTERS[chapter], "parallax_certificate_") if each not in everything] == []
    assert len(life.hidden) > 30
    assert life.found() == []
