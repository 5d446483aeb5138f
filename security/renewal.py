"""When a certificate is renewed, how urgent that is, and what may take its place; pure."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes

from parallax.security.credentials import Credentials, check_usable
from parallax.security.errors import UntrustedChain, VerificationError
from parallax.security.files import MAX_BYTES
from parallax.security.pinned import is_self_signed
from parallax.security.profiles import LEAF_LIFETIME, lifetime_of

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.security.authority import Issued
    from parallax.security.identity import Identity
    from parallax.security.keys import PrivateKey

RENEW_AT: Final = 2 / 3  # of the lifetime; as SPIRE, cert-manager and step have it, give or take
JITTER: Final = 0.1  # of the lifetime, earlier: so a fleet that was issued at once is not renewed at once
LATE_AT: Final = 0.8
CRITICAL_AT: Final = 0.9

FIRST_RETRY: Final = timedelta(seconds=2)
SHORTEST_RETRY: Final = timedelta(seconds=1)
LONGEST_RETRY: Final = timedelta(hours=1)
_DOUBLINGS: Final = 11  # then it is over the longest
_SHARE_LEFT: Final = 0.1  # so ten attempts at least fit into what is left
_MOST_LEFT: Final = 0.5  # whatever is asked of us: so that some fit even then


class Urgency(StrEnum):
    """How far a renewal has slipped."""

    FINE = "fine"
    DUE = "due"
    LATE = "late"
    CRITICAL = "critical"
    EXPIRED = "expired"

    @property
    def level(self) -> int:
        """How loud the log is about it."""
        match self:
            case Urgency.FINE | Urgency.DUE:
                return logging.INFO
            case Urgency.LATE:
                return logging.WARNING
            case Urgency.CRITICAL | Urgency.EXPIRED:
                return logging.ERROR

    @property
    def is_healthy(self) -> bool:
        """Whether peers still accept the certificate."""
        return self is not Urgency.EXPIRED


@dataclass(frozen=True, slots=True)
class RenewalPlan:
    """The moments in the life of a certificate at which its renewal becomes more urgent, in this order."""

    due: datetime
    late: datetime
    critical: datetime
    not_after: datetime

    def urgency(self, now: datetime) -> Urgency:
        """How urgent the renewal is at *now*; the last moment of validity belongs to it."""
        if now > self.not_after:
            return Urgency.EXPIRED
        if now >= self.critical:
            return Urgency.CRITICAL
        if now >= self.late:
            return Urgency.LATE
        return Urgency.DUE if now >= self.due else Urgency.FINE


def plan_renewal(leaf: Certificate) -> RenewalPlan:
    """
    The plan for *leaf*: always the same one, however often it is asked for.

    One that was made for longer than we issue is left alone until another would outlast it.
    """
    not_after, lifetime = leaf.not_valid_after_utc, min(lifetime_of(leaf), LEAF_LIFETIME)
    begin = not_after - lifetime  # when it was issued: leaves are backdated
    return RenewalPlan(
        due=renewal_time(begin, not_after, spread_of(leaf)),
        late=begin + lifetime * LATE_AT,
        critical=begin + lifetime * CRITICAL_AT,
        not_after=not_after,
    )


def renewal_time(not_before: datetime, not_after: datetime, spread: float) -> datetime:
    """When to renew: two thirds into the lifetime, or up to a tenth of it earlier, by *spread* in [0, 1]."""
    return not_before + (not_after - not_before) * (RENEW_AT - JITTER * spread)


def spread_of(leaf: Certificate) -> float:
    """A number in [0, 1] that is drawn once for *leaf*: drawn anew at each look, the earliest would win."""
    return int.from_bytes(leaf.fingerprint(hashes.SHA256())[:8]) / (2**64 - 1)


def retry_in(
    attempt: int,
    now: datetime,
    not_after: datetime,
    spread: float,
    at_least: timedelta = timedelta(0),
) -> timedelta:
    """
    How long to wait after failed attempt number *attempt*, from 0: doubling, *spread* decides one half.

    Unasked never longer than a tenth of what is left until *not_after*, and never under a second.

    Args:
        at_least: What the control plane asks for; it is granted up to half of what is left.
    """
    longest = min(FIRST_RETRY * (1 << min(attempt, _DOUBLINGS)), LONGEST_RETRY)
    left = not_after - now
    ours = min(longest * (1 + spread) / 2, left * _SHARE_LEFT)
    return max(ours, min(at_least, left * _MOST_LEFT), SHORTEST_RETRY)


def accept(
    issued: Issued, key: PrivateKey, in_force: Credentials, identity: Identity, now: datetime
) -> Credentials:
    """
    The credentials that *issued* and the *key* it was asked for make, fit to replace those *in_force*.

    Raises:
        VerificationError, IdentityError: They are not usable, see `check_usable`; or would be a step
            back: they end earlier, unless it is a certificate of our own making that they replace, or trust
            none of the roots trusted now; or are more than can be read from files again.
    """
    new = Credentials(issued.chain, key, issued.bundle)
    if max(len(new.chain_pem), len(new.bundle_pem)) > MAX_BYTES:
        raise UntrustedChain(f"it comes with more than {MAX_BYTES} bytes of certificates")
    check_usable(new, identity, now)
    if not set(new.bundle.roots) & set(in_force.bundle.roots):
        raise UntrustedChain(
            "it comes with other roots alone, and while roots change the old ones stay beside"
        )
    before, after = in_force.leaf.not_valid_after_utc, new.leaf.not_valid_after_utc
    if after < before and not is_self_signed(in_force.leaf):  # which may be for longer than anybody issues
        raise VerificationError(f"it ends at {after:%Y-%m-%dT%H:%M:%SZ}, before the one in force does")
    return new
