"""Whatever a handler does or an agent says, its task has an outcome, and the agent's other tasks go on."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from parallax.protos import dispatch_pb2, dispatch_pb2_grpc, link_pb2, registry_pb2, task_pb2
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, RawAgent, Until


class NotMine(Exception):
    """An exception of a user's own."""


def fail() -> None:
    secret = "local variable"  # noqa: F841 - must not travel
    raise NotMine("the model is missing")


class HasNoText(Exception):
    def __str__(self) -> str:
        raise ValueError


def fail_without_text() -> None:
    raise HasNoText


def exit_() -> None:
    raise SystemExit(3)


# What analyze returns, or calls → the code and a part of the message.
RESULTS: dict[str, tuple[Any, str, str]] = {
    "confidence NaN": (("x", math.nan), "INVALID_RESULT", "confidence must be from 0 to 1, not nan"),
    "confidence infinite": (("x", math.inf), "INVALID_RESULT", "confidence must be from 0 to 1, not inf"),
    "confidence 1.5": (("x", 1.5), "INVALID_RESULT", "confidence must be from 0 to 1, not 1.5"),
    "confidence -1": (("x", -1), "INVALID_RESULT", "confidence must be from 0 to 1, not -1"),
    "confidence huge": (("x", 10**400), "INVALID_RESULT", "confidence must be from 0 to 1"),
    "confidence 'high'": (
        ("x", "high"),
        "INVALID_RESULT",
        "confidence must be a number from 0 to 1, not str",
    ),
    "confidence True": (("x", True), "INVALID_RESULT", "confidence must be a number from 0 to 1, not bool"),
    "confidence None": (
        ("x", None),
        "INVALID_RESULT",
        "confidence must be a number from 0 to 1, not NoneType",
    ),
    "no tuple": ("x", "INVALID_RESULT", r"must return \(value, confidence\), not str"),
    "nothing": (None, "INVALID_RESULT", r"must return \(value, confidence\), not None"),
    "three things": (("x", 1, 2), "INVALID_RESULT", r"must return \(value, confidence\), not a tuple of 3"),
    "a set": (({1}, 1), "INVALID_RESULT", r"\$: set is not JSON"),
    "a set inside": (({"a": [0, {1}]}, 1), "INVALID_RESULT", r"\$\.a\[1\]: set is not JSON"),
    "NaN inside": (({"a": [0, math.nan]}, 1), "INVALID_RESULT", r"\$\.a\[1\]: NaN is not JSON"),
    "a key that is no text": (({1: 2}, 1), "INVALID_RESULT", "keys must be str"),
    "too much": ((b"x" * (4 * 1024 * 1024 + 1), 1), "INVALID_RESULT", "more than the 4,194,304 allowed"),
    "raises": (fail, "HANDLER_FAILED", "^HANDLER_FAILED: NotMine: the model is missing$"),
    "raises without text": (fail_without_text, "HANDLER_FAILED", "HasNoText: .*__str__ raised ValueError"),
    "exits": (exit_, "HANDLER_FAILED", "SystemExit: 3"),
}


def result_of(task: str) -> Any:
    result = RESULTS[task][0]
    return result() if callable(result) else result


class OnTheLoop(SecureAgent):
    """Gives the results above; waits until told to go on; hangs until cancelled, or stays beyond."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.go_on = asyncio.Event()
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> Any:
        match task:
            case "wait":
                await self.go_on.wait()
                return data, 1.0
            case "hang" | "stay":
                self.begun.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    if task == "hang":
                        raise
                    await self.go_on.wait()
                return data, 1.0
        return result_of(task)


class OnThreads(SecureAgent):
    """The same with a plain function."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.go_on = threading.Event()
        self.begun = threading.Event()

    def analyze(self, task: str, data: Any) -> Any:
        if task in {"wait", "hang"}:
            if task == "hang":
                self.begun.set()
            self.go_on.wait(timeout=20)
            return data, 1.0
        return result_of(task)


