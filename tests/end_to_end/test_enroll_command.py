"""`parallax token` and `parallax enroll`, as they are typed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from parallax.control_plane import pin_index
from parallax.sdk import exits
from parallax.security.root_pin import RootPin
from tests.end_to_end.test_enrollment import body

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Serve

# Each runs several programs one after the other, which can take seconds each on a busy machine; a key of
# 4,096 bits takes longer.
pytestmark = pytest.mark.timeout(120)
WITHIN_S = 60.0
PARALLAX = str(Path(sys.executable).with_name("parallax"))


ECHO = """
from parallax.sdk import SecureAgent

class Echo(SecureAgent):
    def analyze(self, task, data):
        return data, 1.0
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass
class Shell:
    """Runs the command in *directory*, with the settings of a fleet."""

    directory: Path
    environment: dict[str, str]
    http_port: int = 0

    async def start(
        self, *words: str, environment: dict[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PARALLAX_")}
        return await asyncio.create_subprocess_exec(
            PARALLAX,
            *words,
            cwd=self.directory,
            env=clean | self.environment | (environment or {}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *words: str, stdin: str = "", environment: dict[str, str] | None = None) -> Done:
        process = await self.start(*words, environment=environment)
        async with asyncio.timeout(WITHIN_S):
            out, err = await process.communicate(stdin.encode())
        return Done(process.returncode or 0, out.decode(), err.decode())

    async def administer(self, *words: str) -> Done:
        return await self.run(*words, "--identity", "client/admin")


@pytest.fixture
async def fleet(serve: Serve) -> AsyncIterator[Fleet]:
    async with serve(http_listen="127.0.0.1:0") as running:
        yield running


@pytest.fixture
def shell(fleet: Fleet, pki: Pki, tmp_path: Path) -> Shell:
    return Shell(tmp_path, pki.environment | {"PARALLAX_CONTROL_PLANE": fleet.address}, fleet.http_port)


@pytest.fixture
def newcomer(shell: Shell, tmp_path: Path) -> Shell:
    """The same, where there is no certificate."""
    return Shell(tmp_path, shell.environment | {"PARALLAX_CERTS_DIR": str(tmp_path / "elsewhere")})


@dataclass(frozen=True)
class Invitation:
    """What `token create` says."""

    secret: str
    pin: str
    url: str

    @classmethod
    def read(cls, done: Done) -> Invitation:
        assert done.code == 0, done.err
        who = r"(?:[a-z]\S*|--device --layout home)"
        match = re.fullmatch(rf"parallax enroll {who} --token (\S+) --pin (\S+) --url (\S+)\n", done.out)
        assert match, done.out
        return cls(*match.groups())

    @property
    def where(self) -> tuple[str, ...]:
        return "--pin", self.pin, "--url", self.url


# As it is typed.


async def test_the_command_that_create_prints_enrolls(shell: Shell, newcomer: Shell, tmp_path: Path) -> None:
    made = await shell.administer("token", "create", "agent-7", "--ttl", "5m", "--label", "zone=a")
    assert "shown only now" in made.err
    _, *words = made.out.split()
    done = await newcomer.run(*words)
    assert done.code == 0, done.err
    certificate = tmp_path / "elsewhere" / "agent-7" / "cert.pem"
    assert done.out.startswith("spiffe://parallax.local/agent/agent-7 is enrolled until ")
    assert done.out.endswith(f"Z: {certificate}\n")
    assert stat.S_IMODE(certificate.with_name("key.pem").stat().st_mode) == 0o600
    verified = await newcomer.run("certs", "verify", "agent-7")
    assert verified.code == 0, verified.err


@pytest.mark.parametrize("way", ["--token", "file", "stdin", "variable"])
async def test_a_token_is_taken_from_wherever_it_is(
    shell: Shell, newcomer: Shell, tmp_path: Path, way: str
) -> None:
    invitation = Invitation.read(await shell.administer("token", "create", "agent-7"))
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(f"{invitation.secret}\n")
    words, stdin, environment = {
        "--token": (("--token", invitation.secret), "", {}),
        "file": (("--token-file", str(file)), "", {}),
        "stdin": (("--token-file", "-"), f"{invitation.secret}\n", {}),
        "variable": ((), "", {"PARALLAX_TOKEN": invitation.secret}),
    }[way]
    done = await newcomer.run(
        "enroll", "agent-7", *words, *invitation.where, "--json", stdin=stdin, environment=environment
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["identity"] == "spiffe://parallax.local/agent/agent-7"


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ((), {}, "no token: give --token-file or PARALLAX_TOKEN"),
        (("--token", ""), {}, "no token"),
        (("--token", "a"), {"PARALLAX_TOKEN": "b"}, "the token is given twice"),
        (("--token-file", "missing"), {}, "missing is missing: put the token there"),
        (("--token", "a", "--url", "http://localhost:8080"), {}, "not where one enrolls: 'http://localhost"),
        (("--token", "a", "--url", "https://localhost"), {}, "not where one enrolls"),
        (("--token", "a", "--url", "https://me@localhost:1"), {}, "not where one enrolls"),
        (("--token", "a", "--pin", "sha256:abc"), {}, "not a pin: 'sha256:abc'"),
        (("--token", "a"), {"PARALLAX_CONTROL_PLANE": "none"}, "PARALLAX_CONTROL_PLANE is none"),
    ],
)
async def test_what_is_wrong_with_the_command_is_said_in_one_line(
    newcomer: Shell, words: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    pin = () if "--pin" in words else ("--pin", f"sha256:{'0' * 64}")
    done = await newcomer.run("enroll", "agent-7", *pin, *words, environment=environment)
    assert (done.code, done.out) == (exits.CONFIG, "")
    assert done.err.startswith(f"parallax: {said}"), done.err
    assert done.err.count("\n") == 1


async def test_a_file_that_others_may_read_is_no_place_for_a_token(newcomer: Shell, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("plxt_secret")
    (tmp_path / "token").chmod(0o644)
    done = await newcomer.run("enroll", "agent-7", "--token-file", "token", "--pin", f"sha256:{'0' * 64}")
    assert done.code == exits.CONFIG
    assert "is open to others" in done.err


async def test_the_exit_code_says_why_nobody_was_enrolled(shell: Shell, newcomer: Shell) -> None:
    invitation = Invitation.read(await shell.administer("token", "create", "agent-8"))
    other_name = await newcomer.run("enroll", "agent-7", "--token", invitation.secret, *invitation.where)
    assert other_name.code == exits.NO_PERMISSION
    assert other_name.err.startswith("parallax: this token does not admit")
    stranger = ("--pin", f"sha256:{'0' * 64}", "--url", invitation.url)
    done = await newcomer.run("enroll", "agent-8", "--token", invitation.secret, *stranger)
    assert done.code == exits.NO_PERMISSION
    assert "does not show the root that is pinned" in done.err
    nobody = ("--pin", invitation.pin, "--url", "https://localhost:1", "--wait", "5")
    done = await newcomer.run("enroll", "agent-8", "--token", invitation.secret, *nobody)
    assert done.code == exits.UNAVAILABLE
    assert done.err.count("; trying again\n") == 1  # it was, more than once


async def test_what_lies_there_of_somebody_else_stays(shell: Shell, newcomer: Shell, tmp_path: Path) -> None:
    first = Invitation.read(await shell.administer("token", "create", "agent-7"))
    await newcomer.run("enroll", "agent-7", "--token", first.secret, *first.where, "--layout", "kubernetes")
    before = (tmp_path / "elsewhere" / "tls.crt").read_bytes()
    other = Invitation.read(await shell.administer("token", "create", "agent-8"))
    done = await newcomer.run(
        "enroll", "agent-8", "--token", other.secret, *other.where, "--layout", "kubernetes"
    )
    assert done.code == exits.CONFIG
    assert (tmp_path / "elsewhere" / "tls.crt").read_bytes() == before
    done = await newcomer.run("enroll", "agent-8", "--token", other.secret, *other.where)  # with the same key
    assert done.code == 0, done.err


async def test_a_key_that_is_of_no_use_any_more_is_named(
    shell: Shell, newcomer: Shell, tmp_path: Path
) -> None:
    """As one that was enrolled when the machine died, before it was forgotten that it waits."""
    first, second = [Invitation.read(await shell.administer("token", "create", "agent-7")) for _ in range(2)]
    done = await newcomer.run("enroll", "agent-7", "--token", first.secret, *first.where)
    assert done.code == 0, done.err
    key, waiting = (tmp_path / "elsewhere" / name for name in ("agent-7/key.pem", ".agent-7.enrolling"))
    waiting.write_bytes(key.read_bytes())
    waiting.chmod(0o600)
    again = ("enroll", "agent-7", "--token", second.secret, *second.where)
    done = await newcomer.run(*again)
    assert done.code == exits.CONFIG
    assert (
        f"there is a certificate for that key already; make a new one: its key waits in {waiting}" in done.err
    )
    waiting.unlink()
    assert (await newcomer.run(*again)).code == 0


async def test_tokens_are_listed_and_revoked(shell: Shell, newcomer: Shell) -> None:
    none = await shell.administer("token", "list")
    assert "there is no token" in none.err
    words = ("token", "create", "--pattern", "edge-*", "--uses", "2", "--label", "zone=a", "--json")
    made = json.loads((await shell.administer(*words)).out)
    assert made["command"].startswith("parallax enroll NAME --token plxt_")
    (listed,) = json.loads((await shell.administer("token", "list", "--json")).out)
    assert listed == {key: made[key] for key in listed}
    assert (listed["names"], listed["uses"], listed["labels"]) == ("edge-*", 2, {"zone": "a"})
    shown = await shell.administer("token", "list")
    assert made["secret"] not in shown.out
    assert "0 of 2" in shown.out
    assert (await shell.administer("token", "revoke", made["id"])).out == f"{made['id']} revoked\n"
    assert (await shell.administer("token", "revoke", made["id"])).out == f"{made['id']} is not there\n"
    where = ("--pin", made["pins"][0], "--url", made["command"].split()[-1])
    done = await newcomer.run("enroll", "edge-1", "--token", made["secret"], *where)
    assert done.code == exits.NO_PERMISSION


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give either the NAME"),
        (("agent-7", "--pattern", "edge-*"), "give either the NAME"),
        (("edge-*",), "give --pattern 'edge-*'"),
        (("agent-7", "--device"), "or --device"),
        (("--device", "--kind", "client"), "a name is allotted to agents alone"),
        (("agent-7", "--uses", "2"), "several uses need a pattern"),
        (("agent-7", "--ttl", "10"), "--ttl '10' is not a time"),
        (("agent-7", "--ttl", "31d"), "a token lasts a second to 30 days"),
        (("agent-7", "--label", "zone"), "is not KEY=VALUE"),
        (("ca",), "the name 'ca' is reserved"),
        (("Agent",), "not a name: 'Agent'"),
    ],
)
async def test_a_token_that_cannot_be_is_refused(shell: Shell, words: tuple[str, ...], said: str) -> None:
    done = await shell.administer("token", "create", *words)
    assert (done.code, done.out) == (exits.CONFIG, "")
    assert said in done.err


async def test_only_the_administrator_is_given_one(shell: Shell) -> None:
    done = await shell.run("token", "create", "agent-7")
    assert done.code == exits.NO_PERMISSION
    assert "act as --identity client/admin" in done.err


async def test_whoever_waits_for_the_control_plane_gets_there(shell: Shell, newcomer: Shell) -> None:
    invitation = Invitation.read(await shell.administer("token", "create", "agent-7"))
    port = invitation.url.rpartition(":")[2]
    # Turned away at first: one source has used up what it may.
    while await newcomer_guess(int(port)) != b"503":
        pass
    done = await newcomer.run("enroll", "agent-7", "--token", invitation.secret, *invitation.where)
    assert done.code == 0, done.err


async def newcomer_guess(port: int) -> bytes:
    """What status it gets."""
    from parallax.security.https import unverified_context

    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=unverified_context())
    content = body("guess")
    head = b"POST /v1/enrollments HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(content)
    writer.write(head + b"Content-Type: application/json\r\n\r\n" + content)
    answer = await reader.read()
    writer.close()
    return answer[9:12]


# Without a token.


async def test_who_asks_without_a_token_waits_until_approved(shell: Shell, newcomer: Shell, pki: Pki) -> None:
    pin = str(RootPin.of(pki.authority.certificate))
    url = f"https://localhost:{shell.http_port}"
    asking = await newcomer.start("enroll", "agent-9", "--request", "--pin", pin, "--url", url)
    assert asking.stderr is not None
    said = (await asking.stderr.readline()).decode()
    fingerprint = said.split()[-1]
    assert said == f"agent/agent-9 asks for a certificate for the key {fingerprint}\n"
    async with asyncio.timeout(WITHIN_S):
        while not (waiting := json.loads((await shell.administer("agents", "pending", "--json")).out)):
            await asyncio.sleep(0.1)
    assert [(each["identity"], each["fingerprint"]) for each in waiting] == [("agent/agent-9", fingerprint)]
    table = await shell.administer("agents", "pending")
    assert fingerprint in table.out
    few = await shell.administer("agents", "approve", fingerprint[: len("sha256:") + 8])
    assert (few.code, few.out) == (exits.CONFIG, "")
    assert "state 16 digits at least" in few.err
    for name in ("agent/agent-9", "agent-9"):  # which one can ask under without being it
        shown = await shell.administer("agents", "approve", name, "--label", "zone=a")
        assert (shown.code, shown.out.count(fingerprint)) == (exits.CONFIG, 1)
    *_, command = shown.err.splitlines()
    assert command == f"parallax agents approve {fingerprint} --label zone=a --identity client/admin"
    assert len(json.loads((await shell.administer("agents", "pending", "--json")).out)) == 1
    approved = await shell.run(*command.split()[1:])
    assert approved.out == f"agent/agent-9 with the key {fingerprint} approved\n"
    async with asyncio.timeout(WITHIN_S):
        out, err = await asking.communicate()
    assert asking.returncode == 0, err
    assert out.startswith(b"spiffe://parallax.local/agent/agent-9 is enrolled until ")
    nobody = await shell.administer("agents", "approve", "agent/agent-9")
    assert (nobody.code, nobody.out) == (exits.CONFIG, "")


async def test_who_is_rejected_is_told(shell: Shell, newcomer: Shell, pki: Pki) -> None:
    pin = str(RootPin.of(pki.authority.certificate))
    where = ("--pin", pin, "--url", f"https://localhost:{shell.http_port}")
    gave_up = await newcomer.run("enroll", "agent-9", "--request", *where, "--wait", "0")
    assert gave_up.code == exits.UNAVAILABLE
    assert "run it again, for the same key" in gave_up.err
    rejected = json.loads((await shell.administer("agents", "reject", "agent/agent-9", "--json")).out)
    assert rejected["verdict"] == "rejected"
    assert rejected["fingerprint"] in gave_up.err
    done = await newcomer.run("enroll", "agent-9", "--request", *where)
    assert done.code == exits.NO_PERMISSION
    assert "has rejected this request" in done.err


# Devices, which have no name.


@dataclass(frozen=True)
class Device:
    """A host whose home is its own."""

    shell: Shell
    mtls: Path

    def modes(self) -> dict[str, int]:
        files = {name: self.mtls / name for name in ("client.crt", "client.key", "ca.crt")}
        return {name: stat.S_IMODE(path.stat().st_mode) for name, path in files.items()}

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.mtls / "client.crt").read_bytes())


