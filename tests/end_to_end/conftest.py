"""All of Parallax on 127.0.0.1: a PKI on disk, control planes, agents and clients, here or in children."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import grpc
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from grpc import aio

from parallax.control_plane.server import ControlPlane
from parallax.protos import link_pb2, registry_pb2, session_pb2_grpc, task_pb2
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.sdk.testing import ThrowawayPKI
from parallax.sdk.testing import fleet as local_fleet
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.keys import PrivateKey, generate_key, key_to_pem
from parallax.security.layouts import Layout, save_authority, save_leaf
from parallax.security.profiles import LeafProfile
from tests.ports import free_port

T = TypeVar("T")
AgentT = TypeVar("AgentT", bound=SecureAgent)

WITHIN_S: Final = 20.0  # for what should happen at once, on a machine that is busy
UNBOUNDED: Final = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
WORKER: Final = Path(__file__).with_name("worker.py")


async def until(probe: Callable[[], T | None], within_s: float = WITHIN_S) -> T:
    """What *probe* gives, as soon as that is something: no None, no zero, and nothing empty."""
    deadline = time.monotonic() + within_s
    while not (found := probe()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        await asyncio.sleep(0.01)
    return found


def identity(short: str) -> Identity:
    """The identity spelled `<kind>/<name>`."""
    return Identity.parse_short(short, DEFAULT_TRUST_DOMAIN)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A key and its certificate chain, as gRPC takes them."""

    key_pem: bytes
    chain_pem: bytes
    bundle_pem: bytes
    key: PrivateKey
    certificate: x509.Certificate

    def channel_credentials(self, bundle_pem: bytes | None = None) -> grpc.ChannelCredentials:
        """Client credentials with this leaf; *bundle_pem* replaces the roots it trusts."""
        return grpc.ssl_channel_credentials(bundle_pem or self.bundle_pem, self.key_pem, self.chain_pem)


class Pki:
    """An issuer and a certificate directory that it fills."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = datetime.now(UTC)
        self.throwaway = ThrowawayPKI()
        self.authority = self.throwaway.authority
        save_authority(directory, Layout.PARALLAX, self.authority)

    def issue(
        self, short: str, *, now: datetime | None = None, lifetime: timedelta = timedelta(days=1)
    ) -> Leaf:
        """A leaf of the identity `<kind>/<name>`, not written anywhere."""
        key = generate_key()
        issued = self.authority.issue(
            identity(short), key.public_key(), LeafProfile(lifetime=lifetime), now or self.now
        )
        return Leaf(
            key_to_pem(key), certificates_to_pem(issued.chain), issued.bundle.pem, key, issued.chain[0]
        )

    def forge(
        self,
        common_name: str,
        *,
        uris: Sequence[str] = (),
        dns: Sequence[str] = (),
        usages: Sequence[x509.ObjectIdentifier] | None = None,
        key: PrivateKey | None = None,
    ) -> Leaf:
        """A leaf that the issuer's key signs but our own code would not have made: only what is asked for."""
        key = key or generate_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - timedelta(minutes=5))
            .not_valid_after(self.now + timedelta(days=1))
        )
        names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(self.authority.key, hashes.SHA256())
        chain_pem = certificates_to_pem((certificate,))
        return Leaf(key_to_pem(key), chain_pem, self.authority.bundle.pem, key, certificate)

    def save(
        self, *shorts: str, lifetime: timedelta = timedelta(days=1), now: datetime | None = None
    ) -> None:
        """Leaves of these identities, written to the certificate directory."""
        self.throwaway.save(self.directory, *shorts, lifetime=lifetime, now=now or self.now)

    def age(self, short: str, *, seconds: float) -> None:
        """Give an identity a certificate of a minute that is so old."""
        self.save(short, lifetime=timedelta(minutes=1), now=datetime.now(UTC) - timedelta(seconds=seconds))

    def save_foreign(self, short: str) -> None:
        """A certificate in the directory that its holder finds good, and nobody else."""
        stranger = ThrowawayPKI().authority
        bundle = TrustBundle((*stranger.bundle.roots, *self.authority.bundle.roots))
        who, key = identity(short), generate_key()
        issued = stranger.issue(who, key.public_key(), LeafProfile(), self.now)
        save_leaf(self.directory, Layout.PARALLAX, who, issued.chain, key, bundle)

    def tls(self, *, verify_client: bool = True) -> MTLSConfig:
        """The configuration of a process that uses the certificate directory."""
        return MTLSConfig(enabled=True, certs_dir=self.directory, verify_client=verify_client)

    @property
    def environment(self) -> dict[str, str]:
        """The same, for a child."""
        return {
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_CERTS_DIR": str(self.directory),
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
        }


