"""One agent asked without a control plane: who may, what a break costs, and that it is the agent meant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallax.protos import agent_pb2, agent_pb2_grpc, link_pb2, task_pb2
from parallax.runtime.methods import OF_AGENTS
from parallax.sdk import SecureAgent, SecureGrpcAgentProxy
from parallax.security.config import MTLSConfig
from parallax.security.errors import (
    ConfigError,
    IdentityError,
    InvalidRequest,
    NotAuthorized,
    ParallaxError,
    TaskFailed,
    Unavailable,
    VerificationError,
    WrongIdentity,
)
from tests.end_to_end.relay import relay
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Leaf, Listen, Pki, Until

PROMPTLY_S = 15.0  # for what should happen at once, on a machine that is busy
MIB = 1024 * 1024
BOTH = pytest.mark.parametrize("link", [True, False], ids=["link", "unary"])


class Echo(SecureAgent):
    """Answers with what it was given; notes what is begun and what is cancelled."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.running = 0
        self.most = 0
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            match task:
                case "wait":
                    await self.release.wait()
                case "fail":
                    raise LookupError("no such thing")
                case "grow":
                    data = bytes(data)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
        return data, 0.5


class Count(SecureAgent):
    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        self.made = 0
        self.closed = asyncio.Event()
        try:
            for number in range(data):
                if task == "fail" and number == 2:
                    raise LookupError("no more numbers")
                self.made += 1
                yield (bytes(MIB // 4) if task == "large" else number), 1.0
        finally:
            self.closed.set()


@asynccontextmanager
async def proxy_of(
    agent: SecureAgent | str,
    tls: MTLSConfig,
    agent_id: str = "agent-1",
    **options: Any,
) -> AsyncIterator[SecureGrpcAgentProxy]:
    endpoint = agent if isinstance(agent, str) else agent.endpoint
    assert endpoint is not None
    metadata = {"id": agent_id, "name": "An agent", "endpoint": endpoint}
    async with await SecureGrpcAgentProxy.from_metadata(metadata, tls, **options) as proxy:
        yield proxy


@asynccontextmanager
async def raw(pki: Pki, agent: SecureAgent, leaf: Leaf | str | None) -> AsyncIterator[aio.Channel]:
    """A bare channel to the agent, with the certificate of *leaf* or without one."""
    import grpc

    leaf = pki.issue(leaf) if isinstance(leaf, str) else leaf
    credentials = (
        leaf.channel_credentials(pki.authority.bundle.pem)
        if leaf is not None
        else grpc.ssl_channel_credentials(pki.authority.bundle.pem)
    )
    options = [("grpc.ssl_target_name_override", f"{agent.agent_id}.agents.parallax.local")]
    assert agent.endpoint is not None
    async with aio.secure_channel(agent.endpoint, credentials, options=options) as channel:
        yield channel


async def code_of(waiting: Any) -> str:
    with pytest.raises(TaskFailed) as failed:
        async with asyncio.timeout(PROMPTLY_S):
            await waiting
    return failed.value.code


# As if it were local.


@BOTH
async def test_an_agent_answers_through_its_proxy(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Echo) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        assert await proxy.analyze("echo", {"a": [1, 2.5, None]}) == ({"a": [1, 2.5, None]}, 0.5)
        assert await proxy.analyze("echo", b"\x00\xff", timeout=30) == (b"\x00\xff", 0.5)
        assert await proxy.analyze("echo", {"a": 1}, returns=dict[str, int]) == ({"a": 1}, 0.5)
        assert await proxy.capabilities() == ("echo",)
        assert await proxy.check_health() is True
        assert (proxy.agent_id, proxy.name, proxy.endpoint) == ("agent-1", "An agent", agent.endpoint)
        assert await code_of(proxy.analyze("echo", {"a": 1}, returns=list[int])) == "INVALID_RESULT"


@BOTH
async def test_what_a_handler_raises_is_told_by_type_and_text(
    listen: Listen, pki: Pki, *, link: bool
) -> None:
    async with listen(Echo) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        with pytest.raises(TaskFailed, match="no such thing") as failed:
            await proxy.analyze("fail")
        assert (failed.value.code, failed.value.error_type) == ("HANDLER_FAILED", "LookupError")
        assert await proxy.analyze("echo", 1) == (1, 0.5)


@BOTH
async def test_parts_come_one_by_one(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Count) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        assert [part async for part in proxy.stream("count", 3)] == [(0, 1.0), (1, 1.0), (2, 1.0)]
        assert [part async for part in proxy.stream("count", 0)] == []
        with pytest.raises(TaskFailed, match="no more numbers"):
            assert [part async for part in proxy.stream("fail", 9)]


@BOTH
async def test_an_agent_that_answers_at_once_gives_one_part(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Echo) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        assert [part async for part in proxy.stream("echo", "x")] == [("x", 0.5)]


@BOTH
async def test_parts_are_made_no_faster_than_they_are_taken_and_no_longer(
    listen: Listen, pki: Pki, *, link: bool
) -> None:
    async with listen(Count) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        async with aclosing(proxy.stream("large", 1_000)) as parts:
            async for _ in parts:
                await asyncio.sleep(0.5)
                break
            assert agent.made < 50
        async with asyncio.timeout(PROMPTLY_S):
            await agent.closed.wait()
        assert agent.made < 50


@BOTH
async def test_64_calls_at_once_share_one_proxy(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with (
        listen(Echo, max_concurrency=8) as agent,
        proxy_of(agent, pki.tls(), link=link) as proxy,
    ):
        answers = await asyncio.gather(*(proxy.analyze("echo", number) for number in range(64)))
        assert answers == [(number, 0.5) for number in range(64)]
        assert agent.most <= 8


@BOTH
async def test_a_cancelled_call_cancels_the_handler(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Echo) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        waiting = asyncio.create_task(proxy.analyze("wait"))
        async with asyncio.timeout(PROMPTLY_S):
            while not agent.running:
                await asyncio.sleep(0.01)
            waiting.cancel()
            await agent.cancelled.wait()
        assert await proxy.analyze("echo", 1) == (1, 0.5)


@BOTH
async def test_a_deadline_reaches_the_handler(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Echo) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        while not agent.most:  # a busy machine may let the time pass before it is begun
            assert await code_of(proxy.analyze("wait", timeout=0.2)) == "DEADLINE_EXCEEDED"
        async with asyncio.timeout(PROMPTLY_S):
            await agent.cancelled.wait()
        for timeout in (0, -1, 1e9, float("nan")):
            with pytest.raises(InvalidRequest):
                await proxy.analyze("echo", timeout=timeout)


@BOTH
async def test_what_is_more_than_the_agent_can_have_waiting_is_overloaded(
    listen: Listen, pki: Pki, monkeypatch: pytest.MonkeyPatch, *, link: bool
) -> None:
    monkeypatch.setenv("PARALLAX_QUEUE_LIMIT", "1")
    async with (
        listen(Echo, max_concurrency=1) as agent,
        proxy_of(agent, pki.tls(), link=link) as proxy,
    ):
        held = [asyncio.create_task(proxy.analyze("wait", n)) for n in range(2)]
        while not agent._server._executor._waiting:
            await asyncio.sleep(0.01)
        assert await code_of(proxy.analyze("echo")) == "OVERLOADED"
        agent.release.set()
        assert await asyncio.gather(*held) == [(0, 0.5), (1, 0.5)]


# Sizes, and bytes that mean nothing.


@BOTH
async def test_the_largest_payload_passes_and_one_byte_more_does_not(
    listen: Listen, pki: Pki, *, link: bool
) -> None:
    async with listen(Echo) as agent, proxy_of(agent, pki.tls(), link=link) as proxy:
        kept = asyncio.create_task(proxy.analyze("wait", 1))
        value, _ = await proxy.analyze("echo", bytes(4 * MIB))
        assert value == bytes(4 * MIB)
        with pytest.raises(InvalidRequest, match="4,194,305 bytes"):
            await proxy.analyze("echo", bytes(4 * MIB + 1))
        assert await code_of(proxy.analyze("grow", 4 * MIB + 1)) == "INVALID_RESULT"
        agent.release.set()
        assert await kept == (1, 0.5)


@BOTH
@pytest.mark.parametrize("smaller", ["agent", "caller"])
async def test_where_limits_differ_only_the_task_fails_that_breaks_one(
    listen: Listen, pki: Pki, monkeypatch: pytest.MonkeyPatch, smaller: str, *, link: bool
) -> None:
    monkeypatch.setenv("PARALLAX_MAX_PAYLOAD_BYTES", str(MIB if smaller == "agent" else 8 * MIB))
    async with listen(Echo) as agent:
        monkeypatch.setenv("PARALLAX_MAX_PAYLOAD_BYTES", str(MIB if smaller == "caller" else 8 * MIB))
        async with proxy_of(agent, pki.tls(), link=link) as proxy:
            kept = asyncio.create_task(proxy.analyze("wait", 1))
            await asyncio.sleep(0)
            with pytest.raises((InvalidRequest, TaskFailed)) as refused:
                if smaller == "agent":
                    await proxy.analyze("echo", bytes(6 * MIB))
                else:
                    await proxy.analyze("grow", 6 * MIB)
            assert "PARALLAX_MAX_PAYLOAD_BYTES" in str(refused.value)
            agent.release.set()
            assert await kept == (1, 0.5)


@BOTH
async def test_a_part_that_the_caller_does_not_take_fails_its_own_task_only(
    listen: Listen, pki: Pki, monkeypatch: pytest.MonkeyPatch, *, link: bool
) -> None:
    class Large(Echo):
        async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
            yield bytes(data), 1.0

    async with listen(Large) as agent:
        monkeypatch.setenv("PARALLAX_MAX_PAYLOAD_BYTES", str(MIB))
        async with proxy_of(agent, pki.tls(), link=link) as proxy:
            kept = asyncio.create_task(proxy.analyze("wait", 1))
            with pytest.raises(TaskFailed, match="PARALLAX_MAX_PAYLOAD_BYTES"):
                assert [part async for part in proxy.stream("x", 4 * MIB)]
            agent.release.set()
            assert await kept == (1, 0.5)


@pytest.mark.parametrize("work", [b"\xff\xff\xff", b"garbage", b"\x0a\xff\xff\xff\xff\x0f"])
async def test_bytes_that_are_no_work_fail_their_own_task_only(listen: Listen, pki: Pki, work: bytes) -> None:
    async with listen(Echo) as agent, raw(pki, agent, "client/cli") as channel:
        call: Any = agent_pb2_grpc.AgentServiceStub(channel).Link()
        await call.write(link_pb2.LinkFrame(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1)))
        assert (await call.read()).welcome.protocol_version == 1
        good = link_pb2.Work(name="echo", payload=task_pb2.Payload(data=b"good")).SerializeToString()
        bad_json = link_pb2.Work(
            name="echo", payload=task_pb2.Payload(data=work, content_type="application/json")
        ).SerializeToString()
        tasks = [
            link_pb2.Task(id=number, work=each, timeout_ms=15_000)
            for number, each in enumerate((work, bad_json, good))
        ]
        await call.write(link_pb2.LinkFrame(tasks=tasks))
        outcomes: dict[int, link_pb2.TaskOutcome] = {}
        async with asyncio.timeout(PROMPTLY_S):
            while len(outcomes) < 3:
                outcomes |= {o.task_id: o for o in (await call.read()).outcomes}
        assert task_pb2.Value.FromString(outcomes[2].value).payload.data == b"good"
        for number in (0, 1):
            assert outcomes[number].failure.code == task_pb2.OUTCOME_CODE_INVALID_ARGUMENT
        await call.done_writing()


async def test_a_link_that_breaks_the_protocol_ends_alone(listen: Listen, pki: Pki) -> None:
    async with (
        listen(Echo) as agent,
        proxy_of(agent, pki.tls()) as proxy,
        raw(pki, agent, "client/cli") as channel,
    ):
        kept = asyncio.create_task(proxy.analyze("wait", 1))
        call: Any = agent_pb2_grpc.AgentServiceStub(channel).Link()
        await call.write(link_pb2.LinkFrame(draining=True))
        with pytest.raises(aio.AioRpcError) as ended:
            async with asyncio.timeout(PROMPTLY_S):
                await call.read()
        assert ended.value.code() is StatusCode.INVALID_ARGUMENT
        agent.release.set()
        assert await kept == (1, 0.5)


async def test_a_goodbye_from_a_client_does_not_stop_the_agent(listen: Listen, pki: Pki) -> None:
    async with listen(Echo) as agent, raw(pki, agent, "client/admin") as channel:
        call: Any = agent_pb2_grpc.AgentServiceStub(channel).Link()
        await call.write(link_pb2.LinkFrame(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1)))
        await call.read()
        goodbye = link_pb2.Goodbye(reason=link_pb2.GOODBYE_REASON_DEREGISTERED)
        await call.write(link_pb2.LinkFrame(goodbye=goodbye))
        async with asyncio.timeout(PROMPTLY_S):
            assert await call.read() is aio.EOF
        async with proxy_of(agent, pki.tls()) as proxy:
            assert await proxy.analyze("echo", 1) == (1, 0.5)


# Who may.

METHODS = ("Analyze", "AnalyzeStream", "Link", "GetCapabilities")


async def tried(channel: aio.Channel, method: str) -> StatusCode:
    """How a call of *method* ends."""
    stub = agent_pb2_grpc.AgentServiceStub(channel)
    hello = link_pb2.LinkFrame(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1))
    try:
        async with asyncio.timeout(PROMPTLY_S):
            match method:
                case "Analyze":
                    await stub.Analyze(agent_pb2.AnalyzeRequest(task="echo"))
                case "AnalyzeStream":
                    assert [m async for m in stub.AnalyzeStream(agent_pb2.AnalyzeRequest(task="echo"))]
                case "Link":
                    call = stub.Link()
                    await call.write(hello)
                    await call.read()
                    await call.done_writing()
                case "GetCapabilities":
                    await stub.GetCapabilities(agent_pb2.GetCapabilitiesRequest())
                case "Check":
                    health: Any = health_pb2_grpc.HealthStub(channel)
                    await health.Check(health_pb2.HealthCheckRequest())
    except aio.AioRpcError as exc:
        return exc.code()
    return StatusCode.OK


