"""What is kept of who has acknowledged which roots: while it decides something, and no more than fits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from parallax.control_plane import roots as roots_module
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.engine import MAX_PAGE, Event, Onward, Record, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issuer import IssuerFiles
from parallax.control_plane.root_rotation import RootRotation, Stage
from parallax.control_plane.roots import ADOPTED, RECORD, Desk, Own, Roots
from parallax.control_plane.survey import Survey
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import Unavailable
from parallax.security.identity import Identity, Kind, control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_authority
from parallax.security.profiles import LeafProfile

NOW: Final = datetime.now(UTC)
OLD, NEW = (CertificateAuthority.create(now=NOW, name=name) for name in ("Old", "New"))
PREPARED: Final = RootRotation(Stage.PREPARED, (OLD.certificate,), (OLD.certificate,), (NEW.certificate,))
RETIRING: Final = PREPARED.at(Stage.ACTIVE).at(Stage.RETIRING)


class Interrupted(SqliteEngine):
    """Lets something else happen after each look at who has acknowledged."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def scan(
        self, prefix: str, after: str = "", limit: int = MAX_PAGE, onward: Onward | None = None
    ) -> list[Record]:
        found = await super().scan(prefix, after, limit, onward)
        if self.meanwhile is not None:
            await self.meanwhile()
        return found


def someone(number: int = 1) -> Identity:
    return Identity("parallax.local", Kind.AGENT, f"agent-{number}")


async def nobody_is_there() -> Survey:
    return Survey(NOW)


async def loaded(
    engine: SqliteEngine,
    directory: Path,
    rotation: RootRotation | None = None,
    survey: Callable[[], Awaitable[Survey]] = nobody_is_there,
) -> Roots:
    """As a control plane reads it whose own certificate is of the next CA, and whose fleet is nobody."""
    if rotation is not None:
        save_authority(directory, Layout.PARALLAX, NEW if rotation.signs[0] == NEW.certificate else OLD)
        await engine.commit(Event("roots"), [Write(RECORD, rotation.encode())])
    files = IssuerFiles(directory)

    async def enter(*_: object) -> None:
        pytest.fail("nothing is issued here")

    issuance = Issuance(files.current, lambda: TrustBundle((OLD.certificate,)), enter, lambda: NOW)
    desk = Desk(directory, files, issuance, survey, lambda: 0, frozenset, lambda: NOW)
    us, key = control_plane("parallax.local"), generate_key()
    issued = NEW.issue(us, key.public_key(), LeafProfile(), NOW)
    store = CredentialStore(us, Credentials(issued.chain, key, NEW.bundle), NOW)
    roots = Roots(engine, AuditLog(engine, lambda: NOW), desk, [Own(store, None)])
    await roots.load()
    return roots


async def test_what_somebody_is_waited_for_is_written_down(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        roots = await loaded(engine, tmp_path / "certs", PREPARED)
        await roots.acknowledge(someone(), PREPARED.bundle.hash)
        (record,) = await engine.scan(ADOPTED)
        assert record.value == PREPARED.bundle.hash


async def test_who_acknowledges_while_a_rotation_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    async with Interrupted(tmp_path / "data") as engine:
        numbers = count()

        async def acknowledge() -> None:
            await roots.acknowledge(someone(next(numbers)), RETIRING.bundle.hash)

        roots = await loaded(engine, tmp_path / "certs", RETIRING)
        engine.meanwhile = acknowledge
        ending = asyncio.create_task(roots.run())
        async with asyncio.timeout(10):
            while (await roots.status()).rotation is not None:
                await asyncio.sleep(0.01)
        ending.cancel()
        with suppress(asyncio.CancelledError):
            await ending
        engine.meanwhile = None
        assert next(numbers) > 0
        assert await engine.scan(ADOPTED) == []


async def test_while_nothing_rotates_the_latest_are_kept_in_mind_and_the_others_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roots_module, "MAX_IN_MIND", 3)
    async with SqliteEngine(tmp_path / "data") as engine:
        roots = await loaded(engine, tmp_path / "certs")
        for number in (1, 2, 3, 1, 4, 5):
            await roots.acknowledge(someone(number), b"hash")
        assert list(roots._adopted) == [someone(1), someone(4), someone(5)]
        assert await engine.scan(ADOPTED) == []


async def test_until_the_ledger_is_counted_the_stage_is_told_and_nobody_can_be_left_out(
    tmp_path: Path,
) -> None:
    async def survey() -> Survey:
        raise Unavailable("still being counted")

    async with SqliteEngine(tmp_path / "data") as engine:
        roots = await loaded(engine, tmp_path / "certs", PREPARED, survey)
        status = await roots.status()
        assert (status.rotation, status.problem) == (PREPARED, "still being counted")
        assert status.adoption == 0  # as far as anybody knows
        with pytest.raises(Unavailable, match="still being counted"):
            await roots.rotate("client/admin", ["agent/agent-1"], force=True)
        assert (await roots.status()).rotation == PREPARED
