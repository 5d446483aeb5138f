"""Fixtures of the control plane's tests: its parts wired together, no network, a clock set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from parallax.control_plane.authorization import Grant
from parallax.control_plane.dispatch import Dispatcher
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.order import Answer, Order, parse_target
from parallax.control_plane.registry import AgentRef, Registry
from parallax.control_plane.services import EXECUTE
from parallax.control_plane.sessions import Goodbye, Instance, Reason, Session, Sessions
from parallax.control_plane.views import Views
from parallax.control_plane.waiter import Result, Waiter
from parallax.control_plane.watch import Changes, Watched
from parallax.runtime.authorization import Authorization
from parallax.runtime.deadlines import GRAIN_S
from parallax.runtime.description import AgentDescription
from parallax.runtime.link import End, Link, Receiver, Said
from parallax.runtime.outcome import Outcome, Payload, Value
from parallax.runtime.policy import Policy, Rule
from parallax.runtime.policy_text import built_in_policy
from parallax.runtime.wire import decode_work, encode_value, encode_work
from parallax.security.errors import Revoked
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind
from parallax.security.verification import Peer
from tests.control_plane.clock import Clock

T = TypeVar("T")

EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
EPOCH_NUMBER: Final = 2**64 - 1
LOG_LIMIT: Final = 8
LEASE: Final = timedelta(seconds=15)
ROUNDS: Final = 25  # of the loop: more than any chain of wake-ups here is long


@dataclass(frozen=True, slots=True)
class Assignment:
    """One delivery of a task to an agent, as it was written."""

    task_id: int
    name: str
    payload: Payload
    timeout: timedelta


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Nobody waits for the answer to this task any more."""

    task_id: int


Item = Assignment | Cancellation | Goodbye


class HandLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still unless it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0

    def time(self) -> float:
        """The clock's hand, in seconds."""
        return self.now


