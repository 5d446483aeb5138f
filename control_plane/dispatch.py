"""Giving tasks to agents and their outcomes back to callers."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from itertools import count
from time import monotonic
from typing import Final

from parallax.control_plane.fair_queue import FairQueue
from parallax.control_plane.order import (
    MAX_PART_CREDIT,
    Answer,
    Capability,
    Order,
    Place,
    Target,
)
from parallax.control_plane.registry import AgentRef
from parallax.control_plane.selection import LeastLoaded
from parallax.control_plane.sessions import Cause, Instance, Session
from parallax.runtime.deadlines import Deadlines
from parallax.runtime.link import MAX_BACKLOG_BYTES
from parallax.runtime.outcome import Failure, OutcomeCode
from parallax.runtime.parts import cost_of
from parallax.security.errors import NotAuthorized, Revoked, Unavailable

MAX_ATTEMPTS: Final = 3  # of an idempotent task whose agents are lost, or revoked
MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024  # of work that waits for one agent, or for one target to appear
OVERLOADED_RETRY: Final = timedelta(milliseconds=200)
# What only the control plane can know: an agent that says so does not speak of its own work.
NOT_AN_AGENTS_TO_SAY: Final = frozenset(
    {
        OutcomeCode.AGENT_LOST,
        OutcomeCode.CONTROL_PLANE_LOST,
        OutcomeCode.NO_AGENT,
        OutcomeCode.REVOKED,
    }
)


SHUTTING_DOWN: Final = Failure(
    OutcomeCode.OVERLOADED,
    "the control plane is shutting down; try again",
    Unavailable.__name__,
    timedelta(seconds=1),
)


class Dispatcher:
    """
    Finds an agent for each order, and knows who holds which task.

    A task belongs to an instance: only that instance can answer it, on any of its
    sessions, and it fails the moment the instance is lost. An agent is given as many
    tasks as it works on at once; what is beyond waits here, callers taking turns.

    No order has a task or a timer of its own: everything happens in the calls below, and
    whoever owns the dispatcher calls `expire` every now and then.

    Args:
        queue_limit: Tasks an agent may have waiting beyond those it works on; more is OVERLOADED.
        on_answered: Told a session that has one task less (see `Sessions.settle`).
        on_result: Told the outcome code, or "OK", and the seconds it took.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        queue_limit: int,
        on_result: Callable[[str, float], None],
        on_answered: Callable[[Session], None] = lambda _: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._clock = clock
        self._queue_limit = queue_limit
        self._on_result = on_result
        self.on_answered = on_answered
        self.why_absent: Callable[[AgentRef], str] = lambda _: (
            ""
        )  # of an agent that is known, and not reached
        self._instances: dict[AgentRef, Instance] = {}
        self._index: dict[tuple[str, bool], LeastLoaded] = {}
        self._indexed: dict[Instance, list[tuple[str, bool]]] = {}  # the keys of its indexes
        self._moved: list[Instance] = []  # whose load changed since the indexes were asked
        self._waiting: defaultdict[Target, OrderedDict[Order, None]] = defaultdict(OrderedDict)
        self._waiting_bytes = 0
        self._given: dict[int, Order] = {}
        self._clogged: set[Instance] = set()  # has orders queued because it does not read
        self._deadlines: Deadlines[Order] = Deadlines()
        # A random start: after a restart, an agent may still work on ids given out before it.
        self._ids = count(secrets.randbits(48))
        self._orders = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._given)

    # What the sessions tell (see sessions.Roster).

    def changed(self, instance: Instance) -> None:
        """Enter, move or take out *instance*, as its sessions now are; admit who waits for it."""
        self._take_out(instance)
        if instance.active is None:
            self._place_anew(instance)
            return
        self._instances[instance.ref] = instance
        keys = [(capability, instance.ref.verified) for capability in instance.description.capabilities]
        for key in keys:
            self._index.setdefault(key, LeastLoaded(self._queue_limit)).put(instance)
        self._indexed[instance] = keys
        self._feed(instance)

    def lost(self, instance: Instance, cause: Cause) -> None:
        """Fail everything *instance* holds, and nothing else; find others for what it was not given yet."""
        self._take_out(instance)
        self._fail(instance, list(instance.held), cause)
        self._place_anew(instance)
        self._reindex()  # else the lost would gather where nobody asks for a capability

    def forgotten(self, instance: Instance, held: Collection[int], revoked: Revoked | None = None) -> None:
        """Fail what *instance* was given and does not hold; because of *revoked*, if that is why."""
        missing = [task_id for task_id in instance.held if task_id not in held]
        broke = "its connection broke, and the task or its answer was lost with it"
        self._fail(instance, missing, revoked or broke)
        self._feed(instance)  # which has room now, also where nothing ended but is tried elsewhere

    # What agents say.

    def settle(self, instance: Instance, task_id: int, answer: Answer) -> None:
        """
        Take *instance*'s answer to a task. An answer that comes too late is dropped.

        Raises:
            NotAuthorized: The task is another agent's.
        """
        order = self._held_by(instance, task_id)
        if order is None:
            return
        if isinstance(answer, Failure) and answer.code in NOT_AN_AGENTS_TO_SAY:
            answer = Failure(
                OutcomeCode.INVALID_RESULT, f"{instance.ref} answered {answer.code}, which no agent can know"
            )
        self._end(order, answer)

    def part(self, instance: Instance, task_id: int, value: bytes | Failure) -> None:
        """
        Take a piece of *instance*'s answer to a task.

        One that it had no credit for ends the task, as does what *value* says against it.

        Raises:
            NotAuthorized: The task is another agent's.
        """
        order = self._held_by(instance, task_id)
        if order is None:
            return
        if isinstance(value, Failure):
            self.withdraw(order, value)
            return
        if order.part_credit <= 0:
            text = f"{instance.ref} sent a part of an answer that nobody had made room for"
            self.withdraw(order, Failure(OutcomeCode.INVALID_RESULT, text))
            return
        order.part_credit -= cost_of(value)
        order.has_parts = True
        order.caller.part(order, value)

    # What callers ask for.

    def submit(self, order: Order) -> None:
        """
        Take *order*: its caller hears how it ends, possibly before this returns.

        Raises:
            Unavailable: The control plane drains.
        """
        if self._is_draining:
            raise Unavailable(SHUTTING_DOWN.message)
        now = self._clock()
        order.began = now
        order.part_credit = min(order.part_credit, MAX_PART_CREDIT)
        order.timer = self._deadlines.add(order, now + order.timeout_s)
        self._orders += 1
        self._idle.clear()
        self._place(order, now)

    def allow(self, order: Order, credit: int) -> None:
        """Let *order*'s agent send *credit* bytes more of its answer."""
        granted = min(credit, MAX_PART_CREDIT - order.part_credit)
        if granted > 0 and order.place is not Place.ENDED:
            order.part_credit += granted
            if order.session is not None and order.place is Place.GIVEN:
                order.session.link.allow(order.task_id, granted)

    def withdraw(self, order: Order, why: Failure | None = None) -> None:
        """End *order* before its time, and tell its agent; its caller hears *why*, or nothing if it left."""
        if order.place is Place.ENDED:
            return
        if order.place is Place.GIVEN:
            _cancel(order)
        self._end(order, why)

    def expire(self, now: float) -> None:
        """End the orders whose time is over."""
        # Those that nobody has come first: what the others leave behind is not for them.
        for order in sorted(self._deadlines.expire(now), key=lambda order: order.place.value):
            if order.place is Place.WAITING:  # nobody has it: late or not, that is the cause
                self._end(order, order.failure or self._refusal(order))
            elif now >= order.began + order.timeout_s:
                self.withdraw(order, _late(order))
        for instance in list(self._clogged):
            self._feed(instance)

    def reconsider(self) -> None:
        """Place what waits, as far as its callers may ask those who are there now; see `Caller.may_ask`."""
        for target in list(self._waiting):
            self._admit(target)

    async def drain(self, timeout: timedelta) -> None:
        """
        Take no more orders, and wait at most *timeout* for those that an agent has.

        Orders that wait for an agent end at once. What is left in the end is CONTROL_PLANE_LOST:
        its agent may well finish it, but nobody is here to hear of it.
        """
        self._is_draining = True
        for order in [order for orders in self._waiting.values() for order in orders]:
            self._end(order, order.failure or SHUTTING_DOWN)
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self._idle.wait()
        except TimeoutError:
            text = "the control plane stopped before the task ended; whether it ran is unknown"
            queued = [o for i in self._instances.values() for o in _unqueue(i)]
            for order in queued:
                self._end(order, order.failure or SHUTTING_DOWN)
            for order in list(self._given.values()):
                self._end(order, Failure(OutcomeCode.CONTROL_PLANE_LOST, text))

    # Where an order goes.

    def _place(self, order: Order, now: float) -> None:
        """Give *order* to an agent, or let it wait, or end it."""
        if now >= order.began + order.timeout_s:
            self._end(order, _late(order))
            return
        found = self._choose(order)
        if isinstance(found, Instance):
            self._assign(order, found)
        elif (
            found.code is OutcomeCode.NO_AGENT and now < order.began + order.wait_s and not self._is_draining
        ):
            self._wait(order)
        else:
            # Once an agent was given it, it may have run: NO_AGENT would hide that.
            self._end(order, order.failure or found)

    def _place_anew(self, instance: Instance) -> None:
        """Find others for what *instance* was not given and never will be."""
        for order in _unqueue(instance):
            if order.place is Place.NOWHERE:  # it has not ended with one before it
                self._place(order, self._clock())
        if self._waiting:
            self._admit(instance.ref)  # those whom the unverified agent of its name may serve now

    def _wait(self, order: Order) -> None:
        waiting = len(self._waiting.get(order.target, ()))
        if waiting >= self._queue_limit or self._waiting_bytes + len(order.work) > MAX_QUEUED_BYTES:
            text = f"as many tasks as may wait for {order.target} to appear; try again later"
            refusal = Failure(OutcomeCode.OVERLOADED, text, retry_after=OVERLOADED_RETRY)
            self._end(order, order.failure or refusal)
            return
        order.place = Place.WAITING
        self._waiting[order.target][order] = None
        self._waiting_bytes += len(order.work)
        self._set_timer(order, min(order.wait_s, order.timeout_s))

    def _unwait(self, order: Order) -> None:
        line = self._waiting[order.target]
        del line[order]
        if not line:
            del self._waiting[order.target]
        self._waiting_bytes -= len(order.work)
        order.place = Place.NOWHERE

    def _assign(self, order: Order, instance: Instance) -> None:
        """Give *order* to *instance*, at once or when it has room."""
        if self._has_room(instance) and not instance.queue:
            self._give(order, instance)
            return
        if instance.queue is None:
            instance.queue = FairQueue(self._queue_limit, MAX_QUEUED_BYTES)
        leaver = instance.queue.put(order)
        if leaver is not order:
            order.place, order.instance = Place.QUEUED, instance
            self._note_moved(instance)
        if leaver is not None:
            leaver.place = Place.NOWHERE
            self._end(leaver, leaver.failure or _overloaded(leaver))

    def _give(self, order: Order, instance: Instance) -> None:
        session = instance.active
        assert session is not None, "only instances with an active one are found"  # noqa: S101 - our own bug
        order.task_id = task_id = next(self._ids)
        order.place, order.instance, order.session, order.agent = Place.GIVEN, instance, session, instance.ref
        order.attempts += 1
        self._given[task_id] = order
        instance.take(task_id, session)
        self._note_moved(instance)
        left_ms = max(1, round((order.began + order.timeout_s - self._clock()) * 1000))
        session.link.give(task_id, order.work, left_ms, order.part_credit)
        if not order.idempotent:
            order.work = b""

    def _has_room(self, instance: Instance) -> bool:
        """Whether *instance* may be given one more task now."""
        session = instance.active
        if session is None or len(instance.held) >= instance.description.max_concurrency:
            return False
        if session.link.backlog_bytes > MAX_BACKLOG_BYTES:  # it does not read
            self._clogged.add(instance)
            return False
        return True

    def _feed(self, instance: Instance) -> None:
        """Give *instance* what waits for it, as far as it has room."""
        self._clogged.discard(instance)
        while instance.queue and self._has_room(instance):
            order = instance.queue.pop()
            assert order is not None, "it is not empty"  # noqa: S101 - our own bug
            if order.caller.may_ask(order.target, instance.ref):
                self._give(order, instance)
            else:  # any more: nobody has begun it, so that it is decided anew
                order.place, order.instance = Place.NOWHERE, None
                self._place(order, self._clock())
        if self._waiting:
            for target in _served_by(instance):
                self._admit(target)

    def _admit(self, target: Target) -> None:
        """Place what waits for *target* to appear, as far as there is room."""
        full: set[tuple[str, bool]] = set()  # for whom: one caller may ask whom another may not
        for order in list(self._waiting.get(target, ())):
            if order.place is not Place.WAITING:
                continue  # it ended, or was placed, with one before it
            key = order.caller.key
            if (key, order.allow_unverified) in full:
                continue
            found = self._choose(order)
            if isinstance(found, Instance):
                if found.free <= -self._queue_limit:
                    full |= {(key, False), (key, order.allow_unverified)}
                    continue
                self._unwait(order)
                self._set_timer(order, order.timeout_s)
                self._assign(order, found)

    # How an order ends.

    def _end(self, order: Order, answer: Answer | None) -> None:
        """Forget *order* and tell its caller, if it is still there to be told; only the first end counts."""
        if order.place is Place.ENDED:
            return
        self._deadlines.discard(order, order.timer)
        instance, session, place = order.instance, order.session, order.place
        if place is Place.GIVEN and instance is not None:
            del self._given[order.task_id]
            instance.release(order.task_id)
        elif place is Place.QUEUED and instance is not None and instance.queue is not None:
            instance.queue.discard(order)
        elif place is Place.WAITING:
            self._unwait(order)
        order.place = Place.ENDED
        order.work = b""
        self._orders -= 1
        if not self._orders:
            self._idle.set()
        self._on_result(_code_of(answer), self._clock() - order.began)
        if answer is not None:
            order.caller.ended(order, answer)
        if instance is not None:
            self._note_moved(instance)
            if instance.queue or self._waiting:
                self._feed(instance)
        if place is Place.GIVEN and session is not None:
            self.on_answered(session)

    def _fail(self, instance: Instance, task_ids: Collection[int], cause: Cause) -> None:
        """Take tasks back from *instance*: they are lost, or tried elsewhere where that is allowed."""
        failure = _loss(instance.ref, cause)
        for task_id in task_ids:
            order = self._given.get(task_id)
            if order is None:
                continue  # it ended with one before it
            # Only a capability can be served elsewhere, and parts that the caller has cannot come again.
            again = order.idempotent and isinstance(order.target, Capability) and not order.has_parts
            if not again or order.attempts >= MAX_ATTEMPTS:
                self._end(order, failure)
                continue
            del self._given[task_id]
            instance.release(task_id)
            self._note_moved(instance)
            session, order.session = order.session, None
            order.failure, order.place, order.instance = failure, Place.NOWHERE, None
            self._place(order, self._clock())
            if session is not None:
                self.on_answered(session)

    def _set_timer(self, order: Order, after_s: float) -> None:
        self._deadlines.discard(order, order.timer)
        order.timer = self._deadlines.add(order, order.began + after_s)

    # Who can have it.

    def _held_by(self, instance: Instance, task_id: int) -> Order | None:
        order = self._given.get(task_id)
        if order is None or order.instance is instance:
            return order
        if order.instance is None or order.instance.ref != instance.ref:
            raise NotAuthorized(f"{instance.ref} answered a task of another agent")
        return None  # it was given to a later instance

    def _choose(self, order: Order) -> Instance | Failure:
        target, may_ask = order.target, order.caller.may_ask
        match target:
            case AgentRef() as ref:
                instance = self._instances.get(ref)
                if instance is None and order.allow_unverified and ref.verified:
                    instance = self._instances.get(AgentRef(ref.name, verified=False))
                if instance is None:
                    return self._nobody(order)
                return instance if may_ask(ref, instance.ref) else _not_for_caller(order)
            case Capability():
                self._reindex()
                indexes = list(self._eligible(target, allow_unverified=order.allow_unverified))
                if not indexes:
                    return self._nobody(order)

                def fits(instance: Instance) -> bool:
                    return may_ask(target, instance.ref)

                best = max(
                    filter(None, (index.best(fits) for index in indexes)), key=lambda b: b[0], default=None
                )
                if best is not None:
                    return best[1]
                # Where all are full, one of the caller's own may still make room: see FairQueue.
                full = next(filter(None, (index.any(fits) for index in indexes)), None)
                return full or _not_for_caller(order)

    def _refusal(self, order: Order) -> Failure:
        """Why *order* waited in vain."""
        found = self._choose(order)
        return found if isinstance(found, Failure) else _overloaded(order)

    def _eligible(self, target: Capability, *, allow_unverified: bool) -> Iterator[LeastLoaded]:
        for verified in (True, False) if allow_unverified else (True,):
            index = self._index.get((target.name, verified))
            if index:
                yield index

    def _nobody(self, order: Order) -> Failure:
        """NO_AGENT, saying so where only the missing proof of identity stands in the way."""
        target = order.target
        if isinstance(target, Capability):
            what = f"agent with capability {target.name!r}"
            stranger = (target.name, False) in self._index
        else:
            what = f"agent {str(target)!r}"
            stranger = target.verified and AgentRef(target.name, verified=False) in self._instances
        if stranger and not order.allow_unverified:
            return Failure(
                OutcomeCode.NO_AGENT,
                f"no verified {what} is connected, only one that no certificate vouches for; set "
                "PARALLAX_TLS_VERIFY_CLIENT=true on the control plane, or allow unverified agents here",
            )
        why = self.why_absent(target) if isinstance(target, AgentRef) else ""
        hint = why or "`parallax agents list` shows who is"
        return Failure(OutcomeCode.NO_AGENT, f"no {what} is connected; {hint}")

    def _note_moved(self, instance: Instance) -> None:
        """Remember to move *instance* in its indexes: once, however often its load changes till then."""
        if not instance.is_moved:
            instance.is_moved = True
            self._moved.append(instance)

    def _reindex(self) -> None:
        for instance in self._moved:
            instance.is_moved = False
            for key in self._indexed.get(instance, ()):
                self._index[key].put(instance)
        self._moved.clear()

    def _take_out(self, instance: Instance) -> None:
        self._clogged.discard(instance)
        for key in self._indexed.pop(instance, ()):
            self._index[key].discard(instance)
            if not self._index[key]:
                del self._index[key]
        if self._instances.get(instance.ref) is instance:
            del self._instances[instance.ref]


