"""Agents that listen: every mode, through the control plane's proxy, and what happens when one end goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import aio

from parallax.protos import agent_pb2_grpc, link_pb2, registry_pb2, registry_pb2_grpc
from parallax.runtime.address import advertised
from parallax.sdk import ParallaxClient, SecureAgent, SecureGrpcAgentProxy
from parallax.security.config import MTLSConfig
from parallax.security.errors import ConfigError, Superseded, TaskFailed
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Fleet, Listen, Pki, Serve, Until

PROMPTLY_S = 15.0  # on a machine that is busy; what goes wrong is never, or after a drain time
MIB = 1024 * 1024

# An agent that listens and registers, and waits to be dialled.
DIALLED: dict[str, Any] = {"session": False}


class Echo(SecureAgent):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.running = 0
        self.most = 0
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.set()
        try:
            if task == "wait":
                await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
        return (bytes(data) if task == "grow" else data), 0.5

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        for number in range(data):
            yield number, 1.0


async def proxy_of(agent: SecureAgent, tls: MTLSConfig, **options: Any) -> SecureGrpcAgentProxy:
    metadata = {"id": agent.agent_id, "endpoint": str(agent.endpoint)}
    return await SecureGrpcAgentProxy.from_metadata(metadata, tls, **options)


async def code_of(waiting: Any) -> str:
    with pytest.raises(TaskFailed) as failed:
        async with asyncio.timeout(PROMPTLY_S):
            await waiting
    return failed.value.code


async def state_of(client: ParallaxClient, wanted: str, agent_id: str = "agent-1") -> None:
    """Wait until the registry says so."""
    async with asyncio.timeout(PROMPTLY_S):
        while not any(a.agent_id == agent_id and a.state == wanted for a in await client.agents()):
            await asyncio.sleep(0.02)


async def proxies_are(fleet: Fleet, count: int) -> None:
    """Wait until the control plane keeps so many sessions that it has dialled."""
    async with asyncio.timeout(PROMPTLY_S):
        while (await fleet.metrics())["parallax_agent_proxies"] != count:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def held(client: ParallaxClient, agent: Echo, data: Any = 1) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that the agent has begun, and holds until it is released."""
    agent.begun.clear()
    waiting = asyncio.create_task(client.analyze("agent-1", "wait", data))
    try:
        async with asyncio.timeout(PROMPTLY_S):
            await agent.begun.wait()
        yield waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


# Modes.


async def test_alone_it_needs_no_control_plane_and_no_registration(listen: Listen, pki: Pki) -> None:
    async with listen(Echo) as agent, await proxy_of(agent, pki.tls()) as proxy:
        assert await proxy.analyze("echo", 1) == (1, 0.5)
    assert agent.endpoint is None or agent.endpoint.startswith("127.0.0.1:")


@pytest.mark.parametrize("options", [{"control_plane": "none"}, {"session": False}])
async def test_an_agent_that_nobody_could_reach_does_not_start(pki: Pki, options: dict[str, Any]) -> None:
    agent = Echo("agent-1", "Echo", ["echo"], tls=pki.tls(), **options)
    with pytest.raises(ConfigError, match="set PARALLAX_LISTEN"):
        async with agent:
            pass


async def test_settings_choose_the_mode(children: Children, pki: Pki) -> None:
    child = children.start_agent(pki.environment | {"PARALLAX_CONTROL_PLANE": "none"})
    assert await child.ended() == 2
    assert any("PARALLAX_LISTEN" in line for line in child.lines)


async def test_a_taken_port_is_told_in_one_line(listen: Listen, children: Children, pki: Pki) -> None:
    async with listen(Echo) as agent:
        taken = {"PARALLAX_CONTROL_PLANE": "none", "PARALLAX_LISTEN": str(agent.endpoint)}
        child = children.start_agent(pki.environment | taken)
        assert await child.ended() == 2
        assert any("PARALLAX_LISTEN" in line and "in use" in line for line in child.lines)


@pytest.mark.parametrize("options", [{}, {"listen": None}])
async def test_an_embedded_agent_that_is_superseded_says_only_that(
    listen: Listen, fleet: Fleet, options: dict[str, Any]
) -> None:
    """Whichever way it is reached: the error is not wrapped, and all of it ends."""
    with pytest.raises(Superseded):
        async with (
            listen(Echo, control_plane=fleet.address, **options),
            fleet.raw_agent(agent_id="agent-1"),
            asyncio.timeout(PROMPTLY_S),
        ):
            await asyncio.Event().wait()