def test_the_policy_covers_what_is_served_and_nothing_else() -> None:
    served = {f"/parallax.v1.AgentService/{method}" for method in METHODS}
    assert served == OF_AGENTS
    (service,) = agent_pb2.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("who", ["client/cli", "client/admin", "service/agent-proxy"])
async def test_clients_and_the_agent_proxy_may_ask(listen: Listen, pki: Pki, who: str, method: str) -> None:
    async with listen(Echo) as agent, raw(pki, agent, who) as channel:
        assert await tried(channel, method) is StatusCode.OK


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "who",
    ["agent/agent-2", "agent/agent-1", "agent/agent-proxy", "service/control-plane", "service/agent-proxy-2"],
)
async def test_agents_and_other_services_may_not(listen: Listen, pki: Pki, who: str, method: str) -> None:
    async with listen(Echo) as agent, raw(pki, agent, who) as channel:
        assert await tried(channel, method) is StatusCode.PERMISSION_DENIED
        assert await tried(channel, "Check") is StatusCode.OK


@pytest.mark.parametrize("method", [*METHODS, "Check"])
@pytest.mark.parametrize("wrong", ["certificate of another CA", "no certificate", "expired certificate"])
async def test_nobody_without_a_certificate_of_ours_may(
    listen: Listen, pki: Pki, new_pki: type[Pki], tmp_path: Path, wrong: str, method: str
) -> None:
    from datetime import timedelta

    leaves: dict[str, Callable[[], Leaf | None]] = {
        "certificate of another CA": lambda: new_pki(tmp_path / "other").issue("client/cli"),
        "no certificate": lambda: None,
        "expired certificate": lambda: pki.issue("client/cli", now=pki.now - timedelta(days=3)),
    }
    async with listen(Echo) as agent, raw(pki, agent, leaves[wrong]()) as channel:
        assert await tried(channel, method) is StatusCode.UNAVAILABLE