def _unqueue(instance: Instance) -> list[Order]:
    """Take out what waits for *instance*."""
    orders = instance.queue.clear() if instance.queue else []
    for order in orders:
        order.place, order.instance = Place.NOWHERE, None
    return orders


def _served_by(instance: Instance) -> list[Target]:
    served: list[Target] = [instance.ref, *map(Capability, instance.description.capabilities)]
    if not instance.ref.verified:
        served.append(AgentRef(instance.ref.name))  # of those who allow it
    return served


def _cancel(order: Order) -> None:
    """Tell the agent that nobody waits for the answer: on the task's session, or the newest if that ended."""
    assert order.session is not None, "it was given on one"  # noqa: S101 - our own bug
    sessions = order.session.instance.sessions
    for candidate in (order.session, *reversed(sessions.values())):
        if candidate.generation in sessions and not candidate.over:
            candidate.link.cancel(order.task_id)
            return


def _not_for_caller(order: Order) -> Failure:
    return Failure(
        OutcomeCode.NO_AGENT,
        f"no agent for {order.target} is connected that the caller may ask; "
        "`parallax policy explain` shows which these are",
    )


def _overloaded(order: Order) -> Failure:
    return Failure(
        OutcomeCode.OVERLOADED,
        f"every agent for {order.target} has as much waiting as it may; try again later",
        retry_after=OVERLOADED_RETRY,
    )


def _loss(agent: AgentRef, cause: Cause) -> Failure:
    if isinstance(cause, Revoked):
        return Failure(OutcomeCode.REVOKED, f"{agent} was revoked while it held the task: {cause}")
    return Failure(OutcomeCode.AGENT_LOST, f"{agent} was lost while it held the task: {cause}")


def _late(order: Order) -> Failure:
    return Failure(OutcomeCode.DEADLINE_EXCEEDED, f"no outcome within {order.timeout_s:g} s; allow more time")


def _code_of(answer: Answer | None) -> str:
    if isinstance(answer, Failure):
        return answer.code.value
    return OutcomeCode.CANCELLED.value if answer is None else "OK"
