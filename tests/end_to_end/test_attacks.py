"""Authenticated peers, and a control plane, that do their worst: it costs their own stream or call only."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health, health_pb2_grpc

from parallax.protos import (
    dispatch_pb2,
    dispatch_pb2_grpc,
    link_pb2,
    registry_pb2,
    registry_pb2_grpc,
    session_pb2_grpc,
    task_pb2,
)
from parallax.runtime.link import MAX_FRAME_ITEMS, End, Link, Receiver, Said
from parallax.runtime.link_stream import converse
from parallax.runtime.outcome import Payload
from parallax.runtime.session import SHORTEST_BEAT_S
from parallax.runtime.wire import encode_work
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.sdk import client as client_module
from parallax.security.errors import InvalidRequest, TaskFailed, Unavailable
from tests.end_to_end import http2

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve, Until

MIB = 1024 * 1024
HELLO = link_pb2.LinkFrame(
    hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1, instance_id=bytes(16))
)
PROMPTLY_S = 15.0  # for what would else never end, on a machine that is busy


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


# Peers of a control plane.


@asynccontextmanager
async def windowless(
    fleet: Fleet, directory: Path, method: str, message: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A call of agent-1 whose answers never fit: its flow control window is zero (RFC 9113 §6.9.2)."""
    leaf = fleet.pki.issue("agent/agent-1")
    context = ssl.create_default_context(cadata=leaf.bundle_pem.decode())
    cert, key = directory / "cert.pem", directory / "key.pem"
    cert.write_bytes(leaf.chain_pem)
    key.write_bytes(leaf.key_pem)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", fleet.port, ssl=context, server_hostname="control-plane.parallax.local"
    )
    try:
        writer.write(http2.grpc_call(method, message, settings=http2.NO_WINDOW, ends=False))
        await reader.readuntil(b"grpc-accept-encoding")  # the call is under way: it has its initial metadata
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # for the transport to close


async def test_a_peer_that_takes_no_bytes_does_not_keep_the_control_plane_from_stopping(
    serve: Serve, tmp_path: Path
) -> None:
    async with AsyncExitStack() as after, asyncio.timeout(PROMPTLY_S), serve() as fleet:
        await after.enter_async_context(windowless(fleet, tmp_path, "/grpc.health.v1.Health/Watch", b""))
        async with fleet.client() as client:
            assert await client.agents() == []  # by now the other call waits for its window


