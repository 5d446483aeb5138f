"""
Publishes CRLs as fast as it can, until it is killed: `crl_writer.py DIRECTORY`.

It prints the number of each list that could be seen, over HTTP or as a file.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from parallax.control_plane.crl import CRLPublisher, Issuers
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issuer import IssuerFiles
from parallax.security.crl import RevokedSerial

START = datetime(2026, 6, 1, tzinfo=UTC)  # and it never moves: so nothing but the record moves the number


async def main(root: Path) -> None:
    files = IssuerFiles(root / "certs")
    revoked: dict[int, RevokedSerial] = {}

    async def withdrawn(_: bytes, __: object) -> dict[int, RevokedSerial]:
        return dict(revoked)

    async with SqliteEngine(root / "data") as engine:
        publisher = CRLPublisher(
            engine,
            root / "data" / "crl",
            Issuers(files.current, files.beside),
            withdrawn,
            lambda: START,
            timedelta(days=1),
        )
        await publisher.load()
        for serial in itertools.count():
            revoked[serial] = RevokedSerial(serial, START)
            publisher.note()
            await publisher.publish()
            print(publisher.published[0].crl.number, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
