from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime import handshake_drain
from parallax.runtime.handshake_drain import Sieve
from parallax.runtime.handshake_log import HandshakeFailure, classify

NOW: Final = datetime.now(UTC)
DAY: Final = timedelta(days=1)
SERVER: Final = Path(__file__).with_name("handshake_server.py")
WITHIN_S: Final = 10.0
EVENT: Final = "TLS handshake failed"
SAID: Final = "I1122 17:01:59.265999    5069 ssl_transport_security.cc:2563] Handshake failed with error "
FAILED: Final = SAID + "SSL_ERROR_SSL: error:1:SSL routines:OPENSSL_internal:HTTP_REQUEST: Invalid"
UNKNOWN: Final = (
    "E1122 17:02:02.509522    5069 ssl_transport_security.cc:3238] No match found for server name: "
)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def make(
    name: str,
    issuer: Pair | None = None,
    *,
    start: datetime = NOW - DAY,
    is_ca: bool = False,
    usages: tuple[ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH),
) -> Pair:
    """A certificate for two days from *start* on; self-signed without an *issuer*."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + 2 * DAY)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        # Without these, Python's own clients refuse the chain from 3.13 on.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((issuer.key if issuer else key).public_key()),
            critical=False,
        )
    )
    if is_ca:
        builder = builder.add_extension(CA_USAGE, critical=True)
    if not is_ca:
        local = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(local), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return Pair(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


@dataclass
class Pki:
    """One CA, somebody else's, and the server's files."""

    directory: Path
    root: Pair = field(default_factory=lambda: make("ca", is_ca=True))
    other: Pair = field(default_factory=lambda: make("other", is_ca=True))

    def __post_init__(self) -> None:
        leaf = make("server", self.root)
        (self.directory / "ca.pem").write_bytes(self.root.pem)
        (self.directory / "server.pem").write_bytes(leaf.pem)
        (self.directory / "server-key.pem").write_bytes(leaf.key_pem)

    def trusting(self, *, client: Pair | None = None, root: Pair | None = None) -> ssl.SSLContext:
        """What a TLS client of Python needs to connect; without *client* it has no certificate."""
        context = ssl.create_default_context(cadata=(root or self.root).pem.decode())
        context.set_alpn_protocols(["h2"])
        if client is not None:
            path = self.directory / "client.pem"
            path.write_bytes(client.key_pem + client.pem)
            context.load_cert_chain(path)
        return context


@dataclass
class Server:
    """The other process, and what it wrote to its real stderr."""

    pki: Pki
    process: subprocess.Popen[str]
    stderr: Path
    port: int = 0

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def greet(self, first: bytes) -> None:
        """Open a connection, send *first*, wait until the server hangs up."""
        with self.connect() as connection:
            connection.sendall(first)
            with contextlib.suppress(OSError):
                connection.recv(100)

    def shake(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        """Try a handshake, and wait until either side has given up."""
        with (
            self.connect() as connection,
            contextlib.suppress(OSError),
            context.wrap_socket(connection, server_hostname=name) as tls,
        ):
            tls.recv(100)

    def call(self) -> bytes:
        """A good call, over a connection of its own."""
        client = make("client", self.pki.root)
        credentials = grpc.ssl_channel_credentials(self.pki.root.pem, client.key_pem, client.pem)
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"localhost:{self.port}", credentials, options) as channel:
            return echo(channel)

    def written(self) -> list[str]:
        return self.stderr.read_text().splitlines()

    def logged(self, event: str = EVENT) -> list[dict[str, Any]]:
        whole, _, _ = self.stderr.read_text().rpartition("\n")  # what is being written has no end yet
        records = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [record for record in records if record["event"] == event]

    def failures(self) -> dict[str, int]:
        counts: dict[str, int] = self.ask("counts")
        return counts


def echo(channel: grpc.Channel) -> bytes:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/Echo")
    return call(b"hello", timeout=10)


@contextlib.contextmanager
def running(*command: object, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test, however that ends."""
    with subprocess.Popen([str(part) for part in command], text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def serving(
    pki: Pki,
    *,
    interval_s: float = 0.01,
    close_s: float = WITHIN_S,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    stderr = pki.directory / "stderr.txt"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    with (
        stderr.open("w") as file,
        running(
            sys.executable,
            SERVER,
            pki.directory,
            interval_s,
            close_s,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env={**inherited, **(environment or {})},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield Server(pki, process, stderr, int(process.stdout.readline() or 0))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(2 * WITHIN_S) == 0


def eventually(holds: Callable[[], object]) -> None:
    """Wait until *holds*, ten seconds at most."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, f"did not come about within {WITHIN_S:g} s"
        time.sleep(0.01)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all the tests that only look."""
    with serving(Pki(tmp_path_factory.mktemp("shared"))) as server:
        yield server


def with_leaf(make_leaf: Callable[[Pki], Pair]) -> Callable[[Server], None]:
    return lambda server: server.shake(server.pki.trusting(client=make_leaf(server.pki)))


def without_certificate(server: Server) -> None:
    server.shake(server.pki.trusting())


def grpc_client_without_certificate(server: Server) -> None:
    credentials = grpc.ssl_channel_credentials(server.pki.root.pem)
    with (
        grpc.secure_channel(f"localhost:{server.port}", credentials) as channel,
        pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
    ):
        echo(channel)


def grpc_client_in_plaintext(server: Server) -> None:
    with (
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
        pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
    ):
        echo(channel)


def tls_1_1(server: Server) -> None:
    context = server.pki.trusting(client=make("client", server.pki.root))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it is out of date is the point
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    server.shake(context)


def client_that_distrusts_us(version: ssl.TLSVersion) -> Callable[[Server], None]:
    def shake(server: Server) -> None:
        context = server.pki.trusting(root=server.pki.other)
        context.maximum_version = version
        server.shake(context)

    return shake


def client_that_expects_somebody_else(server: Server) -> None:
    client = make("client", server.pki.root)
    credentials = grpc.ssl_channel_credentials(server.pki.root.pem, client.key_pem, client.pem)
    options = [("grpc.ssl_target_name_override", "agent-7.agents.parallax.local")]
    with (
        grpc.secure_channel(f"localhost:{server.port}", credentials, options) as channel,
        pytest.raises(grpc.RpcError, match="Hostname Verification"),
    ):
        echo(channel)


CAUSES: Final = {
    "no_certificate": (without_certificate, HandshakeFailure.NO_CERTIFICATE),
    "no_certificate_grpc": (grpc_client_without_certificate, HandshakeFailure.NO_CERTIFICATE),
    "leaf_of_other_ca": (with_leaf(lambda pki: make("client", pki.other)), HandshakeFailure.UNTRUSTED_ISSUER),
    "leaf_of_ca_with_same_name": (
        with_leaf(lambda _: make("client", make("ca", is_ca=True))),
        HandshakeFailure.UNTRUSTED_ISSUER,
    ),
    "self_signed_leaf": (with_leaf(lambda _: make("client")), HandshakeFailure.UNTRUSTED_ISSUER),
    "expired_leaf": (
        with_leaf(lambda pki: make("client", pki.root, start=NOW - 9 * DAY)),
        HandshakeFailure.EXPIRED,
    ),
    "leaf_of_tomorrow": (
        with_leaf(lambda pki: make("client", pki.root, start=NOW + DAY)),
        HandshakeFailure.NOT_YET_VALID,
    ),
    "leaf_for_servers_only": (
        with_leaf(lambda pki: make("client", pki.root, usages=(ExtendedKeyUsageOID.SERVER_AUTH,))),
        HandshakeFailure.WRONG_PURPOSE,
    ),
    "http": (lambda server: server.greet(b"GET / HTTP/1.1\r\n\r\n"), HandshakeFailure.PLAINTEXT_PEER),
    "grpc_in_plaintext": (grpc_client_in_plaintext, HandshakeFailure.PLAINTEXT_PEER),
    "tls_1_1": (tls_1_1, HandshakeFailure.PROTOCOL_VERSION),
    "distrusts_us_tls_1_2": (
        client_that_distrusts_us(ssl.TLSVersion.TLSv1_2),
        HandshakeFailure.PEER_REJECTED_US,
    ),
    "distrusts_us_tls_1_3": (
        client_that_distrusts_us(ssl.TLSVersion.TLSv1_3),
        HandshakeFailure.PEER_REJECTED_US,
    ),
    "expects_somebody_else": (client_that_expects_somebody_else, HandshakeFailure.UNKNOWN_SERVER_NAME),
    "alien_record": (
        lambda server: server.greet(b"\x17\x03\x03\x00\x20" + bytes(32)),
        HandshakeFailure.OTHER,
    ),
}


@pytest.mark.parametrize(("fail", "reason"), CAUSES.values(), ids=CAUSES.keys())
def test_reason_of_each_failure_is_counted_and_logged(
    shared: Server, fail: Callable[[Server], None], reason: HandshakeFailure
) -> None:
    counted = shared.failures().get(reason, 0)
    fail(shared)
    eventually(lambda: shared.failures().get(reason, 0) > counted)
    eventually(
        lambda: sum(entry["count"] for entry in shared.logged() if entry["reason"] == reason) > counted
    )
    entry = next(entry for entry in shared.logged() if entry["reason"] == reason)
    assert entry["level"] == "warning"
    assert entry["remedy"] == reason.remedy
    assert entry["detail"]


def test_good_calls_leave_no_trace(pki: Pki) -> None:
    with serving(pki) as server:
        assert server.call() == b"hello"
        assert server.failures() == {}
    assert server.written() == []


def test_other_lines_pass_and_chatter_of_grpc_does_not(pki: Pki) -> None:
    with serving(pki) as server:
        server.ask(r"say Fatal: caf\xc3\xa9\x1b[0m\n")
        server.ask(r"say W1122 17:01:59.265999    5069 tcp.cc:1] careful\x1b[0m\n")
        server.ask(r"say I1122 17:01:59.265999    5069 tcp.cc:1] chatter\n")
        server.ask(r"say the last line has no end")
    assert server.written() == [
        "Fatal: café\x1b[0m",  # native code's own bytes
        r"W1122 17:01:59.265999    5069 tcp.cc:1] careful\x1b[0m",  # may quote a peer
        "the last line has no end",
    ]


def test_a_server_name_cannot_forge_log_lines(pki: Pki) -> None:
    """BoringSSL takes any bytes but NUL as a name, and gRPC prints them."""
    forged = b'x\n{"event": "forged"}\nE1122 17:02:02.509522    5069 x.cc:1] forged'
    asked = ("a" * 50 + "." + "a" * 50)[: len(forged)]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = pki.trusting().wrap_bio(incoming, outgoing, server_hostname=asked)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    with serving(pki) as server:
        hello = outgoing.read()
        assert asked.encode() in hello
        server.greet(hello.replace(asked.encode(), forged))
        eventually(lambda: server.failures().get("unknown_server_name"))
        eventually(lambda: "forged" in server.stderr.read_text())
    assert all(line.startswith(("| ", '{"event": "TLS handshake')) for line in server.written())


def test_a_burst_is_logged_once_with_its_count(pki: Pki) -> None:
    with serving(pki, interval_s=3600) as server:
        server.greet(b"GET / HTTP/1.1\r\n\r\n")
        eventually(lambda: server.failures() == {"plaintext_peer": 1})
        for _ in range(39):
            server.greet(b"GET / HTTP/1.1\r\n\r\n")
        eventually(lambda: server.failures() == {"plaintext_peer": 40})
        assert [entry["count"] for entry in server.logged()] == [1]
    # At once, and what was still held back when it was closed.
    assert [entry["count"] for entry in server.logged()] == [1, 39]


def test_a_stopped_child_costs_no_good_call(pki: Pki) -> None:
    """gRPC writes with its own threads: if one of them waited for the pipe, calls would."""
    with serving(pki) as server:
        server.ask("signal SIGSTOP")
        assert server.ask("fill") >= 65536
        no_certificate = pki.trusting()
        for _ in range(300):
            server.shake(no_certificate)
            assert server.call() == b"hello"
        server.ask("print Python writes past the pipe")
        assert server.written() == ["Python writes past the pipe"]
        server.ask("signal SIGCONT")
        eventually(lambda: len(server.written()) > 1)
        without_certificate(server)
        eventually(lambda: server.failures().get("no_certificate"))


def test_closing_does_not_wait_for_a_stopped_child(pki: Pki) -> None:
    with serving(pki, close_s=0.5) as server:
        server.ask("signal SIGSTOP")
        state = server.ask("close")
    assert state["descriptor_2_is_the_real_one"]
    assert state["child_ended_with"] == -9


def test_a_killed_child_costs_only_the_reasons(pki: Pki) -> None:
    with serving(pki) as server:
        server.ask("signal SIGKILL")
        eventually(lambda: server.ask("state")["descriptor_2_is_the_real_one"])
        without_certificate(server)
        assert server.call() == b"hello"
        eventually(lambda: any("PEER_DID_NOT_RETURN_A_CERTIFICATE" in line for line in server.written()))
        server.ask(r"say still to be seen\n")
    assert "still to be seen" in server.written()
    assert len(server.logged("reasons of failed TLS handshakes are not available")) == 1


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_whole_group_does_not_end_the_child(pki: Pki, number: str) -> None:
    with serving(pki) as server:
        without_certificate(server)
        eventually(lambda: server.failures().get("no_certificate") == 1)  # by now it is listening
        server.ask(f"signal {number}")
        without_certificate(server)
        eventually(lambda: server.failures().get("no_certificate") == 2)


def test_the_child_ends_with_a_killed_parent(pki: Pki) -> None:
    with running(
        sys.executable,
        SERVER,
        pki.directory,
        1,
        WITHIN_S,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert int(process.stdout.readline())
        process.kill()
        process.stderr.read()  # ends when the last process that could write there has ended


def test_closing_puts_everything_back(pki: Pki) -> None:
    with serving(pki) as server:
        opened = server.ask("state")
        assert opened == {
            "descriptor_2_is_the_real_one": False,
            "sys_stderr_is_the_original": False,
            "verbosity": None,
            "child_ended_with": None,
        }
        assert server.ask("close") == {
            "descriptor_2_is_the_real_one": True,
            "sys_stderr_is_the_original": True,
            "verbosity": None,
            "child_ended_with": 0,
        }
        server.ask("print afterwards")
    assert server.written() == ["afterwards"]


def test_verbosity_of_the_user_stays_and_everything_passes(pki: Pki) -> None:
    with serving(pki, environment={"GRPC_VERBOSITY": "info"}) as server:
        without_certificate(server)
        eventually(lambda: server.failures().get("no_certificate"))
        assert server.ask("close")["verbosity"] == "info"
    assert any("PEER_DID_NOT_RETURN_A_CERTIFICATE" in line for line in server.written() if line[0] == "I")


def test_tracing_by_the_user_passes_too(pki: Pki) -> None:
    with serving(pki, environment={"GRPC_TRACE": "http_keepalive"}) as server:
        server.ask(r"say I1122 17:01:59.265999    5069 tcp.cc:1] traced\n")
    assert any("traced" in line for line in server.written())


def test_verbosity_that_hides_reasons_is_named_once(pki: Pki) -> None:
    with serving(pki, environment={"GRPC_VERBOSITY": "error"}) as server:
        without_certificate(server)
        without_certificate(server)
        assert server.call() == b"hello"
        assert server.ask("state")["verbosity"] == "error"
    assert server.logged() == []
    (said,) = server.logged("reasons of failed TLS handshakes are not available")
    assert "GRPC_VERBOSITY=error" in said["error"]


def test_a_process_without_stderr_serves_all_the_same(pki: Pki) -> None:
    without_stderr = ("sh", "-c", 'exec "$@" 2>&-', "sh")
    with running(
        *without_stderr,
        sys.executable,
        SERVER,
        pki.directory,
        1,
        WITHIN_S,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        server = Server(pki, process, pki.directory / "none", int(process.stdout.readline()))
        without_certificate(server)
        assert server.call() == b"hello"
        process.communicate(timeout=10)
        assert process.returncode == 0


def test_a_parent_that_does_not_read_loses_no_count() -> None:
    reports, reports_end = os.pipe()
    os.set_blocking(reports_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(reports_end, b"\n")  # no room for a report
    os.set_blocking(reports_end, True)
    with running(
        sys.executable, "-I", "-S", handshake_drain.__file__, stdin=subprocess.PIPE, stdout=reports_end
    ) as process:
        os.close(reports_end)
        assert process.stdin is not None
        process.stdin.write(f"{FAILED}\n" * 10_000)
        process.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)  # it has something to say yet
        with open(reports, encoding="ascii") as lines:  # noqa: PTH123 - a descriptor
            said = [json.loads(line) for line in lines if line != "\n"]
    assert sum(report["count"] for report in said) == 10_000
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        (
            "error:1:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: invalid CA certificate",
            "untrusted_issuer",
        ),
        ("error:1:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED", "other"),
        ("error:1:SSL routines:OPENSSL_internal:SSLV3_ALERT_BAD_CERTIFICATE: whatever", "peer_rejected_us"),
        ("error:1:SSL routines:OPENSSL_internal:TLSV1_ALERT_PROTOCOL_VERSION", "protocol_version"),
        ("error:1:SSL routines:OPENSSL_internal:NO_SHARED_CIPHER: whatever", "other"),
        ("No match found for server name: certificate has expired", "unknown_server_name"),
        ("(several)", "other"),
        ("", "other"),
    ],
)
def test_detail_is_classified(detail: str, reason: str) -> None:
    assert classify(detail) == reason


def test_every_reason_has_a_remedy() -> None:
    assert all(reason.remedy for reason in HandshakeFailure)


def test_reasons_fit_a_metric_label() -> None:
    assert all(re.fullmatch("[a-z_]{3,24}", reason) for reason in HandshakeFailure)


@given(st.lists(st.binary().map(lambda line: line.replace(b"\n", b"")) | st.just(UNKNOWN.encode() + b"x")))
def test_each_line_passes_whole_or_not_at_all(lines: list[bytes]) -> None:
    sieve = Sieve(unfiltered=False)
    for line in lines:
        passed = sieve.sift(line)
        assert passed == b"" or passed.index(b"\n") == len(passed) - 1


@given(st.binary(max_size=400))
def test_what_follows_a_server_name_is_marked_as_far_as_the_name_may_reach(rest: bytes) -> None:
    sieve = Sieve(unfiltered=False)
    name, *forged = rest[:255].split(b"\n")
    assert sieve.sift(UNKNOWN.encode() + name) == b""
    assert all(sieve.sift(line).startswith(b"| ") for line in forged)
    sieve.sift(b"." * 255)
    assert sieve.sift(b"native") == b"native\n"


def test_distinct_details_are_bounded() -> None:
    sieve = Sieve(unfiltered=False)
    for number in range(1000):
        sieve.sift(f"{UNKNOWN}host-{number}".encode())
        sieve.sift(f"{SAID}error {number}".encode())
    assert len(sieve.pending) <= 66
    assert sum(sieve.pending.values()) == 2000
    by_name = sum(times for detail, times in sieve.pending.items() if detail.startswith("No match"))
    assert by_name == 1000