@BOTH
async def test_a_proxy_that_acts_as_an_agent_is_told_that_it_may_not(
    listen: Listen, pki: Pki, *, link: bool
) -> None:
    async with listen(Echo) as agent:
        with pytest.raises(NotAuthorized, match="agent-2 may not call"):
            async with proxy_of(agent, pki.tls(), identity="agent/agent-2", link=link) as proxy:
                await proxy.analyze("echo")


# Whether it is the agent meant.


@BOTH
async def test_the_endpoint_of_another_agent_is_refused(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Echo, "agent-2") as thief:
        with pytest.raises(WrongIdentity, match=r"agent-1 at 127\.0\.0\.1"):
            async with proxy_of(thief, pki.tls(), "agent-1", link=link):
                pass
        async with proxy_of(thief, pki.tls(), "agent-2", link=link) as proxy:
            assert await proxy.analyze("echo", 1) == (1, 0.5)


@BOTH
async def test_an_endpoint_that_another_agent_takes_over_is_refused_from_then_on(
    listen: Listen, pki: Pki, *, link: bool
) -> None:
    async with listen(Echo, listen=f"127.0.0.1:{free_port()}") as agent:
        endpoint = agent.endpoint
        proxy = await SecureGrpcAgentProxy.from_metadata(
            {"id": "agent-1", "endpoint": str(endpoint)}, pki.tls(), link=link
        )
        assert await proxy.analyze("echo", 1) == (1, 0.5)
    async with listen(Echo, "agent-2", listen=endpoint), proxy:
        with pytest.raises((WrongIdentity, TaskFailed)):
            await proxy.analyze("echo", 1)
        with pytest.raises(WrongIdentity):
            await proxy.analyze("echo", 1)


