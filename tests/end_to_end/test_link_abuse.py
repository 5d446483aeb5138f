"""What bad input gets on a link: one named outcome, for who sent it, while everybody else goes on."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from grpc import StatusCode, aio

from parallax.protos import dispatch_pb2_grpc, link_pb2, registry_pb2, session_pb2_grpc, task_pb2
from parallax.runtime import link_stream
from parallax.runtime.link import MAX_FRAME_ITEMS
from parallax.runtime.outcome import Payload
from parallax.runtime.wire import encode_work
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Fleet, RawAgent, Serve

MIB: Final = 1024 * 1024
PROMPTLY_S: Final = 15.0  # for what should happen at once, on a machine that is busy
YEAR_MS: Final = 365 * 86_400 * 1000
WORK: Final = encode_work("x", Payload(b"data"))
HELLO: Final[dict[str, Any]] = {"protocol_version": 1, "min_protocol_version": 1}
# What the tests' own pauses and a busy machine leave to a call that nothing is in the way of.
SLOWEST_S: Final = 5.0


class Echo(SecureAgent):
    """Gives back what it gets."""

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


class Bystander:
    """A good client that asks a good agent all the while."""

    def __init__(self) -> None:
        self.calls = 0
        self.slowest_s = 0.0

    async def ask(self, client: ParallaxClient) -> None:
        """Call until cancelled; anything but the right answer in time fails the test."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            assert (await client.analyze("agent-2", "x", self.calls, timeout=PROMPTLY_S)).value == self.calls
            self.calls += 1
            self.slowest_s = max(self.slowest_s, loop.time() - began)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def unharmed(fleet: Fleet) -> AsyncIterator[ParallaxClient]:
    """A client, while good ones are at work; they notice nothing of what happens in the block."""
    bystander = Bystander()
    async with fleet.agent(Echo, "agent-2"), fleet.client() as client, asyncio.TaskGroup() as group:
        asking = group.create_task(bystander.ask(client))
        yield client
        seen = bystander.calls
        async with asyncio.timeout(PROMPTLY_S):
            while bystander.calls < seen + 3 and not asking.done():  # it goes on afterwards, too
                await asyncio.sleep(0.01)
        asking.cancel()
    assert bystander.slowest_s < SLOWEST_S


class RawClient:
    """A client that speaks the link by hand, and may break it."""

    def __init__(self, channel: aio.Channel) -> None:
        self.call = dispatch_pb2_grpc.DispatchServiceStub(channel).Link()
        self._numbers = iter(range(1, 1 << 62))

    async def say(self, **frame: Any) -> None:
        """Send one frame."""
        async with asyncio.timeout(PROMPTLY_S):
            await self.call.write(link_pb2.LinkFrame(**frame))

    async def hello(self, **hello: Any) -> link_pb2.Welcome:
        """Say hello; what the control plane makes of it."""
        await self.say(hello=link_pb2.Hello(**(HELLO | hello)))
        return (await self.read()).welcome

    async def read(self) -> link_pb2.LinkFrame:
        """The next frame."""
        async with asyncio.timeout(PROMPTLY_S):
            frame = await self.call.read()
        assert isinstance(frame, link_pb2.LinkFrame), "the stream ended"
        return frame

    def task(self, target: str = "agent-2", work: bytes = WORK, **options: Any) -> link_pb2.Task:
        """A task with a number of its own."""
        fields = {"id": next(self._numbers), "timeout_ms": 15_000} | options
        return link_pb2.Task(target=target, work=work, **fields)

    async def outcomes(self, count: int = 1) -> list[link_pb2.TaskOutcome]:
        """The next *count* outcomes."""
        got: list[link_pb2.TaskOutcome] = []
        while len(got) < count:
            got.extend((await self.read()).outcomes)
        return got

    async def still_works(self) -> None:
        """The link is as good as new."""
        task = self.task()
        await self.say(tasks=[task])
        (outcome,) = await self.outcomes()
        assert (outcome.task_id, outcome.agent_id) == (task.id, "agent-2")
        assert outcome.WhichOneof("result") == "value"

    async def refusal(self) -> tuple[str, str]:
        """What the control plane ends the stream with."""
        with pytest.raises(aio.AioRpcError) as refused:
            while True:
                await self.read()
        return refused.value.code().name, refused.value.details() or ""