@pytest.fixture
def device(newcomer: Shell, tmp_path: Path) -> Device:
    home = tmp_path / "home"
    home.mkdir()
    return Device(Shell(tmp_path, newcomer.environment | {"HOME": str(home)}), home / ".mtls")


def check_kept(device: Device, name: str) -> None:
    """Pass if the files in the home of *device* are those of the agent *name*."""
    assert device.modes() == {"client.crt": 0o644, "client.key": 0o600, "ca.crt": 0o644}
    assert stat.S_IMODE(device.mtls.stat().st_mode) == 0o700
    key = device.leaf.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 4096
    assert device.leaf.subject.rfc4514_string() == f"CN={name}"
    assert not [*device.mtls.glob(".*.enrolling")]


async def test_a_device_is_allotted_a_name_and_keeps_its_certificate_at_home(
    shell: Shell, device: Device
) -> None:
    made = await shell.administer("token", "create", "--device")
    command, *words = made.out.split()
    assert (command, words[:4]) == ("parallax", ["enroll", "--device", "--layout", "home"])
    done = await device.shell.run(*words)
    assert done.code == 0, done.err
    name = done.out.split()[0].rpartition("/")[2]
    assert re.fullmatch("[0-9]{8}", name)
    check_kept(device, name)
    again = await device.shell.run(*words)
    assert again.code == exits.CONFIG
    assert "client.crt exists already and is never replaced" in again.err
    (listed,) = json.loads((await shell.administer("token", "list", "--json")).out)
    assert (listed["names"], listed["redeemed"]) == ("#", [name])