@BOTH
async def test_an_agent_of_another_ca_is_refused(
    listen: Listen, pki: Pki, new_pki: type[Pki], tmp_path: Path, *, link: bool
) -> None:
    other = new_pki(tmp_path / "other")
    other.save("agent/agent-1")
    async with listen(Echo, tls=other.tls()) as agent:
        with pytest.raises(VerificationError):
            async with proxy_of(agent, pki.tls(), link=link):
                pass


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({}, ConfigError),
        ({"id": "agent-1"}, ConfigError),
        ({"id": "", "endpoint": "localhost:1"}, ConfigError),
        ({"id": "agent-1", "endpoint": "localhost"}, ConfigError),
        ({"id": "agent-1", "endpoint": "dns://8.8.8.8/localhost:1"}, ConfigError),
        ({"id": "../agent-1", "endpoint": "localhost:1"}, IdentityError),
        ({"id": "agent/agent-1", "endpoint": "localhost:1"}, IdentityError),
    ],
)
async def test_metadata_that_names_no_agent_is_refused(
    pki: Pki, metadata: dict[str, str], error: type[ParallaxError]
) -> None:
    with pytest.raises(error):
        await SecureGrpcAgentProxy.from_metadata(metadata, pki.tls())


# When the connection breaks.


@BOTH
async def test_an_agent_that_is_not_there_is_unavailable(pki: Pki, *, link: bool) -> None:
    with pytest.raises(Unavailable, match=r"cannot reach agent-1 at 127\.0\.0\.1:1"):
        async with proxy_of("127.0.0.1:1", pki.tls(), link=link):
            pass


