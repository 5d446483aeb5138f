"""All that is served over gRPC: each service of protos/, and those that tell of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from parallax.control_plane.audit_service import AuditService
from parallax.control_plane.certificate_service import CertificateService
from parallax.control_plane.enrollment_service import EnrollmentService
from parallax.control_plane.issuance_service import IssuanceService
from parallax.control_plane.labelling import Labelling
from parallax.control_plane.ledger_service import LedgerService
from parallax.control_plane.pin_service import PinService
from parallax.control_plane.policy_service import PolicyService
from parallax.control_plane.readings import Readings
from parallax.control_plane.registry_service import RegistryService
from parallax.control_plane.revocation_feed import RevocationFeedService
from parallax.control_plane.revocation_service import RevocationService
from parallax.control_plane.root_service import RootService
from parallax.control_plane.services import DispatchService, SessionService
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
from parallax.runtime.clock import utc_now
from parallax.runtime.health import HealthService
from parallax.runtime.refusal import Refusal

if TYPE_CHECKING:
    from grpc import aio

    from parallax.control_plane.access import Access
    from parallax.control_plane.agents import Agents
    from parallax.control_plane.issuing import Issuing
    from parallax.control_plane.mutual_trust import MutualTrust
    from parallax.control_plane.own_identities import OwnIdentities
    from parallax.control_plane.records import Records
    from parallax.security.identity import Identity

SERVICES: Final = tuple(
    service.full_name
    for proto in (
        certificate_pb2,
        registry_pb2,
        dispatch_pb2,
        session_pb2,
        ledger_pb2,
        root_pb2,
        audit_pb2,
        policy_pb2,
        revocation_feed_pb2,
        revocation_pb2,
        pin_pb2,
        issuance_pb2,
        enrollment_pb2,
    )
    for service in proto.DESCRIPTOR.services_by_name.values()
)


@dataclass(frozen=True, slots=True)
class Served:
    """One of each service."""

    audit: AuditService
    certificates: CertificateService
    dispatch: DispatchService
    enrollment: EnrollmentService
    health: HealthService
    issuance: IssuanceService
    ledger: LedgerService
    pins: PinService
    policy: PolicyService
    registry: RegistryService
    revocation_feed: RevocationFeedService
    revocations: RevocationService
    roots: RootService
    sessions: SessionService

    @classmethod
    def new(
        cls,
        own: OwnIdentities,
        records: Records,
        agents: Agents,
        issuing: Issuing,
        trust: MutualTrust | None,
        access: Access,
        on_refusal: Callable[[Refusal], None],
        http_port: Callable[[], int],
    ) -> Self:
        """
        Those of these parts.

        Args:
            on_refusal: Told of tasks that their client may not ask for.
            http_port: Where those enroll that have no certificate; 0: nowhere.
        """
        audit, refusals, revoked = records.audit, records.refusals, records.revocations.current
        fleet, issuance, domain = agents.fleet, issuing.issuance, own.trust_domain
        labelling = Labelling(records.grants, audit, revoked)
        stores = [each.store for each in own.certified]
        pinning = trust.pinning if trust is not None else None
        roots = trust.roots if trust is not None else None
        enrollment = trust.enrollment if trust is not None else None
        served = cls(
            audit=AuditService(records.reader, Readings(audit, utc_now), domain),
            certificates=CertificateService(
                issuance, own.provider.store, roots, pinning, revoked.check, refusals.note
            ),
            dispatch=DispatchService(
                fleet.dispatcher, access.authorization, on_refusal, fleet.max_payload_bytes, fleet.drain
            ),
            enrollment=EnrollmentService(enrollment, domain, lambda: issuance.bundle, http_port),
            health=HealthService(SERVICES),
            issuance=IssuanceService(issuing.policy),
            ledger=LedgerService(records.ledger, revoked, domain, utc_now),
            pins=PinService(pinning, domain),
            policy=PolicyService(
                access.authorization, access.file, records.grants, labelling, access.feed, domain
            ),
            registry=RegistryService(
                fleet.registry, fleet.sessions, agents.changes, audit, utc_now, refusals.note_report
            ),
            revocation_feed=RevocationFeedService(revoked),
            revocations=RevocationService(
                records.revocations, records.ledger, pinning, stores, domain, utc_now
            ),
            roots=RootService(roots),
            sessions=SessionService(fleet),
        )
        records.revocations.follow(served.revocation_feed.note)
        return served

    @property
    def callers(self) -> frozenset[Identity]:
        """Who has something open that lasts."""
        return self.dispatch.callers | self.certificates.watchers

    def add_to(self, server: aio.Server) -> None:
        """Have *server* serve all of it, and say what that is."""
        audit_pb2_grpc.add_AuditServiceServicer_to_server(self.audit, server)
        certificate_pb2_grpc.add_CertificateServiceServicer_to_server(self.certificates, server)
        dispatch_pb2_grpc.add_DispatchServiceServicer_to_server(self.dispatch, server)
        enrollment_pb2_grpc.add_EnrollmentServiceServicer_to_server(self.enrollment, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        issuance_pb2_grpc.add_IssuanceServiceServicer_to_server(self.issuance, server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(self.ledger, server)
        pin_pb2_grpc.add_PinServiceServicer_to_server(self.pins, server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self.policy, server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(self.registry, server)
        revocation_feed_pb2_grpc.add_RevocationFeedServiceServicer_to_server(self.revocation_feed, server)
        revocation_pb2_grpc.add_RevocationServiceServicer_to_server(self.revocations, server)
        root_pb2_grpc.add_RootServiceServicer_to_server(self.roots, server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(self.sessions, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def say_goodbye(self) -> None:
        """End whatever lasts until somebody ends it: the control plane stops."""
        self.dispatch.say_goodbye()
        self.certificates.close()
        self.revocation_feed.close()
