"""Which labels an identity was granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallax.control_plane.engines.engine import Event
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.grants import Grants, Regrant
from parallax.security.errors import Conflict
from parallax.security.identity import Identity

AGENT, OTHER = (Identity.parse_short(f"agent/agent-{number}") for number in (7, 8))


async def loaded(engine: SqliteEngine) -> Grants:
    grants = Grants(engine)
    await grants.load()
    return grants


async def test_granted_labels_outlive_the_process(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        assert grants.labels_of(AGENT) == {}
        await engine.commit(Event("test"), [await grants.plan(AGENT, {"zone": "a"})])
        grants.granted(AGENT, {"zone": "a"})
        assert grants.labels_of(AGENT) == {"zone": "a"}
    async with SqliteEngine(tmp_path / "data") as engine:
        again = await loaded(engine)
        assert again.labels_of(AGENT) == {"zone": "a"}
        assert again.labels_of(Identity.parse_short("client/agent-7")) == {}


async def test_of_two_who_become_one_identity_one_does_not(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        first, second = await grants.plan(AGENT, {}), await grants.plan(AGENT, {"zone": "b"})
        await engine.commit(Event("test"), [first])
        with pytest.raises(Conflict):
            await engine.commit(Event("test"), [second])


async def test_who_was_granted_nothing_or_had_it_taken_back_has_no_labels_and_is_known(
    tmp_path: Path,
) -> None:
    changes: list[Regrant] = []
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        grants.on_change = changes.append
        assert not await grants.knows(AGENT)
        for labels in ({}, {"zone": "a"}, {}):
            await engine.commit(Event("test"), [await grants.plan(AGENT, labels)])
            grants.granted(AGENT, labels)
        assert changes == 2 * [Regrant(AGENT, frozenset({"label:zone=a"}))]
        again = await loaded(engine)
        for each in (grants, again):
            assert each.labels_of(AGENT) == {}
            assert not each.holders("label:zone=a")
            assert await each.knows(AGENT)
            assert not each.is_reserved(AGENT)
            assert not await each.knows(OTHER)


@pytest.mark.parametrize("labels", [{}, {"zone": "a"}])
async def test_a_name_is_reserved_until_something_is_granted_to_it(
    tmp_path: Path, labels: dict[str, str]
) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        await engine.commit(Event("test"), [grants.reserve(AGENT)])
        grants.reserved(AGENT)
        for each in (grants, await loaded(engine)):
            assert each.is_reserved(AGENT)
            assert await each.knows(AGENT)
            assert each.labels_of(AGENT) == {}
            assert not each.is_reserved(OTHER)
        await engine.commit(Event("test"), [await grants.plan(AGENT, labels)])
        grants.granted(AGENT, labels)
        for each in (grants, await loaded(engine)):
            assert not each.is_reserved(AGENT)
            assert each.labels_of(AGENT) == labels


async def test_equal_labels_are_kept_once_and_part_when_one_is_changed(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        for identity in (AGENT, OTHER):
            await engine.commit(Event("test"), [await grants.plan(identity, {"zone": "a"})])
            grants.granted(identity, {"zone": "a"})
        for each in (grants, await loaded(engine)):
            assert each.labels_of(AGENT) is each.labels_of(OTHER)
        grants.granted(OTHER, {"zone": "b"})
        assert (grants.labels_of(AGENT), grants.labels_of(OTHER)) == ({"zone": "a"}, {"zone": "b"})