async def test_a_session_that_does_not_take_its_welcome_ends_with_its_registration(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    caplog.set_level("INFO")
    connect = "/parallax.v1.SessionService/Connect"
    async with (
        windowless(fleet, tmp_path, connect, HELLO.SerializeToString()) as (reader, writer),
        fleet.channel("agent/agent-1") as channel,
    ):
        await until(lambda: "session opened" in caplog.messages)
        await registry_pb2_grpc.RegistryServiceStub(channel).Deregister(registry_pb2.DeregisterRequest())
        await until(lambda: "session closed" in caplog.messages)
        writer.write(http2.frame(http2.WINDOW_UPDATE, 0, 1, MIB.to_bytes(4, "big")))  # room after all
        async with asyncio.timeout(PROMPTLY_S):
            await reader.readuntil(b"grpc-status")


async def test_a_frame_of_more_outcomes_than_one_may_hold_ends_its_own_stream(fleet: Fleet) -> None:
    """Five megabytes hold millions: the loop would have been busy with them for seconds."""
    async with fleet.channel("agent/agent-1") as channel:
        stream: Any = channel.stream_stream("/parallax.v1.SessionService/Connect")()
        await stream.write(HELLO.SerializeToString())
        await stream.read()
        await stream.write(b"\x3a\x00" * MAX_FRAME_ITEMS)
        await stream.write(b"\x3a\x00" * 2_500_000)
        with pytest.raises(aio.AioRpcError, match="more than 4096 items") as refused:
            await stream.read()
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_huge_content_type_costs_the_caller_his_call_and_no_agent(fleet: Fleet) -> None:
    """It counts towards no payload limit, so the frame that carried it would have been too large."""
    async with (
        fleet.agent(Echo),
        fleet.client() as client,
        fleet.channel("client/cli") as channel,
    ):
        before = await client.agents()
        request = dispatch_pb2.ExecuteRequest(target="agent-1", task="x")
        request.payload.content_type = "x" * 3 * MIB
        execute = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute
        calls = [execute(request, timeout=10) for _ in range(3)]
        assert {await call.code() for call in calls} == {StatusCode.INVALID_ARGUMENT}
        assert await client.agents() == before


async def test_an_answer_with_huge_texts_still_reaches_its_caller(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent(agent_id="agent-1") as agent,
        fleet.client() as client,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(outcome(client))
        code = task_pb2.OUTCOME_CODE_HANDLER_FAILED
        said = task_pb2.Failure(code=code, message="m" * 4 * MIB, error_type="t" * 9_999)
        await agent.say(outcomes=[link_pb2.TaskOutcome(task_id=(await agent.task()).id, failure=said)])
        failed = await asked
        assert (failed.code, failed.error_type, failed.args) == ("HANDLER_FAILED", "t" * 256, ("m" * 2048,))

        asked = group.create_task(outcome(client))
        payload = task_pb2.Payload(data=bytes(4 * MIB), content_type="x" * (MIB - 100))
        value = task_pb2.Value(payload=payload, confidence=1).SerializeToString()
        await agent.say(outcomes=[link_pb2.TaskOutcome(task_id=(await agent.task()).id, value=value)])
        assert (await asked).code == "INVALID_RESULT"


async def outcome(client: ParallaxClient) -> TaskFailed:
    """The failure of a task for agent-1."""
    with pytest.raises(TaskFailed) as failed:
        await client.analyze("agent-1", "x")
    return failed.value


async def test_an_agent_allowed_more_than_its_control_plane_fails_what_that_cannot_take(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame over gRPC's limit would have ended the session, and the agent with it for good."""

    class Large(SecureAgent):
        async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
            return bytes(int(task)), 1.0

    async with serve(max_payload_bytes=4 * MIB) as fleet, fleet.client() as client:
        monkeypatch.setenv("PARALLAX_MAX_PAYLOAD_BYTES", str(16 * MIB))
        async with fleet.agent(Large):
            with pytest.raises(TaskFailed, match="more than the 4,194,304 allowed") as failed:
                await client.analyze("agent-1", str(8 * MIB))
            assert failed.value.code == "INVALID_RESULT"
            assert (await client.analyze("agent-1", "1")).value == b"\0"


async def test_a_message_that_grows_when_it_is_unpacked_is_refused(fleet: Fleet) -> None:
    async with fleet.channel("client/cli") as channel:
        request = dispatch_pb2.ExecuteRequest(target="agent-1", task="x")
        request.payload.data = bytes(64 * MIB)
        execute = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute
        with pytest.raises(aio.AioRpcError, match="Decompressed message larger than max") as refused:
            await execute(request, timeout=20, compression=grpc.Compression.Gzip)
        assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED


async def test_very_many_calls_at_once_are_all_answered(fleet: Fleet) -> None:
    """By itself gRPC cancels what exceeds a thousand, which reads as a lost connection."""
    async with fleet.client() as client:
        calls = [client.analyze("agent-1", "x") for _ in range(2_000)]
        failures = await asyncio.gather(*calls, return_exceptions=True)
        assert Counter(getattr(each, "code", repr(each)) for each in failures) == {"NO_AGENT": 2_000}


async def test_callers_who_vanish_leave_nothing_behind(fleet: Fleet, until: Until) -> None:
    forever = 2**64 - 1
    async with (
        fleet.raw_agent(agent_id="agent-1", max_concurrency=4096),
        fleet.client() as client,
        fleet.channel("client/cli") as channel,
    ):
        execute = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute
        targets = ["agent-1", "capability:none"] * 250
        requests = (
            dispatch_pb2.ExecuteRequest(
                target=target, task="x", timeout_ms=forever, wait_for_agent_ms=forever
            )
            for target in targets
        )
        calls = [execute(request, timeout=60) for request in requests]
        while (await client.agent("agent-1")).in_flight < 250:
            await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        while (await fleet.metrics())['parallax_tasks_total{outcome="CANCELLED"}'] < 500:
            await asyncio.sleep(0.01)
        assert (await client.agent("agent-1")).in_flight == 0


async def test_very_many_sessions_of_one_agent_come_down_to_one(fleet: Fleet) -> None:
    """Of one instance the newest stays; of several the fourth, and then nobody may take over."""
    for name, fresh in (("agent-1", False), ("agent-2", True)):
        async with fleet.channel(f"agent/{name}") as channel:
            streams: list[Any] = []
            for _ in range(100):
                streams.append(session_pb2_grpc.SessionServiceStub(channel).Connect())
                hello = link_pb2.LinkFrame()
                hello.CopyFrom(HELLO)
                if fresh:
                    hello.hello.instance_id = secrets.token_bytes(16)
                await streams[-1].write(hello)
            welcomed = await asyncio.gather(*(s.read() for s in streams), return_exceptions=True)
            refused = {e.code() for e in welcomed if isinstance(e, aio.AioRpcError)}
            assert refused == ({StatusCode.FAILED_PRECONDITION} if fresh else set())
            while (await fleet.metrics())["parallax_sessions"] != 1:
                await asyncio.sleep(0.01)


async def test_an_agent_that_never_reads_holds_up_nobody_else(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1", max_concurrency=4096),
        fleet.agent(Echo, "agent-2"),
        fleet.client() as client,
    ):
        data = bytes(100_000)
        deaf = [asyncio.create_task(client.analyze("agent-1", "x", data, timeout=0.5)) for _ in range(100)]
        assert (await client.analyze("agent-2", "x", data)).value == data
        late = await asyncio.gather(*deaf, return_exceptions=True)
        assert Counter(getattr(each, "code", repr(each)) for each in late) == {"DEADLINE_EXCEEDED": 100}
        assert (await client.agent("agent-1")).in_flight == 0


async def test_a_control_plane_whose_log_nobody_reads_any_more_stops_in_order(
    pki: Pki, fleet: Fleet, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    ours = {
        "PARALLAX_LISTEN": "127.0.0.1:0",
        "PARALLAX_HTTP_LISTEN": "none",
        "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
        "PARALLAX_DATA_DIR": str(tmp_path / "data"),
    }
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "parallax.control_plane"],
        env=environment | pki.environment | ours | {"PARALLAX_LOG_FORMAT": "json"},
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        with process.stderr as log:
            ready = json.loads(await asyncio.to_thread(log.readline))
        other = type(fleet)(pki, pki.tls(), ready["port"], ready["metrics_port"])
        async with other.channel("agent/agent-1") as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            with pytest.raises(aio.AioRpcError, match="may not call"):  # which it would have logged
                await stub.ListAgents(registry_pb2.ListAgentsRequest(), timeout=10)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
    finally:
        process.kill()
        process.wait()


# A control plane that has the right certificate and means ill.

Frames = AsyncIterator[link_pb2.LinkFrame]


class Aborted(Exception):
    """Lets the rogue end the stream with this status."""

    def __init__(self, code: StatusCode) -> None:
        super().__init__(code)
        self.code = code


Connect = Callable[[Frames, Callable[..., Awaitable[None]]], Awaitable[None]]


@asynccontextmanager
async def rogue(
    pki: Pki,
    connect: Connect | None = None,
    outcome: link_pb2.TaskOutcome | None = None,
    agents: registry_pb2.ListAgentsResponse | None = None,
) -> AsyncIterator[str]:
    """The address of a control plane that answers so; *connect* gets the frames, and says some of its own."""

    class Sessions(session_pb2_grpc.SessionServiceServicer):
        async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
            async def say(**frame: Any) -> None:
                await context.write(link_pb2.LinkFrame(**frame))

            assert connect is not None
            try:
                await connect(request_iterator, say)
            except Aborted as exc:
                await context.abort(exc.code, "so there")

    class Dispatch(dispatch_pb2_grpc.DispatchServiceServicer):
        async def Execute(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise NotImplementedError

        async def Link(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
            async for frame in request_iterator:
                if frame.HasField("hello"):
                    await context.write(link_pb2.LinkFrame(welcome=link_pb2.Welcome(protocol_version=1)))
                for task in frame.tasks:
                    assert outcome is not None
                    outcome.task_id = task.id
                    await context.write(link_pb2.LinkFrame(outcomes=[outcome]))

    class Registry(registry_pb2_grpc.RegistryServiceServicer):
        async def ListAgents(self, request: Any, context: Any) -> Any:  # noqa: N802
            return agents

    leaf = pki.issue("service/control-plane")
    server = aio.server()
    session_pb2_grpc.add_SessionServiceServicer_to_server(Sessions(), server)
    dispatch_pb2_grpc.add_DispatchServiceServicer_to_server(Dispatch(), server)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(Registry(), server)  # type: ignore[abstract]
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    pairs = [(leaf.key_pem, leaf.chain_pem)]
    credentials = grpc.ssl_server_credentials(pairs, leaf.bundle_pem, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(0)


def agent_of(pki: Pki, address: str) -> SecureAgent:
    """An agent that dials *address*."""
    return Echo("agent-1", "Echo", ["echo"], tls=pki.tls(), control_plane=address)


async def test_an_agent_told_to_be_heard_from_all_the_time_keeps_its_pace(pki: Pki) -> None:
    loop = asyncio.get_running_loop()
    heard: list[float] = []
    enough = asyncio.Event()

    async def connect(frames: Frames, say: Callable[..., Awaitable[None]]) -> None:
        async for _ in frames:
            if not heard:
                await say(welcome=link_pb2.Welcome(protocol_version=1, heartbeat_ms=0))
            heard.append(loop.time())
            if len(heard) == 4:
                enough.set()

    async with rogue(pki, connect) as address, agent_of(pki, address):
        await enough.wait()
        assert heard[3] - heard[0] > 2 * SHORTEST_BEAT_S


async def test_an_agent_whose_frame_was_too_large_comes_back(pki: Pki) -> None:
    calls = 0

    async def connect(frames: Frames, say: Callable[..., Awaitable[None]]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Aborted(StatusCode.RESOURCE_EXHAUSTED)  # gRPC's own word for it
        await say(welcome=link_pb2.Welcome(protocol_version=1, heartbeat_ms=1000))
        async for _ in frames:
            pass

    async with rogue(pki, connect) as address, agent_of(pki, address):
        assert calls == 2


async def test_an_agent_answers_tasks_that_make_no_sense_and_stays(pki: Pki) -> None:
    """No work, no time left, endless time, more than it may have; endless time between signs of life."""
    answers: asyncio.Queue[link_pb2.TaskOutcome] = asyncio.Queue()
    endless, hurried, large, unreadable, wordy = 1, 2, 3, 4, 5
    many = range(1_000, 5_000)

    async def connect(frames: Frames, say: Callable[..., Awaitable[None]]) -> None:
        welcome = link_pb2.Welcome(protocol_version=1, heartbeat_ms=2**64 - 1, max_payload_bytes=10)
        async for frame in frames:
            if frame.HasField("hello"):
                await say(welcome=welcome)
                await say(cancelled_task_ids=[7] * 3_000, credits=[link_pb2.Credit(task_id=7, bytes=1)])
                odd = [
                    link_pb2.Task(id=endless, timeout_ms=2**64 - 1),
                    link_pb2.Task(id=hurried),
                    link_pb2.Task(id=large, timeout_ms=9_000, work=encode_work("x", Payload(bytes(11)))),
                    link_pb2.Task(id=unreadable, timeout_ms=9_000, work=b"\xff\xfe\x00garbage"),
                    link_pb2.Task(id=wordy, timeout_ms=9_000, work=encode_work("x" * 1025, Payload())),
                ]
                rest = [link_pb2.Task(id=n, timeout_ms=9_000) for n in many]
                await say(tasks=[*odd, *rest])
            for answer in frame.outcomes:
                answers.put_nowait(answer)

    async with rogue(pki, connect) as address, agent_of(pki, address):
        got = [await answers.get() for _ in range(5 + len(many))]
    codes: dict[int, str] = {}
    for answer in got:
        assert answer.task_id not in codes
        code = task_pb2.OutcomeCode.Name(answer.failure.code).removeprefix("OUTCOME_CODE_")
        codes[answer.task_id] = code if answer.HasField("failure") else "OK"
    assert codes[endless] == "OK"
    assert codes[hurried] == "DEADLINE_EXCEEDED"
    assert codes[large] == "INVALID_RESULT"  # more than the control plane said it takes
    assert codes[unreadable] == codes[wordy] == "INVALID_ARGUMENT"
    assert Counter(codes[n] for n in many) == {"OK": 16 + 256 - 2, "OVERLOADED": 4_000 - 270}


@pytest.mark.parametrize(
    "said",
    [
        {"tasks": [link_pb2.Task(id=1, timeout_ms=9_000)] * 2},
        {"welcome": link_pb2.Welcome(protocol_version=1)},
        {"hello": link_pb2.Hello()},
        {"outcomes": [link_pb2.TaskOutcome(task_id=1)]},
        {"cancelled_task_ids": [7] * 10_000},
    ],
    ids=["a task twice", "a second welcome", "a hello", "an answer", "too many items"],
)
async def test_an_agent_whose_control_plane_breaks_the_protocol_leaves_it_and_comes_back(
    pki: Pki, caplog: pytest.LogCaptureFixture, said: dict[str, Any]
) -> None:
    """Once: what is wrong with one frame must not take a fleet of agents down for good."""
    calls: asyncio.Queue[None] = asyncio.Queue()

    async def connect(frames: Frames, say: Callable[..., Awaitable[None]]) -> None:
        await say(welcome=link_pb2.Welcome(protocol_version=1, heartbeat_ms=1000))
        if calls.empty():
            await say(**said)
        calls.put_nowait(None)
        async for _ in frames:
            pass

    async with rogue(pki, connect) as address, agent_of(pki, address), asyncio.timeout(PROMPTLY_S):
        while calls.qsize() < 2:
            await asyncio.sleep(0.01)
    causes = [vars(record)["cause"] for record in caplog.records if record.message == "not connected"]
    assert "the other end broke the protocol" in causes[0]  # to be back may take several tries


async def test_a_call_that_the_agent_itself_ends_is_no_cancellation_of_the_agent(pki: Pki) -> None:
    """A control plane that hangs while its agent stops: the agent ends the call, and in good order."""
    ended = asyncio.Event()

    async def connect(frames: Frames, say: Callable[..., Awaitable[None]]) -> None:
        try:
            await say(welcome=link_pb2.Welcome())
            async for _ in frames:
                pass
        finally:
            ended.set()

    async with rogue(pki, connect) as address:
        leaf = pki.issue("agent/agent-1")
        options = [("grpc.ssl_target_name_override", "control-plane.parallax.local")]
        async with aio.secure_channel(address, leaf.channel_credentials(), options=options) as channel:
            call = session_pb2_grpc.SessionServiceStub(channel).Connect()
            welcomed = asyncio.Event()

            class Greeted(Receiver):
                def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
                    welcomed.set()

            link = Link(End.WORKER, Said.WELCOME, Greeted())
            link.greet(HELLO)
            carrying = asyncio.create_task(converse(link, call))
            await welcomed.wait()
            call.cancel()
            with pytest.raises(Unavailable):
                await carrying
        async with asyncio.timeout(10):  # gRPC logs an error where a server stops in the middle of that
            await ended.wait()


@pytest.mark.parametrize(
    "said",
    [
        None,
        task_pb2.Value(confidence=float("nan")),
        task_pb2.Value(payload=task_pb2.Payload(data=b"[" * MIB, content_type="application/json")),
        task_pb2.Value(payload=task_pb2.Payload(content_type="\x1b[2J")),
    ],
    ids=["neither", "NaN", "deep", "type"],
)
async def test_a_client_that_is_told_nonsense_says_so(pki: Pki, said: task_pb2.Value | None) -> None:
    told = link_pb2.TaskOutcome(value=said.SerializeToString()) if said else link_pb2.TaskOutcome()
    async with (
        rogue(pki, outcome=told) as address,
        ParallaxClient(address, pki.tls()) as client,
    ):
        failed = await outcome(client)
        assert failed.code == "INVALID_RESULT"
        assert str(failed).isprintable()


async def test_a_client_lists_agents_in_a_state_younger_than_itself(pki: Pki) -> None:
    agents = [registry_pb2.Agent(agent_id="agent-1", state=99)]  # type: ignore[arg-type]
    async with (
        rogue(pki, agents=registry_pb2.ListAgentsResponse(agents=agents)) as address,
        ParallaxClient(address, pki.tls()) as client,
    ):
        assert [agent.state for agent in await client.agents()] == ["unspecified"]


async def test_a_client_that_is_given_pages_without_end_gives_up(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "READ_S", 0.5)
    async with (
        rogue(pki, agents=registry_pb2.ListAgentsResponse(next_page_token="x")) as address,
        ParallaxClient(address, pki.tls()) as client,
    ):
        with pytest.raises(Unavailable):
            await client.agents()


async def test_a_client_refuses_to_send_a_huge_target_or_is_refused(fleet: Fleet) -> None:
    async with fleet.client() as client:
        for target in ("a" * MIB, "capability:" + "a" * MIB, "\x1b[2J\n", "anonymous/" * 1000):
            with pytest.raises(Exception) as refused:  # noqa: PT011
                await client.analyze(target, "x")
            assert type(refused.value).__name__ in {"InvalidRequest", "IdentityError"}
            assert len(str(refused.value)) < 500
            assert str(refused.value).isprintable()
        with pytest.raises(InvalidRequest, match="more than 1024 bytes"):
            await client.analyze("agent-1", "\u20ac" * 500)


# A log reader that stops reading.


# The first line goes on to the test; then nobody reads until the control plane has ended.
UNREAD = ("bash", "-c", 'exec "$@" 2> >(head -n 1; exec tail --pid=$$ -f /dev/null)', "bash")


async def test_a_log_that_nobody_reads_holds_up_neither_calls_nor_the_end(
    children: Children, pki: Pki
) -> None:
    child, fleet = await children.fleet(pki, *UNREAD)
    async with fleet.channel("agent/agent-1") as channel, fleet.client() as client:
        stub = dispatch_pb2_grpc.DispatchServiceStub(channel)
        for _ in range(600):  # each leaves a line; together they are more than a pipe holds
            with pytest.raises(aio.AioRpcError) as refused:
                await stub.Execute(dispatch_pb2.ExecuteRequest(target="agent-1"), timeout=PROMPTLY_S)
            assert refused.value.code() is StatusCode.PERMISSION_DENIED
        assert await client.agents() == []
    assert await child.stop() == 0
