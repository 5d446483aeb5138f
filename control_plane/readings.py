"""Who reads the audit log: entered in it, and not for each page."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.edge.allowance import source_of
from parallax.security.errors import StorageFailed

READ: Final = "audit/read"
PAUSE: Final = timedelta(hours=1)  # whoever goes on reading, as with --watch, is entered so often
MAX_READERS: Final = 1_000


class Readings:
    """
    Enters who reads the log, before he is answered.

    Where that cannot be written, he reads all the same: it is how he learns what is wrong.

    Args:
        clock: Aware UTC.
    """

    def __init__(self, log: AuditLog, clock: Callable[[], datetime]) -> None:
        self._log = log
        self._clock = clock
        self._lately: OrderedDict[tuple[str, str], datetime] = OrderedDict()  # the oldest first

    async def note(self, reader: str, source: str) -> None:
        """
        Enter that *reader* reads, unless he was entered within `PAUSE`.

        Args:
            reader: An identity as a URI.
            source: His address, without a port.
        """
        who, now = (reader, source_of(source)), self._clock()
        before = self._lately.get(who)
        if before is not None and timedelta(0) <= now - before < PAUSE:
            return
        self._lately.pop(who, None)
        self._lately[who] = now
        if len(self._lately) > MAX_READERS:
            self._lately.popitem(last=False)
        try:
            await self._log.commit(Deed(READ, reader, source=source))
        except StorageFailed:  # the engine has said what is wrong
            self._lately.pop(who, None)