class RawAgent:
    """An agent that speaks the session protocol by hand, and may break it."""

    def __init__(self, channel: aio.Channel, metadata: Sequence[tuple[str, str]]) -> None:
        self._call = session_pb2_grpc.SessionServiceStub(channel).Connect(metadata=metadata)

    async def hello(
        self,
        agent_id: str = "",
        *,
        instance_id: bytes | None = None,
        capabilities: Sequence[str] = ("raw",),
        max_concurrency: int = 8,
    ) -> link_pb2.Welcome:
        """Introduce it as *agent_id*; what the control plane makes of that."""
        hello = link_pb2.Hello(
            protocol_version=1,
            min_protocol_version=1,
            instance_id=instance_id or secrets.token_bytes(16),
            description=registry_pb2.AgentDescription(
                agent_id=agent_id, capabilities=capabilities, max_concurrency=max_concurrency
            ),
        )
        await self.say(hello=hello)
        frame = await self.read()
        assert frame is not None
        return frame.welcome

    async def say(self, **frame: Any) -> None:
        """Send one frame."""
        async with asyncio.timeout(WITHIN_S):
            await self._call.write(link_pb2.LinkFrame(**frame))

    async def answer(self, task_id: int, data: bytes = b"", confidence: float = 0.5) -> None:
        """Send the value *data* for a task."""
        value = task_pb2.Value(payload=task_pb2.Payload(data=data), confidence=confidence)
        await self.say(outcomes=[link_pb2.TaskOutcome(task_id=task_id, value=value.SerializeToString())])

    async def read(self) -> link_pb2.LinkFrame | None:
        """The next frame; None when the control plane has ended the stream in order."""
        async with asyncio.timeout(WITHIN_S):
            frame = await self._call.read()
        return frame if isinstance(frame, link_pb2.LinkFrame) else None

    async def task(self) -> link_pb2.Task:
        """The next task."""
        while True:
            frame = await self.read()
            assert frame is not None, "the stream ended"
            if frame.tasks:
                (task,) = frame.tasks
                return task

    async def goodbye(self) -> str:
        """Why the control plane ended the session in order, without the prefix."""
        while True:
            frame = await self.read()
            assert frame is not None, "the stream ended without a goodbye"
            if frame.HasField("goodbye"):
                name = link_pb2.GoodbyeReason.Name(frame.goodbye.reason)
                return name.removeprefix("GOODBYE_REASON_")

    async def refusal(self) -> aio.AioRpcError:
        """The error that the control plane ends the stream with."""
        with pytest.raises(aio.AioRpcError) as refused:
            while await self.read() is not None:
                pass
        return refused.value

    def hang_up(self) -> None:
        """Break the stream off."""
        self._call.cancel()


class Fleet:
    """A running control plane, and how to reach it."""

    plane: ControlPlane  # where it runs in this process

    def __init__(self, pki: Pki, tls: MTLSConfig, port: int, metrics_port: int, http_port: int = 0) -> None:
        self.pki = pki
        self.tls = tls
        self.port = port
        self.metrics_port = metrics_port
        self.http_port = http_port
        self.address = f"localhost:{port}"

    def client(self, name: str = "client/cli") -> ParallaxClient:
        """A client that acts as *name*."""
        return ParallaxClient(self.address, self.tls, identity=name)

    def agent(self, cls: type[AgentT], name: str = "agent-1", **options: Any) -> AgentT:
        """An agent of class *cls*, to be entered; its capability is the class's name in lower case."""
        options.setdefault("capabilities", [cls.__name__.lower()])
        capabilities = options.pop("capabilities")
        return cls(name, cls.__name__, capabilities, tls=self.tls, control_plane=self.address, **options)

    @asynccontextmanager
    async def channel(self, leaf: Leaf | str) -> AsyncIterator[aio.Channel]:
        """A bare channel without size limits, for peers that speak the protocol their own way."""
        leaf = self.pki.issue(leaf) if isinstance(leaf, str) else leaf
        name = identity("service/control-plane").dns_name
        options = [("grpc.ssl_target_name_override", name), *UNBOUNDED]
        async with aio.secure_channel(self.address, leaf.channel_credentials(), options=options) as channel:
            yield channel

    @asynccontextmanager
    async def raw_agent(
        self, leaf: Leaf | str = "agent/agent-1", metadata: Sequence[tuple[str, str]] = (), **hello: Any
    ) -> AsyncIterator[RawAgent]:
        """A stream of that identity; with arguments for `hello` it has been welcomed."""
        async with self.channel(leaf) as channel:
            agent = RawAgent(channel, metadata)
            if hello:
                await agent.hello(**hello)
            yield agent
            agent.hang_up()

    async def metrics(self) -> dict[str, float]:
        """The value of each series, by its name and labels as they are written."""
        _, text = await self.http("/metrics")
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {series: float(value) for series, _, value in lines}

    async def http(self, path: str) -> tuple[int, str]:
        """Status and body that the metrics listener answers with."""
        return await asyncio.to_thread(_get, f"http://127.0.0.1:{self.metrics_port}{path}")


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=WITHIN_S) as response:  # noqa: S310 - our own
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