async def test_a_device_that_was_allotted_a_name_need_not_be_told_it_again(
    shell: Shell, device: Device, fleet: Fleet, tmp_path: Path
) -> None:
    """Its certificate says it."""
    (tmp_path / "echo.py").write_text(ECHO, encoding="utf-8")
    run = ("agent", "run", "echo:Echo", "--capability", "echo")
    told = await device.shell.run(*run)
    assert (told.code, told.out) == (exits.CONFIG, "")
    assert "nothing here says which agent this is" in told.err
    made = await shell.administer("token", "create", "--device")
    enrolled = await device.shell.run(*made.out.split()[1:])
    process = await device.shell.start(*run)
    async with fleet.client() as client:
        answer = await client.analyze("capability:echo", "echo", 7, wait_for_agent=WITHIN_S)
    assert enrolled.out.startswith(f"spiffe://parallax.local/agent/{answer.agent_id} is enrolled")
    process.terminate()
    async with asyncio.timeout(WITHIN_S):
        await process.communicate()
    assert process.returncode == 0


async def test_a_device_without_a_token_waits_under_the_name_that_it_is_allotted(
    shell: Shell, device: Device, pki: Pki
) -> None:
    pin = str(RootPin.of(pki.authority.certificate))
    where = ("--pin", pin, "--url", f"https://localhost:{shell.http_port}")
    asking = ("enroll", "--device", "--layout", "home", "--request", *where)
    gave_up = await device.shell.run(*asking, "--wait", "0")
    assert gave_up.code == exits.UNAVAILABLE
    (waiting,) = json.loads((await shell.administer("agents", "pending", "--json")).out)
    assert re.fullmatch("agent/[0-9]{8}", waiting["identity"])
    await shell.administer("agents", "approve", waiting["fingerprint"])
    done = await device.shell.run(*asking)
    assert done.out.startswith(f"spiffe://parallax.local/{waiting['identity']} is enrolled until ")
    check_kept(device, waiting["identity"].removeprefix("agent/"))


