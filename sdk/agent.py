"""The class users subclass."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from parallax.runtime.certificates import new_renewer
from parallax.runtime.channel import session_options
from parallax.runtime.connection import Connection
from parallax.runtime.description import AgentDescription
from parallax.runtime.executor import Executor, Handler
from parallax.runtime.following import Followers, Follows
from parallax.runtime.outcome import Failure, Outcome, OutcomeCode, Payload
from parallax.runtime.registration import Registration
from parallax.runtime.session import AgentSession
from parallax.runtime.threads import Threads
from parallax.runtime.trust import BundleFollower, new_follower
from parallax.runtime.worker import Bench
from parallax.sdk.cli.render import say_error
from parallax.sdk.exits import FAILED, exit_code
from parallax.sdk.handler import codec_of, handler_for, stream_handler_for
from parallax.sdk.online import Online
from parallax.security.errors import ConfigError, ParallaxError, Unavailable
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind, control_plane
from parallax.security.pinned import is_self_signed
from parallax.security.provider import Mode, MTLSCredentialsProvider

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from parallax.runtime.agent_server import AgentServer
    from parallax.runtime.certificates import Dial
    from parallax.runtime.fresh_revocations import FreshRevocations
    from parallax.runtime.policy_follower import PolicyFollower
    from parallax.runtime.probe import PortProbe
    from parallax.runtime.renewal import Renewer
    from parallax.runtime.settings import Settings
    from parallax.runtime.telemetry import MetricsListener
    from parallax.sdk.exchanging import Exchanger
    from parallax.security.config import MTLSConfig
    from parallax.security.rotation import CertificateRotator

DEFAULT_MAX_CONCURRENCY: Final = 16
LAST_RESORT: Final = timedelta(seconds=15)  # after the drain: for the last outcomes and for clean-up


class SecureAgent:
    """
    An agent with an identity of its own, which it proves to the control plane to be given tasks.

    Subclass it, override `analyze`, and call `run()`; or `async with agent:` to embed it
    in a program that has an event loop already.

    Args:
        agent_id: Its name, which its certificate must carry.
        name: For people.
        capabilities: What it can do; clients may ask for `capability:<name>`.
        metadata: For people.
        tls: Where its certificate is; by default what the `PARALLAX_*` environment says.
        logger: By default `parallax.agent`.
        control_plane: `host:port`; by default `PARALLAX_CONTROL_PLANE`, else localhost:50051. "none" does
            without: then only those who know where it listens can ask it.
        listen: `host:port`, where it serves itself; by default `PARALLAX_LISTEN`, else not at all.
        advertise: `host:port`, where others reach it, if that is not where it listens; by default
            `PARALLAX_ADVERTISE`.
        session: Whether it dials the control plane for tasks; without, the control plane dials it.
        max_concurrency: How many tasks it works on at once, 1 to 4,096.
        labels: Stated labels, which `parallax agents list` shows; they grant nothing.

    Raises:
        IdentityError, InvalidRequest: An argument breaks a documented bound.
        ConfigError: `analyze` is annotated with what is not defined, or is no type that JSON can carry.
    """

    def __init__(
        self,
        agent_id: str,
        name: str,
        capabilities: Sequence[str],
        metadata: Mapping[str, str] | None = None,
        tls: MTLSConfig | None = None,
        logger: logging.Logger | None = None,
        *,
        control_plane: str | None = None,
        listen: str | None = None,
        advertise: str | None = None,
        session: bool = True,
        max_concurrency: int = DEFAULT_MAX_CONCURRENCY,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, agent_id)  # refuses a bad name before anything else
        self.agent_id = agent_id
        self.description = AgentDescription(
            display_name=name,
            capabilities=tuple(capabilities),
            labels=MappingProxyType(dict(labels or {})),
            metadata=MappingProxyType(dict(metadata or {})),
            max_concurrency=max_concurrency,
        )
        self.logger = logger or logging.getLogger("parallax.agent")
        self._tls = tls
        self._control_plane = control_plane
        self._listen = listen
        self._advertise = advertise
        self._has_session = session
        self._settings: Settings | None = None
        self._embedded: AsyncExitStack | None = None
        self._server: AgentServer | None = None
        self._is_online = False
        self._renewer: Renewer | None = None
        # What is wrong with either is told now, not when the agent runs.
        codec_of(self.analyze)
        if self._is_overridden("analyze_stream"):
            stream_handler_for(self.analyze_stream)

    def analyze(self, task: str, data: Any) -> Awaitable[tuple[Any, float]] | tuple[Any, float]:
        """
        Answer one task; override it, as `async def` or as plain `def` (then it runs in a thread).

        Args:
            task: What to do, in the agent's own vocabulary.
            data: What the caller sent: JSON values, or bytes as they are. Annotate it with a model, a
                dataclass or another type, and it is one of these: what does not fit never comes here.

        Returns:
            A value that JSON can carry (or bytes, a model, a dataclass), and a confidence from 0 to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override analyze()")

    def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        """
        Answer one task part by part; override it as an async generator, instead of `analyze` or beside it.

        It is called for `client.stream`, and goes no faster than its parts are taken: `yield` waits. When
        nobody wants more, the generator is closed where it stands, so that its `finally` runs.

        Args:
            task, data: As for `analyze`, annotations included.

        Yields:
            Parts of the answer, each with a confidence from 0 to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override analyze_stream()")

    def run(self) -> None:
        """
        Work until SIGTERM or SIGINT, then finish what is held and return.

        Exits the process with one line on stderr if it cannot work: see `parallax.sdk.exits`
        for the codes, 78 when another host runs with the same identity.
        """
        from parallax.runtime.log_writer import process_log
        from parallax.runtime.loop import run as run_loop
        from parallax.runtime.settings import load_settings

        try:
            settings = load_settings()
            with process_log(settings.log_level, settings.log_format):
                try:
                    run_loop(self._work(settings))
                except BaseExceptionGroup as raised:
                    raise _sole(raised) from None
        except ParallaxError as exc:
            say_error(str(exc))
            raise SystemExit(exit_code(exc)) from None

    @property
    def endpoint(self) -> str | None:
        """Where others reach it while it is online, `host:port`; None if it does not listen."""
        return self._server.endpoint if self._server is not None and self._server.port else None

    async def rotate_certificates(self) -> None:
        """
        Have the certificate renewed now, whenever it ends; returns once the new one is in force.

        It is renewed by itself in time, see docs/certificates.md. Calls at one time share one attempt.

        Raises:
            Unavailable: The agent is not online, or the control plane did not answer.
            Expired: It has expired, and nobody takes it any more; the text names the way back.
            ConfigError: It is somebody else's to renew, the control plane has no CA, or the new one
                cannot be written.
            ParallaxError: The control plane refuses, or what it answers cannot be used.
        """
        if not self._is_online:
            raise Unavailable(f"{self.agent_id} is not online: its certificate is renewed while it is")
        if self._renewer is None:
            raise ConfigError("in plaintext there is no certificate: set PARALLAX_TLS_ENABLED=true")
        await self._renewer.renew()

    def check_health(self) -> bool:
        """Whether it can do its work, for `/readyz`; override it if being connected is not enough."""
        return True

    async def __aenter__(self) -> Self:
        """
        Go online; the block begins once the agent can be given tasks.

        It waits for the control plane as long as that takes: `asyncio.timeout` sets a limit. Metrics,
        logs and signals are left to the program that embeds it.
        """
        from parallax.runtime.settings import load_settings

        try:
            async with AsyncExitStack() as stack:
                settings = self._settings or load_settings()
                online = await stack.enter_async_context(self._online(settings, self._provider()))
                group = await stack.enter_async_context(asyncio.TaskGroup())
                group.create_task(online.run())
                stack.callback(online.stop)
                await online.ready.wait()
                self._embedded = stack.pop_all()
        except BaseExceptionGroup as raised:
            raise _sole(raised) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish what is held, and leave."""
        assert self._embedded is not None, "entered before"  # noqa: S101 - the statement sees to it
        try:
            await self._embedded.__aexit__(kind, exc, traceback)
        except BaseExceptionGroup as raised:
            raise _sole(raised) from None

    def _place(self, control_plane: str, tls: MTLSConfig, settings: Settings) -> None:
        """Before it is entered, for `parallax.sdk.testing`: with these alone it asks no environment."""
        self._control_plane, self._tls, self._settings = control_plane, tls, settings

    async def _work(self, settings: Settings) -> None:
        provider = self._provider()
        async with AsyncExitStack() as stack:
            online = await stack.enter_async_context(self._online(settings, provider))
            if settings.metrics_listen is not None:
                listener = self._listener(settings.metrics_listen, online, provider)
                await stack.enter_async_context(listener)
                self.logger.info("metrics ready", extra={"metrics_port": listener.port})
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop, online, settings.drain)
            await online.run()

    def _stop(self, online: Online, drain: timedelta) -> None:
        online.stop()
        # A handler that ignores its cancellation could keep the event loop from ending for ever.
        last_resort = threading.Timer((drain + LAST_RESORT).total_seconds(), os._exit, (FAILED,))
        last_resort.daemon = True
        last_resort.start()

    @asynccontextmanager
    async def _online(self, settings: Settings, provider: MTLSCredentialsProvider) -> AsyncIterator[Online]:
        workers, limit = self.description.max_concurrency, settings.max_payload_bytes
        with Threads(workers) as threads:
            in_parts = None
            if self._is_overridden("analyze_stream"):
                in_parts = stream_handler_for(self.analyze_stream, limit)
            if in_parts is not None and not self._is_overridden("analyze"):
                handler: Handler = _only_in_parts
            else:
                handler = handler_for(self.analyze, threads, max_payload_bytes=limit)
            async with Executor(
                handler, max_concurrency=workers, queue_limit=settings.queue_limit
            ) as executor:
                online = self._ways(Bench(executor, in_parts), settings, provider)
                self._renewer, self._is_online = online.renewer, True
                try:
                    yield online
                finally:
                    self._renewer, self._is_online = None, False

    def _ways(self, bench: Bench, settings: Settings, provider: MTLSCredentialsProvider) -> Online:
        """The ways in which the agent is to be reached."""
        from parallax.runtime.policy_follower import PolicyFollower
        from parallax.runtime.settings import NO_CONTROL_PLANE

        address = self._control_plane or settings.control_plane
        listens_on = self._listen or settings.listen
        is_alone = address == NO_CONTROL_PLANE
        if listens_on is None and (is_alone or not self._has_session):
            why = "PARALLAX_CONTROL_PLANE is none" if is_alone else "the agent has no session"
            raise ConfigError(f"{why}: set PARALLAX_LISTEN, where it is then dialled, such as 0.0.0.0:50052")
        instance_id = secrets.token_bytes(16)
        online = Online(bench.executor, settings.drain, rotator=provider.rotator(settings.certs_poll))
        policy, told = PolicyFollower(provider.identity, settings.revocation_max_age), None
        if listens_on is not None:
            if provider.mode is Mode.MUTUAL:  # else nobody is known who could be revoked
                told = self._new_revocations(settings, is_alone=is_alone)
            online.server = self._server = self._new_server(
                listens_on, bench, instance_id, online, settings, provider, policy, told
            )
        options = session_options(settings.max_payload_bytes)
        dial = partial(provider.channel, address, control_plane(provider.identity.trust_domain), options)
        online.renewer = new_renewer(provider, online.rotator, None if is_alone else dial)
        if is_alone:
            return online
        online.exchanger = _new_exchanger(provider, online.rotator, dial, address, settings.enroll_url)
        follower: Follows | None = new_follower(provider, online.rotator, online.renewer)
        server = online.server
        if isinstance(follower, BundleFollower) and server is not None:
            follower = Followers((follower, policy) if told is None else (follower, policy, told))
        if self._has_session:
            online.session = AgentSession(
                dial,
                self.agent_id,
                self.description,
                bench,
                settings.drain,
                instance_id,
                lambda: server is None or not server.is_proxied,
                provider.store,
                follower,
                online.dialling,
            )
        if server is not None:
            online.registration = Registration(
                partial(Connection, dial, provider.store, "the control plane", dialling=online.dialling),
                self.agent_id,
                self.description,
                lambda: server.endpoint,
                follower if online.session is None else None,
                server.informed,
                server.refusals,
            )
        return online

    def _new_revocations(self, settings: Settings, *, is_alone: bool) -> FreshRevocations | None:
        """What knows who is not to be let in; None if nobody would tell."""
        from parallax.runtime.fresh_revocations import FreshRevocations

        if is_alone:
            self.logger.warning(
                "whoever is revoked is let in here until the certificate ends: nobody tells who that is",
                extra={"agent": self.agent_id, "cause": "PARALLAX_CONTROL_PLANE is none"},
            )
            return None
        return FreshRevocations(settings.revocation_max_age)

    def _new_server(
        self,
        address: str,
        bench: Bench,
        instance_id: bytes,
        online: Online,
        settings: Settings,
        provider: MTLSCredentialsProvider,
        policy: PolicyFollower,
        revocations: FreshRevocations | None,
    ) -> AgentServer:
        # Slow to import, and needed here only.
        from parallax.runtime.agent_server import AgentServer
        from parallax.runtime.agent_service import Introduction

        def removed(cause: str) -> None:
            self.logger.warning("stopping", extra={"agent": self.agent_id, "cause": cause})
            online.stop()

        identity = provider.identity if provider.store is not None else None
        return AgentServer(
            provider,
            bench,
            Introduction(self.agent_id, self.description, instance_id, identity),
            address,
            self._advertise or settings.advertise,
            policy=policy,
            max_payload_bytes=settings.max_payload_bytes,
            on_removed=removed,
            is_healthy=self._is_healthy,
            drain=settings.drain,
            revocations=revocations,
        )

    def _is_overridden(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(SecureAgent, method)

    def _provider(self) -> MTLSCredentialsProvider:
        from parallax.security.config import get_mtls_config

        tls = self._tls or get_mtls_config()
        identity = Identity(tls.trust_domain, Kind.AGENT, self.agent_id)
        return MTLSCredentialsProvider(tls, self.logger, identity=identity)

    def _is_healthy(self) -> bool:
        try:
            return self.check_health()
        except Exception:
            self.logger.exception("check_health failed")
            return False

    def _listener(self, address: str, online: Online, provider: MTLSCredentialsProvider) -> MetricsListener:
        from prometheus_client import CollectorRegistry, Gauge

        from parallax.runtime.metrics import certificate_detail, watch_transport
        from parallax.runtime.telemetry import MetricsListener, Readiness

        registry = CollectorRegistry()
        rotators = [online.rotator] if online.rotator is not None else []
        renewers = [online.renewer] if online.renewer is not None else []
        watch_transport(registry, [provider], rotators, renewers, online.dialling.moves)
        probe = _watch_handshakes(registry, online, provider)
        executor, session = online.executor, online.session
        for name, text, read in (
            (
                "parallax_agent_connected",
                "1 while a session is open.",
                lambda: session is not None and session.connected.is_set(),
            ),
            ("parallax_agent_tasks_in_flight", "Tasks without an outcome yet.", lambda: executor.in_flight),
            (
                "parallax_agent_slots_overdue",
                "Slots still taken by handlers whose task has its outcome already.",
                lambda: executor.overdue,
            ),
        ):
            Gauge(name, text, registry=registry).set_function(read)

        def readiness() -> Readiness:
            parts = online.state | {"healthy": self._is_healthy()}
            detail = {name: str(fact).lower() for name, fact in parts.items()}
            detail |= certificate_detail(rotators, renewers)
            is_ready = all(parts.values()) and all(renewer.urgency.is_healthy for renewer in renewers)
            if probe is not None:
                detail["own port"] = probe.detail
                is_ready = is_ready and probe.is_good
            return Readiness(is_ready, detail)

        return MetricsListener(address, registry, readiness)


def _new_exchanger(
    provider: MTLSCredentialsProvider,
    rotator: CertificateRotator | None,
    dial: Dial,
    address: str,
    enroll_url: str | None,
) -> Exchanger | None:
    """What has a certificate of our own making exchanged, if that is what is in force and ours to replace."""
    store, keep = provider.store, provider.keeper(rotator)
    if store is None or keep is None or not is_self_signed(store.current.leaf):
        return None
    from parallax.runtime.address import parse_address
    from parallax.sdk.enrolling import Edge
    from parallax.sdk.exchanging import Exchanger

    return Exchanger(store, keep, dial, parse_address(address), Edge.find(enroll_url, address))


def _watch_handshakes(
    registry: CollectorRegistry, online: Online, provider: MTLSCredentialsProvider
) -> PortProbe | None:
    """Show those of the ways that are about to begin; what looks at the own port, if there is one."""
    from parallax.runtime.handshakes import HandshakeResult, Handshakes, Side
    from parallax.runtime.probe import PortProbe

    server = online.server
    # Why others fail is only on stderr, which belongs to what the handler starts and loads, too.
    handshakes = Handshakes(registry, [HandshakeResult.SUCCESS] if server is not None else [])
    is_alone = online.session is None and online.registration is None
    if provider.store is not None and not is_alone:
        online.dialling.on_let_in = handshakes.timer(Side.PEER)
    if server is None:
        return None
    server.on_call = handshakes.called
    server.probe = PortProbe(provider, handshakes.timer(Side.OWN_PORT))
    return server.probe


async def _only_in_parts(task: str, payload: Payload) -> Outcome:  # noqa: ARG001 - as every handler
    text = "this agent answers in parts only; ask with client.stream(), or with `parallax call --stream`"
    return Failure(OutcomeCode.INVALID_ARGUMENT, text)


def _sole(raised: BaseExceptionGroup) -> BaseException:
    """The one thing that went wrong, where it was only one, in however many groups."""
    found: BaseException = raised
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return found if isinstance(found, ParallaxError) else raised