class Child:
    """A process of its own; what it says is in a file, so that nobody has to keep reading."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def lines(self) -> list[str]:
        """What it has said so far, on stdout and stderr."""
        return self._output.read_text(errors="replace").splitlines()

    def records(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The log records so far that say *event* and hold *fields*."""
        logged = [json.loads(line) for line in self.lines if line.startswith("{") and line.endswith("}")]
        return [r for r in logged if r["event"] == event and fields.items() <= r.items()]

    async def said(self, event: str, **fields: object) -> dict[str, Any]:
        """The first such record, as soon as it is there."""

        def first() -> dict[str, Any] | None:
            has_ended = self.process.poll() is not None  # first: it may say so and end while it is read
            found = self.records(event, **fields)
            assert found or not has_ended, f"ended without saying {event!r}: {self.lines}"
            return found[0] if found else None

        return await until(first)

    async def ended(self, within_s: float = WITHIN_S) -> int:
        """Its exit code, once it has ended by itself."""
        await until(lambda: self.process.poll() is not None, within_s)
        return self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; its exit code."""
        self.process.send_signal(number)
        return await self.ended()


class Children:
    """Starts processes, and leaves none behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._all: list[Child] = []

    def start(self, *argv: str | Path, **environment: str) -> Child:
        """Run a program, our Python's unless it has a path; no setting of ours comes from outside."""
        ours = ("PARALLAX_", "GRPC_", "LOG_LEVEL")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        output = self._directory / f"output-{len(self._all)}"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                list(map(str, argv)),
                env=inherited | environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        child = Child(process, output)
        self._all.append(child)
        return child

    def start_control_plane(self, environment: Mapping[str, str], *prefix: str | Path) -> Child:
        """
        A control plane on free ports with a log in JSON; *environment* wins.

        It can be started again on its own: nobody is given that meanwhile.
        """
        defaults = {
            "PARALLAX_LISTEN": f"127.0.0.1:{free_port()}",
            "PARALLAX_HTTP_LISTEN": "none",
            "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
            "PARALLAX_LOG_FORMAT": "json",
        }
        command = (*prefix, sys.executable, "-m", "parallax.control_plane")
        return self.start(*command, **(defaults | dict(environment)))

    def start_agent(
        self, environment: Mapping[str, str], *prefix: str | Path, name: str = "agent-1"
    ) -> Child:
        """The agent of `worker.py`, with a log in JSON."""
        command = (*prefix, sys.executable, WORKER, name)
        return self.start(*command, **({"PARALLAX_LOG_FORMAT": "json"} | dict(environment)))

    async def fleet(self, pki: Pki, *prefix: str, **environment: str) -> tuple[Child, Fleet]:
        """A control plane that is ready, and how to reach it."""
        child = self.start_control_plane(pki.environment | environment, *prefix)
        ready = await child.said("control plane ready")
        return child, Fleet(pki, pki.tls(), ready["port"], ready["metrics_port"], ready["http_port"])

    async def agent(self, fleet: Fleet, name: str = "agent-1", **environment: str) -> Child:
        """An agent that is connected to *fleet*."""
        dials = {"PARALLAX_CONTROL_PLANE": fleet.address}
        child = self.start_agent(fleet.pki.environment | dials | environment, name=name)
        await child.said("connected")
        return child

    def close(self) -> None:
        """End whatever still runs."""
        for child in self._all:
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