@asynccontextmanager
async def raw_client(fleet: Fleet, *, hello: bool = True) -> AsyncIterator[RawClient]:
    async with fleet.channel("client/cli") as channel:
        client = RawClient(channel)
        if hello:
            await client.hello()
        yield client
        client.call.cancel()


async def refused(agent: RawAgent) -> tuple[str, str]:
    error = await agent.refusal()
    return error.code().name, error.details() or ""


def code_of(outcome: link_pb2.TaskOutcome) -> str:
    """OK, or the failure's code."""
    if not outcome.HasField("failure"):
        return "OK"
    return task_pb2.OutcomeCode.Name(outcome.failure.code).removeprefix("OUTCOME_CODE_")


async def failure(call: Any) -> TaskFailed:
    with pytest.raises(TaskFailed) as failed:
        async with asyncio.timeout(PROMPTLY_S):
            await call
    return failed.value


def rss(child: Child) -> int:
    """Bytes of memory that the process has."""
    pages = int(Path(f"/proc/{child.process.pid}/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture
def fleet(shared_plane: tuple[Child, Fleet]) -> Iterator[Fleet]:
    """One control plane for all tests here, in a process of its own, that logs no bug of ours."""
    plane, running = shared_plane
    yield running
    assert plane.process.poll() is None
    assert not plane.records("handler failed")
    assert not [line for line in plane.lines if "Traceback" in line]


# Clients.


async def test_a_client_that_never_reads_loses_answers_and_takes_no_more_memory(
    shared_plane: tuple[Child, Fleet], fleet: Fleet
) -> None:
    """400 MB of answers, of which the control plane keeps 64 MiB and a little."""
    plane, _ = shared_plane
    async with unharmed(fleet), raw_client(fleet) as deaf, fleet.client() as client:
        before = rss(plane)
        for _ in range(100):
            work = encode_work("x", Payload(bytes(MIB)))
            await deaf.say(tasks=[deaf.task(work=work, timeout_ms=60_000) for _ in range(4)])
        async with asyncio.timeout(PROMPTLY_S):
            while (await client.agent("agent-2")).in_flight > 1:
                await asyncio.sleep(0.05)
        assert rss(plane) - before < 300 * MIB
        answers = await deaf.outcomes(400)
        assert set(map(code_of, answers)) == {"OK", "OVERLOADED"}
        await deaf.still_works()


@pytest.mark.timeout(120)  # a tenth of that, on a machine that is not busy
async def test_a_client_that_never_reads_and_never_stops_asking_loses_its_link(
    shared_plane: tuple[Child, Fleet], fleet: Fleet
) -> None:
    """What is refused at once needs no agent, so that nothing slows it down but who reads here in the end."""
    plane, _ = shared_plane
    asked, heard = Counter[str](), Counter[str]()
    may_ask, may_hear = asyncio.Event(), asyncio.Event()

    async def ask(deaf: RawClient) -> None:
        task = link_pb2.LinkFrame(tasks=[deaf.task("!" * 200) for _ in range(4_000)])
        while await may_ask.wait():
            await deaf.call.write(task)
            asked["tasks"] += 4_000

    async def hear(deaf: RawClient) -> None:
        while await may_hear.wait():
            await deaf.call.read()
            heard["frames"] += 1

    async def until_quiet(counts: Counter[str]) -> None:
        seen = -1
        while seen != counts.total() and not hearing.done():
            seen = counts.total()
            await asyncio.sleep(1)

    async with unharmed(fleet), raw_client(fleet) as deaf:
        before = rss(plane)
        asking, hearing = asyncio.create_task(ask(deaf)), asyncio.create_task(hear(deaf))
        while not hearing.done():
            may_hear.clear()
            may_ask.set()
            await until_quiet(asked)  # until it gets no word in
            assert rss(plane) - before < 300 * MIB
            may_ask.clear()  # where the control plane was but slow, it has to read more before it goes on
            may_hear.set()
            await until_quiet(heard)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        with pytest.raises(aio.AioRpcError) as ended:
            await hearing
        code, text = ended.value.code().name, ended.value.details() or ""
        if code != "INTERNAL":  # which gRPC tells a client instead that was busy writing
            assert (code, "of answers wait to be read; the link ends" in text) == ("UNAVAILABLE", True), text
    assert asked["tasks"] > 100_000


async def test_a_link_that_is_never_read_ends_after_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_stream, "STALLED_S", 0.5)
    monkeypatch.setattr(link_stream, "PULSE_S", 0.2)
    async with serve() as fleet, unharmed(fleet), raw_client(fleet) as deaf:
        work = encode_work("x", Payload(bytes(MIB)))
        for _ in range(10):
            await deaf.say(tasks=[deaf.task(work=work) for _ in range(4)])
        await asyncio.sleep(1.5)
        code, text = await deaf.refusal()
        assert (code, "the peer has not read for 0.5 s" in text) == ("UNAVAILABLE", True)


async def test_a_second_task_of_an_open_number_ends_its_link(fleet: Fleet) -> None:
    async with unharmed(fleet), fleet.raw_agent("agent/held", agent_id="held"), raw_client(fleet) as client:
        await client.say(tasks=[client.task("held", id=7), client.task(id=7)])
        code, text = await client.refusal()
        assert (code, text) == ("INVALID_ARGUMENT", "task 7 is still open on this link; number tasks anew")


@pytest.mark.parametrize(
    ("timeout_ms", "code"), [(0, "DEADLINE_EXCEEDED"), (YEAR_MS, "OK"), (2**64 - 1, "OK")]
)
async def test_a_deadline_out_of_bounds_concerns_its_own_task(
    fleet: Fleet, timeout_ms: int, code: str
) -> None:
    async with unharmed(fleet), raw_client(fleet) as client:
        await client.say(tasks=[client.task(timeout_ms=timeout_ms, wait_for_agent_ms=timeout_ms)])
        (outcome,) = await client.outcomes()
        assert code_of(outcome) == code
        await client.still_works()


async def test_a_frame_of_100_mib_ends_its_own_link(shared_plane: tuple[Child, Fleet], fleet: Fleet) -> None:
    plane, _ = shared_plane
    async with unharmed(fleet), raw_client(fleet) as client, raw_client(fleet) as other:
        before = rss(plane)
        await client.say(tasks=[client.task(work=bytes(100 * MIB))])
        code, text = await client.refusal()
        assert (code, "larger than max" in text) == ("RESOURCE_EXHAUSTED", True)
        assert rss(plane) - before < 64 * MIB
        await other.still_works()


async def test_a_task_somewhat_over_the_limit_is_refused_alone(fleet: Fleet) -> None:
    async with unharmed(fleet), raw_client(fleet) as client:
        await client.say(tasks=[client.task(work=bytes(4 * MIB + 4096)), client.task()])
        outcomes = {o.task_id: o for o in await client.outcomes(2)}
        assert [code_of(outcomes[n]) for n in sorted(outcomes)] == ["INVALID_ARGUMENT", "OK"]
        assert outcomes[1].failure.error_type == "InvalidRequest"


async def test_work_that_is_none_fails_at_the_agent_and_the_link_lives(fleet: Fleet) -> None:
    async with unharmed(fleet), raw_client(fleet) as client:
        await client.say(tasks=[client.task(work=b"\xff\xfe\x00garbage"), client.task(work=b"")])
        outcomes = {o.task_id: o for o in await client.outcomes(2)}
        assert (code_of(outcomes[1]), outcomes[1].attempts) == ("INVALID_ARGUMENT", 1)
        assert code_of(outcomes[2]) == "OK"  # no bytes are a Work without a name
        await client.still_works()


async def test_more_open_tasks_than_allowed_are_overloaded_one_by_one(fleet: Fleet) -> None:
    async with (
        unharmed(fleet),
        fleet.raw_agent("agent/held", agent_id="held", max_concurrency=4096),
        raw_client(fleet) as client,
    ):
        for size in (4_000, 4_000, 2_000):
            await client.say(tasks=[client.task("held", timeout_ms=60_000) for _ in range(size)])
        refused = await client.outcomes(10_000 - 4_096 - 256)
        texts = Counter((code_of(o), o.failure.retry_after_ms) for o in refused)
        assert texts == {("OVERLOADED", 200): 5_648}
        await client.still_works()


async def test_cancelling_and_allowing_what_never_was_does_nothing(fleet: Fleet) -> None:
    async with unharmed(fleet), raw_client(fleet) as client:
        for _ in range(20):
            await client.say(cancelled_task_ids=range(2_000), credits=[link_pb2.Credit(task_id=9)] * 2_000)
        await client.say(credits=[link_pb2.Credit(task_id=2**64 - 1, bytes=2**64 - 1)])
        await client.still_works()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"outcomes": [link_pb2.TaskOutcome(task_id=1)]}, "may not say outcomes on its end"),
        ({"parts": [link_pb2.Part(task_id=1)]}, "may not say parts on its end"),
        ({"welcome": link_pb2.Welcome()}, "may not say welcome on its end"),
        ({"draining": True}, "may not say draining on its end"),
        ({"hello": link_pb2.Hello(**HELLO)}, "may not say hello on its end of a link, or twice"),
        ({"cancelled_task_ids": [1] * 10_000}, "more than 4096 items"),
        ({"tasks": [link_pb2.Task()] * 2_100, "cancelled_task_ids": [1] * 2_100}, "more than 4096 items"),
    ],
    ids=["outcomes", "parts", "welcome", "draining", "hello", "items", "items of two kinds"],
)
async def test_what_a_client_may_not_say_ends_its_own_link(
    fleet: Fleet, said: dict[str, Any], why: str
) -> None:
    async with unharmed(fleet), raw_client(fleet) as client, raw_client(fleet) as other:
        await client.say(**said)
        code, text = await client.refusal()
        assert (code, why in text) == ("INVALID_ARGUMENT", True), text
        await other.still_works()


