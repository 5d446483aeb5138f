"""What CRLs list: certificates that were revoked one by one, and those of revoked identities."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from cryptography.x509 import ReasonFlags

from parallax.control_plane.crl import Withdrawn
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.revoked import Revoked, RevokedCertificate, RevokedIdentity
from parallax.security.crl import RevokedSerial
from parallax.security.revocation import Reason

PIECE: Final = 100  # entries that are read at once, for the calls beside go on
_FLAGS: Final = {reason: ReasonFlags[reason.name.lower()] for reason in Reason}


class CRLEntries:
    """
    Finds what an issuer's list is made of.

    A list can only name serials, so of a revoked identity it names the certificates that the ledger knows:
    one that nobody has seen yet is refused by us, and not by whoever has the list alone.
    """

    def __init__(self, revocations: RevocationLog, ledger: Ledger) -> None:
        self._revocations = revocations
        self._ledger = ledger

    async def of(self, issuer: bytes, among: Sequence[Revoked] | None = None) -> Withdrawn:
        """
        What the issuer whose key has the id *issuer* has withdrawn.

        Args:
            among: What is looked at alone, each in force; None: all there is.

        Raises:
            StorageFailed: It cannot be read.
        """
        found: dict[int, RevokedSerial] = {}
        async for entry in self._all() if among is None else _each(among):
            if isinstance(entry, RevokedCertificate):
                by, serial = entry.certificate
                if by == issuer:
                    found[serial] = RevokedSerial(serial, entry.at, _FLAGS[entry.reason], entry.not_after)
            else:
                async for each in self._held(entry, issuer):
                    found[each.serial] = each
        return found

    async def _all(self) -> AsyncIterator[Revoked]:
        after, more = "", True
        while more:
            page, after = await self._revocations.page(after, PIECE)
            for entry in page:
                yield entry
            more = bool(after)

    async def _held(self, revoked: RevokedIdentity, issuer: bytes) -> AsyncIterator[RevokedSerial]:
        """
        The certificates of *issuer* that are revoked with their holder.

        By what is in force as each is read: else one that was issued after the holder was reinstated, just
        now, would be listed. One that is revoked by itself has an entry of its own.
        """
        current = self._revocations.current
        async for held in self._ledger.all_of(revoked.identity):
            if held.issuer == issuer.hex() and held.is_revoked(current) and held.certificate not in current:
                reason = _FLAGS[revoked.reason]
                yield RevokedSerial(int(held.serial, 16), revoked.at, reason, held.not_after)


async def _each(entries: Sequence[Revoked]) -> AsyncIterator[Revoked]:
    for entry in entries:
        yield entry
