"""Enrollment: whoever holds a token, or was approved, is issued, or has pinned, a first certificate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.control_plane import tokens as kept
from parallax.control_plane.approvals import Approvals, Pending
from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.engine import Write
from parallax.control_plane.grants import Grants
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.pinned import Pinned
from parallax.control_plane.pins import Change, Pinning
from parallax.control_plane.tokens import Tokens
from parallax.runtime.policy import ADMIN
from parallax.security.authority import Issued
from parallax.security.bundle import TrustBundle
from parallax.security.errors import (
    Conflict,
    EnrollmentError,
    InvalidRequest,
    NotAuthorized,
    StorageFailed,
    Unavailable,
)
from parallax.security.identity import Identity, Kind
from parallax.security.keys import PublicKey, check_strength, key_id
from parallax.security.pinned import Pin
from parallax.security.request import check_request, fingerprint_of
from parallax.security.revocation import Revocations
from parallax.security.tokens import REFUSED, Token, new_name

logger = logging.getLogger(__name__)

SWEEP_S: Final = 600.0
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

    @property
    def fingerprint(self) -> str:
        """Of the key, lower-case hex; "" if there is no usable one."""
        return fingerprint_of(self.request)


@dataclass(frozen=True, slots=True)
class Warrant:
    """
    By what an application is granted.

    Args:
        name: For the audit log: `token 7f3a…`, `approval`.
        given_by: Who gave it, as a URI.
        spent: What is written so that it is not used by anybody else.
        is_known: A certificate was issued, or pinned, for this key by it.
        is_open: It is for whichever name is free, not for this one alone.
        used: What is said when it gives that key no other one.
    """

    name: str
    given_by: str
    labels: Mapping[str, str]
    spent: Write
    is_known: bool
    is_open: bool
    used: str = REFUSED


class Enrollment:
    """
    Grants what tokens and approvals grant.

    The certificate's entry in the ledger, or the pin, the token's redemption, the labels granted and the
    entry in the audit log are one transaction.

    Args:
        clock: Aware UTC.
        revocations: What is in force: who is withdrawn is not enrolled.
        administers: Whether a name is one that the policy lets administer.

    Attributes:
        tokens, approvals: Those that there are.
    """

    def __init__(
        self,
        tokens: Tokens,
        approvals: Approvals,
        issuance: Issuance,
        ledger: Ledger,
        grants: Grants,
        pinning: Pinning,
        audit: AuditLog,
        revocations: Revocations,
        clock: Callable[[], datetime],
        administers: Callable[[Identity], bool] = lambda _: False,
    ) -> None:
        self.tokens = tokens
        self.approvals = approvals
        self._issuance = issuance
        self._ledger = ledger
        self._grants = grants
        self._pinning = pinning
        self._audit = audit
        self._clock = clock
        self._revocations = revocations
        self._administers = administers

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
        token = Token.parse(text)
        return await self._grant(
            application, partial(self._by_token, token, application.identity, application.fingerprint)
        )

    async def allot(self, text: str | None, fingerprint: str, trust_domain: str, source: str) -> Identity:
        """
        A name for the holder of a key, who has none: the same again for the same key.

        Args:
            text: The token that grants it, and keeps it; None: it is to be approved, and kept while it waits.
            fingerprint: Of the key, lower-case hex.

        Raises:
            EnrollmentError: The token is unknown, spent or ended, or allots no names: always the same text.
            StorageFailed: It cannot be recorded.
            Unavailable: Others redeem the same token.
        """
        if text is None:
            return await self.approvals.named(fingerprint) or await self._free(trust_domain)
        token = Token.parse(text)
        for _ in range(ATTEMPTS):
            admission, revision = await self.tokens.admission(token, self._clock())
            known = admission.name_of(fingerprint)
            if known is not None:
                return Identity(trust_domain, Kind.AGENT, known)
            identity = await self._free(trust_domain)
            allotted = admission.allot(identity.name, fingerprint)
            taken = self._grants.reserve(identity)  # two tokens must not allot the same
            deed = Deed("name/allotted", f"token {token.id}", str(identity), source, {"key": fingerprint})
            spent = kept.write(replace(admission, allotted=allotted), revision)
            with suppress(Conflict):
                await self._audit.commit(deed, [spent, taken])
                self._grants.reserved(identity)
                return identity
        raise Unavailable("others redeem the same token at this moment; try again")

    async def request(self, application: Application) -> Issued | Pending:
        """
        A certificate if the administrator has approved just this key, else what waits to be approved.

        Raises:
            EnrollmentError: It was rejected, or has been used.
            InvalidRequest, NotAuthorized, VerificationError: Nobody could approve it.
            ConfigError, StorageFailed: As `redeem`.
            Unavailable: Too many wait already, or as `redeem`.
        """
        key = check_request(application.request, application.identity, (), None)
        pending = await self._ask(application.identity, key, application.source)
        if pending is not None:
            return pending
        warrant_for = partial(self._by_approval, application.identity, application.fingerprint)
        return await self._grant(application, warrant_for)

    async def register(
        self, text: str | None, identity: Identity, certificate: x509.Certificate, source: str
    ) -> Pinned | Pending:
        """
        Pin the *certificate* that *identity* has signed itself; again for the same one, it changes nothing.

        Args:
            text: The token that grants the identity; None: it is to be approved, as in `request`.

        Raises:
            EnrollmentError: The token does not admit, or it was rejected, or has been used.
            InvalidRequest, NotAuthorized, VerificationError: It cannot be pinned.
            StorageFailed: It cannot be recorded.
            Unavailable: As `request`; or as many are pinned as may be.
        """
        self._pinning.check(Pin(identity, certificate))  # first: with a key that is not his nobody even waits
        token = None if text is None else Token.parse(text)
        key = check_strength(certificate.public_key())
        fingerprint = key_id(key).hex()
        if token is None:
            pending = await self._ask(identity, key, source)
            if pending is not None:
                return pending
            warrant_for = partial(self._by_approval, identity, fingerprint)
        else:
            warrant_for = partial(self._by_token, token, identity, fingerprint)
        for _ in range(ATTEMPTS):
            with suppress(Conflict):
                return await self._pin(await warrant_for(), identity, certificate, source)
        raise Unavailable("others redeem the same token at this moment; try again")

    def is_on_port(self, pinned: Pinned) -> bool:
        """Whether what was registered is let in as it is; else it is to be exchanged."""
        return self._pinning.is_on_port(pinned)

    async def run(self) -> None:
        """Drop the tokens and approvals that ended long ago, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)  # first: by then a clock that was wrong at boot is right
            try:
                dropped = await self.tokens.sweep() + await self.approvals.sweep()
            except StorageFailed:  # the engine has said what is wrong
                continue
            if dropped:
                logger.info("ended tokens and approvals dropped", extra={"count": dropped})

    async def _by_token(self, token: Token, identity: Identity, fingerprint: str) -> Warrant:
        admission, revision = await self.tokens.admission(token, self._clock())
        redeemed = admission.redeem(identity, fingerprint)
        return Warrant(
            f"token {token.id}",
            admission.created_by,
            admission.grant.labels,
            kept.write(replace(admission, redeemed=redeemed), revision),
            is_known=admission.redeemed.get(identity.name) == fingerprint,
            is_open=admission.grant.is_pattern,
        )

    async def _by_approval(self, identity: Identity, fingerprint: str) -> Warrant:
        found = await self.approvals.find(identity, fingerprint)
        if found is None:
            raise EnrollmentError("the approval has ended; ask for another one")
        approval, spent = found
        return Warrant(
            "approval",
            approval.by,
            approval.labels,
            spent,
            is_known=approval.is_given,
            is_open=False,
            used="the certificate for that key was used or revoked already; ask again with a new key",
        )

    async def _ask(self, identity: Identity, key: PublicKey, source: str) -> Pending | None:
        """Have the holder of *key* wait to be approved as *identity*; None, if that has been done."""
        if identity.kind is Kind.SERVICE:
            raise NotAuthorized("a service is not enrolled: issue it with 'parallax certs issue'")
        self._revocations.check_identity(identity)
        fingerprint = key_id(key).hex()
        if await self.approvals.find(identity, fingerprint) is not None:
            return None
        await self._check_key(key, identity)
        return self.approvals.ask(identity, fingerprint, source)

    async def _pin(
        self, warrant: Warrant, identity: Identity, certificate: x509.Certificate, source: str
    ) -> Pinned:
        """Pin *certificate*; what was granted is written with it, or not at all."""
        granting = await self._grants.plan(identity, warrant.labels)
        await self._check_name(warrant, identity)
        pinned = self._pinning.find(Pin(identity, certificate))
        if pinned is not None:
            return pinned
        if warrant.is_known:  # and what it gave is none, or was taken out
            raise EnrollmentError(warrant.used)
        await self._check_key(check_strength(certificate.public_key()), identity, warrant)
        self._issuance.check_self_signed(identity, certificate)
        der, change = certificate.public_bytes(Encoding.DER), Change(warrant.name, source, warrant.given_by)
        pinned = await self._pinning.pin(identity, der, change, [warrant.spent, granting])
        self._grants.granted(identity, warrant.labels)
        return pinned

    async def _grant(self, application: Application, warrant_for: Callable[[], Awaitable[Warrant]]) -> Issued:
        """What is issued by the warrant that there is; looked for again where others were faster."""
        identity = application.identity
        for attempt in range(ATTEMPTS):
            warrant = await warrant_for()
            # Before anything is looked at: so that whoever becomes this identity meanwhile is noticed.
            granting = await self._grants.plan(identity, warrant.labels)
            await self._check_name(warrant, identity)
            key = check_request(application.request, identity, (), None)
            await self._check_key(key, identity, warrant)
            enter = partial(self._enter, application, warrant, granting)
            try:
                return await self._issuance.enroll(identity, key, enter)
            except Conflict:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")

    async def _free(self, trust_domain: str) -> Identity:
        """An identity that is nobody's, and was nobody's as far as is known."""
        waiting = {each.identity for each in self.approvals.pending()}
        while True:
            identity = Identity(trust_domain, Kind.AGENT, new_name())
            is_known = (
                identity in waiting
                or self._pinning.has(identity)
                or self._revocations.cut_off(identity) is not None
                or await self._grants.knows(identity)
            )
            if not is_known and not await self._ledger.held(identity):
                return identity

    async def _check_name(self, warrant: Warrant, identity: Identity) -> None:
        """Pass unless *identity* is somebody's already, and the warrant is not for it alone."""
        self._revocations.check_identity(identity)
        if not warrant.is_open or warrant.is_known:
            return
        if identity.short == ADMIN or self._administers(identity):
            raise NotAuthorized(f"{identity} needs a token for this name alone")
        if self._grants.is_reserved(identity):
            raise NotAuthorized(f"{identity} is allotted already: choose another name")
        if self._pinning.has(identity) or await self._ledger.held(identity):
            raise NotAuthorized(
                f"{identity} has a certificate already: choose another name, or ask for a token for this name"
            )

    async def _check_key(self, key: PublicKey, identity: Identity, warrant: Warrant | None = None) -> None:
        """
        Pass if the key is new, or for an answer that was lost.

        That it was lost is believed while the ledger has the certificate, still good and not seen in use.
        """
        holder, uses = await self._ledger.user_of(key), await self._ledger.uses(key_id(key).hex())
        if holder not in {None, identity}:
            raise InvalidRequest("the key is that of another identity's certificate; make a new one")
        if warrant is not None and warrant.is_known:
            if not uses or any(use.seen_at is not None or use.is_revoked(self._revocations) for use in uses):
                raise EnrollmentError(warrant.used)
        elif uses:
            raise InvalidRequest("there is a certificate for that key already; make a new one")

    async def _enter(
        self,
        application: Application,
        warrant: Warrant,
        granting: Write,
        leaf: x509.Certificate,
        identity: Identity,
        issuer: x509.Certificate,
        by: str,
    ) -> None:
        serial = f"{leaf.serial_number:x}"
        deed = Deed(
            "certificate/enrolled",
            warrant.name,
            str(identity),
            application.source,
            {"serial": serial, "key": application.fingerprint, "given_by": warrant.given_by},
        )

        async def commit(writes: Sequence[Write]) -> None:
            await self._audit.commit(deed, [*writes, warrant.spent, granting])

        await self._ledger.record_with(leaf, identity, issuer, by, commit)
        self._grants.granted(identity, warrant.labels)
        fields = {"identity": str(identity), "serial": serial, "by": warrant.name}
        logger.info("identity enrolled", extra=fields)