async def test_frames_after_a_goodbye_end_the_link(fleet: Fleet) -> None:
    async with (
        unharmed(fleet),
        raw_client(fleet) as client,
        fleet.raw_agent("agent/a", agent_id="a") as agent,
    ):
        for one in (client, agent):
            await one.say(goodbye=link_pb2.Goodbye(message="so long"))
        await client.say(tasks=[client.task()])
        await agent.answer(1)
        for code, text in (await client.refusal(), await refused(agent)):
            assert (code, "after its goodbye" in text) == ("INVALID_ARGUMENT", True), text


async def test_many_links_on_one_connection_all_work(shared_plane: tuple[Child, Fleet], fleet: Fleet) -> None:
    plane, _ = shared_plane
    async with unharmed(fleet), fleet.channel("client/cli") as channel:
        before = rss(plane)
        links = [RawClient(channel) for _ in range(200)]
        await asyncio.gather(*(link.hello() for link in links))
        await asyncio.gather(*(link.still_works() for link in links))
        assert rss(plane) - before < 100 * MIB
        for link in links:
            await link.call.done_writing()
        assert {await link.call.code() for link in links} == {StatusCode.OK}


# Both.


@pytest.mark.parametrize("role", ["client", "agent"])
async def test_a_protocol_from_the_future_is_spoken_as_far_as_both_know_it(fleet: Fleet, role: str) -> None:
    async with unharmed(fleet), fleet.channel(f"{role}/agent-9") as channel:
        stub: Any = dispatch_pb2_grpc.DispatchServiceStub(channel).Link
        if role == "agent":
            stub = session_pb2_grpc.SessionServiceStub(channel).Connect
        bits = 1 << 63 | 1 << 40
        hello = link_pb2.Hello(protocol_version=99, min_protocol_version=1, capability_bits=bits)
        hello.instance_id = secrets.token_bytes(16)
        call = stub()
        await call.write(link_pb2.LinkFrame(hello=hello))
        welcome = (await call.read()).welcome
        assert (welcome.protocol_version, welcome.capability_bits) == (1, 0)
        call.cancel()

        hello.min_protocol_version = 2
        call = stub()
        await call.write(link_pb2.LinkFrame(hello=hello))
        with pytest.raises(
            aio.AioRpcError, match="no common protocol version: the peer speaks 2 to 99"
        ) as no:
            await call.read()
        assert no.value.code() is StatusCode.FAILED_PRECONDITION


