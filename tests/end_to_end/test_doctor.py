"""`parallax doctor` and what is really wrong: it names the first thing, and what mends it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc import aio
from grpc_health.v1 import health, health_pb2_grpc

from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.sdk import SecureAgent, exits
from parallax.security.authority import CertificateAuthority
from parallax.security.config import MTLSConfig
from parallax.security.identity import Identity
from parallax.security.keys import key_to_pem
from parallax.security.layouts import Layout, save_leaf
from tests.end_to_end.test_exchange import Device, pin
from tests.end_to_end.test_pins import let_in
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve

# Each runs several programs one after the other, which can take seconds each on a busy machine.
pytestmark = pytest.mark.timeout(120)
WITHIN_S: Final = 40.0
PLANE: Final = "spiffe://parallax.local/service/control-plane"


@dataclass(slots=True)
class Place:
    """A directory with a copy of the certificates, where doctor is run as `client/cli`."""

    pki: Pki
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)

    @property
    def own(self) -> Path:
        """Where the client's three files lie."""
        return self.directory / "certs" / "cli"

    def put(self, leaf: Leaf, name: str = "cli") -> None:
        """The three files of *leaf*, plain, as if made by hand."""
        target = self.directory / "certs" / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        (target / "key.pem").touch(0o600)
        for file, content in (
            ("cert.pem", leaf.chain_pem),
            ("key.pem", leaf.key_pem),
            ("ca.pem", leaf.bundle_pem),
        ):
            (target / file).write_bytes(content)

    async def sh(self, *argv: str) -> subprocess.CompletedProcess[str]:
        ours = ("PARALLAX_", "GRPC_", "LOG_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return await asyncio.to_thread(
            subprocess.run,
            [*self.prefix, *argv],
            cwd=self.directory,
            env=inherited | {"PATH": path} | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )

    async def doctor(self, *more: str) -> subprocess.CompletedProcess[str]:
        return await self.sh(sys.executable, "-m", "parallax.sdk.cli", "doctor", *self.arguments, *more)

    async def first(self) -> tuple[dict[str, Any], int]:
        """The first check that failed, and the exit code."""
        ended = await self.doctor("--json")
        assert ended.stderr == "", ended.stderr
        assert "PRIVATE KEY" not in ended.stdout
        failed = [check for check in json.loads(ended.stdout) if check["status"] == "failed"]
        assert failed, ended.stdout
        return failed[0], ended.returncode


@pytest.fixture
def place(pki: Pki, tmp_path: Path) -> Place:
    directory = tmp_path / "here"
    shutil.copytree(pki.directory, directory / "certs", symlinks=True)
    return Place(pki, directory, {"PARALLAX_TLS_ENABLED": "true", "PARALLAX_TLS_VERIFY_CLIENT": "true"})


def dials(place: Place, fleet: Fleet) -> Place:
    place.environment["PARALLAX_CONTROL_PLANE"] = fleet.address
    return place


# Faults on this host, beside a control plane that has none.

Fault = Callable[[Place], None]


def variable(name: str, value: str) -> Fault:
    return lambda place: place.environment.update({name: value})


def rename_variable(old: str, new: str) -> Fault:
    return lambda place: place.environment.update({new: place.environment.pop(old)})


def remove(file: str) -> Fault:
    return lambda place: (place.own / file).unlink()


