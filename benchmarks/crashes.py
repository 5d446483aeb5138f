"""
Kill a ledger while it writes, again and again: `python benchmarks/crashes.py`.

A process issues, sees, marks and drops certificates and records deeds, all at once, until it is killed with
`kill -9`, each time at another moment; then its file is read. Whatever was acknowledged has to be there, and
nothing by half: each certificate with all its records, each record with its certificate.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import track

from crashes_roles import DEEDS, work
from parallax.control_plane.audit import ENTRIES, HEAD, START, Head
from parallax.control_plane.audit_chain import Chain
from parallax.control_plane.engines.engine import Record
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issued import CERTIFICATES, KEYS, IssuedCertificate, KeyUse
from parallax.security.errors import ChainBroken

LONGEST_S: Final = 0.08  # from the first acknowledgement to the kill
READY_S: Final = 30.0
LOADED: Final = [  # before the fork, so that a child begins at once
    "parallax.control_plane.audit",
    "parallax.control_plane.engines.sqlite",
    "parallax.control_plane.ledger",
]
AT_ONCE: Final = 5  # every so manieth is killed before it has acknowledged anything


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there was after the last kill, and what was wrong after any."""

    acknowledged: int
    certificates: int
    faults: tuple[str, ...]


def crash(directory: Path, rounds: int, seed: int = 1) -> Outcome:
    """Kill so often, and look each time; the same seed chooses the same moments."""
    moments = random.Random(seed)  # noqa: S311 - reproducible
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    acknowledged: set[str] = set()
    faults: list[str] = []
    records: dict[str, Record] = {}
    for number in track(range(rounds), "Killing", console=Console(stderr=True), transient=True):
        theirs, ours = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(directory, number, ours))
        child.start()
        ours.close()
        if number % AT_ONCE:
            theirs.poll(READY_S)
        time.sleep(moments.uniform(0, LONGEST_S))
        child.kill()
        acknowledged.update(_said(theirs))
        child.join()
        records = asyncio.run(read(directory))
        faults += [f"round {number}: {fault}" for fault in find_faults(records, acknowledged)]
    certificates = sum(key.startswith(CERTIFICATES) for key in records)
    return Outcome(len(acknowledged), certificates, tuple(faults))


def find_faults(records: Mapping[str, Record], acknowledged: Iterable[str]) -> list[str]:
    """What is not as it has to be in what was read."""
    faults = [f"{key} was acknowledged and is gone" for key in acknowledged if key not in records]
    entries = [
        IssuedCertificate.decode(key, record.value or b"")
        for key, record in records.items()
        if key.startswith(CERTIFICATES)
    ]
    whole = {key for each in entries for key in (each.key, *each.keys)}
    last: dict[str, str] = {}
    for each in entries:
        last[each.use_key] = max(each.key, last.get(each.use_key, ""))
    for key, record in records.items():
        if key.startswith(KEYS):
            if last.pop(key, None) != KeyUse.decode(record.value or b"").certificate:
                faults.append(f"{key} does not lead to the last certificate for that key")
        elif key.startswith(DEEDS):
            first, _, half = key.rpartition("/")
            twin = f"{first}/{'ab'.replace(half, '')}"
            if twin not in records:
                faults.append(f"{key} is half of a deed")
        elif key not in whole and not key.startswith((ENTRIES, HEAD)):
            faults.append(f"{key} is of no certificate")
    faults += [f"{key} is missing" for key in whole if key not in records]
    faults += _find_break(records)
    return faults + [f"{key} is missing" for key in last]


def _find_break(records: Mapping[str, Record]) -> Iterator[str]:
    """Where the chain of the audit log is broken, if it is."""
    chain, head = Chain(), records.get(HEAD)
    try:
        for key in sorted(key for key in records if key.startswith(ENTRIES)):
            chain.add(int(key.removeprefix(ENTRIES)), records[key].value or b"")
        chain.finish(Head.parse((head.value or b"").decode()) if head else START)
    except ChainBroken as exc:
        yield str(exc)


def _said(pipe: Connection) -> list[str]:
    """All that a child has acknowledged before it was killed."""
    said = []
    with suppress(EOFError, OSError):
        while True:
            said.append(pipe.recv_bytes().decode())
    return said


async def read(directory: Path) -> dict[str, Record]:
    """All records."""
    records: dict[str, Record] = {}
    after = ""
    async with SqliteEngine(directory) as engine:
        while page := await engine.scan("", after):
            records |= {record.key: record for record in page}
            after = page[-1].key
    return records


def main() -> int:
    """Kill and print; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="chooses the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = crash(Path(scratch) / "data", arguments.rounds, arguments.seed)
    print(*outcome.faults[:20], sep="\n", end="\n" if outcome.faults else "")
    print(
        f"killed {arguments.rounds} times: {outcome.acknowledged:,} writes acknowledged, "
        f"{outcome.certificates:,} certificates there, {len(outcome.faults)} faults"
    )
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