async def test_with_a_session_too_it_is_one_record_with_an_endpoint(listen: Listen, fleet: Fleet) -> None:
    async with fleet.client() as client:
        async with listen(Echo, control_plane=fleet.address) as agent:
            (record,) = await client.agents()
            assert (record.state, record.endpoint) == ("ready", agent.endpoint)
            assert (await client.analyze("agent-1", "echo", 1)).value == 1
            async with await proxy_of(agent, fleet.tls) as proxy:
                assert await proxy.analyze("echo", 2) == (2, 0.5)
            await proxies_are(fleet, 0)  # it may have been registered first, and was dialled then
        assert await client.agents() == []


async def test_without_a_session_the_control_plane_dials_it(listen: Listen, fleet: Fleet) -> None:
    async with fleet.client() as client:
        async with listen(Echo, control_plane=fleet.address, **DIALLED) as agent:
            result = await client.analyze("agent-1", "echo", {"a": 1}, wait_for_agent=15)
            assert (result.value, result.confidence, result.agent_id) == ({"a": 1}, 0.5, "agent-1")
            assert (await client.analyze("capability:echo", "echo", 2)).value == 2
            assert [part.value async for part in client.stream("agent-1", "count", 3)] == [0, 1, 2]
            (record,) = await client.agents()
            assert (record.state, record.endpoint) == ("ready", agent.endpoint)
            assert (await fleet.metrics())["parallax_agent_proxies"] == 1
        assert await client.agents() == []
        await proxies_are(fleet, 0)


@pytest.mark.parametrize(
    ("address", "advertise", "endpoint"),
    [
        ("127.0.0.1:0", None, "127.0.0.1:7"),
        ("localhost:7", None, "localhost:7"),
        ("[::1]:0", None, "[::1]:7"),
        ("0.0.0.0:0", "agent.example.com:443", "agent.example.com:443"),
        ("[::]:0", "agent.example.com:0", "agent.example.com:7"),
        ("127.0.0.1:0", "[2001:db8::1]:0", "[2001:db8::1]:7"),
    ],
)
def test_an_endpoint_is_what_others_dial(address: str, advertise: str | None, endpoint: str) -> None:
    assert advertised(address, 7, advertise) == endpoint


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_all_interfaces_are_advertised_by_the_name_of_the_host(address: str) -> None:
    import socket

    assert advertised(address, 7) == f"{socket.gethostname()}:7"


async def test_what_is_advertised_is_what_the_registry_tells(listen: Listen, fleet: Fleet) -> None:
    options = {"control_plane": fleet.address, "advertise": "localhost:0"}
    async with listen(Echo, **options) as agent, fleet.client() as client:
        (record,) = await client.agents()
        assert record.endpoint == agent.endpoint
        assert record.endpoint.startswith("localhost:")
        assert not record.endpoint.endswith(":0")


async def test_ways_in_share_the_slots(listen: Listen, fleet: Fleet, until: Until) -> None:
    async with (
        listen(Echo, control_plane=fleet.address, max_concurrency=2) as agent,
        fleet.client() as client,
        await proxy_of(agent, fleet.tls) as proxy,
    ):
        through = [client.analyze("agent-1", "wait", n) for n in range(4)]
        direct = [proxy.analyze("wait", n) for n in range(4)]
        everything = asyncio.gather(*through, *direct)
        executor = agent._server._executor
        await until(lambda: executor.in_flight == 6)  # the direct ones, and two that it is given
        await until(lambda: agent.running == 2)
        agent.release.set()
        assert len(await everything) == 8
        assert agent.most == 2


# Through the control plane's proxy.


async def test_cancel_and_deadline_reach_a_dialled_agent(listen: Listen, fleet: Fleet) -> None:
    options = {"control_plane": fleet.address} | DIALLED
    async with listen(Echo, **options) as agent, fleet.client() as client:
        await state_of(client, "ready")
        async with held(client, agent) as waiting:
            waiting.cancel()
            async with asyncio.timeout(PROMPTLY_S):
                await agent.cancelled.wait()
        agent.cancelled.clear()
        late = client.analyze("agent-1", "wait", timeout=3)  # by then it has begun
        assert await code_of(late) == "DEADLINE_EXCEEDED"
        async with asyncio.timeout(PROMPTLY_S):
            await agent.cancelled.wait()


async def test_64_calls_at_once_reach_a_dialled_agent(listen: Listen, fleet: Fleet) -> None:
    options = {"control_plane": fleet.address, "max_concurrency": 8} | DIALLED
    async with listen(Echo, **options) as agent, fleet.client() as client:
        await state_of(client, "ready")
        answers = await asyncio.gather(*(client.analyze("agent-1", "echo", n) for n in range(64)))
        assert [answer.value for answer in answers] == list(range(64))
        assert agent.most <= 8


