"""
Processes that record deeds as fast as they can and say each number once that is acknowledged.

`audit_writer.py DIRECTORY`: for each line `FIRST [BYTES]` on stdin one process, forked, which records deeds
from number FIRST on, each with a record `n/<number>`, until it is killed. With BYTES no file may grow beyond
that until fifty deeds have failed; then it reads, makes room, and goes on.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.engines.engine import Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.security.errors import StorageFailed

WRITERS = 32
FAILURES = 50


async def record(directory: Path, first: int, limit: int | None) -> None:
    numbers = count(first)
    failures = 0

    async def write(log: AuditLog, reader: AuditReader) -> None:
        nonlocal failures
        while True:
            number = next(numbers)
            try:
                await log.commit(
                    Deed("test/done", "writer", str(number), detail={"filling": "x" * 1_000}),
                    [Write(f"n/{number:08}", b"")],
                )
            except StorageFailed as exc:
                failures += 1
                say(f"failed {exc.fault.value} {exc}")
                if failures == FAILURES:
                    say(f"read {len((await reader.page(0)).kept)}")
                    resource.setrlimit(
                        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                    )
                    say("room")
                await asyncio.sleep(0.01)
            else:
                say(f"done {number}")

    async with SqliteEngine(directory) as engine, asyncio.TaskGroup() as group:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        log = AuditLog(engine, lambda: datetime.now(UTC))
        for _ in range(WRITERS):
            group.create_task(write(log, AuditReader(engine)))


def say(line: str) -> None:
    """Straight to the pipe: what has been said survives us."""
    os.write(1, f"{line}\n".encode())


def main(directory: Path) -> None:
    for line in sys.stdin:
        first, *limit = map(int, line.split())
        child = os.fork()  # no import anew for each of many
        if not child:
            asyncio.run(record(directory, first, limit[0] if limit else None))
        say(f"began {child}")
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
