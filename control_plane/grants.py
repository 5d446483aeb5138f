"""What was granted to identities beside their names: labels, for policy to go by."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from parallax.control_plane.engines.engine import ABSENT, MAX_PAGE, Engine, Record, Write
from parallax.runtime.policy import NO_LABELS, Labels, spelled
from parallax.security.identity import Identity

GRANTS: Final = "grants/"
_NAME_ALONE: Final = b"null"


@dataclass(frozen=True, slots=True)
class Regrant:
    """
    Somebody has other labels than before.

    Args:
        labels: Those that it has now and had not, or the other way round, as rules spell them.
    """

    identity: Identity
    labels: frozenset[str]


class Grants:
    """
    Labels by identity, in memory: policy asks at every call. A name can be reserved before.

    Who has none, as most, takes no room there, and who has the same as others next to none.

    They come from a token, an approval or an administrator, never from the agent itself, and go when their
    holder is revoked: whoever has the name after that has only what is granted to it then.

    Attributes:
        on_change: Called once somebody has other labels.
    """

    def __init__(self, engine: Engine) -> None:
        self.on_change: Callable[[Regrant], None] = lambda _: None
        self._engine = engine
        self._labels: dict[Identity, Labels] = {}  # of those who have any
        self._reserved: set[Identity] = set()
        self._holders: dict[str, set[Identity]] = {}  # by label, as rules spell it

    async def load(self) -> None:
        """Read what is stored; raises StorageFailed."""
        after = ""
        while page := await self._engine.scan(GRANTS, after):
            for record in page:
                if record.value == _NAME_ALONE:
                    self.reserved(_identity_of(record.key))
                elif labels := _labels_in(record):
                    self._put(_identity_of(record.key), labels)
            after = page[-1].key

    async def knows(self, identity: Identity) -> bool:
        """Whether *identity* was ever granted anything, if only its name; raises StorageFailed."""
        return await self._engine.get(_key_of(identity)) is not None

    def is_reserved(self, identity: Identity) -> bool:
        """Whether the name alone was granted, to somebody who is not enrolled yet."""
        return identity in self._reserved

    def labels_of(self, identity: Identity) -> Labels:
        """What was granted to *identity* last."""
        return self._labels.get(identity, NO_LABELS)

    def holders(self, label: str) -> Collection[Identity]:
        """Who has *label*, as rules spell it."""
        return self._holders.get(label, frozenset())

    async def page(self, after: str, limit: int) -> tuple[list[tuple[Identity, Labels]], str]:
        """
        At most *limit* of those who have labels, by name; and behind what to go on, empty at the end.

        There may be fewer, for most have none.

        Args:
            after: What the page before gave.
        """
        found: list[tuple[Identity, Labels]] = []
        records = await self._engine.scan(GRANTS, after)
        for record in records:
            if labels := _labels_in(record):
                found.append((_identity_of(record.key), labels))
            if len(found) == limit:
                return found, record.key
        return found, records[-1].key if len(records) == MAX_PAGE else ""

    async def stored(self, identity: Identity) -> tuple[Labels, int]:
        """What was granted to *identity* last, and the revision at which that is so."""
        found = await self._engine.get(_key_of(identity))
        return (_labels_in(found), found.revision) if found is not None else (NO_LABELS, ABSENT)

    async def plan(self, identity: Identity, labels: Mapping[str, str]) -> Write:
        """
        What grants *labels* to *identity* in place of others, unless somebody is faster.

        So that of two who are about to become one identity, one does not.
        """
        _, revision = await self.stored(identity)
        return write(identity, labels, revision)

    def reserve(self, identity: Identity) -> Write:
        """What keeps the name of *identity*, to whom nothing was granted, for one holder."""
        return Write(_key_of(identity), _NAME_ALONE, ABSENT)

    def reserved(self, identity: Identity) -> None:
        """Take note that this is stored."""
        self._reserved.add(identity)

    def granted(self, identity: Identity, labels: Mapping[str, str]) -> None:
        """Take note that what was planned is stored."""
        self._reserved.discard(identity)
        changed = self._put(identity, _decode(_encode(labels)))
        if changed:
            self.on_change(Regrant(identity, changed))

    def end(self, identity: Identity) -> Write:
        """What takes all labels of *identity* back, and has whatever is about to be granted fail."""
        return Write(_key_of(identity), b"{}")

    def ended(self, identity: Identity) -> None:
        """Take note that this is stored."""
        self.granted(identity, NO_LABELS)

    def _put(self, identity: Identity, labels: Labels) -> frozenset[str]:
        """Which labels it has now and had not, or the other way round."""
        had, has = frozenset(spelled(self.labels_of(identity))), frozenset(spelled(labels))
        if labels:
            self._labels[identity] = labels
        else:
            self._labels.pop(identity, None)
        for label in has - had:
            self._holders.setdefault(label, set()).add(identity)
        for label in had - has:
            self._holders[label].discard(identity)
            if not self._holders[label]:
                del self._holders[label]
        return had ^ has


def write(identity: Identity, labels: Mapping[str, str], revision: int) -> Write:
    """What grants *labels* to *identity* in place of those of that *revision*, and of no later one."""
    return Write(_key_of(identity), _encode(labels), revision)


def _key_of(identity: Identity) -> str:
    return f"{GRANTS}{identity.trust_domain}/{identity.short}"


def _identity_of(key: str) -> Identity:
    return Identity.parse(f"spiffe://{key.removeprefix(GRANTS)}")


def _labels_in(record: Record) -> Labels:
    return _decode(record.value or b"{}")


def _encode(labels: Mapping[str, str]) -> bytes:
    return json.dumps(dict(labels)).encode()


@lru_cache(maxsize=1_024)  # a token grants many the same, which so is kept once
def _decode(stored: bytes) -> Labels:
    labels: dict[str, str] | None = json.loads(stored)
    return MappingProxyType(labels) if labels else NO_LABELS
