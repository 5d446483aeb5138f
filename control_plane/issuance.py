"""What the control plane issues: another certificate of the same identity, for another key."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from parallax.control_plane.lineage import Lineages
from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle
from parallax.security.errors import ConfigError, Unavailable
from parallax.security.identity import Identity
from parallax.security.issuance_policy import IssuancePolicy
from parallax.security.keys import PublicKey, check_strength
from parallax.security.pinned import is_self_signed
from parallax.security.profiles import LeafProfile, lifetime_of, sans_of
from parallax.security.request import check_request

logger = logging.getLogger(__name__)

MAX_RENEWALS: Final = 60  # of one identity, in a minute: one that lasts a minute needs two
WINDOW: Final = timedelta(minutes=1)
MAX_IDENTITIES: Final = 10_000

# What is recorded: the leaf, whose it is, the issuer's certificate, and on whose request.
Enter = Callable[[x509.Certificate, Identity, x509.Certificate, str], Awaitable[object]]


class Issuance:
    """
    Renews certificates: who proves an identity gets another certificate of it.

    Such a one names and lasts what the one before it did, as far as the policy goes along; in place of a
    self-signed one, it names the identity alone. The holder made the new key, and nobody else ever has it.

    Args:
        authority: The CA, as it is now; may block, may raise ConfigError.
        bundle: What the fleet trusts.
        enter: Awaited before a certificate is handed out; what it raises, the caller is told.
        clock: Aware UTC.
        check_identity: Passes if an identity may be issued certificates; raises Revoked.
        policy: What certificates may be like, as it is now.
        on_duplicate: Told of an identity that two holders renew independently.
        crl_url: What certificates say of where CRLs are, see `LeafProfile`.
    """

    def __init__(
        self,
        authority: Callable[[], CertificateAuthority],
        bundle: Callable[[], TrustBundle],
        enter: Enter,
        clock: Callable[[], datetime],
        *,
        check_identity: Callable[[Identity], None] = lambda _: None,
        policy: Callable[[], IssuancePolicy] = IssuancePolicy,
        on_duplicate: Callable[[Identity], None] = lambda _: None,
        crl_url: str | None = None,
    ) -> None:
        self._authority = authority
        self._bundle = bundle
        self._clock = clock
        self._enter = enter
        self._check_identity = check_identity
        self._policy = policy
        self._on_duplicate = on_duplicate
        self._crl_url = crl_url
        self._lineages = Lineages()
        self._lately: OrderedDict[Identity, deque[datetime]] = OrderedDict()  # least recent first

    @property
    def bundle(self) -> TrustBundle:
        """What the fleet trusts."""
        return self._bundle()

    async def renew(self, identity: Identity, presented: x509.Certificate, request: bytes) -> Issued:
        """
        Another certificate of *identity*, which the sender has proved with *presented*.

        Args:
            request: PKCS#10, DER; see `check_request`.

        Raises:
            ConfigError: There is no CA here that could issue it.
            StorageFailed: It cannot be recorded.
            InvalidRequest, NotAuthorized: The request cannot be granted.
            Revoked: The identity is withdrawn.
            Unavailable: The same identity has renewed too often.
        """
        now = self._clock()
        self._check_identity(identity)
        self._limit(identity, now)
        issuer, issued = await asyncio.to_thread(self._issue, identity, presented, request, now)
        await self._enter(issued.chain[0], identity, issuer, str(identity))
        self._note(identity, presented, issued, now)
        return issued

    async def enroll(self, identity: Identity, key: PublicKey, enter: Enter) -> Issued:
        """
        The first certificate of *identity*, or another of the same, for the holder of *key*.

        It names nothing beside the identity. Whether the holder may have it, and has the private key, is
        for the caller to know.

        Args:
            enter: Awaited before it is handed out, in place of the one for renewals.

        Raises:
            ConfigError: There is no CA here that could issue it.
            NotAuthorized: The policy does not admit the key.
            Revoked: The identity is withdrawn.
            VerificationError: The CA cannot issue now.
            Unavailable: The same identity was issued too many.
        """
        now = self._clock()
        self._check_identity(identity)
        rule = self._policy().rule_for(identity)
        rule.check_key(key)
        self._limit(identity, now)
        issuer, issued = await asyncio.to_thread(self._sign, identity, key, rule.profile(), now)
        await enter(issued.chain[0], identity, issuer, str(identity))
        return issued

    def check_self_signed(self, identity: Identity, certificate: x509.Certificate) -> None:
        """
        Pass if the policy would admit *certificate*, which its holder has signed himself.

        Raises:
            NotAuthorized: It does not, for its key or its lifetime.
            VerificationError: The key is too weak.
        """
        rule = self._policy().rule_for(identity)
        rule.check_key(check_strength(certificate.public_key()))
        rule.check_lifetime(lifetime_of(certificate))

    def _issue(
        self, identity: Identity, presented: x509.Certificate, request: bytes, now: datetime
    ) -> tuple[x509.Certificate, Issued]:
        # What a device has written into its own certificate, nobody has granted: a pin is for the identity.
        sans = () if is_self_signed(presented) else sans_of(presented, identity)
        policy = self._policy()
        profile = policy.rule_for(identity).profile(sans, lifetime_of(presented))
        key = check_request(request, identity, profile.sans, presented.public_key(), policy)
        return self._sign(identity, key, profile, now)

    def _sign(
        self, identity: Identity, key: PublicKey, profile: LeafProfile, now: datetime
    ) -> tuple[x509.Certificate, Issued]:
        authority, bundle = self._authority(), self._bundle()
        if not set(authority.bundle.roots) <= set(bundle.roots):
            raise ConfigError("the CA on this host is none of those that this control plane trusts")
        profile = replace(profile, crl_url=self._crl_url)
        issued = authority.issue(identity, key, profile, now)
        return authority.certificate, Issued(issued.chain, bundle)

    def _limit(self, identity: Identity, now: datetime) -> None:
        lately = self._lately.pop(identity, None) or deque(maxlen=MAX_RENEWALS)
        self._lately[identity] = lately
        if len(self._lately) > MAX_IDENTITIES:
            self._lately.popitem(last=False)
        ends_in = lately[0] + WINDOW - now if len(lately) == MAX_RENEWALS else timedelta(0)
        if timedelta(0) < ends_in <= WINDOW:  # longer: the clock was set back
            raise Unavailable(
                f"{identity} was issued {MAX_RENEWALS} certificates within a minute; renew less often",
                retry_after=ends_in,
            )
        lately.append(now)

    def _note(self, identity: Identity, presented: x509.Certificate, issued: Issued, now: datetime) -> None:
        leaf = issued.chain[0]
        logger.info(
            "certificate renewed",
            extra={
                "identity": str(identity),
                "serial": f"{leaf.serial_number:x}",
                "not_after": f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
                "replaces": f"{presented.serial_number:x}",
            },
        )
        made = presented.not_valid_after_utc - lifetime_of(presented)
        if self._lineages.renewed(identity, _fingerprint(presented), made, _fingerprint(leaf), now):
            self._on_duplicate(identity)
            logger.warning(
                "two copies of one certificate are in use, and each was renewed: "
                "find the other one, or issue one of them a name of its own",
                extra={"identity": str(identity), "serial": f"{presented.serial_number:x}"},
            )


def _fingerprint(certificate: x509.Certificate) -> bytes:
    return certificate.fingerprint(hashes.SHA256())
