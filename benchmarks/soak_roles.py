"""Who takes part in a soak: `soak_roles.py agent NAME CAPABILITY`, `soak_roles.py client NAME REPORT`."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from parallax.runtime.loop import run
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import ParallaxError, TaskFailed

STEADY: Final = "capability:steady"  # agents that nobody touches
CHURN: Final = "capability:churn"  # agents that are killed, stopped and superseded all the time
CALLERS: Final = 6  # in a client, at once, each with a connection of its own
ANSWER_S: Final = 25.0  # for an answer, on a machine that is busy
NEVER_S: Final = 30.0  # beyond any timeout used here: what has not ended by then never will
WRONG_KEPT: Final = 20
DICE: Final = random.Random()  # noqa: S311 - picks what to do next, hides nothing

# OVERLOADED is how an agent that stops refuses what was on its way to it.
LOST: Final = frozenset({"OK", "AGENT_LOST", "NO_AGENT", "OVERLOADED"})


class Worker(SecureAgent):
    """Gives back what it gets, at once, late, or in parts."""

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        """All at once."""
        match task:
            case "slow":
                await asyncio.sleep(data)
            case "fail":
                raise LookupError(data)
        return data, 1.0

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        """In parts."""
        for number in range(data):
            if task == "slowly":
                await asyncio.sleep(0.01)
            yield number, 1.0


class WrongAnswer(Exception):
    """Not what was asked for."""


Outcomes = list[str]


class Caller:
    """One connection, and everything that a client may do with it."""

    def __init__(self) -> None:
        self.client = ParallaxClient()
        # What it does → how that may end.
        self.acts: dict[Callable[[], Awaitable[Outcomes]], frozenset[str]] = {
            self.echo: frozenset({"OK"}),
            self.burst: frozenset({"OK"}),
            self.large: frozenset({"OK"}),
            self.stream: frozenset({"OK"}),
            self.leave_stream: frozenset({"OK"}),
            self.fail: frozenset({"HANDLER_FAILED"}),
            self.late: frozenset({"DEADLINE_EXCEEDED"}),
            self.cancel: frozenset({"CANCELLED"}),
            self.nobody: frozenset({"NO_AGENT"}),
            self.no_target: frozenset({"IdentityError"}),
            self.churn: LOST,
            self.churn_again: LOST,
            self.churn_stream: LOST,
            self.reconnect: frozenset({"OK"}),
            self.hang_up: frozenset({"CONTROL_PLANE_LOST"}),
        }

    async def echo(self) -> Outcomes:
        """The usual."""
        return [await self._asked(STEADY)]

    async def burst(self) -> Outcomes:
        """Many at once."""
        return await asyncio.gather(*(self._asked(STEADY) for _ in range(32)))

    async def large(self) -> Outcomes:
        """A frame of its own."""
        return [await self._asked(STEADY, DICE.randbytes(300_000))]

    async def stream(self) -> Outcomes:
        """An answer in parts."""
        return [await self._streamed(STEADY, 50)]

    async def leave_stream(self) -> Outcomes:
        """Leave in the middle of one."""
        async with aclosing(self.client.stream(STEADY, "slowly", 1_000, timeout=ANSWER_S)) as parts:
            async for part in parts:
                if part.value == 3:
                    break
        return ["OK"]

    async def fail(self) -> Outcomes:
        """A handler that raises."""
        return [await _code(self.client.analyze(STEADY, "fail", "on purpose", timeout=ANSWER_S))]

    async def late(self) -> Outcomes:
        """A task that takes longer than it may."""
        return [await _code(self.client.analyze(STEADY, "slow", 20, timeout=DICE.uniform(0.01, 0.2)))]

    async def cancel(self) -> Outcomes:
        """Stop waiting."""
        calls = [asyncio.ensure_future(self.client.analyze(STEADY, "slow", 20, timeout=25)) for _ in range(4)]
        await asyncio.sleep(DICE.uniform(0, 0.1))
        for call in calls:
            call.cancel()
        return [await _code(call) for call in calls]

    async def nobody(self) -> Outcomes:
        """An agent that is not there."""
        wait = DICE.choice((0, 0.1))
        return [await _code(self.client.analyze("nobody", "echo", timeout=ANSWER_S, wait_for_agent=wait))]

    async def no_target(self) -> Outcomes:
        """Nothing that could be one."""
        return [await _code(self.client.analyze("No Body", "echo", timeout=ANSWER_S))]

    async def churn(self) -> Outcomes:
        """Agents that come and go."""
        return await asyncio.gather(*(self._asked(CHURN, wait_for_agent=2) for _ in range(8)))

    async def churn_again(self) -> Outcomes:
        """The same, with tasks that may run again."""
        calls = (self._asked(CHURN, wait_for_agent=2, idempotent=True) for _ in range(8))
        return await asyncio.gather(*calls)

    async def churn_stream(self) -> Outcomes:
        """Their answers in parts."""
        return [await self._streamed(CHURN, 20, "slowly")]

    async def reconnect(self) -> Outcomes:
        """End the connection in order, and make another one."""
        await self.client.close()
        self.client = ParallaxClient()
        return [await self._asked(STEADY)]

    async def hang_up(self) -> Outcomes:
        """End it under calls."""
        async with ParallaxClient() as other:
            await other.analyze(STEADY, "echo", timeout=ANSWER_S)
            calls = [asyncio.ensure_future(_code(other.analyze(STEADY, "slow", 20))) for _ in range(8)]
            await asyncio.sleep(DICE.uniform(0.001, 0.1))
        return await asyncio.gather(*calls)

    async def _asked(self, target: str, data: Any = None, **options: Any) -> str:
        data = data or {"number": DICE.getrandbits(62), "text": "x" * DICE.randrange(2_000)}
        return await _code(self.client.analyze(target, "echo", data, timeout=ANSWER_S, **options), data)

    async def _streamed(self, target: str, count: int, task: str = "at once") -> str:
        async def parts() -> Any:
            return [part async for part in self.client.stream(target, task, count, timeout=ANSWER_S)]

        try:
            values = [part.value for part in await parts()]
        except ParallaxError as exc:
            return _name(exc)
        if values != list(range(count)):
            raise WrongAnswer
        return "OK"


async def _code(call: Awaitable[Any], expected: Any = None) -> str:
    """How *call* ended."""
    try:
        result = await call
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        return "CANCELLED"
    except ParallaxError as exc:
        return _name(exc)
    if expected is not None and result.value != expected:
        raise WrongAnswer
    return "OK"


def _name(exc: ParallaxError) -> str:
    return exc.code if isinstance(exc, TaskFailed) else type(exc).__name__


class Report:
    """
    What a client has seen so far, one line of JSON a second, so that it outlives the client.

    A call that was under way when the client was killed is in none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tally: Counter[str] = Counter()
        self._wrong: list[str] = []

    def note(self, act: str, outcomes: Outcomes, allowed: frozenset[str]) -> None:
        """Count them."""
        for outcome in outcomes:
            self._tally[f"{act} {outcome}"] += 1
            if outcome not in allowed:
                self.complain(act, outcome)

    def complain(self, act: str, what: str) -> None:
        """Something that may not be."""
        self._tally["wrong"] += 1
        self._wrong = [*self._wrong, f"{act}: {what}"][:WRONG_KEPT]

    def write(self, *, is_last: bool = False) -> None:
        """Add a line."""
        with self._path.open("a") as file:
            print(json.dumps({"tally": self._tally, "wrong": self._wrong, "last": is_last}), file=file)


