"""What an agent is told of labels: those that let its callers in, all of it, and how it stands by now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.grants import Grants
from parallax.control_plane.policy_feed import PIECE, REMEMBERED, PolicyFeed, Response
from parallax.runtime.authorization import Authorization
from parallax.runtime.methods import OF_AGENTS
from parallax.runtime.policy import Policy, Rule
from parallax.runtime.policy_follower import Told
from parallax.security.errors import Unavailable
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity

AGENT: Final = Identity.parse_short("agent/agent-1")
OLGA: Final = Identity.parse_short("client/olga")
MAX_BYTES: Final = 128 * 1024
NEVER_S: Final = 3_600.0


def rule(label: str, target: str = "agent-1") -> Rule:
    return Rule(label, frozenset({f"label:{label}"}), OF_AGENTS, frozenset({target}))


class Agent:
    """Is told, and knows what it was told."""

    def __init__(self) -> None:
        self.pieces: list[Response] = []
        self.told = Told((), {}, b"")
        self.complete = 0
        self.may_read = asyncio.Event()
        self.may_read.set()

    async def write(self, piece: Response) -> None:
        await self.may_read.wait()
        self.pieces.append(piece)
        if piece.restart:
            self.told = Told((), dict(piece.labels), piece.hash)
        self.told.enter(piece.callers)
        self.complete += piece.complete


class Plane:
    """Tells agents."""

    def __init__(self, tmp_path: Path, *rules: Rule) -> None:
        self.grants = Grants(SqliteEngine(tmp_path / "data"))  # what is in memory will do
        self.authorization = Authorization(
            Policy(rules), DEFAULT_TRUST_DOMAIN, labels_of=self.grants.labels_of
        )
        self.feed = PolicyFeed(self.authorization, self.grants)
        self.grants.on_change = self.feed.note

    def grant(self, identity: Identity = OLGA, **labels: str) -> None:
        self.grants.granted(identity, labels)

    @asynccontextmanager
    async def telling(self, beat_s: float = NEVER_S) -> AsyncIterator[Agent]:
        agent = Agent()
        telling = asyncio.create_task(self.feed.tell(AGENT, beat_s, agent.write))
        await settled()
        yield agent
        self.feed.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await telling


async def settled() -> None:
    """All that is to be told is told: nothing here waits for anything else."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_an_agent_is_told_of_the_labels_alone_that_let_callers_in_there(tmp_path: Path) -> None:
    plane = Plane(tmp_path, rule("team=audit"), rule("team=sales", "agent-2"))
    plane.grant(team="audit", zone="a")
    plane.grant(Identity.parse_short("client/omar"), team="sales")
    plane.grant(AGENT, env="prod")
    async with plane.telling() as agent:
        assert agent.told.holders == {"label:team=audit": {"client/olga"}}
        assert agent.told.own == {"env": "prod"}
        assert agent.told.labels_of(OLGA) == {"team": "audit"}
        assert agent.told.labels_of(Identity.parse_short("agent/olga")) == {}


async def test_a_change_is_told_by_itself(tmp_path: Path) -> None:
    plane = Plane(tmp_path, rule("team=audit"))
    async with plane.telling() as agent:
        plane.grant(team="audit")
        await settled()
        assert agent.told.holders["label:team=audit"] == {"client/olga"}
        plane.grant(team="sales")
        await settled()
        assert agent.told.holders["label:team=audit"] == set()
        assert [piece.restart for piece in agent.pieces].count(True) == 1
        assert agent.complete == 3


async def test_what_no_rule_names_wakes_nobody(tmp_path: Path) -> None:
    plane = Plane(tmp_path, rule("team=audit"))
    async with plane.telling() as agent:
        before = len(agent.pieces)
        plane.grant(zone="a")
        await settled()
        assert len(agent.pieces) == before


async def test_another_policy_is_told_with_whoever_has_its_labels_by_then(tmp_path: Path) -> None:
    """Also with what was granted while no rule named it."""
    plane = Plane(tmp_path, rule("team=audit"))
    plane.grant(team="audit")
    async with plane.telling() as agent:
        plane.authorization.replace(Policy((rule("zone=a"),)))
        plane.feed.wake()
        await settled()
        assert agent.told.holders == {}
        plane.grant(team="sales")
        plane.grant(Identity.parse_short("client/omar"), team="audit")
        plane.authorization.replace(Policy((rule("team=audit"),)))
        plane.feed.wake()
        await settled()
        assert agent.told.holders == {"label:team=audit": {"client/omar"}}


async def test_who_loses_a_label_while_others_are_told_never_has_it_again(tmp_path: Path) -> None:
    """What is told later is how it stands, not each step on the way."""
    plane = Plane(tmp_path, rule("team=audit"))
    async with plane.telling() as agent:
        agent.may_read.clear()
        plane.grant(Identity.parse_short("client/omar"), team="audit")
        await settled()
        plane.grant(team="audit")
        plane.grant()
        before = len(agent.pieces)
        agent.may_read.set()
        await settled()
        told = [each for piece in agent.pieces[before:] for each in piece.callers]
        assert "client/olga" in {name for each in told for name in each.others}
        assert "client/olga" not in {name for each in told for name in each.holders}


async def test_all_of_it_arrives_in_pieces_that_are_bounded(tmp_path: Path) -> None:
    plane = Plane(tmp_path, rule("team=audit"), rule("zone=a"))
    everybody = [
        Identity.parse_short(f"agent/{f'agent-{number:05}'.ljust(63, 'x')}") for number in range(PIECE + 1)
    ]
    for each in everybody:
        plane.grant(each, team="audit", zone="a")
    async with plane.telling() as agent:
        names = {each.short for each in everybody}
        assert agent.told.holders == {"label:team=audit": names, "label:zone=a": names}
        assert len(agent.pieces) == 1 + 2 * 2 + 1
        assert max(piece.ByteSize() for piece in agent.pieces) <= MAX_BYTES
        assert [piece.complete for piece in agent.pieces].index(True) == len(agent.pieces) - 1


async def test_who_reads_too_slowly_is_told_everything_once_more(tmp_path: Path) -> None:
    plane = Plane(tmp_path, rule("team=audit"))
    async with plane.telling() as agent:
        agent.may_read.clear()
        plane.grant(team="audit")
        await settled()
        for number in range(REMEMBERED + 1):
            plane.grant(Identity.parse_short(f"client/c-{number}"), team="audit")
        plane.grant()
        agent.may_read.set()
        await settled()
        assert [piece.restart for piece in agent.pieces].count(True) == 2
        assert len(agent.told.holders["label:team=audit"]) == REMEMBERED + 1
        assert agent.told.labels_of(OLGA) == {}


async def test_that_nothing_is_new_is_told_again_and_again(tmp_path: Path) -> None:
    plane = Plane(tmp_path)
    async with plane.telling(beat_s=0.01) as agent, asyncio.timeout(5):
        while agent.complete < 5:
            await asyncio.sleep(0.01)
        assert sum(not piece.complete for piece in agent.pieces) == 1