class Until(Protocol):
    """`until`, for tests."""

    async def __call__(self, probe: Callable[[], T | None], within_s: float = WITHIN_S) -> T: ...


Serve = Callable[..., AbstractAsyncContextManager[Fleet]]
Listen = Callable[..., AbstractAsyncContextManager[Any]]
USUAL: Final = (
    "service/control-plane",
    "service/agent-proxy",
    "agent/agent-1",
    "agent/agent-2",
    "client/cli",
    "client/admin",
)


@pytest.fixture(autouse=True)
def _only_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("PARALLAX_"):
            monkeypatch.delenv(name)


@pytest.fixture(name="until")
def _until() -> Until:
    """Polls for an event, with a limit."""
    return until


@pytest.fixture(autouse=True)
def _no_bug_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does: nothing that the gate, asyncio or gRPC would call a bug of ours."""
    yield
    ours = ("parallax.runtime.gate", "parallax.control_plane", "asyncio", "grpc")
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    bugs = [r for r in records if r.levelno >= logging.ERROR and r.name.startswith(ours)]
    bugs = [r for r in bugs if not _is_about_an_earlier_loop(r)]
    assert not bugs, [record.getMessage() for record in bugs]


def _is_about_an_earlier_loop(record: logging.LogRecord) -> bool:
    """
    Whether gRPC has an event left for the loop of a test that is over.

    All loops of a process share gRPC's one queue: what a cancelled call still had to say there comes up in
    whichever test is next. A program of ours has one loop.
    """
    cause = record.exc_info[1] if record.exc_info else None
    is_closed = isinstance(cause, RuntimeError) and str(cause) == "Event loop is closed"
    return is_closed and "PollerCompletionQueue._handle_events" in record.getMessage()


@pytest.fixture(scope="session")
def new_pki() -> type[Pki]:
    """Makes another PKI, in a directory of its own."""
    return Pki


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The PKI that all tests share: a control plane, two agents, a client and the administrator."""
    made = Pki(tmp_path_factory.mktemp("pki") / "certs")
    made.save(*USUAL)
    return made


@pytest.fixture
def own_pki(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """A PKI of its own, for a test whose roots change."""
    pki = new_pki(tmp_path / "certs")
    pki.save(*USUAL)
    return pki


@pytest.fixture
def listen(pki: Pki) -> Listen:
    """An agent of its own port, without a control plane unless one is given: the agent, online."""

    @asynccontextmanager
    async def listening(
        cls: type[SecureAgent], name: str = "agent-1", *, tls: MTLSConfig | None = None, **options: Any
    ) -> AsyncIterator[SecureAgent]:
        options = {"control_plane": "none", "listen": "127.0.0.1:0"} | options
        agent = cls(name, cls.__name__, [cls.__name__.lower()], tls=tls or pki.tls(), **options)
        async with agent:
            yield agent

    return listening


@pytest.fixture
def serve(pki: Pki) -> Serve:
    """A control plane on free ports, in this process; arguments are settings, or `tls=`."""

    @asynccontextmanager
    async def serving(tls: MTLSConfig | None = None, **overrides: Any) -> AsyncIterator[Fleet]:
        tls = tls or pki.tls()
        async with local_fleet(pki.throwaway, tls=tls, **overrides) as running:
            http_port = running.control_plane.http_port
            fleet = Fleet(pki, tls, running.port, running.metrics_port, http_port)
            fleet.plane = running.control_plane
            yield fleet

    return serving


@pytest.fixture
async def fleet(serve: Serve) -> AsyncIterator[Fleet]:
    """A control plane that requires client certificates."""
    async with serve() as running:
        yield running


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Processes that end with the test."""
    directory = tmp_path / "children"
    directory.mkdir()
    made = Children(directory)
    try:
        yield made
    finally:
        made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_plane(
    pki: Pki, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Child, Fleet]]:
    """A control plane in a process of its own that requires client certificates, one for a module."""
    made = Children(tmp_path_factory.mktemp("shared"))
    try:
        yield await made.fleet(pki)
    finally:
        made.close()