class World:
    """Registry, sessions and dispatcher, wired as the server wires them; time passes when told to."""

    def __init__(self, *, queue_limit: int = 2) -> None:
        self.loop = HandLoop()
        self.queue_limit = queue_limit
        self.authorization = Authorization(built_in_policy(), DEFAULT_TRUST_DOMAIN)
        self.results: list[tuple[str, float]] = []
        self.take_overs: list[AgentRef] = []
        self.placed: dict[asyncio.Task[Result], Order] = {}
        self.listeners: dict[Order, Listener] = {}
        self.registry = Registry(LEASE)
        self.dispatcher = Dispatcher(
            queue_limit=queue_limit,
            on_result=lambda code, seconds: self.results.append((code, seconds)),
            clock=lambda: self.loop.now,
        )
        roster = Watched(self.dispatcher)
        self.sessions = Sessions(self.registry, roster, self.take_overs.append)
        self.changes = Changes(Views(self.registry, self.sessions), EPOCH_NUMBER, log_limit=LOG_LIMIT)
        self.registry.on_change = roster.note = self.changes.note
        self.dispatcher.on_answered = self.sessions.settle

    def close(self) -> None:
        """End what still runs."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.spin()
        self.loop.close()

    # Time.

    @property
    def now(self) -> float:
        """What the clock says."""
        return self.loop.now

    def wall_clock(self) -> datetime:
        """The same as a date."""
        return EPOCH + timedelta(seconds=self.now)

    def spin(self) -> None:
        """Let everything happen that can happen without time passing."""

        async def rounds() -> None:
            for _ in range(ROUNDS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rounds())

    def advance(self, seconds: float) -> None:
        """Let time pass; leases are looked at by `sessions.expire`, as in the server."""
        self.loop.now += seconds
        self.dispatcher.expire(self.now + GRAIN_S)  # by when a deadline is noticed
        self.spin()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What *work* returns; it must not need time."""
        return self.loop.run_until_complete(work)

    # Agents.

    def join(
        self,
        agent: str,
        *capabilities: str,
        instance: str = "first",
        max_concurrency: int = 1,
        held: Sequence[int] | None = None,
    ) -> Session:
        """A session of *agent*, `a` or `anonymous/a`."""
        ref = AgentRef.parse(agent)
        identity = Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, ref.name) if ref.verified else None
        description = AgentDescription(capabilities=capabilities, max_concurrency=max_concurrency)
        session = self.sessions.open(
            ref,
            identity,
            instance.encode(),
            description,
            Link(End.CALLER, Said.HELLO, Receiver()),
            held=held,
            now=self.now,
            at=self.wall_clock(),
        )
        self.spin()
        return session

    def register(self, agent: str, endpoint: str = "", *capabilities: str) -> int:
        """A direct registration of *agent*, as the service enters it; its generation."""
        ref = AgentRef.parse(agent)
        identity = Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, ref.name) if ref.verified else None
        description = AgentDescription(capabilities=capabilities)
        registration = self.registry.register(
            ref, identity, description, endpoint=endpoint, now=self.now, at=self.wall_clock()
        )
        self.sessions.describe(ref, description)
        self.spin()
        return registration.generation

    def heartbeat(self, agent: str, generation: int = 0) -> None:
        """A heartbeat of *agent*'s registration."""
        self.registry.heartbeat(AgentRef.parse(agent), self.now, generation)

    def frame(self, session: Session) -> None:
        """A frame arrives on *session*."""
        self.registry.renew(session.instance.ref, self.now)

    def leave(self, session: Session, revoked: Revoked | None = None) -> None:
        """The stream of *session* ends, whoever ended it; its agent may have been *revoked*."""
        self.sessions.close(session, revoked)
        self.spin()

    def expire(self) -> None:
        """Look at the leases."""
        self.sessions.expire(self.now)
        self.spin()

    def heard(self, session: Session) -> list[Item]:
        """What was written to *session* since it was last asked."""
        items: list[Item] = []
        while (frame := session.link.take()) is not None:
            items.extend(
                Assignment(task.id, *decode_work(task.work), timedelta(milliseconds=task.timeout_ms))
                for task in frame.tasks
            )
            items.extend(map(Cancellation, frame.cancelled_task_ids))
            if frame.HasField("goodbye"):
                items.append(Goodbye(Reason(frame.goodbye.reason), frame.goodbye.message))
        return items

    def tasks(self, session: Session) -> list[int]:
        """The ids of the tasks written to *session* since it was last asked."""
        return [item.task_id for item in self.heard(session) if isinstance(item, Assignment)]

    def task(self, session: Session) -> int:
        """The id of the one task written to *session* since it was last asked."""
        [task_id] = self.tasks(session)
        return task_id

    def answer(self, session: Session, task_id: int, outcome: Outcome | None = None) -> None:
        """*session*'s agent answers, with a value unless told otherwise."""
        self.answer_as(session.instance, task_id, outcome or Value(Payload(b"done"), 1.0))

    def answer_as(self, instance: Instance, task_id: int, outcome: Outcome) -> None:
        """The same, on whichever session."""
        answer = encode_value(outcome) if isinstance(outcome, Value) else outcome
        self.dispatcher.settle(instance, task_id, answer)
        self.spin()

    # Callers.

    def let(self, **targets: str) -> None:
        """Let each of these callers ask this target, and nobody anything else."""
        rules = [
            Rule(who, frozenset({f"client/{who}"}), frozenset({EXECUTE}), frozenset({target}))
            for who, target in targets.items()
        ]
        self.authorization.replace(Policy(tuple(rules)))
        self.dispatcher.reconsider()
        self.spin()

    def order(
        self,
        target: str,
        *,
        timeout: float = 60,
        wait: float = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
        part_credit: int = 0,
        data: bytes = b"",
        caller: str = "client",
        then: Callable[[], None] = lambda: None,
    ) -> asyncio.Task[Result]:
        """An order under way; *then* happens the moment it ends."""

        async def execute() -> Result:
            listener = Listener(grant_of(caller, self.authorization))
            listener.then = then
            order = Order(
                parse_target(target),
                encode_work("task", Payload(data)),
                timeout,
                listener,
                wait_s=wait,
                idempotent=idempotent,
                allow_unverified=allow_unverified,
                part_credit=part_credit,
            )
            self.placed[task] = order
            self.listeners[order] = listener
            return await listener.execute(order, self.dispatcher)

        task = self.loop.create_task(execute())
        self.spin()
        return task

    def orders(self, target: str, count: int, **options: Any) -> Sequence[asyncio.Task[Result]]:
        """As many orders of the same kind."""
        return [self.order(target, **options) for _ in range(count)]

    def cancel(self, order: asyncio.Task[Result]) -> None:
        """The caller of *order* goes away."""
        order.cancel()
        self.spin()


def grant_of(name: str, authorization: Authorization) -> Grant:
    """Whom *authorization* lets `client/<name>` ask."""
    identity = Identity(DEFAULT_TRUST_DOMAIN, Kind.CLIENT, name)
    issued, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)
    caller = Peer(identity, 1, b"\0" * 32, end, b"\1" * 32, issued, ())
    return Grant(authorization, caller, EXECUTE)


class Listener(Waiter):
    """A caller that notes the parts of its answer, and may have something to do when it ends."""

    def __init__(self, grant: Grant) -> None:
        super().__init__(grant)
        self.parts: list[bytes] = []
        self.then: Callable[[], None] = lambda: None

    def ended(self, order: Order, answer: Answer) -> None:
        """Note it, and do what is to be done then."""
        super().ended(order, answer)
        self.then()

    def part(self, order: Order, value: bytes) -> None:
        """Note it."""
        self.parts.append(value)


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world() -> Iterator[MakeWorld]:
    """Makes worlds and closes them at the end."""
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(**options))
        return made[-1]

    yield make
    for world in made:
        if not world.loop.is_closed():
            world.close()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """A control plane without a network; agents may have two tasks waiting."""
    return make_world()


@pytest.fixture
def clock() -> Clock:
    """A wall clock that the test sets."""
    return Clock()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SqliteEngine]:
    """The SQLite engine, on an empty directory."""
    async with SqliteEngine(tmp_path / "data") as opened:
        yield opened
