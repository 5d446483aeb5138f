"""
A process that commits as fast as it can and prints each number once that is acknowledged.

`writer.py DIRECTORY FIRST [BYTES]`: records `n/<number>` from FIRST on, beside each other a counter
that every commit moves on by one. With BYTES no file may grow beyond that until a line comes on stdin.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from itertools import count
from pathlib import Path

from parallax.control_plane.engines.engine import Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.security.errors import StorageFailed

WRITERS = 32
VALUE = bytes(2_000)


async def main(directory: Path, first: int, limit: int | None) -> None:
    numbers = count(first)
    full = asyncio.Event()

    async def write(engine: SqliteEngine) -> None:
        while True:
            number = next(numbers)
            try:
                # Two records and an event: all of them or none.
                await engine.commit(
                    Event("tests/written", str(number).encode()),
                    [Write(f"n/{number:08}", VALUE), Write(f"twin/{number:08}", VALUE)],
                )
            except StorageFailed as exc:
                say(f"failed {exc.fault.value} {exc}")
                full.set()
                await asyncio.sleep(0.05)
            else:
                say(f"done {number:08}")

    async def make_room() -> None:
        await full.wait()
        await asyncio.to_thread(sys.stdin.readline)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        say("room")

    async with SqliteEngine(directory) as engine, asyncio.TaskGroup() as group:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            group.create_task(make_room())
        for _ in range(WRITERS):
            group.create_task(write(engine))


def say(line: str) -> None:
    """Straight to the pipe: what has been said survives us."""
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    _, place, start, *rest = sys.argv
    asyncio.run(main(Path(place), int(start), int(rest[0]) if rest else None))
