"""Labels that whoever administers grants to an identity, and takes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final

from parallax.control_plane import grants as kept
from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.grants import Grants
from parallax.control_plane.uninterrupted import Uninterrupted
from parallax.runtime.policy import Labels
from parallax.security.errors import Conflict, InvalidRequest, InvalidTransition
from parallax.security.identity import Identity, clip
from parallax.security.revocation import Revocations
from parallax.security.tokens import check_labels

logger = logging.getLogger(__name__)

ATTEMPTS: Final = 5  # while the same identity is enrolled anew


class Labelling:
    """
    Changes what was granted: with its entry in the audit log, and in force before it is acknowledged.

    Args:
        grants: What is in force; beside enrollment, this alone changes it.
        revocations: What is in force: who is withdrawn is granted nothing.
    """

    def __init__(self, grants: Grants, audit: AuditLog, revocations: Revocations) -> None:
        self._grants = grants
        self._audit = audit
        self._revocations = revocations
        self._lock = asyncio.Lock()
        self._uninterrupted = Uninterrupted()

    async def change(
        self,
        identity: Identity,
        granted: Mapping[str, str],
        taken: Collection[str],
        by: str,
        source: str = "",
    ) -> Labels:
        """
        Grant labels to *identity* and take others back; what it has then.

        Args:
            granted: In place of what was granted under the same keys.
            taken: Keys; that of a label which was not granted is refused: whoever mistypes one would believe
                that it is taken back.
            source: The address that asks for it.

        Raises:
            InvalidRequest: It cannot be granted, or was not.
            InvalidTransition: The identity is revoked, or its name kept for a device that is yet to enroll.
            Conflict: The same identity is enrolled again and again.
            StorageFailed: It is not known to be recorded. It may be in force after the next start.
        """
        return await self._uninterrupted.make(self._change(identity, granted, taken, by, source))

    async def _change(
        self, identity: Identity, granted: Mapping[str, str], taken: Collection[str], by: str, source: str
    ) -> Labels:
        async with self._lock:
            for attempt in range(ATTEMPTS):
                before, revision = await self._grants.stored(identity)
                if self._revocations.is_withdrawn(identity):
                    raise InvalidTransition(f"{identity} is revoked: reinstate it before labels are granted")
                if self._grants.is_reserved(identity):
                    raise InvalidTransition(
                        f"{identity} is kept for a device that is yet to enroll: grant labels after that"
                    )
                after = changed(before, granted, taken)
                if after == before:
                    return before
                detail = {"granted": _spell(granted), "taken": " ".join(sorted(taken))}
                deed = Deed("identity/labelled", by, str(identity), source, detail)
                try:
                    await self._audit.commit(deed, [kept.write(identity, after, revision)])
                except Conflict:
                    if attempt == ATTEMPTS - 1:
                        raise
                else:
                    self._grants.granted(identity, after)
                    logger.warning("labels changed", extra={"subject": str(identity), "by": by, **detail})
                    return after
        raise AssertionError("the loop returns or raises")


def changed(before: Labels, granted: Mapping[str, str], taken: Collection[str]) -> Labels:
    """*before* with the labels *granted* and without the keys *taken*; raises InvalidRequest."""
    if both := sorted(granted.keys() & set(taken)):
        raise InvalidRequest(f"{clip(both[0])} is both granted and taken back: state one of them")
    if missing := sorted(set(taken) - before.keys()):
        has = f"it has {clip(_spell(before), 200)}" if before else "it has no labels"
        raise InvalidRequest(f"there is no label {clip(missing[0])} to take back: {has}")
    return check_labels({key: value for key, value in before.items() if key not in taken} | dict(granted))


def _spell(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
