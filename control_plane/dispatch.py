"""Giving tasks to agents and their outcomes back to callers."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Final

from parallax.control_plane.registry import AgentRef
from parallax.control_plane.sessions import Assignment, Cancellation, Instance, Session
from parallax.runtime.description import check_capability
from parallax.runtime.outcome import Failure, Outcome, OutcomeCode, Payload
from parallax.security.errors import NotAuthorized, Unavailable

MAX_ATTEMPTS: Final = 3  # of an idempotent task whose agents are lost
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
CANCELLATION_BYTES: Final = 12  # an upper bound on the wire
ASSIGNMENT_OVERHEAD_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Capability:
    """A target that any agent of this capability can serve."""

    name: str

    def __str__(self) -> str:
        return f"capability:{self.name}"


Target = AgentRef | Capability


def parse_target(text: str) -> Target:
    """The target spelled `agent-1`, `anonymous/agent-1` or `capability:sentiment`; raises if it is none."""
    prefix, colon, name = text.partition(":")
    if colon and prefix == "capability":
        return Capability(check_capability(name))
    return AgentRef.parse(text)


@dataclass(frozen=True, slots=True)
class Order:
    """
    What a caller asks for.

    Args:
        timeout: For everything, waiting included.
        wait: How long to wait for an eligible agent; zero fails at once.
        idempotent: May run more than once, so it is tried elsewhere if its agent is lost.
        allow_unverified: An agent that no certificate vouches for will do, by id as by capability.
    """

    target: Target
    name: str
    payload: Payload
    timeout: timedelta
    wait: timedelta = timedelta(0)
    idempotent: bool = False
    allow_unverified: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How an order ended: *agent* had it last, None if nobody had; *attempts* agents were given it."""

    outcome: Outcome
    agent: AgentRef | None = None
    attempts: int = 0


class LeastLoaded:
    """
    The instances of one capability, by how many more tasks they could work on at once.

    Moving one and finding the best cost the same however many there are: they lie in
    buckets by free slots, in each the one that was moved last at the end, so that equals
    take turns.
    """

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._free: dict[Instance, int] = {}
        # Ordered: the first key of a plain dict that loses its first keys takes ever longer to find.
        self._buckets: dict[int, OrderedDict[Instance, None]] = {}
        self._top = -queue_limit  # no bucket lies higher

    def __len__(self) -> int:
        return len(self._free)

    def put(self, instance: Instance) -> None:
        """Enter *instance*, or move it to where its load now belongs."""
        self.discard(instance)
        free = instance.description.max_concurrency - len(instance.held)
        self._free[instance] = free
        self._buckets.setdefault(free, OrderedDict())[instance] = None
        self._top = max(self._top, free)

    def discard(self, instance: Instance) -> None:
        """Take *instance* out, if it is in."""
        free = self._free.pop(instance, None)
        if free is not None:
            bucket = self._buckets[free]
            del bucket[instance]
            if not bucket:
                del self._buckets[free]

    def best(self) -> tuple[int, Instance] | None:
        """Free slots and instance of the least loaded one; None if all have as much waiting as they may."""
        while self._top > -self._queue_limit:
            if self._top in self._buckets:
                return self._top, next(iter(self._buckets[self._top]))
            self._top -= 1  # paid for by the `put` that raised it
        return None