async def test_a_device_signs_its_certificate_itself_and_is_let_in_with_it(
    shell: Shell, device: Device
) -> None:
    made = await shell.administer("token", "create", "--device")
    words = [*made.out.split()[1:], "--self-signed"]
    where = words.index("--url") + 1
    lost = await device.shell.run(*words[:where], "https://localhost:1", *words[where + 1 :], "--wait", "0")
    assert lost.code == exits.UNAVAILABLE
    done = await device.shell.run(*words)
    assert done.code == 0, done.err
    name = done.out.split()[0].rpartition("/")[2]
    check_kept(device, name)
    assert device.leaf.issuer == device.leaf.subject
    (pinned,) = json.loads((await shell.administer("certs", "pins", "--json")).out)
    assert pinned["fingerprint"] == device.leaf.fingerprint(hashes.SHA256()).hex()
    renewed = await device.shell.run("certs", "renew", name)  # let in, it is issued another for it
    assert renewed.code == 0, renewed.out + renewed.err
    assert device.leaf.issuer != device.leaf.subject


async def test_where_the_port_has_no_room_a_device_is_told_to_exchange_its_certificate_and_does(
    shell: Shell, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pin_index, "MAX_ON_PORT", 0)
    made = await shell.administer("token", "create", "--device")
    done = await device.shell.run(*made.out.split()[1:], "--self-signed")
    assert done.code == 0, done.err
    name = done.out.split()[0].rpartition("/")[2]
    command = re.search("in its place: parallax (.*)", done.err)
    assert command
    words = command[1].split()
    assert words == ["certs", "renew", name, "--url", f"https://localhost:{shell.http_port}"]
    (pinned,) = json.loads((await shell.administer("certs", "pins", "--json")).out)
    assert (pinned["on_port"], pinned["exchanged"]) == (False, False)
    assert "to be exchanged" in (await shell.administer("certs", "pins")).out

    lost = await device.shell.run(*words[:-1], "https://localhost:1")
    assert lost.code == exits.UNAVAILABLE
    assert "https://localhost:1 does not answer" in lost.err
    assert "--url says where" in lost.err
    assert device.leaf.issuer == device.leaf.subject

    url = {"PARALLAX_ENROLL_URL": words[-1]}
    renewed = await device.shell.run(*words[:-2], environment=device.shell.environment | url)
    assert renewed.code == 0, renewed.out + renewed.err
    assert device.leaf.issuer != device.leaf.subject
    check_kept(device, name)
    assert (await device.shell.run("certs", "renew", name)).code == 0  # over the port, from here on


