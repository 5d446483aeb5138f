"""
Fills a disk of a few megabytes while an engine writes to it, then makes room: `full_disk.py DIRECTORY`.

A program of its own, because it mounts that disk where nobody else sees it: `unshare --user
--map-root-user --mount` runs it. It prints one line of JSON; a broken promise ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from parallax.control_plane.engines.engine import Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.security.errors import ConfigError, Fault, StorageFailed

WRITTEN = Event("tests/written")
DISK = 4 << 20
LEFT = 700_000  # for the engine, until there is room


async def main(directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", directory], check=True)  # noqa: ASYNC221
    ballast, place = directory / "ballast", directory / "data"
    ballast.write_bytes(bytes(DISK - LEFT))
    acknowledged: list[str] = []
    failures = 0

    async def write(engine: SqliteEngine, number: int) -> None:
        nonlocal failures
        key = f"n/{number:05}"
        try:
            await engine.commit(WRITTEN, [Write(key, bytes(3_000))])
        except StorageFailed as exc:
            if exc.fault is not Fault.FULL:
                raise
            failures += 1
        else:
            acknowledged.append(key)

    async with SqliteEngine(place) as engine:
        for start in range(0, 1_000, 10):
            await asyncio.gather(*(write(engine, start + step) for step in range(10)))
        before = len(acknowledged)
        found = [record.key for record in await engine.scan("n/")]
        assert found == sorted(acknowledged), "what was refused is there, or what was acknowledged is not"
        ballast.unlink()
        for number in range(1_000, 1_100):
            await write(engine, number)
        assert engine.fault is None
        assert len(acknowledged) == before + 100
    async with SqliteEngine(place) as engine:
        assert [record.key for record in await engine.scan("n/")] == sorted(acknowledged)
    ballast.write_bytes(bytes(3))
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True)  # noqa: ASYNC221
    try:
        async with SqliteEngine(place):
            pass
    except ConfigError as exc:
        refusal = str(exc)
    print(json.dumps({"acknowledged": before, "failures": failures, "refusal": refusal}))  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
