"""
The client of every subject, a process of its own: `python client.py SUBJECT CERTS ADDRESS`.

It obeys lines on stdin and answers with JSON lines on stdout. `run IN_FLIGHT WARM_UP SECONDS` puts the
subject under load, says when the measured window begins and when it ends, and keeps up the load until it
is told `stop`, so that whoever reads the CPU times at these two lines reads them in the midst of it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Final

from measuring import percentile
from role import run
from subject import Ask, BenchmarkFailed, load

PAYLOAD: Final = bytes(range(256)) * 4  # 1 KiB, and each byte value in it


async def main(name: str, certs: Path, address: str) -> None:
    """Connect, then measure as often as asked."""
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with load(name).connect(certs, address) as ask:
        _say(ready=True)
        while command := await commands.readline():
            _, in_flight, warm_up, seconds = command.split()
            await measure(ask, commands, int(in_flight), float(warm_up), float(seconds))


async def measure(
    ask: Ask, commands: asyncio.StreamReader, in_flight: int, warm_up_s: float, seconds: float
) -> None:
    """*in_flight* coroutines, each asking again as soon as it has its answer; the first failure raises."""
    latencies: list[float] = []
    stopping = False

    async def work(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while not stopping:
            began = time.perf_counter()
            if await ask(PAYLOAD) != PAYLOAD:
                raise BenchmarkFailed("an answer is not what was sent")
            latencies.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        # Not all at once: in step they would stay in step, in batches as large as they ever get.
        for number in range(in_flight):
            group.create_task(work(warm_up_s / 2 * number / in_flight))
        await asyncio.sleep(warm_up_s)
        first, began = len(latencies), time.perf_counter()
        _say(begin=True)
        await asyncio.sleep(seconds)
        while len(latencies) == first:  # noqa: ASYNC110 - a window without an answer measures nothing
            await asyncio.sleep(seconds)
        last, ended = len(latencies), time.perf_counter()
        _say(end=True)
        await commands.readline()
        stopping = True
    measured = sorted(latencies[first:last])
    _say(
        tasks=len(measured),
        seconds=ended - began,
        p50_ms=percentile(measured, 0.5) * 1000,
        p99_ms=percentile(measured, 0.99) * 1000,
    )


def _say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
