"""What is withdrawn before its time: certificates, and identities with all that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from parallax.security.errors import Revoked

if TYPE_CHECKING:
    from parallax.security.identity import Identity
    from parallax.security.verification import CertificateId, Peer

WITHDRAWN: Final = datetime.max.replace(tzinfo=UTC)
"""The cut-off of an identity of which no certificate is good, whenever it was issued."""

_SHARDS: Final = 256  # a set of a million takes 100 ms to grow, one of so many parts 1 ms


class Reason(StrEnum):
    """Why something is revoked (RFC 5280 §5.3.1), as openssl and people spell it."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key-compromise"
    CA_COMPROMISE = "ca-compromise"
    AFFILIATION_CHANGED = "affiliation-changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation-of-operation"
    CERTIFICATE_HOLD = "certificate-hold"
    PRIVILEGE_WITHDRAWN = "privilege-withdrawn"
    AA_COMPROMISE = "aa-compromise"


class Revocations:
    """
    What is revoked now; each question costs the same however much that is.

    It grows in place, for nobody copies a million entries to add one: one thread changes it and reads it, and
    every change is whole before the next question. `version` tells whether it is still what it was.

    A certificate is known by its issuer's key and its serial alone, which its holder cannot write otherwise.
    An identity has a cut-off: what was issued to it before that is revoked, by whomever, whether or not
    anybody ever saw it.

    Attributes:
        version: Higher after every change.
    """

    def __init__(self) -> None:
        self.version = 0
        self._serials: dict[bytes, tuple[set[int], ...]] = {}  # by their low bits
        self._cut_offs: dict[Identity, datetime] = {}
        self._count = 0

    def __len__(self) -> int:
        """How many certificates, and identities with a cut-off."""
        return self._count + len(self._cut_offs)

    def __contains__(self, certificate: CertificateId) -> bool:
        """Whether *certificate* itself is revoked, its identity and its issuer aside."""
        return self._has(*certificate)

    def check(self, peer: Peer) -> None:
        """
        Pass if nothing that proves *peer* is revoked: no certificate up to the root, nor its identity.

        Raises:
            Revoked: The text says what would help.
        """
        who = peer.identity
        if self._has(peer.issuer_key, peer.serial):
            raise Revoked(f"the certificate {peer.serial:x} of {who} is revoked: have another one issued")
        for above in peer.above:
            if self._has(*above):
                raise Revoked(
                    f"the CA certificate {above.serial:x}, which vouches for {who}, is revoked: "
                    "have a certificate issued by another CA"
                )
        cut_off = self._cut_offs.get(who)
        if cut_off is not None and peer.issued_at < cut_off:
            self.check_identity(who)
            raise Revoked(
                f"the certificate {peer.serial:x} is from before {who} was reinstated, at "
                f"{cut_off:%Y-%m-%dT%H:%M:%SZ}, so that it stays revoked: have another one issued"
            )

    def check_identity(self, identity: Identity) -> None:
        """
        Pass if *identity* may hold certificates, and be issued them.

        Raises:
            Revoked: The text says what would help.
        """
        if self.is_withdrawn(identity):
            raise Revoked(
                f"{identity} is revoked: 'parallax certs reinstate {identity.short}' lets it be issued "
                "certificates again"
            )

    def is_withdrawn(self, identity: Identity) -> bool:
        """Whether nothing is good that *identity* holds."""
        return self._cut_offs.get(identity) == WITHDRAWN

    def cut_off(self, identity: Identity) -> datetime | None:
        """What was issued to *identity* before this is revoked; `WITHDRAWN`, everything; None, nothing."""
        return self._cut_offs.get(identity)

    def revoke(self, certificate: CertificateId) -> None:
        """From here on *certificate* is refused, and what is below it if it is a CA's."""
        issuer, serial = certificate
        if not self._has(issuer, serial):
            if issuer not in self._serials:
                self._serials[issuer] = tuple(set() for _ in range(_SHARDS))
            self._serials[issuer][serial % _SHARDS].add(serial)
            self._count += 1
        self.version += 1

    def forget(self, certificate: CertificateId) -> None:
        """*certificate* has ended: it needs no entry any more."""
        issuer, serial = certificate
        if self._has(issuer, serial):
            self._serials[issuer][serial % _SHARDS].remove(serial)
            self._count -= 1
        self.version += 1

    def cut(self, identity: Identity, cut_off: datetime) -> None:
        """From here on what was issued to *identity* before *cut_off* is refused."""
        self._cut_offs[identity] = cut_off
        self.version += 1

    def certificates(self) -> Iterator[tuple[bytes, Iterator[int]]]:
        """
        The serials that are revoked, by the key of their issuer.

        What changes while they are taken may be among them or not.
        """
        for issuer, shards in list(self._serials.items()):
            yield issuer, (serial for shard in shards for serial in tuple(shard))

    def identities(self) -> Iterator[tuple[Identity, datetime]]:
        """The identities that have a cut-off, and that."""
        yield from tuple(self._cut_offs.items())

    def withdrawn(self) -> Iterator[Identity]:
        """Of whom nothing is good."""
        yield from (who for who, cut_off in self.identities() if cut_off == WITHDRAWN)

    def _has(self, issuer: bytes, serial: int) -> bool:
        shards = self._serials.get(issuer)
        return shards is not None and serial in shards[serial % _SHARDS]
