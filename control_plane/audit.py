"""The audit log: what was done and refused, by whom, and when."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime

from parallax.control_plane.engines.engine import Engine, Event, Write


@dataclass(frozen=True, slots=True)
class Deed:
    """
    Something that was done, or refused.

    Args:
        action: What, as an area and a verb: `certificate/revoked`.
        by: Who did it or tried to: an identity as a URI, or a description where there is none.
        subject: Whom or what it was done to.
        source: The address that it came from; empty if from nowhere else.
        detail: Whatever else there is to know. Never a key, a token, or a request's body.
    """

    action: str
    by: str
    subject: str = ""
    source: str = ""
    detail: Mapping[str, str] = field(default_factory=dict)


class AuditLog:
    """
    Records deeds in an engine, each in one commit with what it changes.

    Args:
        clock: Aware UTC.
    """

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._clock = clock

    async def commit(self, deed: Deed, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        """
        Record *deed* and do all of *writes*, or nothing at all; the revision of each write.

        Raises:
            Conflict: A record is not as expected; nothing was written.
            StorageFailed: It is not known to be recorded.
        """
        entry = asdict(deed) | {"at": self._clock().isoformat()}
        return await self._engine.commit(Event(f"audit/{deed.action}", json.dumps(entry).encode()), writes)
