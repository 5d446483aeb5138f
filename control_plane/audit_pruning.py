"""What becomes of old entries of the audit log: they go, and another entry tells so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from parallax.control_plane.audit import MAX_OWN_WRITES, AuditLog, Deed, Entry, key_of
from parallax.control_plane.audit_chain import PRUNED
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.engines.engine import Write
from parallax.security.errors import ChainBroken, StorageFailed

logger = logging.getLogger(__name__)

# Some 650 bytes of disk each, so 1.3 GB, which a start has to check: two seconds. A thousand agents whose
# certificates last a day write 600,000 a year; ten thousand with an hour each write as much in two days.
MAX_ENTRIES: Final = 2_000_000
SWEEP_S: Final = 600.0


class AuditPruner:
    """
    Takes out entries that are too old, or too many.

    Each step is one commit, with an entry that carries the hash of the last one taken out: the chain
    begins there from then on.

    Args:
        kept: How long an entry stays at the most.
        by: Who does it: the control plane.
        clock: Aware UTC.
    """

    def __init__(
        self,
        log: AuditLog,
        reader: AuditReader,
        kept: timedelta,
        by: str,
        clock: Callable[[], datetime],
        *,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self._log = log
        self._reader = reader
        self._kept = kept
        self._by = by
        self._clock = clock
        self._max_entries = max_entries

    async def run(self) -> None:
        """Prune every ten minutes, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)  # first: by then a clock that was wrong at boot is right
            try:
                pruned = await self.prune()
            except StorageFailed:
                continue  # the engine has said what is wrong
            except ChainBroken as exc:
                logger.error("the audit log cannot be pruned", extra={"cause": str(exc)})  # noqa: TRY400 - ours
                continue
            if pruned:
                logger.info("audit log pruned", extra={"count": pruned})

    async def prune(self) -> int:
        """
        Take out what is to go; how many entries.

        Raises:
            ChainBroken: What lies there is no entry: it stays, as evidence.
            StorageFailed: It is not known to be done.
        """
        pruned, after = 0, 0
        while old := await self._old(after):
            deed = Deed(PRUNED, self._by, detail={"until": str(old[-1].head), "at": old[-1].at.isoformat()})
            await self._log.commit(deed, [Write(key_of(each.sequence), None) for each in old])
            pruned, after = pruned + len(old), old[-1].sequence
        return pruned

    async def _old(self, after: int) -> list[Entry]:
        """The first entries, which are behind *after*, if they are to go: as many as fit into one commit."""
        page = await self._reader.page(after, MAX_OWN_WRITES)
        entries = [Entry.decode(number, content) for number, content in page.kept]
        oldest, surplus = self._clock() - self._kept, 0
        if entries:
            surplus = page.head.sequence - entries[0].sequence + 1 - self._max_entries
        # One more than there are too many: the entry that says so comes to them.
        least = surplus + 1 if surplus > 0 else 0
        kept = next((n for n, each in enumerate(entries) if n >= least and each.at >= oldest), None)
        return entries[:kept]
