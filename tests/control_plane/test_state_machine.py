"""
Sessions, registry and dispatcher together, whatever happens in whatever order.

Agents join, leave, drain, come back and take over from one another; leases run out;
orders come, are answered by right and wrong agents, at once or in parts, cancelled, and
time out. After every step the books must balance, and when all is over they must be empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from parallax.control_plane.dispatch import MAX_ATTEMPTS
from parallax.control_plane.order import MAX_PART_CREDIT, Capability, Order, Place, parse_target
from parallax.control_plane.registry import AgentRef, Way
from parallax.control_plane.sessions import MAX_TAKE_OVERS, TAKE_OVER_WINDOW_S, Instance, Session
from parallax.control_plane.waiter import Result
from parallax.runtime.description import AgentDescription
from parallax.runtime.link import End, Link, Receiver, Said
from parallax.runtime.outcome import Failure, OutcomeCode, Payload, Value
from parallax.security.errors import Expired, LeaseExpired, NoSuchAgent, NotAuthorized, Revoked, Superseded
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind

if TYPE_CHECKING:
    from tests.control_plane.conftest import MakeWorld, World

QUEUE_LIMIT: Final = 3
AGENTS: Final = ("a", "b", "anonymous/c")
CAPABILITIES: Final = ("echo", "sum")
TARGETS: Final = (*AGENTS, "c", *(f"capability:{name}" for name in CAPABILITIES), "capability:none")
CALLERS: Final = ("greedy", "modest", "rare")
CREDITS: Final = (0, 1, 20, MAX_PART_CREDIT, 2**64 - 1)
WRONG: Final = Value(Payload(b"not the holder's"), 1.0)

ANSWERED: Final = (None, OutcomeCode.HANDLER_FAILED, OutcomeCode.AGENT_LOST, OutcomeCode.REVOKED)

number = st.integers(0, 1_000)  # picks one of what there is at that moment


@dataclass(eq=False)
class Ordered:
    """An order and what its caller knows about it."""

    task: asyncio.Task[Result]
    target: str
    idempotent: bool
    allow_unverified: bool
    deadline: float
    no_wait_after: float
    credit: int  # as the caller should reckon it
    parts: list[bytes] = field(default_factory=list)  # that it should have
    attempts: int | None = None  # when the first of them came


class Books(RuleBasedStateMachine):
    def __init__(self, make_world: Callable[..., World]) -> None:
        super().__init__()
        self.world = make_world(queue_limit=QUEUE_LIMIT)
        self.streams: list[Session] = []  # whose stream has not ended
        self.broken: set[Session] = set()  # for all that their agent knows
        self.lapsed: set[Session] = set()  # whose certificate has expired
        self.instances: list[Instance] = []  # all there ever were
        self.orders: list[Ordered] = []
        self.taken_over: dict[AgentRef, list[float]] = {}
        self.answers: dict[int, Value] = {}

    # Agents.

    @initialize()
    def some_are_there(self) -> None:
        for agent in AGENTS:
            self.join(agent, b"two", {"echo"})

    @rule(
        agent=st.sampled_from(AGENTS),
        instance=st.sampled_from((b"one", b"two")),
        capabilities=st.sets(st.sampled_from(CAPABILITIES)),
    )
    def join(self, agent: str, instance: bytes, capabilities: set[str]) -> None:
        ref, now = AgentRef.parse(agent), self.world.now
        before = self.world.sessions.instance(ref)
        sessions_before = dict(before.sessions) if before else {}
        held = self.holders()
        recent = [t for t in self.taken_over.get(ref, []) if t > now - TAKE_OVER_WINDOW_S]
        takes_over = before is not None and before.instance_id != instance
        refused = takes_over and len(recent) >= MAX_TAKE_OVERS
        try:
            session = self.open(ref, instance, capabilities)
        except Superseded:
            assert refused
            assert self.world.sessions.instance(ref) is before
            assert before is not None
            assert before.sessions == sessions_before
        else:
            assert not refused
            if takes_over:
                self.taken_over[ref] = [*recent, now]
                assert before is not None
                assert all(s.over for s in before.sessions.values())
            self.streams.append(session)
            if session.instance not in self.instances:
                self.instances.append(session.instance)
            assert session.instance.active is session
            assert self.world.registry.get(ref).generation == session.generation
        self.only_the_lost_lost(held)

    @precondition(lambda self: self.streams)
    @rule(which=number, kept=number, capabilities=st.sets(st.sampled_from(CAPABILITIES)))
    def connection_breaks(self, which: int, kept: int, capabilities: set[str]) -> None:
        """The same instance comes back, and names what it still holds: bit by bit of *kept*, or not."""
        instance = self.streams[which % len(self.streams)].instance
        if self.world.sessions.instance(instance.ref) is not instance:
            return
        before = dict(self.holders())
        mine = [task_id for task_id, holder in before.items() if holder is instance]
        named = {task_id for place, task_id in enumerate(mine) if kept >> place & 1}
        older = list(instance.sessions.values())
        session = self.open(instance.ref, instance.instance_id, capabilities, named | {123})
        self.streams.append(session)
        assert instance.active is session
        assert all(s.over for s in older)
        self.broken.update(older)
        assert named <= instance.held.keys()
        assert not (set(mine) - named) & instance.held.keys()
        self.world.spin()
        others = before.keys() - set(mine)
        assert all(self.holders()[task_id] is before[task_id] for task_id in others)

    def open(
        self, ref: AgentRef, instance: bytes, capabilities: set[str], held: set[int] | None = None
    ) -> Session:
        identity = Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, ref.name) if ref.verified else None
        description = AgentDescription(
            capabilities=tuple(capabilities), max_concurrency=1 if instance == b"one" else 3
        )
        return self.world.sessions.open(
            ref,
            identity,
            instance,
            description,
            Link(End.CALLER, Said.HELLO, Receiver()),
            held=held,
            now=self.world.now,
            at=self.world.wall_clock(),
        )

    @precondition(lambda self: self.streams)
    @rule(which=number, revoked=st.sampled_from((None, Revoked("withdrawn"))))
    def stream_ends(self, which: int, revoked: Revoked | None) -> None:
        held = self.holders()
        session = self.streams.pop(which % len(self.streams))
        in_force = self.world.sessions.instance(session.instance.ref)
        given = [o for o in self.orders if self.world.placed[o.task].instance is session.instance]
        given = [o for o in given if self.world.placed[o.task].place is Place.GIVEN]
        self.world.sessions.close(session, revoked)
        self.world.spin()
        for order in given:
            if order.task.done():  # else it is held still, or tried elsewhere
                outcome = order.task.result().outcome
                assert isinstance(outcome, Failure)
                assert outcome.code is (OutcomeCode.REVOKED if revoked else OutcomeCode.AGENT_LOST)
        if in_force is not None and (in_force is not session.instance or in_force.sessions):
            assert self.world.sessions.instance(in_force.ref) is in_force, "removed by something older"
            assert self.world.registry.get(in_force.ref).generation >= in_force.generation
        self.only_the_lost_lost(held)

    @precondition(lambda self: self.streams)
    @rule(which=number)
    def drain(self, which: int) -> None:
        self.world.sessions.drain(self.streams[which % len(self.streams)])

    @precondition(lambda self: self.streams)
    @rule(which=number)
    def certificate_expires(self, which: int) -> None:
        session = self.streams[which % len(self.streams)]
        held = self.holders()
        self.world.sessions.retire(session, Expired("renew it"))
        self.lapsed.add(session)
        assert self.holders() == held

    @precondition(lambda self: self.streams)
    @rule(which=number, kept=number)
    def one_of_two_breaks_off(self, which: int, kept: int) -> None:
        """The other one tells what is still held of what was given on it: bit by bit of *kept*, or not."""
        session = self.streams[which % len(self.streams)]
        instance = session.instance
        before = self.holders()
        given = [task_id for task_id, by in instance.held.items() if by is session]
        lost = {task_id for place, task_id in enumerate(given) if not kept >> place & 1}
        self.world.dispatcher.forgotten(instance, [t for t in instance.held if t not in lost])
        assert not lost & instance.held.keys()
        assert set(given) - lost <= instance.held.keys()
        others = before.keys() - lost
        assert all(self.holders()[task_id] is before[task_id] for task_id in others)

    @precondition(lambda self: self.streams)
    @rule(which=number)
    def write(self, which: int) -> None:
        """The writer of a stream takes what waits."""
        self.world.heard(self.streams[which % len(self.streams)])

    @rule(agent=st.sampled_from(AGENTS), generation=number)
    def deregister(self, agent: str, generation: int) -> None:
        held, ref = self.holders(), AgentRef.parse(agent)
        known = [s.generation for s in self.streams if s.instance.ref == ref]
        stated = known[generation % len(known)] if known else 0
        in_force = {r.ref: r.generation for r in self.world.registry.records()}.get(ref)
        before = self.world.sessions.instance(ref)
        removed = self.world.sessions.remove(ref, stated)
        assert removed == (in_force is not None and stated in (0, in_force))
        assert self.world.sessions.instance(ref) is (None if removed else before)
        self.only_the_lost_lost(held)

    @rule(agent=st.sampled_from(AGENTS))
    def register(self, agent: str) -> None:
        """By the unary call, beside any session."""
        self.world.registry.register(
            AgentRef.parse(agent), None, AgentDescription(), now=self.world.now, at=self.world.wall_clock()
        )

    @rule(agent=st.sampled_from(AGENTS), by_generation=st.booleans())
    def heartbeat_of_a_registration(self, *, agent: str, by_generation: bool) -> None:
        ref = AgentRef.parse(agent)
        record = self.world.registry.find(ref)
        if record is None or record.registration is None:
            with pytest.raises((NoSuchAgent, LeaseExpired)):
                self.world.registry.heartbeat(ref, self.world.now)
        else:
            stated = record.registration.generation if by_generation else 0
            self.world.registry.heartbeat(ref, self.world.now, stated)

    @rule(agent=st.sampled_from(AGENTS))
    def registration_is_taken_back(self, agent: str) -> None:
        ref, held = AgentRef.parse(agent), self.holders()
        record = self.world.registry.find(ref)
        generation = record.registration.generation if record and record.registration else 1_000_000
        beside = record is not None and record.session is not None and record.registration is not None
        assert self.world.registry.retract(ref, generation) == beside
        self.only_the_lost_lost(held)
        assert held == self.holders()

    @precondition(lambda self: self.streams)
    @rule(which=number)
    def heartbeat(self, which: int) -> None:
        session = self.streams[which % len(self.streams)]
        if not session.over:
            self.world.registry.renew(session.instance.ref, self.world.now)

    @rule()
    def leases_are_looked_at(self) -> None:
        held = self.holders()
        self.world.sessions.expire(self.world.now)
        self.only_the_lost_lost(held)

    # Callers.

    @rule(
        wanted=st.sampled_from(TARGETS),
        timeout=st.integers(0, 20),
        wait=st.integers(0, 20),
        idempotent=st.booleans(),
        allow_unverified=st.booleans(),
        caller=st.sampled_from(CALLERS),
        credit=st.sampled_from(CREDITS),
    )
    def order(
        self,
        *,
        wanted: str,
        timeout: int,
        wait: int,
        idempotent: bool,
        allow_unverified: bool,
        caller: str,
        credit: int,
    ) -> None:
        task = self.world.order(
            wanted,
            timeout=timeout,
            wait=wait,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
            caller=caller,
            part_credit=credit,
            data=b"x" * (len(self.orders) % 7),
        )
        now = self.world.now
        deadline = now + timeout
        order = Ordered(
            task,
            wanted,
            idempotent,
            allow_unverified,
            deadline,
            min(deadline, now + wait),
            min(credit, MAX_PART_CREDIT),
        )
        self.orders.append(order)
        if order.task.done() and timeout:
            self.was_refused_fairly(order, caller)

    def was_refused_fairly(self, order: Ordered, caller: str) -> None:
        """OVERLOADED by an agent is only for who has as much waiting there as anybody, but for one."""
        target = parse_target(order.target)
        instance = None if isinstance(target, Capability) else self.world.dispatcher._instances.get(target)
        outcome = order.task.result().outcome
        if instance is None or not isinstance(outcome, Failure) or outcome.code is not OutcomeCode.OVERLOADED:
            return
        assert instance.queue is not None
        lines = {key.rpartition("/")[2]: len(line) for key, line in instance.queue._lines.items()}
        assert sum(lines.values()) >= QUEUE_LIMIT
        assert max(lines.values()) <= lines.get(caller, 0) + 1

    @precondition(lambda self: self.world.dispatcher._instances)
    @rule(
        which=number,
        by_capability=st.booleans(),
        idempotent=st.booleans(),
        caller=st.sampled_from(CALLERS),
        credit=st.sampled_from(CREDITS),
    )
    def order_from_somebody_there(
        self, *, which: int, by_capability: bool, idempotent: bool, caller: str, credit: int
    ) -> None:
        there = list(self.world.dispatcher._instances.values())
        instance = there[which % len(there)]
        capabilities = instance.description.capabilities if by_capability else ()
        wanted = (
            f"capability:{capabilities[which % len(capabilities)]}" if capabilities else str(instance.ref)
        )
        self.order(
            wanted=wanted,
            timeout=60,
            wait=0,
            idempotent=idempotent,
            allow_unverified=True,
            caller=caller,
            credit=credit,
        )

    @precondition(lambda self: self.orders)
    @rule(which=number)
    def cancel(self, which: int) -> None:
        self.world.cancel(self.orders[which % len(self.orders)].task)

    @precondition(lambda self: self.orders)
    @rule(which=number, credit=st.sampled_from(CREDITS))
    def caller_makes_room(self, which: int, credit: int) -> None:
        ordered = self.orders[which % len(self.orders)]
        self.world.dispatcher.allow(self.world.placed[ordered.task], credit)
        if not ordered.task.done():
            ordered.credit = min(ordered.credit + credit, MAX_PART_CREDIT)

    @rule(seconds=st.integers(1, 6))
    def time_passes(self, seconds: int) -> None:
        self.world.advance(seconds)

    # Answers.

    @precondition(lambda self: self.world.dispatcher._given)
    @rule(which=number, failure=st.sampled_from(ANSWERED))
    def holder_answers(self, which: int, failure: OutcomeCode | None) -> None:
        held = self.holders()
        task_id = list(held)[which % len(held)]
        if failure is None:
            self.answers[task_id] = value = Value(Payload(str(task_id).encode()), 1.0)
            self.world.answer_as(held[task_id], task_id, value)
        else:
            self.world.answer_as(held[task_id], task_id, Failure(failure, ""))
        assert task_id not in self.holders()

    @precondition(lambda self: self.world.dispatcher._given)
    @rule(which=number, size=st.integers(0, 30))
    def holder_sends_a_part(self, which: int, size: int) -> None:
        held = self.holders()
        task_id = list(held)[which % len(held)]
        order = self.world.dispatcher._given[task_id]
        ordered = next(o for o in self.orders if self.world.placed[o.task] is order)
        value = bytes([which % 256]) * size
        self.world.dispatcher.part(held[task_id], task_id, value)
        self.world.spin()
        if ordered.credit > 0:
            ordered.credit -= max(1, size)
            ordered.attempts = ordered.attempts or order.attempts
            ordered.parts.append(value)
            assert task_id in self.holders()
        else:
            outcome = ordered.task.result().outcome
            assert isinstance(outcome, Failure)
            assert outcome.code is OutcomeCode.INVALID_RESULT

    @precondition(lambda self: self.world.dispatcher._given)
    @rule(which=number, who=number)
    def somebody_else_answers(self, which: int, who: int) -> None:
        held = self.holders()
        task_id = list(held)[which % len(held)]
        others = [instance for instance in self.instances if instance is not held[task_id]]
        if not others:
            return
        other = others[who % len(others)]
        if other.ref == held[task_id].ref:
            self.world.answer_as(other, task_id, WRONG)
        else:
            with pytest.raises(NotAuthorized):
                self.world.answer_as(other, task_id, WRONG)
        assert self.holders() == held

    @precondition(lambda self: self.instances)
    @rule(who=number, task_id=number)
    def somebody_answers_what_nobody_asked(self, who: int, task_id: int) -> None:
        if task_id not in self.world.dispatcher._given:
            self.world.answer_as(self.instances[who % len(self.instances)], task_id, WRONG)

    # What must hold.

    def holders(self) -> dict[int, Instance]:
        """Which instance holds which task."""
        given = self.world.dispatcher._given.items()
        return {task_id: order.instance for task_id, order in given if order.instance is not None}

    def only_the_lost_lost(self, before: dict[int, Instance]) -> None:
        """Of the tasks held *before*, a moment ago, those of instances no longer in force have failed."""
        self.world.spin()
        kept = {t: i for t, i in before.items() if self.world.sessions.instance(i.ref) is i}
        now = self.holders()
        assert kept.items() <= now.items()
        assert not (before.keys() - kept.keys()) & now.keys()

    @invariant()
    def who_is_in_force(self) -> None:
        world = self.world
        for instance in self.instances:
            is_in_force = world.sessions.instance(instance.ref) is instance
            assert is_in_force or instance.active is None
            if is_in_force:
                assert instance.sessions
                assert world.registry.get(instance.ref).generation == instance.generation
        in_force = {i.ref: i for i in self.instances if world.sessions.instance(i.ref) is i}
        assert world.sessions._instances == in_force
        assert world.dispatcher._instances == {r: i for r, i in in_force.items() if i.active}
        for session in self.streams:
            newest = session.generation == session.instance.generation
            assert (newest and session not in self.lapsed) or not session.takes_tasks
            if session.instance in in_force.values():
                # One that was replaced, or lapsed, stays until it has nothing left to do, and not longer.
                retires = not newest or session in self.lapsed
                assert session.over == (retires and (not session.held or session in self.broken))
            else:
                assert session.over

    @invariant()
    def a_record_is_kept_by_what_there_is(self) -> None:
        registry, leases = self.world.registry, set()
        for record in registry.records():
            instance = self.world.sessions.instance(record.ref)
            assert (record.session.generation if record.session else None) == (
                instance.generation if instance else None
            )
            assert record.registration or not record.endpoint
            for way, presence in ((Way.SESSION, record.session), (Way.REGISTRATION, record.registration)):
                if presence is not None:
                    leases.add((record.ref, way))
        assert registry._renewed.keys() == leases
        assert list(registry._renewed.values()) == sorted(registry._renewed.values())
        assert self.world.sessions._instances.keys() <= registry._records.keys()

    @invariant()
    def a_watcher_sees_what_there_is(self) -> None:
        changes = self.world.changes
        changes.settle()
        assert changes._seen == {r.ref: changes.views.of(r) for r in self.world.registry.records()}

    @invariant()
    def who_holds_what(self) -> None:
        held = self.holders()
        assert len(self.world.dispatcher) == len(held)
        for instance in self.instances:
            assert set(instance.held) == {t for t, holder in held.items() if holder is instance}
            assert len(instance.held) <= instance.description.max_concurrency
            for session in {*instance.sessions.values(), *instance.held.values()}:
                assert session.held == sum(s is session for s in instance.held.values())

    @invariant()
    def every_order_is_in_one_place(self) -> None:
        dispatcher = self.world.dispatcher
        given = list(dispatcher._given.values())
        waiting = [order for line in dispatcher._waiting.values() for order in line]
        queued = []
        for instance in self.instances:
            orders = [o for line in (instance.queue._lines.values() if instance.queue else ()) for o in line]
            queued.extend(orders)
            assert len(orders) == len(instance.queue or ()) <= QUEUE_LIMIT
            assert (instance.queue._bytes if instance.queue else 0) == sum(len(o.work) for o in orders)
            assert all(o.instance is instance for o in orders)
            # Nothing waits that could be had at once.
            assert not orders or instance.active
            assert not orders or len(instance.held) >= instance.description.max_concurrency
        self.world.spin()
        assert {self.world.placed[o.task] for o in self.orders if not o.task.done()} == {
            *given,
            *waiting,
            *queued,
        }
        assert dispatcher._orders == len(given) + len(waiting) + len(queued) == len(dispatcher._deadlines)
        assert dispatcher._waiting_bytes == sum(len(o.work) for o in waiting)
        assert all(dispatcher._waiting.values()), "no line is empty"
        for place, orders in ((Place.GIVEN, given), (Place.WAITING, waiting), (Place.QUEUED, queued)):
            assert all(o.place is place for o in orders)
        for order in waiting:
            assert all(self.is_full(instance) for instance in self.eligible(order))

    def eligible(self, order: Order) -> list[Instance]:
        there = self.world.dispatcher._instances
        if isinstance(order.target, Capability):
            able = [i for i in there.values() if order.target.name in i.description.capabilities]
            return [i for i in able if i.ref.verified or order.allow_unverified]
        if order.target in there or not order.allow_unverified:
            return [there[order.target]] if order.target in there else []
        return [i for i in there.values() if i.ref == AgentRef(order.target.name, verified=False)]

    def is_full(self, instance: Instance) -> bool:
        waiting = len(instance.queue or ())
        return len(instance.held) + waiting >= instance.description.max_concurrency + QUEUE_LIMIT

    @invariant()
    def parts_reach_their_caller(self) -> None:
        for ordered in self.orders:
            order = self.world.placed[ordered.task]
            assert self.world.listeners[order].parts == ordered.parts
            assert ordered.attempts in (None, order.attempts), "what was begun to be told was told anew"
            if order.place is not Place.ENDED:
                assert order.part_credit == ordered.credit <= MAX_PART_CREDIT

    @invariant()
    def index_says_what_a_look_at_all_would_say(self) -> None:
        self.world.dispatcher._reindex()
        indexes = self.world.dispatcher._index
        expected: dict[tuple[str, bool], list[Instance]] = {}
        for instance in self.world.dispatcher._instances.values():
            for capability in instance.description.capabilities:
                expected.setdefault((capability, instance.ref.verified), []).append(instance)
        assert indexes.keys() == expected.keys()
        for key, instances in expected.items():
            free = {i: i.description.max_concurrency - len(i.held) - len(i.queue or ()) for i in instances}
            most = max(free.values())
            best = indexes[key].best()
            assert len(indexes[key]) == len(instances)
            if most <= -QUEUE_LIMIT:
                assert best is None
            else:
                assert best is not None
                assert best[0] == most == free[best[1]]

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        self.world.spin()
        now = self.world.now
        open_orders = [order for order in self.orders if not order.task.done()]
        assert all(now < order.deadline for order in open_orders)
        queued = sum(len(instance.queue or ()) for instance in self.instances)
        waiting = len(open_orders) - len(self.holders()) - queued
        assert sum(map(len, self.world.dispatcher._waiting.values())) == waiting
        assert waiting <= sum(now < order.no_wait_after for order in open_orders)
        assert self.world.dispatcher._idle.is_set() == (not open_orders)

    @invariant()
    def every_order_ends_once(self) -> None:
        self.world.spin()
        ended = [order for order in self.orders if order.task.done()]
        assert len(self.world.results) == len(ended)
        for order in ended:
            if not order.task.cancelled():
                self.check(order, order.task.result())

    def check(self, order: Ordered, result: Result) -> None:
        tries = MAX_ATTEMPTS if order.idempotent and order.target.startswith("capability:") else 1
        assert result.attempts <= tries
        assert (result.agent is None) == (result.attempts == 0)
        match result.outcome:
            case Value():
                assert result.outcome != WRONG
                assert result.outcome in self.answers.values()
            case Failure(code=OutcomeCode.NO_AGENT | OutcomeCode.OVERLOADED):
                assert result.attempts == 0
            case Failure(code=code):
                assert code is OutcomeCode.DEADLINE_EXCEEDED or result.attempts > 0
        if result.agent is not None:
            target = parse_target(order.target)
            if not result.agent.verified:
                assert order.allow_unverified or target == result.agent
            if not isinstance(target, Capability):
                assert target.name == result.agent.name

    def teardown(self) -> None:
        try:
            for session in self.streams:
                self.world.sessions.close(session)
            self.world.advance(1_000)
            self.world.sessions.expire(self.world.now)
            assert all(order.task.done() for order in self.orders)
            self.every_order_ends_once()
            dispatcher, sessions, registry = self.world.dispatcher, self.world.sessions, self.world.registry
            for left in (
                dispatcher._given,
                dispatcher._waiting,
                dispatcher._instances,
                dispatcher._index,
                dispatcher._indexed,
                dispatcher._moved,
                dispatcher._clogged,
                dispatcher._deadlines,
                dispatcher._waiting_bytes,
                dispatcher._orders,
                *(instance.queue for instance in self.instances),
                *(instance.queue._bytes for instance in self.instances if instance.queue is not None),
                sessions._instances,
                sessions._take_overs,
                registry._records,
                registry._renewed,
            ):
                assert not left
            assert dispatcher._idle.is_set()
        finally:
            self.world.close()


@pytest.mark.timeout(120)
def test_books_balance(make_world: MakeWorld) -> None:
    run_state_machine_as_test(
        lambda: Books(make_world),  # type: ignore[arg-type]  # takes any factory
        settings=settings(
            max_examples=80,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
