"""A life of identities, and everything that is said and kept about it: nowhere is a secret in that."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from parallax.runtime.policy import Policy
from parallax.runtime.policy_text import read_policy
from parallax.sdk import exits
from parallax.security.keys import generate_key, key_to_pem
from tests.end_to_end.test_enroll_command import Invitation, Shell
from tests.end_to_end.test_policy import asks

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children

PASSPHRASE: Final = "correct horse battery staple"


def forms(pem: bytes) -> set[str]:
    """How the private key in *pem* could be spelled: line by line, or as a number."""
    lines = pem.decode().split("-----")[2].split()
    key = load_pem_private_key(pem, PASSPHRASE.encode() if b"ENCRYPTED" in pem else None)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        number = key.private_numbers().private_value
    else:
        assert isinstance(key, rsa.RSAPrivateKey)
        number = key.private_numbers().d
    raw = number.to_bytes((number.bit_length() + 7) // 8)
    return {*(line for line in lines if len(line) > 20), str(number), raw.hex(), raw.decode("latin-1")}


@dataclass
class Life:
    """What is to stay hidden, and all that could show it."""

    directory: Path
    children: Children
    hidden: set[str] = field(default_factory=lambda: {PASSPHRASE})
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
            "PARALLAX_CA_PASSPHRASE_FILE": str(self.keep("passphrase", f"{PASSPHRASE}\n")),
            "PARALLAX_POLICY_FILE": str(self.policy),
            "PARALLAX_HTTP_LISTEN": "127.0.0.1:0",
            "LOG_LEVEL": "debug",
        }
        self.admin = Shell(self.directory, settings)

    @property
    def newcomer(self) -> Shell:
        """Where there is no certificate at first."""
        own = {"PARALLAX_CERTS_DIR": str(self.directory / "elsewhere"), "HOME": str(self.directory / "home")}
        return Shell(self.directory, self.admin.environment | own)

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

    async def begin(self, **more: str) -> Child:
        """A control plane."""
        plane = self.children.start_control_plane(self.admin.environment | more)
        ready = await self.start(plane, "control plane ready")
        self.admin.environment["PARALLAX_CONTROL_PLANE"] = f"localhost:{ready['port']}"
        self.seen.append(await scrape(ready["metrics_port"]))
        return plane

    def look(self) -> None:
        """Learn of the keys that lie there now, and read how all processes below us were started."""
        for path in self.directory.rglob("*"):
            if path.is_file() and path.suffix != ".db" and b"PRIVATE KEY" in (pem := path.read_bytes()):
                self.hidden |= forms(pem)
        for process in psutil.Process().children(recursive=True):
            with suppress(OSError):  # it has ended
                self.seen.append(Path(f"/proc/{process.pid}/cmdline").read_text())

    async def run(self, shell: Shell, *words: str, code: int = 0) -> None:
        """Run a command that ends with *code*; what it says is looked at, and so is how it was started."""
        process = await shell.start(*words)
        asyncio.get_running_loop().call_later(0.2, self.look)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        self.seen += [out.decode(), err.decode()]
        assert process.returncode == code, (words, self.seen[-2:])
        self.look()

    async def administer(self, *words: str, code: int = 0) -> None:
        await self.run(self.admin, *words, "--identity", "client/admin", code=code)

    def everything(self) -> str:
        """All that was said, and all that the control plane keeps."""
        kept = [path for path in (self.directory / "data").rglob("*") if path.is_file()]
        assert kept
        self.seen += [path.read_bytes().decode("latin-1") for path in kept]
        return "\n".join([*self.seen, *(line for each in self.processes for line in each.lines)])


async def scrape(port: int) -> str:
    """What the metrics listener says of itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()


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
    await life.run(life.newcomer, *words, *invitation.where, "--json")
    await life.run(life.newcomer, *words, *invitation.where, code=exits.NO_PERMISSION)


async def work(life: Life) -> None:
    """Be called, renew, and see the root rotated, whose key has a passphrase."""
    await life.administer("call", "agent-7", "echo", "1")
    await life.administer("call", "agent-9", "echo", "1", code=exits.FAILED)
    await life.run(life.newcomer, "certs", "renew", "agent-7")
    await life.administer("ca", "rotate")


async def withdraw(life: Life, agent: Child) -> None:
    """Be revoked, and reinstated."""
    await life.administer("certs", "revoke", "agent/agent-7", "--reason", "key-compromise")
    await agent.said("not connected")
    await life.administer("call", "agent-7", "echo", "1", code=exits.FAILED)
    await life.run(life.newcomer, "certs", "renew", "agent-7", code=exits.NO_PERMISSION)
    await life.administer("certs", "reinstate", "agent/agent-7")


async def pin(life: Life) -> None:
    """Have a certificate pinned; another one cannot be."""
    token, invitation = await life.token("device-token", "--device")
    words = ("enroll", "--device", "--layout", "home", "--self-signed", "--token-file", token)
    await life.run(life.newcomer, *words, *invitation.where)
    issued = life.directory / "certs" / "agent-1" / "cert.pem"
    await life.administer("certs", "pin", "agent/agent-1", "--file", str(issued), code=exits.CONFIG)


async def change_policy(life: Life, plane: Child) -> None:
    """To one that is none, and to another that is."""
    life.policy.write_text("[[rule]]\nname = 1\n")
    await plane.said("the policy cannot be used, what was in force stays so")
    rules = asks("agent-7", "agent-8", who="client/*")
    life.policy.write_text(rules)
    new = read_policy(rules)
    assert isinstance(new, Policy)
    await plane.said("policy in force", hash=new.hash.hex()[:16])


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE.encode()], ids=["plain", "encrypted"])
def test_a_key_would_be_found_in_its_file_and_as_a_number(passphrase: bytes | None) -> None:
    key = generate_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    pem = key_to_pem(key, passphrase)
    hidden = forms(pem)
    assert [each for each in hidden if each in pem.decode()]
    assert f"{key.private_numbers().private_value:x}" in {each.lstrip("0") for each in hidden}


@pytest.mark.timeout(180)
async def test_no_secret_is_where_others_read(children: Children, tmp_path: Path) -> None:
    life = Life(tmp_path, children)
    await life.run(life.admin, "certs", "generate")
    plane = await life.begin()
    await enroll(life)
    agent = children.start_agent(life.newcomer.environment, name="agent-7")
    await life.start(agent, "connected")
    await work(life)
    await withdraw(life, agent)
    await pin(life)
    await change_policy(life, plane)
    assert await plane.stop() == 0
    plane = await life.begin()
    for words in (
        ("token", "list", "--json"),
        ("certs", "list", "--ledger", "--json"),
        ("certs", "pins", "--json"),
        ("certs", "revoked", "--json"),
        ("agents", "list", "--json"),
        ("audit", "list", "--json"),
        ("audit", "verify"),
    ):
        await life.administer(*words)
    for process in (agent, plane):
        await process.stop()
    everything = life.everything()
    said = ("certificate/enrolled", "certificate/renewed", "pin/added", "agent-7", "parallax_certificate_")
    assert [each for each in said if each not in everything] == []
    assert len(life.hidden) > 100
    assert [each for each in life.hidden if each in everything] == []