async def test_nobody_is_kept_who_says_nothing_at_all(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_stream, "GREETING_S", 0.2)
    async with (
        serve() as fleet,
        raw_client(fleet, hello=False) as client,
        fleet.raw_agent("agent/a") as agent,
    ):
        for code, text in (await client.refusal(), await refused(agent)):
            assert (code, text) == ("INVALID_ARGUMENT", "no greeting within 0.2 s")


# Agents.


@asynccontextmanager
async def asked(client: ParallaxClient, agent: RawAgent, **options: Any) -> AsyncIterator[tuple[int, Any]]:
    """A task that the agent `bad` has: its id there, and the caller who waits for it."""
    waiting: asyncio.Task[Any] = asyncio.create_task(client.analyze("bad", "x", **options))
    try:
        yield (await agent.task()).id, waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


@asynccontextmanager
async def bad_agent(fleet: Fleet, **hello: Any) -> AsyncIterator[RawAgent]:
    async with fleet.raw_agent("agent/bad", agent_id="bad", **hello) as agent:
        yield agent


async def still_works(client: ParallaxClient, agent: RawAgent) -> None:
    """The session is as good as new."""
    async with asked(client, agent) as (task_id, waiting):
        await agent.answer(task_id, b"fine")
        assert (await waiting).value == b"fine"