@asynccontextmanager
async def another_task_under_way(client: ParallaxClient, agent: Any) -> AsyncIterator[None]:
    """While open, the agent works on a task; that ends well, and so does one after it."""
    async with asyncio.TaskGroup() as group:
        other = group.create_task(client.analyze("agent-1", "wait", "other"))
        try:
            yield
            assert not other.done()
        finally:
            agent.go_on.set()
        assert (await other).value == "other"
        assert (await client.analyze("agent-1", "wait", "next")).value == "next"


@pytest.mark.parametrize("agent_class", [OnTheLoop, OnThreads])
async def test_a_result_that_is_none_fails_its_own_task_only(
    fleet: Fleet, agent_class: type[SecureAgent]
) -> None:
    async with (
        fleet.agent(agent_class) as agent,
        fleet.client() as client,
        another_task_under_way(client, agent),
    ):
        for task, (_, code, message) in RESULTS.items():
            with pytest.raises(TaskFailed, match=message) as failed:
                await client.analyze("agent-1", task)
            assert failed.value.code == code, task
            assert "Traceback" not in str(failed.value)
            assert "local variable" not in str(failed.value)
            assert __file__ not in str(failed.value)


async def test_confidence_zero_is_an_answer(fleet: Fleet) -> None:
    class Unsure(SecureAgent):
        async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
            return None, 0

    async with fleet.agent(Unsure), fleet.client() as client:
        result = await client.analyze("agent-1", "guess")
    assert (result.value, result.confidence) == (None, 0.0)


@pytest.mark.parametrize(
    ("agent_class", "task"), [(OnTheLoop, "hang"), (OnTheLoop, "stay"), (OnThreads, "hang")]
)
async def test_a_handler_that_hangs_past_the_deadline_fails_its_own_task_only(
    fleet: Fleet, agent_class: type[SecureAgent], task: str
) -> None:
    """Cancelled where it can be; a handler that swallows that, or blocks a thread, keeps nobody waiting."""
    async with (
        fleet.agent(agent_class) as agent,
        fleet.client() as client,
        another_task_under_way(client, agent),
    ):
        assert isinstance(agent, OnTheLoop | OnThreads)
        while not agent.begun.is_set():  # a busy machine may let the time pass before
            with pytest.raises(TaskFailed) as failed:
                await client.analyze("agent-1", task, timeout=0.3)
            assert failed.value.code == "DEADLINE_EXCEEDED"
        if isinstance(agent, OnTheLoop):
            async with asyncio.timeout(15):
                await agent.cancelled.wait()


async def test_handlers_that_hang_do_not_use_up_the_control_plane(fleet: Fleet, until: Until) -> None:
    async with fleet.agent(OnThreads, max_concurrency=4) as agent, fleet.client() as client:
        hung = [client.analyze("agent-1", "hang", timeout=0.2) for _ in range(6)]
        outcomes = await asyncio.gather(*hung, return_exceptions=True)
        assert [getattr(outcome, "code", outcome) for outcome in outcomes] == ["DEADLINE_EXCEEDED"] * 6
        (info,) = await client.agents()
        assert info.in_flight == 0
        agent.go_on.set()
        assert (await client.analyze("agent-1", "wait", 1)).value == 1


# What a rogue agent says of a task instead of an outcome → the code that its caller gets, and the message.
Outcome = Callable[[int], link_pb2.TaskOutcome]


def saying(value: task_pb2.Value) -> Outcome:
    return lambda task_id: link_pb2.TaskOutcome(task_id=task_id, value=value.SerializeToString())


def with_confidence(confidence: float) -> Outcome:
    return saying(task_pb2.Value(confidence=confidence))


