"""How long to wait before a peer is dialled again: after a failure, or because credentials have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography import x509

from parallax.security.certificate import find_extension
from parallax.security.credentials import may_stay

if TYPE_CHECKING:
    from datetime import datetime

    from parallax.security.credentials import Credentials

FIRST_S: Final = 0.2
LONGEST_S: Final = 10.0  # also how long a peer that was away for minutes may be back before it is dialled
STEADY_S: Final = 5.0  # what held this long begins anew with the first
MOVE_WITHIN_S: Final = 0.5
ENDS_SOON_S: Final = 5.0


def backoff_s(attempt: int, spread: float) -> float:
    """Seconds before reconnect *attempt*, from 0: doubling, of which *spread* in [0, 1] decides one half."""
    longest: float = min(LONGEST_S, FIRST_S * 2 ** min(attempt, 16))
    return longest * (1 + spread) / 2


def move_after_s(
    used: Credentials | None, in_force: Credentials | None, now: datetime, spread: float
) -> float:
    """
    Seconds until what was made with *used* is made again with what is *in_force*: up to half of one.

    Connections change credentials together: all of those who have many, and of many where one tool writes
    the files of a host. Each handshake takes milliseconds of a processor, for which the calls of that moment
    would wait. Nothing is put off where *used* must not stay or ends soon; nor where another CA has issued
    what is in force, for the root above *used* may be taken out as soon as that is seen.

    Args:
        spread: In [0, 1]; by chance, another for each connection.
    """
    if used is None or in_force is None or not may_stay(used, in_force):
        return 0.0
    if _issuer(used) != _issuer(in_force):
        return 0.0
    left_s = (used.leaf.not_valid_after_utc - now).total_seconds()
    return spread * MOVE_WITHIN_S if left_s > ENDS_SOON_S else 0.0


def _issuer(credentials: Credentials) -> tuple[x509.Name, bytes | None]:
    """The name and the key of the CA that issued them."""
    key = find_extension(credentials.leaf, x509.AuthorityKeyIdentifier)
    return credentials.leaf.issuer, key.key_identifier if key is not None else None