async def test_an_agent_that_never_answers_costs_its_callers_their_deadline(fleet: Fleet) -> None:
    async with unharmed(fleet) as client, bad_agent(fleet) as agent:
        late = [failure(client.analyze("bad", "x", timeout=0.3)) for _ in range(200)]
        assert {failed.code for failed in await asyncio.gather(*late)} == {"DEADLINE_EXCEEDED"}
        assert (await client.agent("bad")).in_flight == 0
        given: set[int] = set()
        cancelled: set[int] = set()
        while not cancelled or given - cancelled:
            frame = await agent.read()
            assert frame is not None
            given.update(task.id for task in frame.tasks)
            cancelled.update(frame.cancelled_task_ids)
        await still_works(client, agent)


async def test_an_answer_counts_once_and_only_while_somebody_waits(fleet: Fleet) -> None:
    async with unharmed(fleet) as client, bad_agent(fleet) as agent:
        async with asked(client, agent) as (task_id, waiting):
            await agent.answer(task_id, b"first")
            await agent.answer(task_id, b"second")
            await agent.say(parts=[link_pb2.Part(task_id=task_id, value=b"x")])
            assert (await waiting).value == b"first"
        async with asked(client, agent) as (task_id, waiting):
            waiting.cancel()
            while (frame := await agent.read()) is not None and task_id not in frame.cancelled_task_ids:
                pass
            await agent.answer(task_id, b"after the cancel")
        await still_works(client, agent)


