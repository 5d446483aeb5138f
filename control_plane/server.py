"""The control plane: one object that builds every part, owns every task, and stops in order."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Final

from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from parallax.control_plane.agent_link import Fleet
from parallax.control_plane.agent_proxy import AgentProxies
from parallax.control_plane.approvals import Approvals
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.audit_pruning import AuditPruner
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.audit_service import AuditService
from parallax.control_plane.certificate_service import CertificateService
from parallax.control_plane.crl import FOLDER, CRLPublisher, Issuers
from parallax.control_plane.crl_entries import CRLEntries
from parallax.control_plane.dispatch import Dispatcher
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.enrollment import Enrollment
from parallax.control_plane.enrollment_service import EnrollmentService
from parallax.control_plane.exchange import Exchange
from parallax.control_plane.grants import Grants, Regrant
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issuance_file import IssuanceFile
from parallax.control_plane.issuance_service import IssuanceService
from parallax.control_plane.issuer import IssuerFiles
from parallax.control_plane.labelling import Labelling
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.ledger_service import LedgerService
from parallax.control_plane.metrics import ControlPlaneMetrics, FleetCertificates, PublishedCRLs
from parallax.control_plane.pin_service import PinService
from parallax.control_plane.pins import Pinning
from parallax.control_plane.policy_feed import PolicyFeed
from parallax.control_plane.policy_service import PolicyService
from parallax.control_plane.readings import Readings
from parallax.control_plane.refusals import Refusals
from parallax.control_plane.registry import AgentRecord, AgentRef, Registry
from parallax.control_plane.registry_service import RegistryService
from parallax.control_plane.revocation_feed import RevocationFeedService
from parallax.control_plane.revocation_service import RevocationService
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.revoked import Revoked, RevokedIdentity
from parallax.control_plane.root_service import RootService
from parallax.control_plane.roots import Desk, Own, Roots
from parallax.control_plane.services import DispatchService, SessionService
from parallax.control_plane.sessions import Sessions
from parallax.control_plane.survey import Survey, Surveyor
from parallax.control_plane.tokens import Tokens
from parallax.control_plane.views import Views
from parallax.control_plane.watch import Changes, Watched
from parallax.protos import (
    audit_pb2,
    audit_pb2_grpc,
    certificate_pb2,
    certificate_pb2_grpc,
    dispatch_pb2,
    dispatch_pb2_grpc,
    enrollment_pb2,
    enrollment_pb2_grpc,
    issuance_pb2,
    issuance_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    pin_pb2,
    pin_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    revocation_feed_pb2,
    revocation_feed_pb2_grpc,
    revocation_pb2,
    revocation_pb2_grpc,
    root_pb2,
    root_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from parallax.runtime.authorization import Authorization
from parallax.runtime.deadlines import GRAIN_S
from parallax.runtime.dialling import Dialling
from parallax.runtime.gate import Refusal, current_source, utc_now
from parallax.runtime.handshakes import Side
from parallax.runtime.health import HealthService
from parallax.runtime.http import HttpPort
from parallax.runtime.metrics import certificate_detail, watch_transport
from parallax.runtime.passphrase import given_passphrase
from parallax.runtime.policy_file import PolicyFile, PolicyMetrics
from parallax.runtime.probe import PortProbe
from parallax.runtime.renewal import Renewer
from parallax.runtime.server import GatedServer, new_server, serving
from parallax.runtime.settings import NOWHERE, VARIABLES
from parallax.runtime.telemetry import MetricsListener, Readiness
from parallax.security.errors import ConfigError
from parallax.security.errors import Revoked as RevokedError
from parallax.security.https import server_context
from parallax.security.identity import agent_proxy, control_plane
from parallax.security.provider import Mode, MTLSCredentialsProvider

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.runtime.handshake_log import HandshakeFailure
    from parallax.runtime.policy import Policy
    from parallax.runtime.settings import Settings
    from parallax.security.authority import CertificateAuthority, Issued
    from parallax.security.bundle import TrustBundle
    from parallax.security.config import MTLSConfig
    from parallax.security.errors import ParallaxError
    from parallax.security.identity import Identity
    from parallax.security.rotation import CertificateRotator

logger = logging.getLogger(__name__)

DEFAULT_LISTEN: Final = "127.0.0.1:50051"
DEFAULT_METRICS_LISTEN: Final = "127.0.0.1:9464"
GRACE_S: Final = 1.0  # for the last answers, after all has been drained
SERVICES: Final = (
    certificate_pb2.DESCRIPTOR.services_by_name["CertificateService"].full_name,
    registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name,
    dispatch_pb2.DESCRIPTOR.services_by_name["DispatchService"].full_name,
    session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
    ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name,
    root_pb2.DESCRIPTOR.services_by_name["RootService"].full_name,
    audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name,
    policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name,
    revocation_feed_pb2.DESCRIPTOR.services_by_name["RevocationFeedService"].full_name,
    revocation_pb2.DESCRIPTOR.services_by_name["RevocationService"].full_name,
    pin_pb2.DESCRIPTOR.services_by_name["PinService"].full_name,
    issuance_pb2.DESCRIPTOR.services_by_name["IssuanceService"].full_name,
    enrollment_pb2.DESCRIPTOR.services_by_name["EnrollmentService"].full_name,
)


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
        self.provider = MTLSCredentialsProvider(tls, logger, identity=control_plane(tls.trust_domain))
        self.metrics = ControlPlaneMetrics()
        self._engine = SqliteEngine(settings.data_dir)
        self.audit = AuditLog(self._engine, utc_now, current_source)
        self._pruner = AuditPruner(
            self.audit, AuditReader(self._engine), settings.audit_kept, str(self.provider.identity), utc_now
        )
        self.refusals = Refusals(self.audit, utc_now)
        self.ledger = Ledger(self._engine, self.audit, utc_now, self.metrics.ledger_deferrals.inc)
        self.grants = Grants(self._engine)
        self.revocations = RevocationLog(self._engine, self.audit, utc_now, self.grants.end)
        self.registry = Registry(settings.lease)
        self.dispatcher = Dispatcher(queue_limit=settings.queue_limit, on_result=self.metrics.task_ended)
        roster = Watched(self.dispatcher)
        self.sessions = Sessions(self.registry, roster, lambda _: self.metrics.take_overs.inc())
        self.changes = Changes(Views(self.registry, self.sessions), secrets.randbits(64))
        self._fleet = fleet = Fleet(
            self.registry,
            self.sessions,
            self.dispatcher,
            utc_now,
            settings.max_payload_bytes,
            settings.drain,
        )
        proxy_provider = self._proxy_provider(tls)
        self._dialling = Dialling()
        self.proxies = AgentProxies(fleet, proxy_provider, self._dialling)
        self._providers = [self.provider]
        if proxy_provider is not None and proxy_provider is not self.provider:
            self._providers.append(proxy_provider)
        rotators = [provider.rotator(settings.certs_poll) for provider in self._providers]
        self.rotators = [rotator for rotator in rotators if rotator is not None]
        self._issuer = IssuerFiles(tls.certs_dir, lambda: given_passphrase(settings.ca_passphrase_file))
        issuers = (
            Issuers(authority, tuple) if authority else Issuers(self._issuer.current, self._issuer.beside)
        )
        self._issuance_file = IssuanceFile(settings.issuance_file)
        self._issuance = self._new_issuance(issuers.in_force)
        self.renewers = [
            self._renewer(provider, rotator)
            for provider, rotator in zip(self._providers, rotators, strict=True)
            if provider.store is not None
        ]
        self._probe = PortProbe(self.provider, self.metrics.handshakes.timer(Side.OWN_PORT))
        roster.note = self.changes.note
        self.registry.on_change = self._note
        self._feed = RevocationFeedService(self.revocations.current)
        self.proxies.is_revoked = self._is_revoked
        self.dispatcher.why_absent = self.proxies.why_absent
        self.dispatcher.on_answered = self.sessions.settle
        self.surveyor = Surveyor(self.ledger, utc_now)
        self.pinning = self._new_pinning() if self.provider.mode is Mode.MUTUAL else None
        self.enrollment = self._new_enrollment(self.pinning) if self.pinning is not None else None
        self.roots = self._new_roots(tls) if self.provider.mode is Mode.MUTUAL else None
        self.crls = self._new_crls(issuers) if self.provider.mode is Mode.MUTUAL else None
        self._certificates = CertificateService(
            self._issuance,
            self.provider.store,
            self._acknowledge,
            self._successor,
            self._renewed,
            self.revocations.current.check,
            self.refusals.note,
        )
        self.policy = PolicyFile(settings.policy_file, self._adopt_policy, settings.certs_poll)
        self.authorization = Authorization(
            self.policy.policy, tls.trust_domain, labels_of=self.grants.labels_of
        )
        self.grants.on_change = self._regranted
        self._policy_feed = PolicyFeed(self.authorization, self.grants)
        self._dispatch = DispatchService(
            self.dispatcher, self.authorization, self._refused, settings.max_payload_bytes, settings.drain
        )
        self._health = HealthService(SERVICES)
        self._watch()
        self._follow_revocations()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ControlPlane]:
        """
        Serve for as long as the block; leaving it drains, then stops.

        Raises:
            ConfigError: An address cannot be bound, plaintext would leave loopback, or the data
                directory cannot be used.
            StorageFailed: What is in it cannot be read.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            listener = MetricsListener(
                settings.metrics_listen or DEFAULT_METRICS_LISTEN,
                self.metrics.registry,
                self.readiness,
                self.crls.page if self.crls is not None else lambda _: None,
            )
            self.metrics_port = (await stack.enter_async_context(listener)).port
            await stack.enter_async_context(self._engine)
            await self.revocations.load()
            if self.roots is not None:
                await self.roots.load()
            if self.crls is not None:
                await self.crls.load()
            if self.pinning is not None:
                await self.pinning.load()
            await self.grants.load()
            if self.enrollment is not None and self.pinning is not None and settings.http_listen != NOWHERE:
                edge = self._edge(self.enrollment, self.pinning)
                self.http_port = (await stack.enter_async_context(edge)).port
            address = settings.listen or DEFAULT_LISTEN
            self._gated = gated = self._server()
            self.revocations.follow(lambda _: gated.end_revoked())
            listening = serving(gated, self.provider, address, GRACE_S, self._probe)
            self.port = await stack.enter_async_context(listening)
            await stack.enter_async_context(
                _supervised(
                    self._expire_leases,
                    self._expire_tasks,
                    self.proxies.run,
                    self.ledger.run,
                    self.refusals.run,
                    self._pruner.run,
                    self.revocations.run,
                    self.surveyor.run,
                    self.policy.run,
                    self._issuance_file.run,
                    *((self.enrollment.run,) if self.enrollment is not None else ()),
                    *((self.roots.run,) if self.roots is not None else ()),
                    *((self.crls.run,) if self.crls is not None else ()),
                    *((self.pinning.run,) if self.pinning is not None else ()),
                    *(rotator.run for rotator in self.rotators),
                    *(renewer.run for renewer in self.renewers),
                )
            )
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
                "crl": self.crls.detail if self.crls is not None else "none",
                "policy": self.policy.detail,
                "issuance policy": self._issuance_file.detail,
                **certificate_detail(self.rotators, self.renewers),
            },
        )

    def _server(self) -> GatedServer:
        settings, metrics = self._settings, self.metrics
        trust_domain = self.provider.identity.trust_domain
        server = new_server(
            self.provider,
            self.authorization.authorize,
            self._refused,
            settings.max_payload_bytes,
            on_verified=self.ledger.note,
            on_call=metrics.handshakes.called,
            check_revoked=self.revocations.current.check,
        )
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryService(
                self.registry, self.sessions, self.changes, self.audit, utc_now, self.refusals.note_report
            ),
            server,
        )
        dispatch_pb2_grpc.add_DispatchServiceServicer_to_server(self._dispatch, server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionService(self._fleet), server)
        certificate_pb2_grpc.add_CertificateServiceServicer_to_server(self._certificates, server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(
            LedgerService(self.ledger, self.revocations.current, trust_domain, utc_now), server
        )
        own = [provider.store for provider in self._providers if provider.store is not None]
        revocation_pb2_grpc.add_RevocationServiceServicer_to_server(
            RevocationService(self.revocations, self.ledger, own, trust_domain, utc_now), server
        )
        audit_pb2_grpc.add_AuditServiceServicer_to_server(
            AuditService(AuditReader(self._engine), Readings(self.audit, utc_now), trust_domain), server
        )
        revocation_feed_pb2_grpc.add_RevocationFeedServiceServicer_to_server(self._feed, server)
        root_pb2_grpc.add_RootServiceServicer_to_server(RootService(self.roots), server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(
            PolicyService(
                self.authorization,
                self.policy,
                self.grants,
                Labelling(self.grants, self.audit, self.revocations.current),
                self._policy_feed,
                trust_domain,
            ),
            server,
        )
        pin_pb2_grpc.add_PinServiceServicer_to_server(
            PinService(self.pinning, self.provider.identity.trust_domain), server
        )
        issuance_pb2_grpc.add_IssuanceServiceServicer_to_server(IssuanceService(self._issuance_file), server)
        enrollment_pb2_grpc.add_EnrollmentServiceServicer_to_server(
            EnrollmentService(
                self.enrollment,
                self.provider.identity.trust_domain,
                lambda: self._issuance.bundle,
                lambda: self.http_port,
            ),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _renewer(self, provider: MTLSCredentialsProvider, rotator: CertificateRotator | None) -> Renewer:
        """What renews a certificate of the control plane's own: it asks itself."""
        store = provider.store
        assert store is not None, "there is no certificate in plaintext"  # noqa: S101

        async def ask(request: bytes) -> Issued:
            return await self._issuance.renew(provider.identity, store.current.leaf, request)

        return Renewer(store, ask, provider.keeper(rotator))

    def _new_issuance(self, authority: Callable[[], CertificateAuthority]) -> Issuance:
        def bundle() -> TrustBundle:
            assert self.provider.store is not None, "nobody is authenticated in plaintext"  # noqa: S101
            return self.provider.store.current.bundle

        return Issuance(
            authority,
            bundle,
            self.ledger.record,
            utc_now,
            check_identity=self.revocations.current.check_identity,
            policy=lambda: self._issuance_file.current,
            on_duplicate=lambda _: self.metrics.duplicates.inc(),
            crl_url=self._settings.crl_url,
        )

    def _new_enrollment(self, pinning: Pinning) -> Enrollment:
        return Enrollment(
            Tokens(self._engine, self.audit, utc_now),
            Approvals(self._engine, self.audit, self._settings.approval, utc_now),
            self._issuance,
            self.ledger,
            self.grants,
            pinning,
            self.audit,
            self.revocations.current,
            utc_now,
        )

    def _edge(self, enrollment: Enrollment, pinning: Pinning) -> HttpPort:
        """What those talk to that have no certificate yet."""
        from parallax.control_plane.edge.app import new_app  # 0.3 s, for who serves it only

        assert self.provider.store is not None, "nobody enrolls in plaintext"  # noqa: S101
        trust_domain = self.provider.identity.trust_domain
        exchange = Exchange(pinning, self._issuance, trust_domain)
        app = new_app(enrollment, exchange, trust_domain, self.metrics.enrolled, self._turned_away)
        context = server_context(self.provider.store)
        return HttpPort(app, self._settings.http_listen, VARIABLES["http_listen"], context=context)

    def _new_roots(self, tls: MTLSConfig) -> Roots:
        """What rotates the root that the fleet trusts."""
        rotators = {rotator.identity: rotator for rotator in self.rotators}
        own = [
            Own(provider.store, provider.keeper(rotators.get(provider.identity)))
            for provider in self._providers
            if provider.store is not None
        ]

        async def survey() -> Survey:
            """Of those who can follow: whoever is revoked never will."""
            return (await self.surveyor.current()).without(self.revocations.current.withdrawn())

        desk = Desk(
            tls.certs_dir,
            self._issuer,
            self._issuance,
            survey,
            lambda: len(self.ledger),
            self._live,
            utc_now,
        )
        return Roots(self._engine, self.audit, desk, own)

    def _new_crls(self, issuers: Issuers) -> CRLPublisher:
        """What publishes who is revoked."""
        settings = self._settings
        return CRLPublisher(
            self._engine,
            settings.data_dir / FOLDER,
            issuers,
            CRLEntries(self.revocations, self.ledger).of,
            utc_now,
            settings.crl_lifetime,
        )

    def _new_pinning(self) -> Pinning:
        """What keeps the certificates that are let in though nobody issued them."""
        store = self.provider.store
        assert store is not None, "there is no certificate in plaintext"  # noqa: S101
        check_revoked = self.revocations.current.check
        pinning = Pinning(
            self._engine, self.audit, self.ledger, store, self._settings.drain, utc_now, check_revoked
        )
        self.ledger.follow(pinning.note)
        return pinning

    async def _renewed(self, presented: Certificate, issued: Certificate) -> None:
        if self.pinning is not None:
            await self.pinning.renewed(presented, issued)

    def _live(self) -> frozenset[Identity]:
        """Who is connected, or registered."""
        agents = frozenset(record.identity for record in self.registry.records() if record.identity)
        return agents | self._dispatch.callers | self._certificates.watchers

    def _successor(self) -> bytes:
        return self.roots.successor if self.roots is not None else b""

    async def _acknowledge(self, identity: Identity, bundle_hash: bytes) -> None:
        if self.roots is not None:
            await self.roots.acknowledge(identity, bundle_hash)

    def _follow_revocations(self) -> None:
        self.revocations.follow(self._feed.note)
        self.revocations.follow(self._revoked)
        if self.crls is not None:
            note, revoked = self.crls.note, self.revocations.current
            self.revocations.follow(lambda _: note())
            self.ledger.follow(lambda entry: note() if entry.is_revoked(revoked) else None)

    def _watch(self) -> None:
        self.metrics.registry.register(FleetCertificates(lambda: self.surveyor.last))
        self.metrics.registry.register(PolicyMetrics(self.policy))
        if self.crls is not None:
            self.metrics.registry.register(PublishedCRLs(self.crls))
        watch_transport(
            self.metrics.registry, self._providers, self.rotators, self.renewers, self._dialling.moves
        )
        if len(self._providers) > 1:  # else nobody is dialled, or without TLS
            self._dialling.on_let_in = self.metrics.handshakes.timer(Side.PEER)
        self.metrics.watch(
            agents=lambda: len(self.registry),
            sessions=lambda: len(self.sessions),
            proxies=lambda: len(self.proxies),
            in_flight=lambda: len(self.dispatcher),
            ledger_waiting=lambda: len(self.ledger),
            revocations=lambda: len(self.revocations.current),
            adoption=lambda: self.roots.adoption if self.roots is not None else 1.0,
            issuance_policy_stale=lambda: bool(self._issuance_file.problem),
        )

    def reauthorize(self) -> None:
        """Decide anew whatever is open or waits, as after labels were granted or taken back."""
        self.authorization.forget()
        self.dispatcher.reconsider()
        if self._gated is not None:
            self._gated.review()

    def _regranted(self, change: Regrant) -> None:
        self._policy_feed.note(change)
        if not change.labels.isdisjoint(self.authorization.policy.labels):  # else nothing is decided by them
            self.reauthorize()

    def _adopt_policy(self, policy: Policy) -> None:
        self.authorization.replace(policy)
        self.reauthorize()
        self._policy_feed.wake()

    def _refused(self, refusal: Refusal) -> None:
        self.metrics.refused(refusal.reason)
        self.refusals.note(refusal)

    def _turned_away(self, source: str, wanted: str, cause: ParallaxError) -> None:
        """Take note of somebody who is not enrolled."""
        self.refusals.note(Refusal("/v1/enrollments", None, source, cause))
        if wanted:  # before that no rate limits what one source can have written
            logger.warning(
                "enrollment refused",
                extra={"identity": wanted, "source": source, "reason": type(cause).__name__},
            )

    def handshake_failed(self, reason: HandshakeFailure, times: int) -> None:
        """Count handshakes with our port that failed."""
        self.metrics.handshake_failed(reason, times)
        self.refusals.note_handshakes(reason, times)

    def _is_revoked(self, record: AgentRecord) -> bool:
        """Whether what proved the registration in *record* is revoked."""
        proof = record.registration.proof if record.registration is not None else None
        try:
            if proof is not None:
                self.revocations.current.check(proof)
        except RevokedError:
            return True
        return False

    def _revoked(self, entry: Revoked) -> None:
        """
        Forget what was granted to whom *entry* revokes, and the registrations that it has proved.

        Nobody sees the certificate of whom he dials.
        """
        if isinstance(entry, RevokedIdentity):
            self.grants.ended(entry.identity)
        if entry.identity is None:
            records = self.registry.records()
        else:
            found = self.registry.find(AgentRef(entry.identity.name))
            records = [found] if found is not None and found.identity == entry.identity else []
        for record in records:
            if self._is_revoked(record):
                self.registry.unregister(record.ref)

    def _note(self, ref: AgentRef) -> None:
        self.changes.note(ref)
        self.proxies.note(ref)

    def _proxy_provider(self, tls: MTLSConfig) -> MTLSCredentialsProvider | None:
        """What agents are dialled with; None if there is nothing to prove that we may."""
        if self.provider.store is None:
            return self.provider  # plaintext, which proves nothing
        # Never less than our own port speaks, whatever is allowed where that has no material.
        strict = tls.model_copy(update={"allow_insecure": False})
        try:
            return MTLSCredentialsProvider(strict, logger, identity=agent_proxy(tls.trust_domain))
        except ConfigError as exc:
            logger.warning(
                "agents that listen and keep no session are not dialled: there is no certificate for it",
                extra={"identity": str(agent_proxy(tls.trust_domain)), "cause": str(exc)},
            )
            return None

    async def _expire_leases(self) -> None:
        pause = min(1.0, self.registry.lease / timedelta(seconds=10))
        while True:
            await asyncio.sleep(pause)
            self.sessions.expire(monotonic())

    async def _expire_tasks(self) -> None:
        while True:
            await asyncio.sleep(GRAIN_S)
            self.dispatcher.expire(monotonic())

    async def _drain(self) -> None:
        logger.info("draining", extra={"in_flight": len(self.dispatcher)})
        self._set_health(serving=False)
        self._dispatch.drain()
        await self.dispatcher.drain(self._settings.drain)
        self._dispatch.say_goodbye()
        self._certificates.close()
        self._policy_feed.close()
        self._feed.close()
        self.changes.close()  # first: that all agents leave now is no news about them
        self.sessions.end_all()
        await self.proxies.close()
        await self.refusals.enter()

    def _set_health(self, *, serving: bool) -> None:
        self._serving = serving
        self._health.set(serving=serving)


@asynccontextmanager
async def _supervised(*loops: Callable[[], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Run *loops* for as long as the block; if one fails, the block fails with it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop()) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
