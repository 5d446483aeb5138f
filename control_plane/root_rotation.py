"""When a new CA may sign, and when the old one and its root may go; pure."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.bundle import TrustBundle
from parallax.security.errors import InvalidTransition
from parallax.security.identity import Identity
from parallax.security.keys import key_id


class Stage(StrEnum):
    """How far a rotation has come. Between two of them lies one commit, so a restart finds one of these."""

    IDLE = "idle"
    PREPARED = "prepared"
    """The fleet is told the roots of both; the old one signs."""
    ACTIVE = "active"
    """The new one signs; leaves of the old one are still in use."""
    RETIRING = "retiring"
    """All is decided: what is told and what is on the disk has yet to follow."""
    ABORTING = "aborting"


# What may come after what.
TRANSITIONS: Final[Mapping[Stage, frozenset[Stage]]] = {
    Stage.IDLE: frozenset({Stage.PREPARED}),
    Stage.PREPARED: frozenset({Stage.ACTIVE, Stage.ABORTING}),
    Stage.ACTIVE: frozenset({Stage.RETIRING}),
    Stage.RETIRING: frozenset({Stage.IDLE}),
    Stage.ABORTING: frozenset({Stage.IDLE}),
}


@dataclass(frozen=True, slots=True)
class RootRotation:
    """
    A rotation under way, as it is stored.

    A CA is the way from its own certificate to its root, last: a root is that alone. Below one root, the
    issuer alone changes.

    Args:
        roots: What the fleet trusted before, the old CA's root included.
        old: The CA that is to go.
        new: The CA that takes its place.
        without: Who is not waited for, as `<kind>/<name>`; for this stage alone.
    """

    stage: Stage
    roots: tuple[x509.Certificate, ...]
    old: tuple[x509.Certificate, ...]
    new: tuple[x509.Certificate, ...]
    without: frozenset[str] = frozenset()

    @property
    def bundle(self) -> TrustBundle:
        """What the fleet is to trust in this stage."""
        match self.stage:
            case Stage.PREPARED | Stage.ACTIVE:
                return TrustBundle(tuple(dict.fromkeys((*self.roots, self.new[-1]))))
            case Stage.RETIRING:
                return TrustBundle(self._remaining)
            case Stage.ABORTING | Stage.IDLE:
                return TrustBundle(self.roots)

    @property
    def signs(self) -> tuple[x509.Certificate, ...]:
        """The CA that signs in this stage."""
        return self.new if self.stage in {Stage.ACTIVE, Stage.RETIRING} else self.old

    @property
    def is_decided(self) -> bool:
        """Whether nobody is waited for any more; what is told and what is on the disk has yet to follow."""
        return self.stage in {Stage.RETIRING, Stage.ABORTING}

    @property
    def replaces_root(self) -> bool:
        """Whether a root goes, and another comes."""
        return self.old[-1] != self.new[-1]

    @property
    def new_issuer(self) -> str:
        """How the ledger calls the new CA."""
        return _ledger_name(self.new[0])

    def going(self, issuers: Collection[str]) -> frozenset[str]:
        """
        Of which of *issuers*, as the ledger calls them, nobody may be left with a leaf alone.

        Of the old one; and where its root goes, of all that may be below it, so of each that is not known to
        be elsewhere. An intermediate of the new CA is none of those: the old root may have certified its
        key, too.
        """
        if not self.replaces_root:
            return frozenset({_ledger_name(self.old[0])})
        return frozenset(issuers) - {self.new_issuer, *map(_ledger_name, self._remaining)}

    @property
    def _remaining(self) -> tuple[x509.Certificate, ...]:
        """The roots at the end."""
        return tuple(dict.fromkeys((*(root for root in self.roots if root != self.old[-1]), self.new[-1])))

    def at(self, stage: Stage) -> RootRotation:
        """
        The same in another stage; whoever was left out has to be named again.

        Raises:
            InvalidTransition: It does not follow on this one.
        """
        if stage not in TRANSITIONS[self.stage]:
            raise InvalidTransition(
                f"the rotation of the root is {self.stage}, from which none becomes {stage}"
            )
        return replace(self, stage=stage, without=frozenset())

    def abort(self) -> RootRotation:
        """
        The way back.

        Raises:
            InvalidTransition: The new CA signs already.
        """
        if self.stage is not Stage.PREPARED:
            raise InvalidTransition(
                f"the rotation of the root is {self.stage}: it can be aborted while it is "
                f"{Stage.PREPARED} only; let it end, then rotate again"
            )
        return self.at(Stage.ABORTING)

    def excluding(self, names: Collection[str]) -> RootRotation:
        """The same without waiting for *names* in this stage, besides those named before."""
        return replace(self, without=self.without | frozenset(names))

    def encode(self) -> bytes:
        """As it is stored."""
        stored = {
            "stage": self.stage,
            "roots": [_encode(root) for root in self.roots],
            "old": [_encode(each) for each in self.old],
            "new": [_encode(each) for each in self.new],
            "without": sorted(self.without),
        }
        return json.dumps(stored).encode()

    @classmethod
    def decode(cls, stored: bytes) -> Self:
        """What `encode` gave."""
        fields = json.loads(stored)
        return cls(
            Stage(fields["stage"]),
            tuple(map(_decode, fields["roots"])),
            tuple(map(_decode, fields["old"])),
            tuple(map(_decode, fields["new"])),
            frozenset(fields["without"]),
        )


@dataclass(frozen=True, slots=True)
class Situation:
    """
    What is known of the fleet at one moment.

    Args:
        live: Who is connected, or watches the roots.
        holders: Who holds a certificate that is valid and has been seen in use: one that sleeps is not gone.
        adopted: The hash of the bundle that each has in force, as far as it has said so.
        unreplaced: Who holds a valid leaf of an issuer that goes, and was not seen with one of the new CA.
    """

    live: frozenset[Identity] = frozenset()
    holders: frozenset[Identity] = frozenset()
    adopted: Mapping[Identity, bytes] = field(default_factory=dict)
    unreplaced: frozenset[Identity] = frozenset()

    @property
    def members(self) -> frozenset[Identity]:
        """Everybody who has to know of a new root before it signs."""
        return self.live | self.holders

    def adoption(self, bundle: TrustBundle) -> float:
        """Which part of the members has *bundle* in force; all of them where there is none."""
        members, wanted = self.members, bundle.hash
        have = sum(self.adopted.get(member) == wanted for member in members)
        return have / len(members) if members else 1.0


def missing(rotation: RootRotation, situation: Situation) -> tuple[Identity, ...]:
    """Who keeps *rotation* from its next stage, in order; nobody where all is decided."""
    match rotation.stage:
        case Stage.PREPARED if rotation.replaces_root:  # else everybody trusts the root of the new CA already
            wanted = rotation.bundle.hash
            awaited = {m for m in situation.members if situation.adopted.get(m) != wanted}
        case Stage.ACTIVE:
            awaited = set(situation.unreplaced)
        case _:
            awaited = set()
    return tuple(sorted((m for m in awaited if m.short not in rotation.without), key=str))


def advance(rotation: RootRotation, situation: Situation) -> RootRotation | None:
    """The next stage of *rotation*; None while somebody is missing, and where files have to follow first."""
    if missing(rotation, situation):
        return None
    match rotation.stage:
        case Stage.PREPARED:
            return rotation.at(Stage.ACTIVE)
        case Stage.ACTIVE:
            return rotation.at(Stage.RETIRING)
        case _:
            return None


def _ledger_name(issuer: x509.Certificate) -> str:
    return key_id(issuer.public_key()).hex()


def _encode(certificate: x509.Certificate) -> str:
    return b64encode(certificate.public_bytes(Encoding.DER)).decode()


def _decode(stored: str) -> x509.Certificate:
    return x509.load_der_x509_certificate(b64decode(stored))