async def test_a_part_of_another_agents_answer_ends_the_thiefs_session_only(fleet: Fleet) -> None:
    async with (
        unharmed(fleet) as client,
        bad_agent(fleet) as owner,
        fleet.raw_agent("agent/thief", agent_id="thief") as thief,
        asked(client, owner) as (task_id, waiting),
    ):
        await thief.say(parts=[link_pb2.Part(task_id=task_id, value=b"forged")])
        assert (await refused(thief))[0] == "PERMISSION_DENIED"
        await owner.answer(task_id, b"true")
        assert (await waiting).value == b"true"


@pytest.mark.parametrize("count", [MAX_FRAME_ITEMS + 1, 10_000])
async def test_too_many_outcomes_in_one_frame_end_the_session(fleet: Fleet, count: int) -> None:
    async with unharmed(fleet) as client, bad_agent(fleet) as agent, asked(client, agent) as (_, waiting):
        await agent.say(outcomes=[link_pb2.TaskOutcome(task_id=n) for n in range(count)])
        assert await refused(agent) == ("INVALID_ARGUMENT", "a frame has more than 4096 items")
        assert (await failure(waiting)).code == "AGENT_LOST"


@pytest.mark.parametrize("claimed", [4_097, 10**9, 2**32 - 1])
async def test_an_agent_of_endless_concurrency_is_refused(fleet: Fleet, claimed: int) -> None:
    async with unharmed(fleet), fleet.raw_agent("agent/bad") as agent:
        with pytest.raises(aio.AioRpcError, match=f"from 1 to 4096, not {claimed}") as refused:
            await agent.hello(max_concurrency=claimed)
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def test_an_agent_that_holds_more_than_it_can_is_refused(fleet: Fleet) -> None:
    """Five megabytes of numbers: to compare them would hold up everybody."""
    async with unharmed(fleet), fleet.raw_agent("agent/bad") as agent:
        hello = link_pb2.Hello(**HELLO, sole=True, held_task_ids=[1] * 4_000_000)
        hello.instance_id = bytes(16)
        await agent.say(hello=hello)
        code, text = await refused(agent)
        assert (code, "tasks are held" in text) == ("INVALID_ARGUMENT", True), text


@pytest.mark.timeout(90)  # a tenth of that, on a machine that is not busy
async def test_a_hundred_thousand_heartbeats_cost_next_to_nothing(
    shared_plane: tuple[Child, Fleet], fleet: Fleet
) -> None:
    plane, _ = shared_plane
    async with unharmed(fleet) as client, bad_agent(fleet) as agent:
        before = rss(plane)
        async with asyncio.timeout(60):
            for _ in range(100_000):
                await agent._call.write(link_pb2.LinkFrame())
        assert rss(plane) - before < 16 * MIB
        await still_works(client, agent)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"tasks": [link_pb2.Task(id=1, work=WORK)]}, "may not say tasks on its end"),
        ({"cancelled_task_ids": [1]}, "may not say cancellations on its end"),
        ({"credits": [link_pb2.Credit(task_id=1, bytes=1)]}, "may not say credits on its end"),
        ({"welcome": link_pb2.Welcome()}, "may not say welcome on its end"),
        ({"hello": link_pb2.Hello(**HELLO, instance_id=bytes(16))}, "or twice"),
    ],
    ids=["tasks", "cancellations", "credits", "welcome", "hello"],
)
async def test_what_an_agent_may_not_say_ends_its_own_session(
    fleet: Fleet, said: dict[str, Any], why: str
) -> None:
    async with unharmed(fleet) as client, bad_agent(fleet) as agent, asked(client, agent) as (_, waiting):
        await agent.say(**said)
        code, text = await refused(agent)
        assert (code, why in text) == ("INVALID_ARGUMENT", True), text
        assert (await failure(waiting)).code == "AGENT_LOST"