async def test_a_device_that_nobody_has_pinned_is_told_whom_to_ask(
    shell: Shell, device: Device, pki: Pki
) -> None:
    ca = pki.directory / "ca" / "cert.pem"
    assert (await device.shell.run("certs", "self-sign", "agent/07048933", "--ca", str(ca))).code == 0
    refused = await device.shell.run(
        "certs", "renew", "07048933", "--url", f"https://localhost:{shell.http_port}"
    )
    assert refused.code == exits.NO_PERMISSION
    assert "ask an administrator whether it is pinned ('parallax certs pins')" in refused.err
    assert device.leaf.issuer == device.leaf.subject


async def test_a_device_whose_answer_was_lost_registers_the_same_certificate_again(
    shell: Shell, device: Device
) -> None:
    made = await shell.administer("token", "create", "--device")
    words = [*made.out.split()[1:], "--self-signed"]
    assert (await device.shell.run(*words)).code == 0
    before = device.leaf
    waiting = device.mtls / ".device.enrolling"
    waiting.touch(mode=0o600)
    waiting.write_bytes((device.mtls / "client.key").read_bytes())  # as if it had not heard that it is pinned
    assert (await device.shell.run(*words)).code == 0
    assert device.leaf == before
    assert len(json.loads((await shell.administer("certs", "pins", "--json")).out)) == 1


@pytest.mark.parametrize(
    "words", [(), ("agent-7", "--device"), ("--device", "--kind", "client")], ids=["none", "both", "client"]
)
async def test_who_enrolls_has_a_name_or_is_a_device(newcomer: Shell, words: tuple[str, ...]) -> None:
    where = ("--token", "guess", "--pin", f"sha256:{'0' * 64}", "--url", "https://localhost:1")
    done = await newcomer.run("enroll", *words, *where)
    assert (done.code, done.out) == (exits.CONFIG, "")
    assert "give either the NAME, or --device" in done.err
