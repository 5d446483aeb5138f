"""
Kill a ledger while it writes, again and again: `python benchmarks/crashes.py`.

A process does several kinds of all that a control plane writes at once, until it is killed with
`kill -9`, each time at another moment; then its file is read. Whatever was acknowledged has to be there,
and nothing by half: each entry of the audit log with its records, and each record with its entry. Whoever
was about to enroll does so in the next process, with the same key. In every fourth process the disk is full
every now and then: what is refused is not there.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import track

from crashes_faults import Found, Story
from crashes_messages import Attempt, Begun, Ended, Failed, NoMore, Refused, There, Turn
from crashes_roles import is_filled, kinds_of, work
from parallax.control_plane.audit import START, Head
from parallax.control_plane.engines.engine import Record
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issued import CERTIFICATES
from parallax.runtime.clock import utc_now
from parallax.security.authority import CertificateAuthority
from parallax.security.crl import CRL
from parallax.security.errors import ConfigError
from parallax.security.layouts import Layout, load_authority, save_authority

LONGEST_S: Final = 0.08  # from what is waited for to the kill
READY_S: Final = 30.0
LOADED: Final = ["crashes_roles"]  # before the fork, so that a child begins at once


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What there was after the last kill, and what was wrong after any.

    Args:
        story: What the audit log has told until then.
    """

    acknowledged: int
    refused: int
    certificates: int
    story: Story
    faults: tuple[str, ...]


@dataclass
class Witness:
    """
    Hears what the processes say, and remembers what was acknowledged.

    Attributes:
        head: Of the audit log, as it was acknowledged last.
        there: Records of which that does not tell.
        unfinished: Who was about to enroll.
        turns: What the process that runs has done all of, once at least.
        refused: How often nothing could be recorded.
        failed: Why processes have ended by themselves.
    """

    acknowledged: int = 0
    head: Head = START
    there: set[str] = field(default_factory=set)
    unfinished: list[Attempt] = field(default_factory=list)
    turns: set[str] = field(default_factory=set)
    refused: int = 0
    failed: list[str] = field(default_factory=list)

    def hear(self, said: object) -> None:
        """Remember what one message means."""
        match said:
            case Head():
                self.acknowledged += 1
                self.head = max(self.head, said, key=lambda head: head.sequence)
            case There(key):
                self.acknowledged += 1
                self.there.add(key)
            case NoMore(key):
                self.there.discard(key)
            case Begun(attempt):
                self.unfinished.append(attempt)
            case Ended(attempt):
                self.unfinished.remove(attempt)
            case Turn(kind):
                self.turns.add(kind)
            case Refused():
                self.refused += 1
            case Failed(why):
                self.failed.append(why)

    def hear_until(self, told: Connection, enough: Callable[[], bool]) -> None:
        """Hear what is told until that is *enough*, or nothing is for too long."""
        with suppress(EOFError, OSError):
            while not enough() and not self.failed and told.poll(READY_S):
                self.hear(told.recv())


def crash(directory: Path, rounds: int, seed: int = 1) -> Outcome:
    """Kill so often, and look each time; the same seed chooses the same moments."""
    moments = random.Random(seed)  # noqa: S311 - reproducible
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    save_authority(directory / "certs", Layout.PARALLAX, CertificateAuthority.create(now=utc_now()))
    witness, story = Witness(), Story()
    faults: list[str] = []
    found = Found({})
    for number in track(range(rounds), "Killing", console=Console(stderr=True), transient=True):
        told, ours = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(directory, number, ours, tuple(witness.unfinished)))
        child.start()
        ours.close()
        _wait(number, told, witness)
        time.sleep(moments.uniform(0, LONGEST_S))
        child.kill()
        witness.hear_until(told, lambda: False)
        child.join()
        found = look(directory)
        wrong = story.find_faults(found, witness.head, witness.there) + witness.failed + _torn_ca(directory)
        faults += [f"round {number}, {', '.join(kinds_of(number))}: {each}" for each in wrong]
        witness.failed.clear()
        witness.turns.clear()
    certificates = sum(key.startswith(CERTIFICATES) for key in found.records)
    return Outcome(witness.acknowledged, witness.refused, certificates, story, tuple(faults))


def _wait(number: int, told: Connection, witness: Witness) -> None:
    """Until the disk was full, or all kinds had their turn, or for the first word, or for nothing at all."""
    before = witness.refused
    if is_filled(number):
        witness.hear_until(told, lambda: witness.refused > before)
    elif number % 4 == 0:
        witness.hear_until(told, lambda: witness.turns >= {*kinds_of(number)})
    elif number % 2 == 0:
        told.poll(READY_S)


def _torn_ca(directory: Path) -> list[str]:
    """What is wrong with the CA, which was killed while it gave way to another."""
    try:
        load_authority(directory / "certs")
    except ConfigError as exc:
        return [str(exc)]
    return []


def look(directory: Path) -> Found:
    """All that there is."""
    lists = {path.stem: CRL.parse(path.read_bytes()).number for path in (directory / "crl").glob("*.crl")}
    return Found(asyncio.run(read(directory / "data")), lists)


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
        outcome = crash(Path(scratch), arguments.rounds, arguments.seed)
    print(*outcome.faults[:20], sep="\n", end="\n" if outcome.faults else "")
    print(
        f"killed {arguments.rounds} times: {outcome.acknowledged:,} writes acknowledged, of "
        f"{len(outcome.story.actions)} kinds, and {outcome.refused:,} refused by a full disk; "
        f"{outcome.certificates:,} certificates there, {len(outcome.faults)} faults"
    )
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
