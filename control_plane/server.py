"""The control plane: one object that builds every part, owns every task, and stops in order."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

from parallax.control_plane.access import Access
from parallax.control_plane.agents import Agents
from parallax.control_plane.exchange import Exchange
from parallax.control_plane.issuing import Issuing
from parallax.control_plane.metrics import ControlPlaneMetrics, FleetCertificates, PublishedCRLs
from parallax.control_plane.mutual_trust import MutualTrust
from parallax.control_plane.own_identities import OwnIdentities
from parallax.control_plane.records import Records
from parallax.control_plane.served import Served
from parallax.control_plane.supervision import Loop, supervised
from parallax.runtime.handshakes import Side
from parallax.runtime.http import HttpPort
from parallax.runtime.metrics import certificate_detail, watch_transport
from parallax.runtime.policy_file import PolicyMetrics
from parallax.runtime.probe import PortProbe
from parallax.runtime.refusal import Refusal
from parallax.runtime.server import GatedServer, new_server, serving
from parallax.runtime.settings import NOWHERE, VARIABLES
from parallax.runtime.telemetry import MetricsListener, Readiness
from parallax.security.https import server_context
from parallax.security.provider import Mode

if TYPE_CHECKING:
    from parallax.runtime.handshake_log import HandshakeFailure
    from parallax.runtime.settings import Settings
    from parallax.security.authority import CertificateAuthority
    from parallax.security.config import MTLSConfig
    from parallax.security.errors import ParallaxError
    from parallax.security.identity import Identity

logger = logging.getLogger(__name__)

DEFAULT_LISTEN: Final = "127.0.0.1:50051"
DEFAULT_METRICS_LISTEN: Final = "127.0.0.1:9464"
GRACE_S: Final = 1.0  # for the last answers, after all has been drained


class ControlPlane:
    """
    A running control plane; built by `serving`.

    Args:
        authority: The CA that renews certificates, as it is now; by default that of the files beside ours.

    Attributes:
        rotators: Keep its own certificate, and the one it dials agents with, like their files.
        renewers: Have these renewed, by itself.
        port: Where agents and clients dial.
        http_port: Where those enroll that have no certificate; 0: nowhere.
        metrics_port: Where Prometheus scrapes.
    """

    port = 0
    metrics_port = 0
    http_port = 0
    _gated: GatedServer | None = None
    _serving = False

    def __init__(
        self,
        settings: Settings,
        tls: MTLSConfig,
        *,
        authority: Callable[[], CertificateAuthority] | None = None,
    ) -> None:
        self._settings = settings
        self.metrics = metrics = ControlPlaneMetrics()
        self._own = own = OwnIdentities.load(tls, settings.certs_poll)
        by = str(own.provider.identity)
        self._records = records = Records.new(settings, by, metrics.ledger_deferrals.inc)
        self._agents = agents = Agents.new(settings, own, records.revocations, metrics)
        self._issuing = issuing = Issuing.new(settings, tls.certs_dir, own, records, metrics, authority)
        self._access = access = Access(settings, own.trust_domain, records.grants, self._reconsider)
        self._trust = trust = None
        if own.provider.mode is Mode.MUTUAL:
            administers = access.names_administrator
            self._trust = trust = MutualTrust.new(settings, own, records, issuing, self._live, administers)
        self._served = served = Served.new(
            own, records, agents, issuing, trust, access, self._refused, lambda: self.http_port
        )
        self._probe = PortProbe(own.provider, metrics.handshakes.timer(Side.OWN_PORT))
        self.renewers = own.renewers(issuing.issuance)
        # The parts of these by their own names, for who uses one of them alone.
        self.provider, self.rotators = own.provider, own.rotators
        self._engine, self.audit, self.refusals = records.engine, records.audit, records.refusals
        self.ledger, self.grants, self.revocations = records.ledger, records.grants, records.revocations
        self.registry, self.sessions = agents.fleet.registry, agents.fleet.sessions
        self.dispatcher, self.changes, self.proxies = agents.fleet.dispatcher, agents.changes, agents.proxies
        self.enrollment = trust.enrollment if trust is not None else None
        self.pinning = trust.pinning if trust is not None else None
        self.roots = trust.roots if trust is not None else None
        self.policy, self.authorization, self._adopt_policy = access.file, access.authorization, access.adopt
        self._issuance_file, self._certificates = issuing.policy, served.certificates
        self._watch()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ControlPlane]:
        """
        Serve for as long as the block; leaving it drains, then stops.

        Raises:
            ConfigError: An address cannot be bound, plaintext would leave loopback, or the data
                directory cannot be used.
            StorageFailed: What is in it cannot be read.
        """
        async with AsyncExitStack() as stack:
            self.metrics_port = (await stack.enter_async_context(self._metrics_listener())).port
            await stack.enter_async_context(self._engine)
            await self._records.load()
            if self._trust is not None:
                await self._trust.load()
                if self._settings.http_listen != NOWHERE:
                    self.http_port = (await stack.enter_async_context(self._edge(self._trust))).port
            self.port = await stack.enter_async_context(self._listening())
            await stack.enter_async_context(supervised(*self._loops))
            stack.push_async_callback(self._drain)
            self._set_health(serving=True)
            logger.info(
                "control plane ready",
                extra={
                    "port": self.port,
                    "http_port": self.http_port,
                    "metrics_port": self.metrics_port,
                    "mode": self.provider.mode.value,
                },
            )
            yield self

    def readiness(self) -> Readiness:
        """What `/readyz` answers."""
        return Readiness(
            ready=self._serving and self._probe.is_good,
            detail={
                "state": "serving" if self._serving else "draining",
                "transport": self.provider.mode.value,
                "agents": str(len(self.registry)),
                "own port": self._probe.detail,
                "storage": self._engine.fault or "ok",
                "crl": self._trust.crls.detail if self._trust is not None else "none",
                "policy": self.policy.detail,
                "issuance policy": self._issuance_file.detail,
                **certificate_detail(self.rotators, self.renewers),
            },
        )

    def handshake_failed(self, reason: HandshakeFailure, times: int) -> None:
        """Count handshakes with our port that failed."""
        self.metrics.handshake_failed(reason, times)
        self.refusals.note_handshakes(reason, times)

    @property
    def _loops(self) -> tuple[Loop, ...]:
        return (
            *self._agents.loops,
            *self._records.loops,
            self.policy.run,
            self._issuance_file.run,
            *(self._trust.loops if self._trust is not None else ()),
            *(rotator.run for rotator in self.rotators),
            *(renewer.run for renewer in self.renewers),
        )

    def _metrics_listener(self) -> MetricsListener:
        return MetricsListener(
            self._settings.metrics_listen or DEFAULT_METRICS_LISTEN,
            self.metrics.registry,
            self.readiness,
            self._trust.crls.page if self._trust is not None else lambda _: None,
        )

    def _edge(self, trust: MutualTrust) -> HttpPort:
        """What those talk to that have no certificate yet."""
        from parallax.control_plane.edge.app import new_app  # 0.3 s, for who serves it only

        assert self.provider.store is not None, "nobody enrolls in plaintext"  # noqa: S101
        trust_domain = self._own.trust_domain
        exchange = Exchange(trust.pinning, self._issuing.issuance, trust_domain)
        app = new_app(trust.enrollment, exchange, trust_domain, self.metrics.enrolled, self._turned_away)
        context = server_context(self.provider.store)
        return HttpPort(app, self._settings.http_listen, VARIABLES["http_listen"], context=context)

    def _listening(self) -> AbstractAsyncContextManager[int]:
        self._gated = gated = new_server(
            self.provider,
            self.authorization.authorize,
            self._refused,
            self._settings.max_payload_bytes,
            on_verified=self.ledger.note,
            on_call=self.metrics.handshakes.called,
            check_revoked=self.revocations.current.check,
        )
        self._served.add_to(gated)
        self.revocations.follow(lambda _: gated.end_revoked())
        return serving(gated, self.provider, self._settings.listen or DEFAULT_LISTEN, GRACE_S, self._probe)

    def _live(self) -> frozenset[Identity]:
        """Who is connected, or registered."""
        return self._agents.identities | self._served.callers

    def _watch(self) -> None:
        registry, trust = self.metrics.registry, self._trust
        registry.register(FleetCertificates(lambda: self._records.surveyor.last))
        registry.register(PolicyMetrics(self.policy))
        if trust is not None:
            registry.register(PublishedCRLs(trust.crls))
        moves = self._agents.dialling.moves
        watch_transport(registry, self._own.providers, self.rotators, self.renewers, moves)
        self.metrics.watch(
            agents=lambda: len(self.registry),
            sessions=lambda: len(self.sessions),
            proxies=lambda: len(self.proxies),
            in_flight=lambda: len(self.dispatcher),
            ledger_waiting=lambda: len(self.ledger),
            revocations=lambda: len(self.revocations.current),
            adoption=lambda: trust.roots.adoption if trust is not None else 1.0,
            issuance_policy_stale=lambda: bool(self._issuance_file.problem),
        )

    def _reconsider(self) -> None:
        """Look again at whatever is open or waits: it may be for others now."""
        self.dispatcher.reconsider()
        if self._gated is not None:
            self._gated.review()

    def _refused(self, refusal: Refusal) -> None:
        self.metrics.refused(refusal.reason)
        self.refusals.note(refusal)

    def _turned_away(self, source: str, path: str, wanted: str, cause: ParallaxError) -> None:
        """Take note of somebody who is not enrolled."""
        self.refusals.note(Refusal(path, None, source, cause))
        if wanted:  # before that no rate limits what one source can have written
            logger.warning(
                "enrollment refused",
                extra={"identity": wanted, "source": source, "reason": type(cause).__name__},
            )

    async def _drain(self) -> None:
        logger.info("draining", extra={"in_flight": len(self.dispatcher)})
        self._set_health(serving=False)
        self._served.dispatch.drain()
        await self.dispatcher.drain(self._settings.drain)
        self._served.say_goodbye()
        self._access.feed.close()
        await self._agents.dismiss()
        await self.refusals.enter()

    def _set_health(self, *, serving: bool) -> None:
        self._serving = serving
        self._served.health.set(serving=serving)
