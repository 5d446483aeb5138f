"""What a watcher is told: nothing twice, nothing too little, and nobody waits for it."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallax.control_plane.registry import AgentRef
from parallax.control_plane.sessions import Session
from parallax.control_plane.views import AgentFilter, AgentView, State, Views
from parallax.control_plane.watch import (
    BATCH,
    MAX_WATCHERS,
    UNSETTLED_LIMIT,
    Batch,
    Change,
    Mark,
    Watcher,
)
from parallax.runtime.description import AgentDescription
from parallax.security.errors import InvalidRequest, Superseded, Unavailable

if TYPE_CHECKING:
    from tests.control_plane.conftest import MakeWorld, World

ALL = AgentFilter()
ECHO = AgentFilter(capabilities=frozenset({"echo"}))
READY = AgentFilter(states=frozenset({State.READY}))


def told(world: World, watcher: Watcher) -> list[Batch]:
    """All that *watcher* is told without anything else happening."""
    batches = []
    while (batch := take(world, watcher)) is not None:
        batches.append(batch)
    return batches


def take(world: World, watcher: Watcher) -> Batch | None:
    """The next batch, if there is one at once."""
    task = world.loop.create_task(watcher.take())
    world.spin()
    if task.done():
        return task.result()
    task.cancel()
    world.spin()
    return None


def events(batches: list[Batch]) -> list[tuple[str, str]]:
    return [(change.kind.name, str(change.ref)) for batch in batches for change in batch.changes]


def begun(world: World, wanted: AgentFilter = ALL) -> Watcher:
    """A watcher that has been told what there is."""
    watcher = world.changes.watch(wanted)
    assert told(world, watcher)[-1].synced
    return watcher


class TestBeginning:
    def test_of_an_empty_fleet_is_synced_at_once(self, world: World) -> None:
        [batch] = told(world, world.changes.watch(ALL))
        assert (batch.changes, batch.fresh, batch.synced) == ((), True, True)
        assert batch.resume

    def test_tells_the_whole_state_in_order_and_then_that_it_is_synced(self, world: World) -> None:
        for name in ("c", "a", "anonymous/b"):
            world.join(name)
        [batch] = told(world, world.changes.watch(ALL))
        assert events([batch]) == [("ADDED", "a"), ("ADDED", "anonymous/b"), ("ADDED", "c")]
        assert (batch.fresh, batch.synced) == (True, True)

    @pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 3 * BATCH])
    def test_of_a_large_fleet_comes_in_batches(self, world: World, count: int) -> None:
        for number in range(count):
            world.registry.register(
                AgentRef(f"a{number:04}"), None, AgentDescription(), now=0.0, at=world.wall_clock()
            )
        batches = told(world, world.changes.watch(ALL))
        assert len(events(batches)) == count
        assert max(len(batch.changes) for batch in batches) <= BATCH
        assert [batch.fresh for batch in batches] == [True] + [False] * (len(batches) - 1)
        assert [batch.synced for batch in batches] == [False] * (len(batches) - 1) + [True]
        assert [bool(batch.resume) for batch in batches] == [batch.synced for batch in batches]

    def test_tells_what_changes_meanwhile_once_and_as_it_is(self, world: World) -> None:
        for number in range(2 * BATCH):
            world.register(f"a{number:04}", "h:1")
        watcher = world.changes.watch(ALL)
        first = take(world, watcher)
        assert first is not None
        world.register("a0000", "h:2")  # told already
        world.register(f"a{2 * BATCH - 1:04}", "h:2")  # yet to come
        world.registry.remove(AgentRef("a0001"))
        world.registry.remove(AgentRef(f"a{2 * BATCH - 2:04}"))
        world.register("b", "h:1")
        world.register("0", "h:1")
        rest = told(world, watcher)
        later = [(kind, ref) for kind, ref in events(rest) if (kind, ref[0]) != ("ADDED", "a")]
        assert later == [("ADDED", "b"), ("CHANGED", "a0000"), ("REMOVED", "a0001"), ("ADDED", "0")]
        last = next(c for b in rest for c in b.changes if str(c.ref) == f"a{2 * BATCH - 1:04}")
        assert last.view is not None
        assert last.view.record.endpoint == "h:2"
        assert f"a{2 * BATCH - 2:04}" not in {ref for _, ref in events(rest)}

    def test_of_a_filter_that_few_match_lets_others_have_their_turn(self, world: World) -> None:
        for number in range(5 * BATCH):
            world.register(f"a{number:04}", "h:1")
        world.join("z", "echo")
        batches = told(world, world.changes.watch(ECHO))
        assert events(batches) == [("ADDED", "z")]
        assert batches[0].fresh
        assert batches[-1].synced


class TestChanges:
    def test_of_state_description_endpoint_and_generation_are_told(self, world: World) -> None:
        watcher = begun(world)
        session = world.join("a")
        assert events(told(world, watcher)) == [("ADDED", "a")]
        world.join("a")
        assert events(told(world, watcher)) == [("CHANGED", "a")]
        world.register("a", "h:1", "echo")
        [batch] = told(world, watcher)
        [change] = batch.changes
        assert change.view is not None
        assert change.view.record.endpoint == "h:1"
        instance = world.sessions.instance(AgentRef("a"))
        assert instance is not None
        assert instance.active is not None
        world.sessions.drain(instance.active)
        [batch] = told(world, watcher)
        [change] = batch.changes
        assert change.view is not None
        assert change.view.state is State.DRAINING
        for open_session in [*instance.sessions.values(), session]:
            world.leave(open_session)
        assert [c.view and c.view.state for b in told(world, watcher) for c in b.changes] == [
            State.REGISTERED
        ]
        world.registry.remove(AgentRef("a"))
        assert events(told(world, watcher)) == [("REMOVED", "a")]

    def test_of_lease_and_load_are_not(self, world: World) -> None:
        session = world.join("a", max_concurrency=5)
        world.register("a", "h:1")
        watcher = begun(world)
        world.orders("a", 3)
        for task_id in world.tasks(session):
            world.answer(session, task_id)
        world.heartbeat("a")
        world.frame(session)
        world.expire()
        assert told(world, watcher) == []

    def test_that_cancel_each_other_out_are_none(self, world: World) -> None:
        watcher = begun(world)
        revision = world.changes.revision
        world.leave(world.join("a"))
        assert told(world, watcher) == []
        assert world.changes.revision == revision

    def test_of_one_agent_are_told_as_one(self, world: World) -> None:
        watcher = begun(world)
        for _ in range(5):
            world.join("a")
            world.changes.settle()
        [batch] = told(world, watcher)
        assert events([batch]) == [("ADDED", "a")]

    def test_by_a_lease_that_runs_out_are_told(self, world: World) -> None:
        session = world.join("a")
        watcher = begun(world)
        world.advance(16)
        world.expire()
        assert events(told(world, watcher)) == [("REMOVED", "a")]
        world.leave(session)
        assert told(world, watcher) == []

    def test_wake_who_waits(self, world: World) -> None:
        watcher = begun(world)
        waiting = world.loop.create_task(watcher.take())
        world.spin()
        assert not waiting.done()
        world.join("a")
        batch = waiting.result()
        assert batch is not None
        assert events([batch]) == [("ADDED", "a")]


class TestFilter:
    def test_tells_who_comes_to_match_and_who_ceases_to(self, world: World) -> None:
        watcher = begun(world, READY)
        session = world.join("a")
        assert events(told(world, watcher)) == [("ADDED", "a")]
        world.sessions.drain(session)
        assert events(told(world, watcher)) == [("REMOVED", "a")]
        world.leave(session)
        assert told(world, watcher) == []
        world.join("a")
        assert events(told(world, watcher)) == [("ADDED", "a")]

    def test_hides_changes_of_others(self, world: World) -> None:
        world.join("other")
        watcher = begun(world, ECHO)
        world.join("other")
        world.join("third")
        assert told(world, watcher) == []


class TestSlowWatcher:
    def test_keeps_no_more_than_one_entry_for_each_agent(self, world: World) -> None:
        world.join("a")
        watcher = begun(world)
        for number in range(200):
            world.join("a")
            world.leave(world.join(f"b{number}"))
            world.changes.settle()
        assert len(watcher) == 1
        assert events(told(world, watcher)) == [("CHANGED", "a")]

    def test_keeps_nothing_of_agents_that_came_and_went_unseen(self, world: World) -> None:
        watcher = begun(world)
        for number in range(200):
            session = world.join(f"anonymous/x{number}")
            world.changes.settle()
            world.leave(session)
            world.changes.settle()
        assert len(watcher) == 0
        assert told(world, watcher) == []

    def test_that_has_closed_is_told_nothing(self, world: World) -> None:
        watcher = begun(world)
        watcher.close()
        watcher.close()
        world.join("a")
        world.changes.settle()
        assert len(watcher) == len(world.changes) == 0


class TestResuming:
    def test_tells_only_what_changed_since(self, world: World) -> None:
        world.join("a")
        world.join("b")
        [batch] = told(world, world.changes.watch(ALL))
        world.join("c")
        world.registry.remove(AgentRef("a"))
        batches = told(world, world.changes.watch(ALL, batch.resume))
        assert events(batches) == [("CHANGED", "c"), ("REMOVED", "a")]
        assert [(b.fresh, b.synced) for b in batches] == [(False, True)]

    def test_where_nothing_changed_is_synced_at_once(self, world: World) -> None:
        world.join("a")
        [batch] = told(world, world.changes.watch(ALL))
        [again] = told(world, world.changes.watch(ALL, batch.resume))
        assert (again.changes, again.fresh, again.synced) == ((), False, True)
        assert again.resume == batch.resume

    def test_after_a_batch_that_left_some_waiting_tells_those(self, world: World) -> None:
        watcher = begun(world)
        for number in range(BATCH + 2):
            world.registry.register(
                AgentRef(f"a{number:04}"), None, AgentDescription(), now=0.0, at=world.wall_clock()
            )
        world.changes._log_limit = 10_000
        first = take(world, watcher)
        assert first is not None
        watcher.close()
        batches = told(world, world.changes.watch(ALL, first.resume))
        assert {ref for _, ref in events(batches)} == {f"a{BATCH:04}", f"a{BATCH + 1:04}"}

    @pytest.mark.parametrize("missed", [8, 9])
    def test_reaches_as_far_back_as_the_log(self, world: World, missed: int) -> None:
        [batch] = told(world, world.changes.watch(ALL))
        for number in range(missed):
            world.join(f"a{number}")
            world.changes.settle()
        first, *_ = told(world, world.changes.watch(ALL, batch.resume))
        assert first.fresh == (missed > 8)
        assert len(first.changes) == missed

    def test_is_not_outrun_by_one_agent_that_changes_all_the_time(self, world: World) -> None:
        [batch] = told(world, world.changes.watch(ALL))
        for _ in range(100):
            world.join("a")
            world.changes.settle()
        [again] = told(world, world.changes.watch(ALL, batch.resume))
        assert not again.fresh

    @pytest.mark.parametrize(
        "other",
        [
            lambda mark: Mark(mark.epoch - 1, mark.revision, mark.filter_digest),
            lambda mark: Mark(mark.epoch, mark.revision + 1, mark.filter_digest),
            lambda mark: Mark(mark.epoch, mark.revision, b"otherone"),
        ],
        ids=["another life", "the future", "another filter"],
    )
    def test_from_elsewhere_begins_anew(self, world: World, other: Callable[[Mark], Mark]) -> None:
        world.join("a")
        [batch] = told(world, world.changes.watch(ALL))
        [again] = told(world, world.changes.watch(ALL, str(other(Mark.parse(batch.resume)))))
        assert (again.fresh, again.synced, events([again])) == (True, True, [("ADDED", "a")])

    def test_with_another_filter_begins_anew(self, world: World) -> None:
        world.join("a", "echo")
        [batch] = told(world, world.changes.watch(ALL))
        [again] = told(world, world.changes.watch(ECHO, batch.resume))
        assert again.fresh

    @pytest.mark.parametrize(
        "token", ["x", "!", "AAAA", "ä", "\x00", " ", base64.b64encode(b"a" * 25).decode(), "A" * 100_000]
    )
    def test_with_what_is_no_token_is_refused(self, world: World, token: str) -> None:
        with pytest.raises(InvalidRequest, match="not one that a watch has given"):
            world.changes.watch(ALL, token)
        assert len(world.changes) == 0

    def test_spells_the_largest_numbers(self) -> None:
        mark = Mark(2**64 - 1, 2**64 - 1, b"\xff" * 8)
        assert Mark.parse(str(mark)) == mark

    def test_knows_a_filter_in_whichever_order_it_is_stated(self, make_world: MakeWorld) -> None:
        world = make_world()
        one = AgentFilter(frozenset({"a", "b"}), {"x": "1", "y": None}, frozenset(State), verified=True)
        two = AgentFilter(frozenset({"b", "a"}), {"y": None, "x": "1"}, frozenset(State), verified=True)
        three = AgentFilter(frozenset({"a", "b"}), {"x": "1", "y": ""}, frozenset(State), verified=True)
        digests = [world.changes.watch(each).digest for each in (one, two, three)]
        assert digests[0] == digests[1] != digests[2]


class TestEnd:
    def test_ends_every_watch_and_lets_none_begin(self, world: World) -> None:
        watcher = begun(world)
        waiting = world.loop.create_task(watcher.take())
        world.spin()
        world.changes.close()
        world.spin()
        assert waiting.done()
        assert waiting.result() is None
        with pytest.raises(Unavailable, match="shutting down"):
            world.changes.watch(ALL)

    def test_no_more_than_so_many_watch(self, world: World) -> None:
        watchers = [world.changes.watch(ALL) for _ in range(MAX_WATCHERS)]
        with pytest.raises(Unavailable, match="as many as may be"):
            world.changes.watch(ALL)
        watchers[0].close()
        world.changes.watch(ALL)


def test_notes_do_not_pile_up_where_nobody_watches(world: World) -> None:
    for number in range(3 * UNSETTLED_LIMIT):
        world.registry.register(
            AgentRef(f"a{number}"), None, AgentDescription(), now=0.0, at=world.wall_clock()
        )
        world.registry.remove(AgentRef(f"a{number}"))
    assert len(world.changes._noted) < UNSETTLED_LIMIT


def test_a_change_costs_the_same_in_a_small_and_in_a_large_fleet(world: World) -> None:
    """Counted, not timed: how many agents are looked at."""
    for number in range(2_000):
        world.registry.register(
            AgentRef(f"a{number}"), None, AgentDescription(), now=0.0, at=world.wall_clock()
        )
    looks: list[AgentRef] = []

    class Counting(Views):
        def find(self, ref: AgentRef) -> AgentView | None:
            looks.append(ref)
            return super().find(ref)

    watcher = begun(world)
    world.changes.settle()
    world.changes.views = Counting(world.registry, world.sessions)
    world.join("a7")
    assert len(events(told(world, watcher))) == 1
    assert looks == [AgentRef("a7")] * 2


OPS = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "join",
                "join",
                "leave",
                "register",
                "remove",
                "drain",
                "time",
                "take",
                "take",
                "resume",
                "settle",
            )
        ),
        st.integers(0, 2**16),
    ),
    max_size=120,
)


@pytest.mark.parametrize("wanted", [ALL, ECHO, READY], ids=["all", "echo", "ready"])
def test_whoever_follows_what_it_is_told_knows_the_fleet(make_world: MakeWorld, wanted: AgentFilter) -> None:
    """Whatever happens, however slowly it reads and wherever it resumes."""

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(OPS)
    def run(ops: list[tuple[str, int]]) -> None:
        world = make_world()
        try:
            follow(world, wanted, ops)
        finally:
            world.close()

    run()


class Follower:
    """Keeps its own view of the fleet, by what it is told alone."""

    def __init__(self, world: World, wanted: AgentFilter) -> None:
        self.world, self.wanted = world, wanted
        self.watcher, self.token = world.changes.watch(wanted), ""
        self.known: dict[AgentRef, AgentView] = {}
        self._fresh: set[AgentRef] | None = None

    def read(self) -> bool:
        """One batch, if there is one."""
        batch = take(self.world, self.watcher)
        if batch is None:
            return False
        if batch.fresh:
            self._fresh = set()
        for change in batch.changes:
            self._learn(change)
        if batch.synced and self._fresh is not None:
            self.known = {ref: view for ref, view in self.known.items() if ref in self._fresh}
            self._fresh = None
        self.token = batch.resume or self.token
        return True

    def resume(self) -> None:
        """Break off and come back."""
        self.watcher.close()
        self.watcher, self._fresh = self.world.changes.watch(self.wanted, self.token), None

    def _learn(self, change: Change) -> None:
        if change.view is None:
            self.known.pop(change.ref, None)
            return
        assert self.wanted.matches(change.view.record, change.view.state)
        self.known[change.ref] = change.view
        if self._fresh is not None:
            self._fresh.add(change.ref)


def step(world: World, sessions: list[Session], op: str, pick: random.Random) -> None:
    """Something happens to the fleet."""
    name = pick.choice(("a", "b", "c", "d", "e", "f", "anonymous/a", "g", "h", "i", "j", "k"))
    capabilities = pick.choice(((), ("echo",)))
    match op:
        case "join":
            with suppress(Superseded):
                sessions.append(world.join(name, *capabilities, instance=pick.choice(("1", "1", "2"))))
        case "leave" if sessions:
            world.leave(sessions.pop(pick.randrange(len(sessions))))
        case "drain" if sessions:
            world.sessions.drain(pick.choice(sessions))
        case "register":
            world.register(name, pick.choice(("", "h:1")), *capabilities)
        case "remove":
            world.sessions.remove(AgentRef.parse(name))
        case "time":
            world.advance(6)
            world.expire()
        case "settle":
            world.changes.settle()


def follow(world: World, wanted: AgentFilter, ops: list[tuple[str, int]]) -> None:
    world.changes.batch = 2
    follower, sessions = Follower(world, wanted), list[Session]()
    for op, number in ops:
        if op == "take":
            follower.read()
        elif op == "resume":
            follower.resume()
        else:
            step(world, sessions, op, random.Random(number))  # noqa: S311
        bound = len(world.registry) + len(follower.known) + world.changes._log_limit
        assert len(follower.watcher) <= bound
    while follower.read():
        pass
    views = map(world.changes.views.of, world.registry.records())
    assert follower.known == {v.record.ref: v for v in views if wanted.matches(v.record, v.state)}
