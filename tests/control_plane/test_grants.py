"""Which labels an identity was granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallax.control_plane.engines.engine import Event
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.grants import Grants
from parallax.security.errors import Conflict
from parallax.security.identity import Identity

AGENT = Identity.parse_short("agent/agent-7")


async def test_granted_labels_outlive_the_process(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        assert grants.labels_of(AGENT) == {}
        await engine.commit(Event("test"), [await grants.plan(AGENT, {"zone": "a"})])
        grants.granted(AGENT, {"zone": "a"})
        assert grants.labels_of(AGENT) == {"zone": "a"}
    async with SqliteEngine(tmp_path / "data") as engine:
        again = Grants(engine)
        await again.load()
        assert again.labels_of(AGENT) == {"zone": "a"}
        assert again.labels_of(Identity.parse_short("client/agent-7")) == {}


async def test_of_two_who_become_one_identity_one_does_not(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        grants = Grants(engine)
        first, second = await grants.plan(AGENT, {}), await grants.plan(AGENT, {"zone": "b"})
        await engine.commit(Event("test"), [first])
        with pytest.raises(Conflict):
            await engine.commit(Event("test"), [second])