class Dispatcher:
    """
    Finds an agent for each order, and knows who holds which task.

    A task belongs to an instance: only that instance can answer it, on any of its
    sessions, and it fails the moment the instance is lost.

    Args:
        queue_limit: Tasks an agent may have waiting beyond those it works on; more is OVERLOADED.
        on_answered: Told a session that has one task less (see `Sessions.settle`).
        on_result: Told the outcome code, or "OK", and the seconds it took.
    """

    def __init__(
        self,
        *,
        queue_limit: int,
        on_result: Callable[[str, float], None],
        on_answered: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self._queue_limit = queue_limit
        self._on_result = on_result
        self.on_answered = on_answered
        self._instances: dict[AgentRef, Instance] = {}
        self._index: dict[tuple[str, bool], LeastLoaded] = {}
        self._indexed: dict[Instance, list[tuple[str, bool]]] = {}  # the keys of its indexes
        self._waiting: defaultdict[Target, set[asyncio.Future[None]]] = defaultdict(set)
        self._pending: dict[int, tuple[Instance, asyncio.Future[Outcome]]] = {}
        # A random start: after a restart, an agent may still work on ids given out before it.
        self._ids = count(secrets.randbits(48))
        self._orders = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._pending)

    # What the sessions tell (see sessions.Roster).

    def changed(self, instance: Instance) -> None:
        """Enter, move or take out *instance*, as its sessions now are; wake who waits for it."""
        self._take_out(instance)
        if instance.active is None:
            return
        self._instances[instance.ref] = instance
        keys = [(capability, instance.ref.verified) for capability in instance.description.capabilities]
        for key in keys:
            self._index.setdefault(key, LeastLoaded(self._queue_limit)).put(instance)
        self._indexed[instance] = keys
        served: list[Target] = [instance.ref, *map(Capability, instance.description.capabilities)]
        if not instance.ref.verified:
            served.append(AgentRef(instance.ref.name))  # of those who allow it
        self._wake(*served)

    def lost(self, instance: Instance, cause: str) -> None:
        """Fail everything *instance* holds, and nothing else."""
        self._take_out(instance)
        failure = Failure(OutcomeCode.AGENT_LOST, f"{instance.ref} was lost while it held the task: {cause}")
        for task_id in list(instance.held):
            _, future = self._pending[task_id]
            if not future.done():
                future.set_result(failure)

    # What agents say.

    def settle(self, instance: Instance, task_id: int, outcome: Outcome) -> None:
        """
        Take *instance*'s answer to a task. An answer that comes too late is dropped.

        Raises:
            NotAuthorized: The task is another agent's.
        """
        held = self._pending.get(task_id)
        if held is None:
            return
        owner, future = held
        if owner.ref != instance.ref:
            raise NotAuthorized(f"{instance.ref} answered a task of another agent")
        if isinstance(outcome, Failure) and outcome.code in NOT_AN_AGENTS_TO_SAY:
            outcome = Failure(
                OutcomeCode.INVALID_RESULT, f"{instance.ref} answered {outcome.code}, which no agent can know"
            )
        if owner is instance and not future.done():
            future.set_result(outcome)

    # What callers ask for.

    async def execute(self, order: Order) -> Result:
        """
        Run *order* and bring its outcome; failures of the task are outcomes, not exceptions.

        Raises:
            Unavailable: The control plane drains.
        """
        if self._draining:
            raise _shutting_down()
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._orders += 1
        self._idle.clear()
        try:
            result = await self._execute(order, began, began + order.timeout.total_seconds())
        except asyncio.CancelledError:
            self._on_result(OutcomeCode.CANCELLED.value, loop.time() - began)
            raise
        finally:
            self._orders -= 1
            if not self._orders:
                self._idle.set()
        code = result.outcome.code.value if isinstance(result.outcome, Failure) else "OK"
        self._on_result(code, loop.time() - began)
        return result

    async def drain(self, timeout: timedelta) -> None:
        """
        Take no more orders, and wait at most *timeout* for those that an agent has.

        Orders that wait for an agent end at once. What is left in the end is CONTROL_PLANE_LOST:
        its agent may well finish it, but nobody is here to hear of it.
        """
        self._draining = True
        self._wake(*self._waiting)
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self._idle.wait()
        except TimeoutError:
            text = "the control plane stopped before the task ended; whether it ran is unknown"
            for _, future in self._pending.values():
                if not future.done():
                    future.set_result(Failure(OutcomeCode.CONTROL_PLANE_LOST, text))

    async def _execute(self, order: Order, began: float, deadline: float) -> Result:
        loop = asyncio.get_running_loop()
        agent: AgentRef | None = None
        outcome: Outcome | None = None
        attempts = 0
        wait_until = min(deadline, began + order.wait.total_seconds())
        while True:
            found = await self._find(order, wait_until)
            if isinstance(found, Failure):
                # Once an agent was given it, it may have run: NO_AGENT would hide that.
                return Result(outcome or found, agent, attempts)
            if loop.time() >= deadline:
                return Result(_late(order), agent, attempts)
            agent = found.ref
            attempts += 1
            outcome = await self._attempt(order, found, deadline)
            lost = isinstance(outcome, Failure) and outcome.code is OutcomeCode.AGENT_LOST
            # Only a capability can be served elsewhere.
            again = lost and order.idempotent and isinstance(order.target, Capability)
            if not again or attempts >= MAX_ATTEMPTS:
                return Result(outcome, agent, attempts)

    async def _attempt(self, order: Order, instance: Instance, deadline: float) -> Outcome:
        loop = asyncio.get_running_loop()
        session = instance.active
        assert session is not None, "only instances with an active one are found"  # noqa: S101 - our own bug
        task_id = next(self._ids)
        future: asyncio.Future[Outcome] = loop.create_future()
        self._pending[task_id] = instance, future
        instance.take(task_id, session)
        self._reindex(instance)
        left = timedelta(seconds=deadline - loop.time())
        ticket = session.outbox.put(
            Assignment(task_id, order.name, order.payload, left),
            _bytes_of(order) + ASSIGNMENT_OVERHEAD_BYTES,
        )
        try:
            async with asyncio.timeout_at(deadline):
                return await future
        except TimeoutError:
            return _late(order)
        finally:
            del self._pending[task_id]
            instance.release(task_id)
            # An agent that reads slowly must not find its outbox full of what nobody waits for.
            unsent = session.outbox.withdraw(ticket)
            if not unsent and (not future.done() or future.cancelled()):
                _cancel(session, task_id)
            self._reindex(instance)
            self.on_answered(session)

    def _wake(self, *targets: Target) -> None:
        """Let those who wait for one of *targets* look again."""
        for target in targets:
            for waiter in self._waiting.get(target, ()):
                if not waiter.done():
                    waiter.set_result(None)

    def _reindex(self, instance: Instance) -> None:
        for key in self._indexed.get(instance, ()):
            self._index[key].put(instance)

    def _take_out(self, instance: Instance) -> None:
        for key in self._indexed.pop(instance, ()):
            self._index[key].discard(instance)
            if not self._index[key]:
                del self._index[key]
        if self._instances.get(instance.ref) is instance:
            del self._instances[instance.ref]

    async def _find(self, order: Order, wait_until: float) -> Instance | Failure:
        loop = asyncio.get_running_loop()
        while True:
            if self._draining:
                raise _shutting_down()
            found = self._choose(order)
            waits = isinstance(found, Failure) and found.code is OutcomeCode.NO_AGENT
            if not waits or loop.time() >= wait_until:
                return found
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiting[order.target].add(waiter)
            try:
                async with asyncio.timeout_at(wait_until):
                    await waiter
            except TimeoutError:
                pass
            finally:
                waiters = self._waiting[order.target]
                waiters.discard(waiter)
                if not waiters:
                    del self._waiting[order.target]

    def _choose(self, order: Order) -> Instance | Failure:
        match order.target:
            case AgentRef() as ref:
                instance = self._instances.get(ref)
                if instance is None and order.allow_unverified and ref.verified:
                    instance = self._instances.get(AgentRef(ref.name, verified=False))
                if instance is None:
                    return self._nobody(order)
                full = len(instance.held) >= instance.description.max_concurrency + self._queue_limit
                return _overloaded(order) if full else instance
            case Capability():
                indexes = list(self._eligible(order.target, allow_unverified=order.allow_unverified))
                if not indexes:
                    return self._nobody(order)
                best = max(
                    filter(None, (index.best() for index in indexes)), key=lambda b: b[0], default=None
                )
                return _overloaded(order) if best is None else best[1]

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
        return Failure(OutcomeCode.NO_AGENT, f"no {what} is connected; `parallax agents list` shows who is")


def _bytes_of(order: Order) -> int:
    payload = order.payload
    return len(payload.data) + len(payload.content_type.encode()) + len(order.name.encode())


def _cancel(session: Session, task_id: int) -> None:
    """Tell the agent that nobody waits for the answer: on *session*, or on the newest if that has ended."""
    sessions = session.instance.sessions
    for candidate in (session, *reversed(sessions.values())):
        if candidate.generation in sessions and not candidate.over.is_set():
            candidate.outbox.put(Cancellation(task_id), CANCELLATION_BYTES)
            return


def _shutting_down() -> Unavailable:
    return Unavailable("the control plane is shutting down; try again")


def _overloaded(order: Order) -> Failure:
    return Failure(
        OutcomeCode.OVERLOADED,
        f"every agent for {order.target} has as much waiting as it may; try again later",
        retry_after=OVERLOADED_RETRY,
    )


def _late(order: Order) -> Failure:
    return Failure(
        OutcomeCode.DEADLINE_EXCEEDED,
        f"no outcome within {order.timeout.total_seconds():g} s; allow more time",
    )