async def test_an_agent_that_sends_parts_without_credit_fails_that_task_only(fleet: Fleet) -> None:
    """One megabyte and the debt of one part may be under way; it stops at nothing."""
    async with unharmed(fleet) as client, bad_agent(fleet) as agent:
        go_on = asyncio.Event()

        async def read_slowly() -> None:
            async for _ in client.stream("bad", "x"):
                await go_on.wait()

        reading = asyncio.create_task(read_slowly())
        task = await agent.task()
        value = task_pb2.Value(payload=task_pb2.Payload(data=bytes(MIB))).SerializeToString()
        for _ in range(40):
            await agent.say(parts=[link_pb2.Part(task_id=task.id, value=value)])
        while (frame := await agent.read()) is not None and task.id not in frame.cancelled_task_ids:
            pass
        go_on.set()
        with pytest.raises(TaskFailed) as failed:
            await reading
        assert failed.value.code == "INVALID_RESULT"
        await still_works(client, agent)


async def test_parts_that_nobody_asked_for_fail_that_task_only(fleet: Fleet) -> None:
    async with unharmed(fleet) as client, bad_agent(fleet) as agent:
        async with asked(client, agent) as (task_id, waiting):
            await agent.say(parts=[link_pb2.Part(task_id=task_id, value=b"x")])
            failed = await failure(waiting)
            assert (failed.code, "nobody had made room" in str(failed)) == ("INVALID_RESULT", True)
        await agent.say(parts=[link_pb2.Part(task_id=n, value=b"of nobody") for n in range(1_000)])
        await still_works(client, agent)


async def test_an_answer_of_fewer_parts_than_were_sent_is_none(fleet: Fleet) -> None:
    async with unharmed(fleet) as client, bad_agent(fleet) as agent:
        parts: Any = client.stream("bad", "x")
        first = asyncio.ensure_future(anext(parts))
        task = await agent.task()
        value = task_pb2.Value(payload=task_pb2.Payload(data=b"one")).SerializeToString()
        await agent.say(
            parts=[link_pb2.Part(task_id=task.id, value=value)],
            outcomes=[link_pb2.TaskOutcome(task_id=task.id, parts=7)],
        )
        assert (await first).value == b"one"
        assert (await failure(anext(parts))).code == "INVALID_RESULT"
        await still_works(client, agent)


async def test_an_agent_that_never_reads_while_its_heart_beats_costs_bounded_memory(
    shared_plane: tuple[Child, Fleet], fleet: Fleet
) -> None:
    plane, _ = shared_plane
    async with unharmed(fleet), fleet.client() as client, bad_agent(fleet, max_concurrency=4096) as agent:
        before = rss(plane)
        data = bytes(MIB)
        deaf: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.analyze("bad", "x", data, timeout=4)) for _ in range(300)
        ]
        for _ in range(20):
            await agent.say()
            await asyncio.sleep(0.1)
        assert rss(plane) - before < 400 * MIB  # 64 MiB to be read, 64 MiB queued, and what gRPC holds
        ended = Counter(getattr(e, "code", e) for e in await asyncio.gather(*deaf, return_exceptions=True))
        assert set(ended) <= {"DEADLINE_EXCEEDED", "OVERLOADED"}
        assert ended["DEADLINE_EXCEEDED"] > 0
        assert (await client.agent("bad")).in_flight == 0


async def test_an_agent_that_comes_back_without_its_tasks_has_lost_them(fleet: Fleet) -> None:
    """And cannot answer them any more."""
    async with (
        unharmed(fleet) as client,
        bad_agent(fleet, instance_id=b"1" * 16) as agent,
        asked(client, agent) as (task_id, waiting),
        fleet.raw_agent("agent/bad") as again,
    ):
        hello = link_pb2.Hello(**HELLO, sole=True, instance_id=b"1" * 16)
        hello.description.CopyFrom(registry_pb2.AgentDescription(agent_id="bad", max_concurrency=8))
        await again.say(hello=hello)
        assert (await failure(waiting)).code == "AGENT_LOST"
        assert await agent.goodbye() == "REPLACED"
        assert (await again.read()) is not None
        await again.answer(task_id, b"late")
        await still_works(client, again)