@BOTH
async def test_an_agent_that_is_far_away_is_reached(listen: Listen, pki: Pki, *, link: bool) -> None:
    """By the first attempt, whose handshake takes longer than the pause before another would."""
    async with (
        listen(Echo) as agent,
        relay(agent._server.port, delay_s=0.3) as (port, _),
        proxy_of(f"127.0.0.1:{port}", pki.tls(), link=link) as proxy,
    ):
        assert await proxy.analyze("echo", 1) == (1, 0.5)


@asynccontextmanager
async def holding(
    proxy: SecureGrpcAgentProxy, file: Path, until: Until
) -> AsyncIterator[asyncio.Task[tuple[Any, float]]]:
    """A task that a worker holds until *file* is gone."""
    waiting = asyncio.create_task(proxy.analyze("hold", str(file)))
    try:
        await until(file.exists)
        yield waiting
    finally:
        file.unlink(missing_ok=True)  # noqa: ASYNC240
        waiting.cancel()
        await asyncio.wait({waiting})


async def start(children: Children, pki: Pki, **environment: str) -> tuple[Child, str]:
    """An agent in a process of its own, and its endpoint."""
    alone = {"PARALLAX_CONTROL_PLANE": "none", "PARALLAX_LISTEN": "127.0.0.1:0"}
    child = children.start_agent(pki.environment | alone | environment)
    return child, f"127.0.0.1:{(await child.said('agent serves'))['port']}"