ROGUE: dict[str, tuple[Outcome, str, str]] = {
    "confidence NaN": (
        with_confidence(math.nan),
        "INVALID_RESULT",
        "confidence must be from 0 to 1, not nan",
    ),
    "confidence infinite": (with_confidence(math.inf), "INVALID_RESULT", "not inf"),
    "confidence 1.5": (with_confidence(1.5), "INVALID_RESULT", "not 1.5"),
    "neither value nor failure": (
        lambda task_id: link_pb2.TaskOutcome(task_id=task_id),
        "INVALID_RESULT",
        "neither a value nor a failure",
    ),
    "a value that is not what its type says": (
        saying(task_pb2.Value(payload=task_pb2.Payload(data=b"[NaN]", content_type="application/json"))),
        "INVALID_RESULT",
        "the payload is not JSON: NaN",
    ),
    "a value that is no message": (
        lambda task_id: link_pb2.TaskOutcome(task_id=task_id, value=b"\xff\xfe\x00garbage"),
        "INVALID_RESULT",
        "the answer is not a Value message",
    ),
    "a value that is a message of another kind": (
        lambda task_id: link_pb2.TaskOutcome(
            task_id=task_id, value=registry_pb2.HeartbeatRequest(agent_id="agent-1").SerializeToString()
        ),
        "INVALID_RESULT",
        "the answer is not a Value message",
    ),
    "parts that it never sent": (
        lambda task_id: link_pb2.TaskOutcome(task_id=task_id, parts=3),
        "INVALID_RESULT",
        "in parts, which nobody asked for",
    ),
    "a code nobody knows": (
        lambda task_id: link_pb2.TaskOutcome(
            task_id=task_id,
            failure=task_pb2.Failure(code=99, message="new"),  # type: ignore[arg-type]
        ),
        "UNSPECIFIED",
        "new",
    ),
}


@asynccontextmanager
async def asked(client: ParallaxClient, agent: RawAgent) -> AsyncIterator[tuple[int, asyncio.Task[Any]]]:
    """A task that *agent* has been given: its id there, and the caller who waits for it."""
    waiting = asyncio.create_task(client.analyze("agent-1", "x"))
    try:
        yield (await agent.task()).id, waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


@pytest.mark.parametrize("said", ROGUE)
async def test_a_rogue_outcome_fails_its_own_task_only(fleet: Fleet, said: str) -> None:
    outcome, code, message = ROGUE[said]
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as rogue,
        fleet.client() as client,
        asked(client, rogue) as (bad, victim),
        asked(client, rogue) as (good, other),
    ):
        nothing = task_pb2.Value().SerializeToString()  # is an answer, too
        await rogue.say(outcomes=[outcome(bad), link_pb2.TaskOutcome(task_id=good, value=nothing)])
        with pytest.raises(TaskFailed, match=message) as failed:
            await victim
        assert failed.value.code == code
        assert (await other).value == b""


async def test_a_second_outcome_and_one_of_an_unknown_task_have_no_effect(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as rogue,
        fleet.client() as client,
        asked(client, rogue) as (first, one),
        asked(client, rogue) as (second, two),
    ):
        await rogue.answer(first, b"first")
        await rogue.answer(first, b"again")
        await rogue.answer(2**64 - 1, b"of nobody")
        await rogue.answer(0, b"of nobody")
        await rogue.answer(second, b"second")
        assert (await one).value == b"first"
        assert (await two).value == b"second"
        async with asked(client, rogue) as (third, three):
            await rogue.answer(first, b"late")
            await rogue.answer(third, b"third")
            assert (await three).value == b"third"


async def test_a_failure_of_the_handler_is_an_outcome_and_not_a_status(fleet: Fleet) -> None:
    """So that any gRPC client can tell a task that failed from a call that failed."""
    async with fleet.agent(OnTheLoop), fleet.channel("client/cli") as channel:
        request = dispatch_pb2.ExecuteRequest(target="agent-1", task="raises")
        response = await dispatch_pb2_grpc.DispatchServiceStub(channel).Execute(request, timeout=10)
    failure = response.outcome.failure
    assert (failure.code, failure.error_type) == (task_pb2.OUTCOME_CODE_HANDLER_FAILED, "NotMine")
    assert failure.message == "the model is missing"
    assert (response.agent_id, response.attempts) == ("agent-1", 1)
