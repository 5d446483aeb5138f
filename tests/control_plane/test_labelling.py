"""Labels granted and taken back: what is in force is what is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from parallax.control_plane.audit import AuditLog, Deed, Entry
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.engines.engine import Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.grants import Grants, Regrant
from parallax.control_plane.labelling import Labelling, changed
from parallax.security.errors import Fault, InvalidRequest, InvalidTransition, StorageFailed
from parallax.security.identity import Identity
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.tokens import MAX_LABELS

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ADMIN = "spiffe://parallax.local/client/admin"
OLGA = Identity.parse_short("client/olga")
OMAR = Identity.parse_short("client/omar")


class Desk:
    """Where labels are granted, and what has become of it."""

    def __init__(self, engine: SqliteEngine) -> None:
        self.engine = engine
        self.grants = Grants(engine)
        self.revocations = Revocations()
        self.labelling = Labelling(self.grants, AuditLog(engine, lambda: NOW), self.revocations)
        self.told: list[Regrant] = []
        self.grants.on_change = self.told.append

    async def grant(self, identity: Identity = OLGA, *taken: str, **granted: str) -> dict[str, str]:
        return dict(await self.labelling.change(identity, granted, taken, ADMIN, "ipv4:127.0.0.1:1"))

    async def audited(self) -> list[Entry]:
        page = await AuditReader(self.engine).page(0)
        return [Entry.decode(number, content) for number, content in page.kept]


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with SqliteEngine(tmp_path / "data") as engine:
        yield Desk(engine)


async def test_labels_are_granted_beside_others_and_taken_back(desk: Desk) -> None:
    assert await desk.grant(team="audit", env="prod") == {"team": "audit", "env": "prod"}
    assert await desk.grant(OLGA, "env", team="sales", zone="a") == {"team": "sales", "zone": "a"}
    assert desk.grants.labels_of(OLGA) == {"team": "sales", "zone": "a"}
    assert desk.grants.labels_of(OMAR) == {}
    again = Grants(desk.engine)
    await again.load()
    assert again.labels_of(OLGA) == {"team": "sales", "zone": "a"}
    assert set(again.holders("label:team=sales")) == {OLGA}
    assert not again.holders("label:team=audit")


async def test_who_is_revoked_is_granted_nothing_until_reinstated(desk: Desk) -> None:
    desk.revocations.cut(OLGA, WITHDRAWN)
    with pytest.raises(InvalidTransition, match="is revoked: reinstate it"):
        await desk.grant(OLGA, team="audit")
    assert desk.grants.labels_of(OLGA) == {}
    desk.revocations.cut(OLGA, NOW)
    assert await desk.grant(OLGA, team="audit") == {"team": "audit"}


async def test_a_name_that_is_kept_for_a_device_has_no_labels_before(desk: Desk) -> None:
    await desk.engine.commit(Event("name"), [desk.grants.reserve(OLGA)])
    again = Grants(desk.engine)
    await again.load()
    labelling = Labelling(again, AuditLog(desk.engine, lambda: NOW), desk.revocations)
    with pytest.raises(InvalidTransition, match="kept for a device"):
        await labelling.change(OLGA, {"team": "audit"}, (), ADMIN)
    assert again.is_reserved(OLGA)
    assert not again.holders("label:team=audit")


async def test_whoever_has_a_label_is_found_by_it(desk: Desk) -> None:
    await desk.grant(OLGA, team="audit")
    await desk.grant(OMAR, team="audit")
    assert set(desk.grants.holders("label:team=audit")) == {OLGA, OMAR}
    await desk.grant(OLGA, "team")
    assert set(desk.grants.holders("label:team=audit")) == {OMAR}
    await desk.grant(OMAR, team="sales")
    assert not desk.grants.holders("label:team=audit")


async def test_a_change_tells_which_labels_it_touched(desk: Desk) -> None:
    await desk.grant(team="audit", env="prod")
    await desk.grant(OLGA, "env", team="sales")
    assert [each.labels for each in desk.told] == [
        {"label:team=audit", "label:env=prod"},
        {"label:team=audit", "label:env=prod", "label:team=sales"},
    ]


async def test_each_change_is_audited_with_who_made_it(desk: Desk) -> None:
    await desk.grant(team="audit")
    await desk.grant(OLGA, "team", zone="a")
    deeds = [entry.deed for entry in await desk.audited()]
    assert {(deed.action, deed.by, deed.subject, deed.source) for deed in deeds} == {
        ("identity/labelled", ADMIN, str(OLGA), "ipv4:127.0.0.1:1")
    }
    assert sorted((deed.detail["granted"], deed.detail["taken"]) for deed in deeds) == [
        ("team=audit", ""),
        ("zone=a", "team"),
    ]


async def test_what_changes_nothing_is_neither_audited_nor_told(desk: Desk) -> None:
    await desk.grant(team="audit")
    await desk.grant(team="audit")
    assert len(await desk.audited()) == len(desk.told) == 1


async def test_changes_at_once_all_count(desk: Desk) -> None:
    await asyncio.gather(*(desk.grant(OLGA, **{f"key-{number}": "x"}) for number in range(20)))
    assert set(desk.grants.labels_of(OLGA)) == {f"key-{number}" for number in range(20)}


async def test_a_change_whose_asker_hangs_up_is_in_force_once_it_is_recorded(desk: Desk) -> None:
    asking = asyncio.create_task(desk.grant(team="audit"))
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(10):
        while not desk.told:
            await asyncio.sleep(0.01)
    assert desk.grants.labels_of(OLGA) == (await desk.grants.stored(OLGA))[0] == {"team": "audit"}


class Overtaken(AuditLog):
    """Somebody is enrolled just before the first deed is recorded."""

    def __init__(self, engine: SqliteEngine, grants: Grants) -> None:
        super().__init__(engine, lambda: NOW)
        self._storage, self._grants, self._is_first = engine, grants, True

    async def commit(self, deed: Deed, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        if self._is_first:
            self._is_first = False
            await self._storage.commit(Event("test"), [await self._grants.plan(OLGA, {"zone": "b"})])
            self._grants.granted(OLGA, {"zone": "b"})
        return await super().commit(deed, writes)


async def test_labels_of_an_enrollment_meanwhile_are_what_is_changed(desk: Desk) -> None:
    await desk.grant(team="audit")
    overtaken = Labelling(desk.grants, Overtaken(desk.engine, desk.grants), desk.revocations)
    assert await overtaken.change(OLGA, {"env": "prod"}, (), ADMIN) == {"zone": "b", "env": "prod"}
    assert desk.grants.labels_of(OLGA) == {"zone": "b", "env": "prod"}


class Full(AuditLog):
    """Has no room for another deed."""

    async def commit(self, deed: Deed, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        raise StorageFailed(f"no room for {deed.action}", Fault.FULL)


async def test_what_cannot_be_recorded_is_not_in_force(desk: Desk) -> None:
    await desk.grant(team="audit")
    full = Labelling(desk.grants, Full(desk.engine, lambda: NOW), desk.revocations)
    with pytest.raises(StorageFailed):
        await full.change(OLGA, {"env": "prod"}, ["team"], ADMIN)
    assert desk.grants.labels_of(OLGA) == {"team": "audit"}
    assert set(desk.grants.holders("label:team=audit")) == {OLGA}


@pytest.mark.parametrize(
    ("granted", "taken", "why"),
    [
        ({}, ["taem"], r"no label 'taem' to take back: it has 'team=audit'"),
        ({"team": "x"}, ["team"], "both granted and taken back"),
        ({"": "x"}, [], "not a label"),
        ({"a b": "x"}, [], "not a label"),
        ({"a": "x y"}, [], "not a label"),
        ({"a=b": "x"}, [], "not a label"),
        ({f"key-{number}": "x" for number in range(MAX_LABELS)}, [], f"{MAX_LABELS + 1} labels"),
    ],
    ids=["mistyped", "both", "no key", "blank in a key", "blank in a value", "equals sign", "too many"],
)
def test_what_cannot_be_granted_or_was_not_is_refused(
    granted: dict[str, str], taken: list[str], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        changed({"team": "audit"}, granted, taken)


def test_of_whom_nothing_was_granted_nothing_is_taken_back() -> None:
    with pytest.raises(InvalidRequest, match="it has no labels"):
        changed({}, {}, ["team"])


async def test_pages_hold_those_alone_who_have_labels(desk: Desk) -> None:
    for number in range(5):
        await desk.grant(Identity.parse_short(f"agent/agent-{number}"), **({"a": "b"} if number % 2 else {}))
    await desk.grant(OLGA, team="audit")
    await desk.grant(OLGA, "team")
    first, more = await desk.grants.page("", 1)
    rest, end = await desk.grants.page(more, 10)
    assert [identity.name for identity, _ in (*first, *rest)] == ["agent-1", "agent-3"]
    assert end == ""
