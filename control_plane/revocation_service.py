"""The gRPC service of revocation: what is meant, whether it is meant, and the translation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final

from grpc import aio

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.paging import position, size_of, token_of
from parallax.control_plane.pins import Pinning
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.revoked import Revoked, RevokedCertificate, RevokedIdentity
from parallax.protos import revocation_pb2, revocation_pb2_grpc
from parallax.runtime.caller import current_caller
from parallax.security.credentials import CredentialStore
from parallax.security.errors import InvalidRequest, InvalidTransition, NotAuthorized
from parallax.security.identity import Identity, clip
from parallax.security.path import MAX_SERIAL
from parallax.security.revocation import Reason
from parallax.security.verification import CertificateId, Peer

HASH_DIGITS: Final = 64  # SHA-256, hex

Context = aio.ServicerContext[Any, Any]

_HEX: Final = re.compile(r"[0-9a-f]{1,64}", re.ASCII)
_REASONS: Final = {
    revocation_pb2.REVOCATION_REASON_UNSPECIFIED: Reason.UNSPECIFIED,
    revocation_pb2.REVOCATION_REASON_KEY_COMPROMISE: Reason.KEY_COMPROMISE,
    revocation_pb2.REVOCATION_REASON_CA_COMPROMISE: Reason.CA_COMPROMISE,
    revocation_pb2.REVOCATION_REASON_AFFILIATION_CHANGED: Reason.AFFILIATION_CHANGED,
    revocation_pb2.REVOCATION_REASON_SUPERSEDED: Reason.SUPERSEDED,
    revocation_pb2.REVOCATION_REASON_CESSATION_OF_OPERATION: Reason.CESSATION_OF_OPERATION,
    revocation_pb2.REVOCATION_REASON_CERTIFICATE_HOLD: Reason.CERTIFICATE_HOLD,
    revocation_pb2.REVOCATION_REASON_PRIVILEGE_WITHDRAWN: Reason.PRIVILEGE_WITHDRAWN,
    revocation_pb2.REVOCATION_REASON_AA_COMPROMISE: Reason.AA_COMPROMISE,
}
_TO_PROTO: Final = {reason: number for number, reason in _REASONS.items()}


class RevocationService(revocation_pb2_grpc.RevocationServiceServicer):
    """
    Revocation over gRPC.

    Args:
        pinning: None: nothing is pinned.
        own: The control plane's own credentials.
        clock: Aware UTC.
    """

    def __init__(
        self,
        log: RevocationLog,
        ledger: Ledger,
        pinning: Pinning | None,
        own: Iterable[CredentialStore],
        trust_domain: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._log = log
        self._ledger = ledger
        self._pinning = pinning
        self._own = tuple(own)
        self._trust_domain = trust_domain
        self._clock = clock

    async def Revoke(
        self, request: revocation_pb2.RevokeRequest, context: Context
    ) -> revocation_pb2.RevokeResponse:
        caller = _administrator()
        entry = await self._meant(request, caller)
        if not request.force:
            self._check_harmless(entry, caller)
        is_known = isinstance(entry, RevokedCertificate) or await self._is_known(entry.identity)
        revoked = await self._log.revoke(entry)
        return revocation_pb2.RevokeResponse(
            revocation=_to_proto(revoked or entry), already=revoked is None, unknown=not is_known
        )

    async def Reinstate(
        self, request: revocation_pb2.ReinstateRequest, context: Context
    ) -> revocation_pb2.ReinstateResponse:
        identity = Identity.parse_short(request.identity, self._trust_domain)
        await self._check_none_ahead(identity)
        entry = await self._log.reinstate(identity, str(_administrator().identity))
        return revocation_pb2.ReinstateResponse(revocation=_to_proto(entry))

    async def ListRevocations(
        self, request: revocation_pb2.ListRevocationsRequest, context: Context
    ) -> revocation_pb2.ListRevocationsResponse:
        found, more = await self._log.page(position(request.page_token), size_of(request.page_size))
        return revocation_pb2.ListRevocationsResponse(
            revocations=map(_to_proto, found), next_page_token=token_of(more)
        )

    async def _is_known(self, identity: Identity) -> bool:
        """Whether *identity* holds anything, issued or pinned."""
        is_pinned = self._pinning is not None and self._pinning.has(identity)
        return is_pinned or bool(await self._ledger.held(identity))

    async def _meant(self, request: revocation_pb2.RevokeRequest, caller: Peer) -> Revoked:
        """What *request* asks to revoke."""
        reason = _REASONS.get(request.reason)
        if reason is None:
            raise InvalidRequest(f"{request.reason} is no reason: update the control plane, or state another")
        by, now = str(caller.identity), self._clock()
        match request.WhichOneof("target"):
            case "identity":
                identity = Identity.parse_short(request.identity, self._trust_domain)
                return RevokedIdentity(identity, reason, by, now)
            case "certificate":
                serial, issuer = _serial(request.certificate.serial), request.certificate.issuer
                found = await self._find(serial, issuer)
                if found is None:
                    certificate = CertificateId(_hash(issuer, "issuer"), int(serial, 16))
                    return RevokedCertificate(certificate, None, None, reason, by, now)
            case "fingerprint":
                found = next(
                    iter(await self._ledger.find(_hash(request.fingerprint, "fingerprint").hex())), None
                )
                if found is None:
                    raise InvalidRequest(
                        "the ledger knows no certificate with that fingerprint: state serial and issuer"
                    )
                await self._find(found.serial, found.issuer)  # for it may be one of several
            case _:
                raise InvalidRequest("state what to revoke: a serial, a fingerprint, or <kind>/<name>")
        return RevokedCertificate(found.certificate, found.identity, found.not_after, reason, by, now)

    async def _find(self, serial: str, issuer: str) -> IssuedCertificate | None:
        """The certificate in the ledger; None if it is not there, but *issuer* says which is meant."""
        found = [each for each in await self._ledger.find(serial) if issuer in ("", each.issuer)]
        if len(issuers := sorted({each.issuer for each in found})) > 1:
            raise InvalidRequest(
                f"several issuers have signed {serial}: state one of them, {', '.join(issuers)}"
            )
        if len(found) > 1:  # what no CA may do (RFC 5280 §4.1.2.2), and scripts around openssl do
            holders = ", ".join(sorted({each.identity.short for each in found}))
            raise InvalidRequest(
                f"their issuer has given {serial} to several certificates, which would all be revoked: "
                f"revoke by name whom you mean, of {clip(holders, 200)}"
            )
        if not found and not issuer:
            raise InvalidRequest(
                f"the ledger knows no certificate {serial}: state its issuer, too, the SHA-256 of that key"
            )
        return found[0] if found else None

    async def _check_none_ahead(self, identity: Identity) -> None:
        """
        Pass unless *identity* holds what seems to be issued after this moment, and would be good again.

        Raises:
            InvalidTransition: The text says what to do about it.
        """
        now, revoked = self._clock(), self._log.current
        ahead = [
            each.serial
            for each in await self._ledger.held(identity)
            if each.issued_at > now and each.certificate not in revoked
        ]
        if ahead:
            raise InvalidTransition(
                f"{identity} holds {ahead[0]}, which is dated ahead of the clock and would be good again: "
                "revoke it by its serial first"
            )

    def _check_harmless(self, entry: Revoked, caller: Peer) -> None:
        """
        Pass unless the control plane itself, or *caller*, could not go on.

        Raises:
            InvalidRequest: The text says what would happen.
        """
        if isinstance(entry, RevokedCertificate):
            serials = {each.serial_number: own.identity for own in self._own for each in own.current.chain}
            holder = serials.get(entry.certificate.serial)
            is_callers = entry.certificate in {(caller.issuer_key, caller.serial), *caller.above}
        else:
            holder = next((own.identity for own in self._own if own.identity == entry.identity), None)
            is_callers = entry.identity == caller.identity
        if holder is not None:
            raise InvalidRequest(
                f"the control plane itself is {holder}: agents would refuse what it dials, and it could not "
                "renew; replace its certificate first, or state --force"
            )
        if is_callers:
            raise InvalidRequest(
                f"you are {caller.identity}: this command would be the last you are let in with, and nobody "
                "else can take it back; use another certificate, or state --force"
            )


def _administrator() -> Peer:
    caller = current_caller()
    if not isinstance(caller, Peer):
        raise NotAuthorized("nobody is authenticated here")  # the policy has refused them before
    return caller


def _serial(stated: str) -> str:
    # A longer one is of no certificate that is let in anywhere, and no CRL could name it.
    if not _HEX.fullmatch(stated) or not 0 < int(stated, 16) < 1 << 8 * MAX_SERIAL:
        most = f"of {MAX_SERIAL} octets at most"
        raise InvalidRequest(f"not a serial in lower-case hex, {most}: {clip(stated)}")
    return f"{int(stated, 16):x}"


def _hash(stated: str, what: str) -> bytes:
    if len(stated) != HASH_DIGITS or not _HEX.fullmatch(stated):
        raise InvalidRequest(f"no {what}, {HASH_DIGITS} digits of lower-case hex: {clip(stated)}")
    return bytes.fromhex(stated)


def _to_proto(entry: Revoked) -> revocation_pb2.Revocation:
    message = revocation_pb2.Revocation(
        identity=str(entry.identity or ""), reason=_TO_PROTO[entry.reason], revoked_by=entry.by
    )
    message.revoked_at.FromDatetime(entry.at)
    if isinstance(entry, RevokedCertificate):
        message.serial, message.issuer = f"{entry.certificate.serial:x}", entry.certificate.issuer.hex()
        if entry.not_after is not None:
            message.not_after.FromDatetime(entry.not_after)
    elif entry.reinstated_at is not None:
        message.reinstated_at.FromDatetime(entry.reinstated_at)
    return message
