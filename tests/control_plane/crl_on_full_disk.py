"""
Publishes CRLs on a disk that is full, then makes room: `crl_on_full_disk.py DIRECTORY`.

A program of its own, because it mounts that disk where nobody else sees it: `unshare --user
--map-root-user --mount` runs it. A broken promise ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from parallax.control_plane.crl import CRLPublisher, Issuers, Obstacle
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.security.authority import CertificateAuthority
from parallax.security.crl import CRL, RevokedSerial

DISK = 8 << 20


async def main(directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", directory], check=True)  # noqa: ASYNC221
    now = datetime.now(UTC)
    authority = CertificateAuthority.create(now=now)
    revoked: dict[int, RevokedSerial] = {}

    async def withdrawn(_: bytes, __: object) -> dict[int, RevokedSerial]:
        return dict(revoked)

    async with SqliteEngine(directory / "data") as engine:
        publisher = CRLPublisher(
            engine,
            directory / "crl",
            Issuers(lambda: authority, list),
            withdrawn,
            lambda: now,
            timedelta(days=1),
        )
        await publisher.publish()
        (path,) = (directory / "crl").glob("*.crl")
        before = path.read_bytes()
        # Room for what the engine has to write, and not for the list.
        revoked |= {each.serial: each for each in (RevokedSerial(1 << 150 | n, now) for n in range(20_000))}
        ballast = directory / "ballast"
        ballast.write_bytes(bytes(DISK - 600_000))
        publisher.note()
        await publisher.publish()
        assert list(publisher.obstacles) == [Obstacle.UNWRITTEN], publisher.obstacles
        assert path.read_bytes() == before, "a part of a list lies there"
        assert sorted(each.suffix for each in path.parent.iterdir()) == [".crl", ".pem"], "something is left"
        shown = publisher.published[0].crl
        assert len(shown) == 20_000
        ballast.unlink()
        await publisher.publish()
        assert not publisher.obstacles
        assert CRL.parse(path.read_bytes()) == shown
        # No room at all, not for a number either.
        revoked.clear()
        with ballast.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                pass
        publisher.note()
        await publisher.publish()
        assert Obstacle.UNRECORDED in publisher.obstacles
        assert publisher.published[0].crl == shown
        ballast.unlink()
        await publisher.publish()
        assert not publisher.obstacles
        assert len(CRL.parse(path.read_bytes())) == 0


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
