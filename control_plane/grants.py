"""What was granted to identities beside their names: labels, for policy to go by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from parallax.control_plane.engines.engine import ABSENT, Engine, Write
from parallax.security.identity import Identity

GRANTS: Final = "grants/"
NONE: Final[Mapping[str, str]] = MappingProxyType({})


class Grants:
    """
    Labels by identity, all of them in memory: policy asks at every call. A name can be reserved before.

    They come from a token, an approval or an administrator, never from the agent itself, and go when their
    holder is revoked: whoever has the name after that has only what is granted to it then.

    Attributes:
        on_change: Called once somebody has other labels.
    """

    def __init__(self, engine: Engine) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._engine = engine
        self._labels: dict[Identity, Mapping[str, str] | None] = {}  # None: the name alone

    async def load(self) -> None:
        """Read what is stored; raises StorageFailed."""
        after = ""
        while page := await self._engine.scan(GRANTS, after):
            for record in page:
                self._labels[_identity_of(record.key)] = json.loads(record.value or b"{}")
            after = page[-1].key

    def __contains__(self, identity: Identity) -> bool:
        """Whether *identity* was ever granted anything, if only its name."""
        return identity in self._labels

    def is_reserved(self, identity: Identity) -> bool:
        """Whether the name alone was granted, to somebody who is not enrolled yet."""
        return self._labels.get(identity, NONE) is None

    def labels_of(self, identity: Identity) -> Mapping[str, str]:
        """What was granted to *identity* last."""
        return self._labels.get(identity) or NONE

    async def plan(self, identity: Identity, labels: Mapping[str, str]) -> Write:
        """
        What grants *labels* to *identity* in place of others, unless somebody is faster.

        So that of two who are about to become one identity, one does not.
        """
        key = _key(identity)
        found = await self._engine.get(key)
        return Write(key, json.dumps(dict(labels)).encode(), found.revision if found else ABSENT)

    def reserve(self, identity: Identity) -> Write:
        """What keeps the name of *identity*, to whom nothing was granted, for one holder."""
        return Write(_key(identity), b"null", ABSENT)

    def reserved(self, identity: Identity) -> None:
        """Take note that this is stored."""
        self._labels[identity] = None

    def granted(self, identity: Identity, labels: Mapping[str, str]) -> None:
        """Take note that what was planned is stored."""
        before = self.labels_of(identity)
        self._labels[identity] = MappingProxyType(dict(labels))
        if before != labels:
            self.on_change()

    def end(self, identity: Identity) -> Write:
        """What takes all labels of *identity* back, and has whatever is about to be granted fail."""
        return Write(_key(identity), b"{}")

    def ended(self, identity: Identity) -> None:
        """Take note that this is stored."""
        self.granted(identity, NONE)


def _key(identity: Identity) -> str:
    return f"{GRANTS}{identity.trust_domain}/{identity.short}"


def _identity_of(key: str) -> Identity:
    return Identity.parse(f"spiffe://{key.removeprefix(GRANTS)}")
