"""The gRPC service of enrollment's administration: the translation between proto and domain."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from grpc import aio

from parallax.control_plane.approvals import Pending
from parallax.control_plane.certificate_service import UNAUTHENTICATED
from parallax.control_plane.engines.engine import check_key
from parallax.control_plane.enrollment import Enrollment
from parallax.protos import enrollment_pb2, enrollment_pb2_grpc
from parallax.runtime.caller import current_caller, name_of
from parallax.security.bundle import TrustBundle
from parallax.security.errors import ConfigError, InvalidRequest
from parallax.security.identity import Kind, clip
from parallax.security.root_pin import RootPin
from parallax.security.tokens import Admission, Grant

PAGE: Final = 100  # of up to 10 KiB each; a message may have 1 MiB
MAX_NAMES: Final = 20

Context = aio.ServicerContext[Any, Any]


class EnrollmentService(enrollment_pb2_grpc.EnrollmentServiceServicer):
    """
    Enrollment's administration over gRPC.

    Args:
        enrollment: None where nobody is authenticated.
        bundle: What the fleet trusts.
        http_port: Where to enroll; 0: nowhere.
    """

    def __init__(
        self,
        enrollment: Enrollment | None,
        trust_domain: str,
        bundle: Callable[[], TrustBundle],
        http_port: Callable[[], int],
    ) -> None:
        self._enrollment = enrollment
        self._trust_domain = trust_domain
        self._bundle = bundle
        self._http_port = http_port

    async def CreateToken(
        self, request: enrollment_pb2.CreateTokenRequest, context: Context
    ) -> enrollment_pb2.CreateTokenResponse:
        tokens = self._known().tokens
        grant = _grant(request.grant, self._trust_domain)
        token, admission = await tokens.create(grant, _ttl(request.ttl), name_of(current_caller()))
        return enrollment_pb2.CreateTokenResponse(
            token=_to_proto(admission),
            secret=token.text,
            pins=[str(RootPin.of(root)) for root in self._bundle().roots],
            http_port=self._http_port(),
        )

    async def ListTokens(
        self, request: enrollment_pb2.ListTokensRequest, context: Context
    ) -> enrollment_pb2.ListTokensResponse:
        size = min(request.page_size or PAGE, PAGE)
        found, more = await self._known().tokens.page(_position(request.page_token), size)
        return enrollment_pb2.ListTokensResponse(
            tokens=map(_to_proto, found), next_page_token=base64.urlsafe_b64encode(more.encode()).decode()
        )

    async def RevokeToken(
        self, request: enrollment_pb2.RevokeTokenRequest, context: Context
    ) -> enrollment_pb2.RevokeTokenResponse:
        if not (request.id.isascii() and request.id.isalnum()):
            raise InvalidRequest(
                f"not the id of a token: {clip(request.id)} ('parallax token list' has them)"
            )
        revoked = await self._known().tokens.revoke(request.id, name_of(current_caller()))
        return enrollment_pb2.RevokeTokenResponse(revoked=revoked)

    async def ListEnrollmentRequests(
        self, request: enrollment_pb2.ListEnrollmentRequestsRequest, context: Context
    ) -> enrollment_pb2.ListEnrollmentRequestsResponse:
        waiting = self._known().approvals.pending()
        return enrollment_pb2.ListEnrollmentRequestsResponse(requests=map(_pending_to_proto, waiting))

    async def ApproveEnrollment(
        self, request: enrollment_pb2.ApproveEnrollmentRequest, context: Context
    ) -> enrollment_pb2.ApproveEnrollmentResponse:
        by = name_of(current_caller())
        approved = await self._known().approvals.approve(request.which, dict(request.labels), by)
        return enrollment_pb2.ApproveEnrollmentResponse(approved=_pending_to_proto(approved))

    async def RejectEnrollment(
        self, request: enrollment_pb2.RejectEnrollmentRequest, context: Context
    ) -> enrollment_pb2.RejectEnrollmentResponse:
        rejected = await self._known().approvals.reject(request.which, name_of(current_caller()))
        return enrollment_pb2.RejectEnrollmentResponse(rejected=_pending_to_proto(rejected))

    def _known(self) -> Enrollment:
        if self._enrollment is None:
            raise ConfigError(UNAUTHENTICATED)
        return self._enrollment


def _grant(stated: enrollment_pb2.TokenGrant, trust_domain: str) -> Grant:
    try:
        kind = Kind(stated.kind)
    except ValueError:
        raise InvalidRequest(f"not a kind that is enrolled: {clip(stated.kind)} (agent or client)") from None
    return Grant(trust_domain, kind, stated.names, dict(stated.labels), stated.uses or 1)


def _ttl(stated: Duration) -> timedelta:
    try:
        return stated.ToTimedelta()
    except (ValueError, OverflowError):
        raise InvalidRequest("a duration that is out of bounds") from None


def _to_proto(admission: Admission) -> enrollment_pb2.EnrollmentToken:
    grant = admission.grant
    message = enrollment_pb2.EnrollmentToken(
        id=admission.id,
        grant=enrollment_pb2.TokenGrant(
            kind=grant.kind, names=grant.names, labels=dict(grant.labels), uses=grant.uses
        ),
        created_by=admission.created_by,
        redeemed=admission.names[:MAX_NAMES],
        redeemed_count=len(admission.names),
    )
    message.created_at.FromDatetime(admission.created_at)
    message.expires_at.FromDatetime(admission.expires_at)
    return message


def _pending_to_proto(pending: Pending) -> enrollment_pb2.EnrollmentRequest:
    message = enrollment_pb2.EnrollmentRequest(
        identity=pending.identity.short, fingerprint=pending.fingerprint, source=pending.source
    )
    message.asked_at.FromDatetime(pending.asked_at)
    message.expires_at.FromDatetime(pending.expires_at)
    return message


def _position(page_token: str) -> str:
    """Behind which record the page begins."""
    if not page_token:
        return ""
    try:
        return check_key(base64.b64decode(page_token, b"-_", validate=True).decode())
    except ValueError:
        raise InvalidRequest(
            "the page token is not one that a page has given; leave it out for the first page"
        ) from None