@BOTH
async def test_a_killed_agent_fails_what_it_held_and_is_found_again_when_it_is_back(
    children: Children, pki: Pki, tmp_path: Path, until: Until, *, link: bool
) -> None:
    child, endpoint = await start(children, pki, PARALLAX_LISTEN=f"127.0.0.1:{free_port()}")
    async with proxy_of(endpoint, pki.tls(), link=link) as proxy:
        async with holding(proxy, tmp_path / "held", until) as lost:
            child.process.kill()
            assert await code_of(lost) == "AGENT_LOST"
        with pytest.raises(Unavailable, match="cannot reach agent-1"):
            await proxy.analyze("echo", 1)
        assert await proxy.check_health() is False
        await start(children, pki, PARALLAX_LISTEN=endpoint)
        async with asyncio.timeout(PROMPTLY_S):
            while True:
                try:
                    assert await proxy.analyze("echo", 2) == (2, 1.0)
                except Unavailable:
                    await asyncio.sleep(0.05)
                else:
                    break


@BOTH
async def test_an_agent_that_is_told_to_stop_finishes_what_it_holds(
    children: Children, pki: Pki, tmp_path: Path, until: Until, *, link: bool
) -> None:
    child, endpoint = await start(children, pki)
    async with proxy_of(endpoint, pki.tls(), link=link) as proxy:
        async with holding(proxy, tmp_path / "held", until) as kept:
            child.process.terminate()
            while await proxy.check_health():
                await asyncio.sleep(0.01)
            with pytest.raises((Unavailable, TaskFailed), match=r"stopping|shutting down"):
                await proxy.analyze("echo")
            (tmp_path / "held").unlink()
            assert await kept == (str(tmp_path / "held"), 1.0)
        assert await child.ended() == 0


@BOTH
async def test_a_closed_proxy_says_so(listen: Listen, pki: Pki, *, link: bool) -> None:
    async with listen(Echo) as agent:
        async with proxy_of(agent, pki.tls(), link=link) as proxy:
            pass
        with pytest.raises(Unavailable, match="closed"):
            await proxy.analyze("echo")
        with pytest.raises(Unavailable, match="closed"):
            await proxy.capabilities()
        await proxy.close()


async def test_a_sick_agent_is_not_healthy(listen: Listen, pki: Pki) -> None:
    class Sick(Echo):
        def check_health(self) -> bool:
            return False

    async with listen(Sick) as agent, proxy_of(agent, pki.tls()) as proxy:
        assert await proxy.check_health() is False


# Where nobody is authenticated.


@BOTH
async def test_in_plaintext_everybody_on_this_host_may_ask(listen: Listen, *, link: bool) -> None:
    async with listen(Echo, tls=MTLSConfig()) as agent, proxy_of(agent, MTLSConfig(), link=link) as proxy:
        assert await proxy.analyze("echo", 1) == (1, 0.5)


async def test_plaintext_neither_listens_nor_dials_beyond_this_host(listen: Listen) -> None:
    with pytest.raises(ConfigError, match="plaintext does not listen"):
        async with listen(Echo, tls=MTLSConfig(), listen="0.0.0.0:0"):
            pass
    with pytest.raises(ConfigError, match="plaintext does not dial"):
        await SecureGrpcAgentProxy.from_metadata({"id": "a", "endpoint": "192.0.2.1:1"}, MTLSConfig())


@BOTH
async def test_without_client_certificates_the_agent_still_proves_who_it_is(
    listen: Listen, pki: Pki, *, link: bool
) -> None:
    tls = pki.tls(verify_client=False)
    async with listen(Echo, tls=tls) as agent:
        async with proxy_of(agent, tls, link=link) as proxy:
            assert await proxy.analyze("echo", 1) == (1, 0.5)
        with pytest.raises(WrongIdentity):
            async with proxy_of(agent, tls, "agent-2", link=link):
                pass