async def keep_calling(report: Report, stop: asyncio.Event) -> None:
    """One act after the other until told to stop, all of them before any comes again."""
    caller = Caller()
    to_do: list[Callable[[], Awaitable[Outcomes]]] = []
    while not stop.is_set():
        to_do = to_do or DICE.sample([*caller.acts], len(caller.acts))
        act = to_do.pop()
        try:
            async with asyncio.timeout(NEVER_S):
                outcomes = await act()
        except TimeoutError:
            report.complain(act.__name__, "never ended")
        except Exception as exc:  # noqa: BLE001 - whatever else a client raises is what is sought here
            report.complain(act.__name__, f"{type(exc).__name__}: {exc}")
        else:
            report.note(act.__name__, outcomes, caller.acts[act])
        await asyncio.sleep(DICE.uniform(0, 0.02))
    await caller.client.close()


async def client(path: Path) -> None:
    """Call until SIGTERM, then let what is under way end."""
    report, stop = Report(path), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as group:
        callers = [group.create_task(keep_calling(report, stop)) for _ in range(CALLERS)]
        while not all(caller.done() for caller in callers):
            report.write()
            await asyncio.wait(callers, timeout=1)
    report.write(is_last=True)


if __name__ == "__main__":
    role, name, given = sys.argv[1:]
    if role == "agent":
        Worker(name, "Worker", [given], max_concurrency=64).run()
    else:
        run(client(Path(given)))