def tear(file: str) -> Fault:
    def fault(place: Place) -> None:
        content = (place.own / file).read_bytes()
        (place.own / file).write_bytes(content[: len(content) // 2])

    return fault


def no_directory(place: Place) -> None:
    shutil.rmtree(place.own)


def no_ca_at_all(place: Place) -> None:
    place.environment["PARALLAX_CERTS_DIR"] = "nowhere"


def open_key(place: Place) -> None:
    (place.own / "key.pem").chmod(0o644)


def encrypted_key(place: Place) -> None:
    leaf = place.pki.issue("client/cli")
    place.put(leaf)
    (place.own / "key.pem").write_bytes(key_to_pem(leaf.key, b"secret"))


def key_of_another_pair(place: Place) -> None:
    (place.own / "key.pem").write_bytes(place.pki.issue("client/cli").key_pem)


def ca_of_somebody_else(place: Place) -> None:
    other = CertificateAuthority.create(now=place.pki.now, name="Other")
    (place.own / "ca.pem").write_bytes(other.bundle.pem)


def leaf_of_another_ca(place: Place) -> None:
    other = type(place.pki)(place.directory / "other").issue("client/cli")
    place.put(other)
    (place.own / "ca.pem").write_bytes(place.pki.authority.bundle.pem)


def expired(place: Place) -> None:
    now = datetime.now(UTC) - timedelta(minutes=2)
    place.put(place.pki.issue("client/cli", now=now, lifetime=timedelta(minutes=1)))


def not_yet_valid(place: Place) -> None:
    place.put(place.pki.issue("client/cli", now=place.pki.now + timedelta(hours=2)))


def for_somebody_else(place: Place) -> None:
    place.put(place.pki.issue("client/admin"))


def of_two_identities(place: Place) -> None:
    uris = [f"spiffe://parallax.local/client/{name}" for name in ("cli", "admin")]
    place.put(place.pki.forge("cli", uris=uris))


def of_another_trust_domain(place: Place) -> None:
    place.put(place.pki.forge("cli", uris=["spiffe://elsewhere.example/client/cli"]))


def for_servers_only(place: Place) -> None:
    uris = ["spiffe://parallax.local/client/cli"]
    place.put(place.pki.forge("cli", uris=uris, usages=[ExtendedKeyUsageOID.SERVER_AUTH]))


ISSUE = r"parallax certs issue cli --kind client$"

# Fault, the check that names it, what its detail says, the command; whether that command alone mends it here.
HERE: dict[str, tuple[Fault, str, str, str, bool]] = {
    "misspelt boolean": (
        variable("PARALLAX_TLS_VERIFY_CLIENT", "ture"),
        "settings", "PARALLAX_TLS_VERIFY_CLIENT=ture", "^$", False,
    ),
    "misspelt variable": (
        rename_variable("PARALLAX_TLS_ENABLED", "PARALLAX_TLS_ENABLE"),
        "variables", "PARALLAX_TLS_ENABLED does", r"^export PARALLAX_TLS_ENABLED=", True,
    ),
    "variable nobody reads": (
        variable("PARALLAX_TLS_CIPHERS", "HIGH"),
        "variables", "means nothing", "^unset PARALLAX_TLS_CIPHERS$", True,
    ),
    "TLS off beside its own settings": (
        variable("PARALLAX_TLS_ENABLED", "false"), "agreement", "TLS is off, though",
        "^export PARALLAX_TLS_ENABLED=true$", True,
    ),
    "a certificate without its key": (
        variable("PARALLAX_TLS_CERT_FILE", "certs/cli/cert.pem"), "settings", "given without", "^$", False
    ),
    "no certificate of the identity": (no_directory, "files", "no certificate of cli", ISSUE, True),
    "no certificates at all": (
        no_ca_at_all, "files", "holds no certificate", r"^parallax certs generate --certs-dir nowhere$", False
    ),
    "certificate missing": (remove("cert.pem"), "files", "cert.pem is missing", ISSUE, True),
    "key missing": (remove("key.pem"), "files", "key.pem is missing", ISSUE, True),
    "CA missing": (
        remove("ca.pem"), "files", "ca.pem is missing", r"^cp certs/ca/cert.pem certs/cli/ca.pem$", True
    ),
    "key open to others": (open_key, "permissions", "mode 0644", r"^chmod 600 certs/cli/key.pem$", True),
    "certificate damaged": (tear("cert.pem"), "content", "damaged", f"^mv .*{ISSUE}", True),
    "key damaged": (tear("key.pem"), "content", "not a private key", ISSUE, True),
    "CA damaged": (tear("ca.pem"), "content", "damaged", "^cp certs/ca/cert.pem", True),
    "key encrypted": (encrypted_key, "content", "encrypted", "openssl pkey -in certs/cli/key.pem", False),
    "key of another pair": (key_of_another_pair, "key pair", "does not fit", ISSUE, True),
    "CA of somebody else": (
        ca_of_somebody_else, "chain", "not issued by a CA of the trust bundle", "^cp certs/ca/cert.pem", True
    ),
    "certificate of another CA": (leaf_of_another_ca, "chain", "has another key there", ISSUE, True),
    "expired": (expired, "validity", "expired 1 minute ago|expired less|expired 2", ISSUE, True),
    "not valid yet": (not_yet_valid, "clock", "clock says .* probably wrong", "^timedatectl", False),
    "somebody else's": (for_somebody_else, "identity", "belongs to .*client/admin", f"^mv .*{ISSUE}", True),
    "two identities": (of_two_identities, "identity", "2 URI SANs", f"^mv .*{ISSUE}", True),
    "another trust domain": (of_another_trust_domain, "identity", "not of the trust domain", ISSUE, True),
    "for servers only": (for_servers_only, "credentials", "lacks clientAuth", ISSUE, True),
}  # fmt: skip


@pytest.mark.parametrize("fault", HERE)
async def test_the_first_thing_wrong_on_this_host_is_named_and_its_command_mends_it(
    place: Place, fleet: Fleet, fault: str
) -> None:
    plant, check, detail, command, mends = HERE[fault]
    plant(dials(place, fleet))
    found, code = await place.first()
    assert (found["name"], code) == (check, exits.CONFIG), found
    assert re.search(detail, found["detail"]), found
    assert found["remedy"]
    assert re.search(command, found["command"] or ""), found
    if mends:
        doctor = f"{sys.executable} -m parallax.sdk.cli doctor"
        ended = await place.sh("bash", "-c", f"{found['command']} >/dev/null && {doctor}")
        assert ended.returncode == exits.OK, ended.stdout + ended.stderr
        assert ended.stdout.splitlines()[-1].startswith("Nothing is wrong")


async def test_a_healthy_setup_says_so_in_its_last_line(place: Place, fleet: Fleet) -> None:
    ended = await dials(place, fleet).doctor()
    assert (ended.returncode, ended.stderr) == (exits.OK, ""), ended.stdout
    assert ended.stdout.splitlines()[-1] == "Nothing is wrong: 22 checks passed."
    assert "failed" not in ended.stdout


@pytest.mark.parametrize("who", ["agent/agent-1", "service/control-plane", "client/admin"])
async def test_every_kind_of_identity_can_be_healthy(place: Place, fleet: Fleet, who: str) -> None:
    ended = await dials(place, fleet).doctor("--identity", who)
    assert ended.returncode == exits.OK, ended.stdout


async def test_a_look_leaves_no_trace_in_the_control_planes_metrics(place: Place, fleet: Fleet) -> None:
    """It would look like an attack there."""
    assert (await dials(place, fleet).doctor()).returncode == exits.OK
    refused = {
        name: n for name, n in (await fleet.metrics()).items() if "authentication_failures_total" in name
    }
    assert not any(refused.values()), refused


async def test_the_last_lines_are_the_first_fault_and_what_to_type(place: Place, fleet: Fleet) -> None:
    open_key(dials(place, fleet))
    expired(place)
    open_key(place)
    ended = await place.doctor()
    *_, first, then, command = ended.stdout.splitlines()
    assert first == "First: permissions: certs/cli/key.pem is open to others (mode 0644)"
    assert then.startswith("Then: ")
    assert command == "chmod 600 certs/cli/key.pem"
    assert re.search(r"^failed +validity ", ended.stdout, re.MULTILINE), "it goes on"


async def test_a_key_by_value_is_checked_shown_to_the_server_and_never_printed(
    place: Place, fleet: Fleet
) -> None:
    leaf = place.pki.issue("client/cli")
    dials(place, fleet).environment |= {
        "PARALLAX_TLS_CERT_PEM": leaf.chain_pem.decode(),
        "PARALLAX_TLS_KEY_PEM": leaf.key_pem.decode(),
        "PARALLAX_TLS_CA_PEM": leaf.bundle_pem.decode(),
    }
    ended = await place.doctor("--json")
    assert ended.returncode == exits.OK, ended.stdout
    place.environment["PARALLAX_TLS_KEY_PEM"] = torn = leaf.key_pem.decode()[:120]
    found, _ = await place.first()
    assert (found["name"], "PARALLAX_TLS_KEY_PEM" in found["detail"]) == ("content", True)
    said = (await place.doctor()).stdout
    assert not any(line in said for line in torn.splitlines())


async def test_a_file_that_may_not_be_read_is_a_matter_of_permissions(
    place: Place, fleet: Fleet, require_tool: Callable[[str], str]
) -> None:
    key = place.own / "key.pem"
    if os.geteuid() == 0:
        os.chown(key, 65534, 65534)
        less = "-dac_override,-dac_read_search"
        place.prefix = [require_tool("setpriv"), f"--inh-caps={less}", f"--bounding-set={less}"]
    else:
        key.chmod(0)
    found, code = await dials(place, fleet).first()
    assert (found["name"], code) == ("permissions", exits.CONFIG)
    assert re.fullmatch(r"(chown \d+|chmod u\+r) certs/cli/key.pem", found["command"])


# Faults over there.


@contextmanager
def listener(answer: Callable[[socket.socket], None] | None) -> Iterator[str]:
    """A port whose owner answers every connection so, or accepts none of them; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WITHIN_S)

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(WITHIN_S)
                    try:
                        assert answer is not None
                        answer(connection)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve) if answer else None
        if thread:
            thread.start()
        yield "localhost:{1}".format(*server.getsockname())
        server.shutdown(socket.SHUT_RDWR)
    if thread:
        thread.join(WITHIN_S)


def speaks_ssh(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    connection.recv(1024)


def speaks_https(leaf: Leaf, directory: Path) -> Callable[[socket.socket], None]:
    file = directory / "https.pem"
    file.write_bytes(leaf.chain_pem + leaf.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    context.set_alpn_protocols(["http/1.1"])

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(64)

    return answer


def speaks_old_tls(leaf: Leaf, directory: Path) -> Callable[[socket.socket], None]:
    file = directory / "old.pem"
    file.write_bytes(leaf.chain_pem + leaf.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or it would not even offer it

    def answer(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    return answer


def refuses_by_alert(
    leaf: Leaf, directory: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Callable[[socket.socket], None]:
    """A TLS peer that trusts another CA than ours and says so, as OpenSSL's servers do."""
    file, roots = directory / "alert.pem", directory / "roots.pem"
    file.write_bytes(leaf.chain_pem + leaf.key_pem)
    roots.write_bytes(CertificateAuthority.create(now=leaf.certificate.not_valid_before_utc).bundle.pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    context.load_verify_locations(roots)
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(64)

    return answer


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """One that lets nobody read."""

    async def ListAgents(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "client/cli may not call 'ListAgents'")


@asynccontextmanager
async def server(leaf: Leaf, roots: bytes | None = None) -> AsyncIterator[str]:
    """A gRPC server with the certificate of *leaf* that asks for those of *roots*; its address."""
    running = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), running)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(
        Registry(),  # type: ignore[abstract]  # the rest is answered UNIMPLEMENTED
        running,
    )
    pair = [(leaf.key_pem, leaf.chain_pem)]
    credentials = grpc.ssl_server_credentials(pair, roots, require_client_auth=roots is not None)
    port = running.add_secure_port("127.0.0.1:0", credentials)
    await running.start()
    try:
        yield f"localhost:{port}"
    finally:
        await running.stop(None)


async def assert_first(place: Place, address: str, check: str, code: int, detail: str, command: str) -> None:
    place.arguments = [address]
    found, ended = await place.first()
    assert (found["name"], ended) == (check, code), found
    assert re.search(detail, found["detail"]), found
    assert re.search(command, found["command"] or ""), found
    assert found["remedy"]


def leaf_of_the_plane(pki: Pki, kind: str, directory: Path) -> Leaf:
    past, ahead = pki.now - timedelta(minutes=2), pki.now + timedelta(hours=2)
    match kind:
        case "another CA":
            return type(pki)(directory / "elsewhere").issue("service/control-plane")
        case "expired":
            return pki.issue("service/control-plane", now=past, lifetime=timedelta(minutes=1))
        case "not yet valid":
            return pki.issue("service/control-plane", now=ahead)
        case "no DNS name":
            return pki.forge("control-plane", uris=[PLANE])
        case "for clients only":
            dns, usages = ["control-plane.parallax.local"], [ExtendedKeyUsageOID.CLIENT_AUTH]
            return pki.forge("control-plane", uris=[PLANE], dns=dns, usages=usages)
        case short:
            return pki.issue(short)


@pytest.mark.parametrize(
    ("kind", "check", "detail", "command"),
    [
        ("another CA", "server chain", "not from our CA", "^cp CA_OF_THE_CONTROL_PLANE certs/cli/ca.pem"),
        ("expired", "server validity", "expired", "^parallax certs issue control-plane --kind service"),
        ("not yet valid", "server validity", "clock of this host.* probably wrong", "^timedatectl"),
        ("agent/agent-1", "server identity", "agent/agent-1 answers there", "PARALLAX_CONTROL_PLANE"),
        ("service/agent-proxy", "server identity", "service/agent-proxy answers", "PARALLAX_CONTROL_PLANE"),
        ("no DNS name", "server identity", "lacks the DNS name control-plane.parallax.local", "certs issue"),
        ("for clients only", "server identity", "not good for a server", "certs issue control-plane"),
    ],
)
async def test_a_server_that_is_not_a_sound_control_plane_is_named(
    place: Place, tmp_path: Path, kind: str, check: str, detail: str, command: str
) -> None:
    async with server(leaf_of_the_plane(place.pki, kind, tmp_path)) as address:
        await assert_first(place, address, check, exits.NO_PERMISSION, detail, command)


async def test_a_server_that_refuses_our_certificate_is_named(place: Place) -> None:
    """gRPC's servers close the connection without a word."""
    other = CertificateAuthority.create(now=place.pki.now, name="Other")
    async with server(place.pki.issue("service/control-plane"), other.bundle.pem) as address:
        await assert_first(
            place, address, "authentication", exits.NO_PERMISSION, "refuses our certificate", "^cp "
        )


async def test_a_certificate_of_our_own_making_that_is_not_let_in_is_to_be_pinned_or_exchanged(
    place: Place, fleet: Fleet
) -> None:
    device = Device.make(Identity.parse_short("agent/07048933"))
    place.put(device.leaf(fleet.pki), "07048933")
    place.arguments = ["--identity", device.who.short]
    check, code = await dials(place, fleet).first()
    assert (check["name"], code) == ("authentication", exits.NO_PERMISSION)
    assert "which is self-signed" in check["detail"]
    assert check["command"] == "parallax certs renew 07048933"
    await pin(fleet, device)
    await let_in(fleet, device.leaf(fleet.pki))
    assert (await place.doctor()).returncode == exits.OK


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_server_that_says_why_it_refuses_our_certificate_is_quoted(
    place: Place, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    with listener(refuses_by_alert(place.pki.issue("service/control-plane"), tmp_path, version)) as address:
        await assert_first(
            place, address, "authentication", exits.NO_PERMISSION, "does not know our CA", "^cp "
        )


async def test_a_refused_authorization_is_named(place: Place) -> None:
    leaf = place.pki.issue("service/control-plane")
    async with server(leaf, place.pki.authority.bundle.pem) as address:
        await assert_first(
            place, address, "authorization", exits.NO_PERMISSION, "may not call", "PARALLAX_IDENTITY"
        )


async def test_a_control_plane_that_asks_nobody_for_a_certificate_is_named(
    place: Place, serve: Serve
) -> None:
    async with serve(place.pki.tls(verify_client=False)) as fleet:
        await assert_first(
            place, fleet.address, "authentication", exits.NO_PERMISSION, "asks nobody", "VERIFY_CLIENT=true"
        )
        place.environment["PARALLAX_TLS_VERIFY_CLIENT"] = "false"
        ended = await place.doctor()
        assert ended.returncode == exits.OK, ended.stdout
        assert "as PARALLAX_TLS_VERIFY_CLIENT=false says" in ended.stdout


async def test_a_control_plane_in_plaintext_is_named(place: Place, serve: Serve) -> None:
    async with serve(MTLSConfig(enabled=False)) as fleet:
        await assert_first(
            place,
            fleet.address,
            "protocol",
            exits.UNAVAILABLE,
            "plaintext HTTP/2",
            "TLS_ENABLED=true .*start",
        )


async def test_without_tls_it_says_so_and_looks_for_plaintext(
    place: Place, serve: Serve, fleet: Fleet
) -> None:
    place.environment.clear()
    async with serve(MTLSConfig(enabled=False)) as plain:
        place.arguments = [plain.address]
        ended = await place.doctor()
        assert ended.returncode == exits.OK, ended.stdout
        assert "TLS is off" in ended.stdout
    await assert_first(
        place,
        fleet.address,
        "protocol",
        exits.UNAVAILABLE,
        "speaks TLS",
        "^export PARALLAX_TLS_ENABLED=true$",
    )
    await assert_first(
        place, "192.0.2.1:50051", "address", exits.CONFIG, "plaintext does not dial", "TLS_ENABLED=true$"
    )


async def test_other_programs_and_nobody_are_told_apart(place: Place, tmp_path: Path) -> None:
    with listener(speaks_ssh) as address:
        await assert_first(place, address, "protocol", exits.UNAVAILABLE, "SSH-2.0-OpenSSH", "CONTROL_PLANE")
    https = speaks_https(place.pki.issue("service/control-plane"), tmp_path)
    with listener(https) as address:
        await assert_first(place, address, "protocol", exits.UNAVAILABLE, "no gRPC server", "CONTROL_PLANE")
    old = speaks_old_tls(place.pki.issue("service/control-plane"), tmp_path)
    with listener(old) as address:
        await assert_first(place, address, "handshake", exits.UNAVAILABLE, "protocol", "start")
    address = f"localhost:{free_port()}"
    await assert_first(place, address, "port", exits.UNAVAILABLE, "connection refused", "control-plane start")
    await assert_first(
        place, "nowhere.invalid:50051", "name", exits.UNAVAILABLE, "cannot be looked up", "CONTROL_PLANE"
    )
    await assert_first(place, "nowhere", "settings", exits.CONFIG, "is not an address", "^$")


async def test_a_port_behind_which_nobody_speaks_is_named(place: Place) -> None:
    with listener(None) as address:
        await assert_first(place, address, "protocol", exits.UNAVAILABLE, "says nothing", "start")


async def test_agents_without_a_session_and_with_one_are_counted(place: Place, fleet: Fleet) -> None:
    class Echo(SecureAgent):
        async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
            return data, 1.0

    ended = await dials(place, fleet).doctor()
    assert "no agent is registered" in ended.stdout
    async with fleet.agent(Echo):
        ended = await place.doctor()
    assert "1 of 1 agents ready" in ended.stdout


async def test_agents_that_are_registered_and_not_connected_are_no_agents(place: Place, fleet: Fleet) -> None:
    """What a caller sees of that is NO_AGENT."""
    async with fleet.channel("agent/agent-1") as channel:
        description = registry_pb2.AgentDescription(agent_id="agent-1", max_concurrency=1)
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.Register(registry_pb2.RegisterRequest(description=description))
        await assert_first(
            place,
            fleet.address,
            "authorization",
            exits.UNAVAILABLE,
            "0 of 1 agents ready.*NO_AGENT",
            "agent run",
        )


async def test_a_mounted_secret_and_a_home_have_nothing_wrong(place: Place, fleet: Fleet) -> None:
    mounted, home = place.directory / "mounted", place.directory / "home"
    for directory, names in (
        (mounted, ("tls.crt", "tls.key", "ca.crt")),
        (home / ".mtls", ("client.crt", "client.key", "ca.crt")),
    ):
        directory.mkdir(parents=True)
        for ours, theirs in zip(("cert.pem", "key.pem", "ca.pem"), names, strict=True):
            shutil.copy(place.own / ours, directory / theirs)
    dials(place, fleet)
    for certs_dir in (mounted, place.directory / "nothing"):
        place.environment |= {"PARALLAX_CERTS_DIR": str(certs_dir), "HOME": str(home)}
        ended = await place.doctor()
        assert ended.returncode == exits.OK, ended.stdout


async def test_the_flat_layout_gets_its_own_command(place: Place, fleet: Fleet) -> None:
    certs = place.directory / "flat"
    leaf = place.pki.issue("client/admin")
    own = place.pki.issue(
        "client/cli", now=place.pki.now - timedelta(minutes=2), lifetime=timedelta(minutes=1)
    )
    for short, each in (("client/admin", leaf), ("client/cli", own)):
        save_leaf(
            certs,
            Layout.FLAT,
            Identity.parse_short(short),
            (each.certificate,),
            each.key,
            place.pki.authority.bundle,
        )
    dials(place, fleet).arguments = ["--certs-dir", str(certs)]
    found, _ = await place.first()
    assert found["name"] == "validity"
    assert found["command"] == f"parallax certs issue cli --kind client --layout flat --certs-dir {certs}"