async def test_what_a_dialled_agent_does_not_take_fails_alone(
    listen: Listen, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_MAX_PAYLOAD_BYTES", str(MIB))
    options = {"control_plane": fleet.address} | DIALLED
    async with listen(Echo, **options) as agent:
        monkeypatch.delenv("PARALLAX_MAX_PAYLOAD_BYTES")
        async with fleet.client() as client:
            await state_of(client, "ready")
            async with held(client, agent) as kept:
                assert await code_of(client.analyze("agent-1", "echo", bytes(4 * MIB))) == "INVALID_ARGUMENT"
                many = (client.analyze("agent-1", "echo", bytes(3 * MIB)) for _ in range(20))
                failed = await asyncio.gather(*many, return_exceptions=True)
                assert {getattr(exc, "code", exc) for exc in failed} == {"INVALID_ARGUMENT"}
                agent.release.set()
                assert (await kept).value == 1


async def test_what_the_control_plane_does_not_take_fails_alone(
    listen: Listen, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(max_payload_bytes=MIB) as fleet:
        options = {"control_plane": fleet.address} | DIALLED
        async with listen(Echo, **options) as agent, fleet.client() as client:
            await state_of(client, "ready")
            async with held(client, agent) as kept:
                assert await code_of(client.analyze("agent-1", "grow", 4 * MIB)) == "INVALID_RESULT"
                agent.release.set()
                assert (await kept).value == 1


async def start(children: Children, fleet: Fleet, **environment: str) -> tuple[Child, str]:
    """An agent in a process of its own that waits to be dialled, and its endpoint."""
    places = {"PARALLAX_CONTROL_PLANE": fleet.address, "PARALLAX_LISTEN": "127.0.0.1:0", "SESSION": "no"}
    child = children.start_agent(fleet.pki.environment | places | environment)
    return child, (await child.said("registered"))["endpoint"]


@asynccontextmanager
async def holding(client: ParallaxClient, file: Path, until: Until) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that a worker holds until *file* is gone."""
    waiting = asyncio.create_task(client.analyze("agent-1", "hold", str(file)))
    try:
        await until(file.exists)
        yield waiting
    finally:
        file.unlink(missing_ok=True)  # noqa: ASYNC240
        waiting.cancel()
        await asyncio.wait({waiting})


async def test_a_killed_agent_fails_what_it_held_and_is_dialled_again_when_it_is_back(
    fleet: Fleet, children: Children, tmp_path: Path, until: Until
) -> None:
    # Nobody else is given that port meanwhile.
    child, endpoint = await start(children, fleet, PARALLAX_LISTEN=f"127.0.0.1:{free_port()}")
    async with fleet.client() as client:
        await state_of(client, "ready")
        async with holding(client, tmp_path / "held", until) as lost:
            child.process.kill()
            assert await code_of(lost) == "AGENT_LOST"
        with pytest.raises(TaskFailed, match=f"it is registered at {endpoint}") as failed:
            await client.analyze("agent-1", "echo")
        assert failed.value.code == "NO_AGENT"
        await start(children, fleet, PARALLAX_LISTEN=endpoint)
        assert (await client.analyze("agent-1", "echo", 2, wait_for_agent=15)).value == 2


async def test_a_dialled_agent_that_is_told_to_stop_finishes_what_it_holds(
    fleet: Fleet, children: Children, tmp_path: Path, until: Until
) -> None:
    child, _ = await start(children, fleet)
    async with fleet.client() as client:
        await state_of(client, "ready")
        async with holding(client, tmp_path / "held", until) as kept:
            child.process.terminate()
            await state_of(client, "draining")
            assert await code_of(client.analyze("agent-1", "echo")) == "NO_AGENT"
            (tmp_path / "held").unlink()
            assert (await kept).value == str(tmp_path / "held")
        assert await child.ended() == 0
        assert await client.agents() == []


async def test_an_agent_in_both_modes_that_is_told_to_stop_finishes_what_it_holds(
    fleet: Fleet, children: Children, tmp_path: Path, until: Until
) -> None:
    child, endpoint = await start(children, fleet, SESSION="yes")
    await child.said("connected")
    metadata = {"id": "agent-1", "endpoint": endpoint}
    async with (
        fleet.client() as client,
        await SecureGrpcAgentProxy.from_metadata(metadata, fleet.tls) as proxy,
        holding(client, tmp_path / "held", until) as kept,
    ):
        other = tmp_path / "other"
        direct = asyncio.create_task(proxy.analyze("hold", str(other)))
        await until(other.exists)
        child.process.terminate()
        await state_of(client, "draining")
        (tmp_path / "held").unlink()
        assert (await kept).value == str(tmp_path / "held")
        other.unlink()
        assert await direct == (str(other), 1.0)
        assert await child.ended() == 0
        assert await client.agents() == []


async def test_an_agent_that_is_taken_out_of_the_registry_stops(fleet: Fleet, children: Children) -> None:
    child, _ = await start(children, fleet)
    async with fleet.client("client/admin") as admin:
        await state_of(admin, "ready")
        assert await admin.remove_agent("agent-1")
        assert await child.ended() == 0
        (said,) = child.records("stopping")
        assert "taken out of the registry" in said["cause"]
        assert await admin.agents() == []


async def test_a_stopped_control_plane_says_goodbye_and_a_new_one_finds_the_agent(
    listen: Listen, serve: Serve, pki: Pki, tmp_path: Path
) -> None:
    port = free_port()  # that nobody else is given meanwhile
    async with serve(listen=f"127.0.0.1:{port}") as first:
        address = first.address
        agent_stack = listen(Echo, control_plane=address, **DIALLED)
        agent = await agent_stack.__aenter__()
        async with first.client() as client:
            await state_of(client, "ready")
    from parallax.control_plane.server import ControlPlane
    from parallax.runtime.settings import load_settings

    settings = load_settings(
        listen=f"127.0.0.1:{port}",
        metrics_listen="127.0.0.1:0",
        data_dir=tmp_path / "data",
        drain_seconds=1.0,
    )
    async with ControlPlane(settings, pki.tls()).serving():
        async with ParallaxClient(address, pki.tls()) as client:
            result = await client.analyze("agent-1", "echo", 3, wait_for_agent=15)
            assert result.value == 3
        await agent_stack.__aexit__(None, None, None)
    assert not agent.running


# Whether it is the agent meant.


@asynccontextmanager
async def registered(fleet: Fleet, short: str, endpoint: str) -> AsyncIterator[None]:
    """Somebody who registers an endpoint, whoever's it is."""
    async with fleet.channel(short) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        description = registry_pb2.AgentDescription(capabilities=["echo"])
        await stub.Register(registry_pb2.RegisterRequest(description=description, endpoint=endpoint))
        yield


async def test_the_endpoint_of_another_agent_is_not_served_from(
    listen: Listen, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """agent-2 says that it is found where agent-1 listens: nobody is harmed but itself."""
    options = {"control_plane": fleet.address} | DIALLED
    async with listen(Echo, **options) as agent, fleet.client() as client:
        await state_of(client, "ready")
        async with registered(fleet, "agent/agent-2", str(agent.endpoint)):
            async with asyncio.timeout(PROMPTLY_S):
                while not any("WrongIdentity" in str(getattr(r, "cause", "")) for r in caplog.records):
                    await asyncio.sleep(0.02)
            with pytest.raises(TaskFailed, match="another identity answers") as failed:
                await client.analyze("agent-2", "echo")
            assert failed.value.code == "NO_AGENT"
            assert (await client.analyze("agent-1", "echo", 1)).value == 1
            assert (await client.analyze("capability:echo", "echo", 1)).agent_id == "agent-1"


async def test_an_agent_of_another_ca_is_not_served_from(
    listen: Listen, fleet: Fleet, new_pki: type[Pki], tmp_path: Path
) -> None:
    other = new_pki(tmp_path / "other")
    other.save("agent/agent-2")
    async with (
        listen(Echo, "agent-2", tls=other.tls()) as thief,
        fleet.client() as client,
        registered(fleet, "agent/agent-2", str(thief.endpoint)),
        asyncio.timeout(PROMPTLY_S),
    ):
        told = ""
        while "UntrustedChain" not in told:
            with pytest.raises(TaskFailed, match="NO_AGENT") as failed:
                await client.analyze("agent-2", "echo")
            told = str(failed.value)
            await asyncio.sleep(0.02)


async def test_without_the_certificate_to_dial_with_the_refusal_says_so(
    listen: Listen, serve: Serve, new_pki: type[Pki], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pki = new_pki(tmp_path / "bare")
    pki.save("service/control-plane", "agent/agent-1", "client/cli")
    async with serve(pki.tls()) as fleet:
        warnings = [r for r in caplog.records if "are not dialled" in r.getMessage()]
        assert len(warnings) == 1
        async with (
            listen(Echo, tls=pki.tls(), control_plane=fleet.address, **DIALLED),
            fleet.client() as client,
        ):
            with pytest.raises(TaskFailed, match="no certificate as service/agent-proxy") as failed:
                await client.analyze("agent-1", "echo")
            assert failed.value.code == "NO_AGENT"


# Its own session goes first.


async def test_a_session_of_its_own_takes_the_new_tasks_and_the_dialled_one_drains(
    listen: Listen, fleet: Fleet
) -> None:
    """The same process, dialled first: what it holds is finished on the link it came by."""
    options = {"control_plane": fleet.address} | DIALLED
    async with listen(Echo, **options) as agent, fleet.client() as client:
        await state_of(client, "ready")
        instance_id = await instance_of(agent, fleet)
        async with held(client, agent) as kept:
            async with fleet.raw_agent(agent_id="agent-1", instance_id=instance_id) as own:
                asked = asyncio.create_task(client.analyze("agent-1", "echo"))
                await own.answer((await own.task()).id, b"by its own session")
                assert (await asked).value == b"by its own session"
                assert not kept.done()
                agent.release.set()
                assert (await kept).value == 1
                await proxies_are(fleet, 0)
            await proxies_are(fleet, 1)  # its own session is over: it is dialled again
            assert (await client.analyze("agent-1", "echo", 2, wait_for_agent=15)).value == 2


async def instance_of(agent: SecureAgent, fleet: Fleet) -> bytes:
    """The process that listens there, as it tells the control plane."""
    leaf = fleet.pki.issue("service/agent-proxy")
    options = [("grpc.ssl_target_name_override", f"{agent.agent_id}.agents.parallax.local")]
    credentials = leaf.channel_credentials()
    async with aio.secure_channel(str(agent.endpoint), credentials, options=options) as channel:
        call: Any = agent_pb2_grpc.AgentServiceStub(channel).Link()
        await call.write(link_pb2.LinkFrame(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1)))
        welcome = (await call.read()).welcome
        await call.done_writing()
        assert await call.read() is aio.EOF
    return bytes(welcome.instance_id)


async def test_another_instance_with_a_session_supersedes_the_dialled_one(
    listen: Listen, fleet: Fleet
) -> None:
    options = {"control_plane": fleet.address} | DIALLED
    async with listen(Echo, **options) as agent, fleet.client() as client:
        await state_of(client, "ready")
        async with (
            held(client, agent) as kept,
            listen(Echo, control_plane=fleet.address, listen=None),
        ):
            assert await code_of(kept) == "AGENT_LOST"
            assert (await client.analyze("agent-1", "echo", 2)).value == 2
            await proxies_are(fleet, 0)


async def test_in_plaintext_it_is_dialled_on_this_host_and_stays_unverified(
    listen: Listen, serve: Serve
) -> None:
    async with serve(MTLSConfig()) as fleet:
        options = {"control_plane": fleet.address, "tls": MTLSConfig()} | DIALLED
        async with listen(Echo, **options), fleet.client() as client:
            result = await client.analyze("anonymous/agent-1", "echo", 1, wait_for_agent=15)
            assert (result.value, result.agent_id) == (1, "anonymous/agent-1")
            assert await code_of(client.analyze("agent-1", "echo")) == "NO_AGENT"


async def test_a_registration_that_is_lost_is_made_again(listen: Listen, serve: Serve) -> None:
    """The record goes without the agent's doing: its next heartbeat finds out."""
    async with serve(
        lease_seconds=6
    ) as fleet:  # which is not over before a busy machine gets to the heartbeat
        options = {"control_plane": fleet.address} | DIALLED
        async with listen(Echo, **options), fleet.client() as client:
            await state_of(client, "ready")
            before = (await client.agents())[0].generation
            async with fleet.channel("agent/agent-1") as channel:
                stub = registry_pb2_grpc.RegistryServiceStub(channel)
                await stub.Register(registry_pb2.RegisterRequest(endpoint="127.0.0.1:1"))
            async with asyncio.timeout(PROMPTLY_S):
                while (await client.agents())[0].endpoint == "127.0.0.1:1":
                    await asyncio.sleep(0.02)
            assert (await client.analyze("agent-1", "echo", 1, wait_for_agent=15)).value == 1
            assert (await client.agents())[0].generation > before


async def test_a_lease_is_kept_by_a_dialled_agent_that_has_nothing_to_do(
    listen: Listen, serve: Serve
) -> None:
    async with serve(lease_seconds=6) as fleet:  # of which a machine may stand still for two thirds
        options = {"control_plane": fleet.address} | DIALLED
        async with listen(Echo, **options), fleet.client() as client:
            await state_of(client, "ready")
            generation = (await client.agents())[0].generation
            await asyncio.sleep(7.5)
            (record,) = await client.agents()
            assert (record.state, record.generation) == ("ready", generation)
