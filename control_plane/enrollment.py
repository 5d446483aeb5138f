"""Enrollment: whoever holds a token gets the first certificate of the identity that it grants."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Final

from cryptography import x509

from parallax.control_plane import tokens as kept
from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.engine import Write
from parallax.control_plane.grants import Grants
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.tokens import Tokens
from parallax.runtime.policy import ADMIN
from parallax.security.authority import Issued
from parallax.security.bundle import TrustBundle
from parallax.security.errors import (
    Conflict,
    EnrollmentError,
    InvalidRequest,
    NotAuthorized,
    ParallaxError,
    VerificationError,
)
from parallax.security.identity import Identity
from parallax.security.keys import key_id
from parallax.security.request import check_request, fingerprint_of
from parallax.security.tokens import REFUSED, Admission, Token

logger = logging.getLogger(__name__)

ATTEMPTS: Final = 4  # where others redeem the same token at the same moment


@dataclass(frozen=True, slots=True)
class Application:
    """
    A wish for a certificate, from somebody of whom nothing is known yet.

    Args:
        identity: Whose it is to be.
        request: PKCS#10, DER; it gives a key, and proves that the sender has the private half.
        source: The address that it came from.
    """

    identity: Identity
    request: bytes = field(repr=False)
    source: str


class Enrollment:
    """
    Grants what tokens grant.

    The certificate's entry in the ledger, the token's redemption, the labels granted and the entry in
    the audit log are one transaction.

    Args:
        clock: Aware UTC.
        admit: Raises ParallaxError for an identity that must not be enrolled: a revoked one.
        on_refusal: Told of each application that was refused, and why.

    Attributes:
        tokens: Those that there are.
    """

    def __init__(
        self,
        tokens: Tokens,
        issuance: Issuance,
        ledger: Ledger,
        grants: Grants,
        audit: AuditLog,
        clock: Callable[[], datetime],
        *,
        admit: Callable[[Identity], None] = lambda _: None,
        on_refusal: Callable[[Deed, ParallaxError], None] = lambda _deed, _cause: None,
    ) -> None:
        self.tokens = tokens
        self._issuance = issuance
        self._ledger = ledger
        self._grants = grants
        self._audit = audit
        self._clock = clock
        self._admit = admit
        self._on_refusal = on_refusal

    @property
    def bundle(self) -> TrustBundle:
        """What the fleet trusts."""
        return self._issuance.bundle

    async def redeem(self, text: str, application: Application) -> Issued:
        """
        A certificate for the token spelled *text*.

        Until its holder has used it, the same token gives another one for the same name and key: the
        answer may have been lost.

        Raises:
            EnrollmentError: The token is unknown, spent, ended or for somebody else: always the same text.
            InvalidRequest, NotAuthorized, VerificationError: The token is good, the request is not.
            ConfigError: There is no CA here that could issue it.
            StorageFailed: It cannot be recorded.
            Unavailable: The same identity was issued too many, or others redeem the same token.
        """
        try:
            return await self._redeem(Token.parse(text), application)
        except (EnrollmentError, InvalidRequest, NotAuthorized, VerificationError) as exc:
            self._note_refusal(application, exc)
            raise

    async def _redeem(self, token: Token, application: Application) -> Issued:
        for attempt in range(ATTEMPTS):
            admission, revision = await self.tokens.admission(token, self._clock())
            fingerprint = fingerprint_of(application.request)
            is_known = admission.redeemed.get(application.identity.name) == fingerprint
            redeemed = admission.redeem(application.identity, fingerprint)
            await self._check_name(admission, application.identity, is_known=is_known)
            key = check_request(application.request, application.identity, (), None)
            await self._check_key(key_id(key).hex(), application.identity, is_known=is_known)
            enter = partial(self._enter, replace(admission, redeemed=redeemed), revision, application.source)
            try:
                return await self._issuance.enroll(application.identity, key, enter)
            except Conflict:  # somebody redeems it, or becomes that identity, at the same moment
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")

    async def _check_name(self, admission: Admission, identity: Identity, *, is_known: bool) -> None:
        """Pass unless *identity* is somebody's already, and the token is not for it alone."""
        self._admit(identity)
        if not admission.grant.is_pattern or is_known:
            return
        if identity.short == ADMIN:
            raise NotAuthorized(f"{identity} needs a token for this name alone")
        if await self._ledger.held(identity):
            raise NotAuthorized(
                f"{identity} has a certificate already: choose another name, or ask for a token for this name"
            )

    async def _check_key(self, fingerprint: str, identity: Identity, *, is_known: bool) -> None:
        """Pass if the key is new, or the token was redeemed for it and nobody has used it yet."""
        uses = await self._ledger.uses(fingerprint)
        if any(use.identity != identity for use in uses):
            raise InvalidRequest("the key is that of another identity's certificate; make a new one")
        if is_known:
            if any(use.seen_at is not None for use in uses):
                raise EnrollmentError(REFUSED)
        elif uses:
            raise InvalidRequest("there is a certificate for that key already; make a new one")

    async def _enter(
        self,
        spent: Admission,
        revision: int,
        source: str,
        leaf: x509.Certificate,
        identity: Identity,
        issuer: x509.Certificate,
        by: str,
    ) -> None:
        labels = spent.grant.labels
        granting = await self._grants.plan(identity, labels)
        serial = f"{leaf.serial_number:x}"
        deed = Deed(
            "certificate/enrolled",
            f"token {spent.id}",
            str(identity),
            source,
            {"serial": serial, "key": spent.redeemed[identity.name], "token_of": spent.created_by},
        )

        async def commit(writes: Sequence[Write]) -> None:
            await self._audit.commit(deed, [*writes, kept.write(spent, revision), granting])

        await self._ledger.record_with(leaf, identity, issuer, by, commit)
        self._grants.granted(identity, labels)
        logger.info(
            "identity enrolled", extra={"identity": str(identity), "serial": serial, "token": spent.id}
        )

    def _note_refusal(self, application: Application, cause: ParallaxError) -> None:
        deed = Deed(
            "enrollment/refused",
            "somebody without a certificate",
            str(application.identity),
            application.source,
            {"reason": type(cause).__name__, "cause": str(cause)},
        )
        self._on_refusal(deed, cause)
