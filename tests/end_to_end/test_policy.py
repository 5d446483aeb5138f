"""A policy in force over real sockets: methods, targets and labels, on links, at agents, as it changes."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from grpc import StatusCode, aio

from parallax.control_plane.policy_service import PolicyService
from parallax.protos import (
    agent_pb2,
    agent_pb2_grpc,
    dispatch_pb2,
    dispatch_pb2_grpc,
    link_pb2,
    policy_pb2,
    policy_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    session_pb2_grpc,
)
from parallax.runtime.policy import Policy
from parallax.runtime.policy_text import BUILT_IN
from parallax.runtime.protocol import hello
from parallax.sdk import SecureAgent, SecureGrpcAgentProxy
from parallax.security.errors import ConfigError, NotAuthorized, TaskFailed, Unavailable

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve, Until

PROMPTLY_S: Final = 15.0  # for what should happen at once, on a machine that is busy

AGENTS: Final = """
[[rule]]
name = "agents"
who = ["agent/*"]
may = ["Connect", "Register", "Heartbeat", "Deregister"]
"""
EXECUTE: Final = "/parallax.v1.DispatchService/Execute"


def asks(*targets: str, who: str = "client/cli") -> str:
    """A policy by which *who* may ask *targets*, whichever way, and the agents may work."""
    methods = ["Execute", "Link", "Analyze", "AnalyzeStream", "GetCapabilities"]
    return f"""{AGENTS}
[[rule]]
name = "asks"
who = ["{who}"]
may = {methods!r}
targets = {list(targets)!r}

[[rule]]
name = "looks"
who = ["client/*"]
may = ["ListAgents", "GetAgent"]
"""


class Echo(SecureAgent):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun = asyncio.Event()
        self.release = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        self.begun.set()
        if task == "wait":
            await self.release.wait()
        return self.agent_id, 1.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the policy is."""
    return tmp_path / "policy.toml"


def write(file: Path, text: str | None) -> None:
    """Put *text* in place as whoever cares does: complete, in one step; None: take the file away."""
    if text is None:
        file.unlink()
        return
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


@asynccontextmanager
async def two_agents(serve: Serve, file: Path, policy: str) -> AsyncIterator[Fleet]:
    """A control plane with *policy*, and two agents that can do the same."""
    write(file, policy)
    async with serve(policy_file=file) as fleet, fleet.agent(Echo, "agent-1"), fleet.agent(Echo, "agent-2"):
        yield fleet


async def execute(fleet: Fleet, target: str, who: str = "client/cli") -> str:
    """The agent that a task by itself came to; raises what gRPC does."""
    async with fleet.channel(who) as channel:
        stub: Any = dispatch_pb2_grpc.DispatchServiceStub(channel)
        request = dispatch_pb2.ExecuteRequest(target=target, task="echo", timeout_ms=15_000)
        response = await stub.Execute(request, timeout=PROMPTLY_S)
    assert not response.outcome.HasField("failure"), response
    return str(response.agent_id)


async def code_of(call: Any) -> StatusCode:
    with pytest.raises(aio.AioRpcError) as refused:
        await call
    return refused.value.code()


async def until_refused(call: Callable[[], Awaitable[object]]) -> None:
    """Until it is for who calls; before, the link that was open drains."""
    async with asyncio.timeout(PROMPTLY_S):
        while True:
            try:
                await call()
            except Unavailable:
                await asyncio.sleep(0.02)
            except NotAuthorized:
                return


# Targets.


async def test_a_client_asks_the_agent_it_may_and_no_other(serve: Serve, file: Path) -> None:
    async with two_agents(serve, file, asks("agent-1")) as fleet, fleet.client() as client:
        assert (await client.analyze("agent-1", "echo")).value == "agent-1"
        with pytest.raises(NotAuthorized, match=r"DispatchService/Link of 'agent-2', only of agent-1"):
            await client.analyze("agent-2", "echo")
        assert await execute(fleet, "agent-1") == "agent-1"
        assert await code_of(execute(fleet, "agent-2")) is StatusCode.PERMISSION_DENIED


async def test_a_link_goes_on_after_a_task_for_whom_its_client_may_not_ask(serve: Serve, file: Path) -> None:
    async with two_agents(serve, file, asks("agent-1")) as fleet, fleet.client() as client:
        outcomes = await asyncio.gather(
            *(client.analyze(target, "echo") for target in ("agent-1", "agent-2", "agent-1", "agent-2")),
            return_exceptions=True,
        )
        kinds = [type(each).__name__ for each in outcomes]
        assert kinds == ["Result", "NotAuthorized", "Result", "NotAuthorized"]
        refused = 'parallax_authentication_failures_total{reason="not_authorized"}'
        assert (await fleet.metrics())[refused] == 2


async def test_whom_nobody_may_ask_is_refused_whether_there_or_not(serve: Serve, file: Path) -> None:
    """Else one could find out who is there."""
    async with two_agents(serve, file, asks("agent-1")) as fleet:
        assert await code_of(execute(fleet, "agent-9")) is StatusCode.PERMISSION_DENIED


async def test_another_client_may_not_what_the_rule_lets_one(serve: Serve, file: Path) -> None:
    async with two_agents(serve, file, asks("agent-1")) as fleet:
        assert await code_of(execute(fleet, "agent-1", "client/other")) is StatusCode.PERMISSION_DENIED
        assert await code_of(execute(fleet, "agent-1", "agent/agent-2")) is StatusCode.PERMISSION_DENIED


async def test_a_capability_comes_to_those_alone_whom_the_client_may_ask(serve: Serve, file: Path) -> None:
    async with two_agents(serve, file, asks("agent-2")) as fleet, fleet.client() as client:
        results = await asyncio.gather(*(client.analyze("capability:echo", "echo") for _ in range(20)))
        assert {result.agent_id for result in results} == {"agent-2"}


async def test_a_capability_of_which_the_client_may_ask_nobody_who_is_there_finds_nobody(
    serve: Serve, file: Path
) -> None:
    async with two_agents(serve, file, asks("agent-9")) as fleet, fleet.client() as client:
        with pytest.raises(TaskFailed, match="that the caller may ask") as failed:
            await client.analyze("capability:echo", "echo")
        assert failed.value.code == "NO_AGENT"


async def test_a_capability_that_is_allowed_comes_to_whoever_offers_it_and_opens_no_agent(
    serve: Serve, file: Path
) -> None:
    async with two_agents(serve, file, asks("capability:echo")) as fleet, fleet.client() as client:
        results = await asyncio.gather(*(client.analyze("capability:echo", "echo") for _ in range(20)))
        assert {result.agent_id for result in results} == {"agent-1", "agent-2"}
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-1", "echo")
        with pytest.raises(NotAuthorized):
            await client.analyze("capability:other", "echo")


async def test_a_task_that_waits_for_a_capability_is_given_to_nobody_whom_its_client_may_not_ask(
    serve: Serve, file: Path
) -> None:
    write(file, asks("agent-2"))
    async with serve(policy_file=file) as fleet, fleet.client() as client:
        waiting = asyncio.create_task(client.analyze("capability:echo", "echo", wait_for_agent=30))
        async with fleet.agent(Echo, "agent-1"), fleet.agent(Echo, "agent-2"):
            assert (await waiting).value == "agent-2"


# Labels.


async def label(fleet: Fleet, who: str, *taken: str, **granted: str) -> None:
    """Have the administrator grant labels to *who*, by short name, and take others back."""
    request = policy_pb2.ChangeLabelsRequest(identity=who, granted=granted, taken=taken)
    async with fleet.channel("client/admin") as channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        await stub.ChangeLabels(request, timeout=PROMPTLY_S)


async def test_a_label_that_is_granted_opens_an_agent_and_one_that_is_stated_does_not(
    serve: Serve, file: Path
) -> None:
    write(file, asks("label:env=prod"))
    async with (
        serve(policy_file=file) as fleet,
        fleet.agent(Echo, "agent-1", labels={"env": "prod"}),
        fleet.agent(Echo, "agent-2"),
        fleet.client() as client,
    ):
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-1", "echo")
        await label(fleet, "agent/agent-2", env="prod")
        assert (await client.analyze("capability:echo", "echo")).value == "agent-2"
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-1", "echo")
        await label(fleet, "agent/agent-2", "env")
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-2", "echo")


async def test_a_label_that_is_granted_lets_a_client_ask(serve: Serve, file: Path) -> None:
    async with two_agents(serve, file, asks("*", who="label:team=audit")) as fleet:
        assert await code_of(execute(fleet, "agent-1")) is StatusCode.PERMISSION_DENIED
        await label(fleet, "client/cli", team="audit")
        await label(fleet, "client/other", team="sales")
        assert await execute(fleet, "agent-1") == "agent-1"
        assert await code_of(execute(fleet, "agent-1", "client/other")) is StatusCode.PERMISSION_DENIED
        await label(fleet, "client/cli", "team")
        assert await code_of(execute(fleet, "agent-1")) is StatusCode.PERMISSION_DENIED


# Methods.


async def test_an_agent_that_no_rule_lets_connect_is_turned_away(serve: Serve, file: Path) -> None:
    write(file, asks("*").replace("agent/*", "agent/agent-1"))
    async with (
        serve(policy_file=file) as fleet,
        fleet.agent(Echo, "agent-1"),
        fleet.raw_agent("agent/agent-2") as raw,
    ):
        assert (await raw.refusal()).code() is StatusCode.PERMISSION_DENIED


async def test_another_than_client_admin_may_administer_and_it_no_more(serve: Serve, file: Path) -> None:
    policy = f'{AGENTS}[[rule]]\nname = "ops"\nwho = ["client/ops"]\nmay = ["administration"]\n'
    write(file, policy)
    async with serve(policy_file=file) as fleet:
        for who, is_allowed in (("client/ops", True), ("client/admin", False), ("client/cli", False)):
            async with fleet.channel(who) as channel:
                call = policy_pb2_grpc.PolicyServiceStub(channel).GetPolicy(policy_pb2.GetPolicyRequest())
                if is_allowed:
                    assert (await call).text == policy
                else:
                    assert await code_of(call) is StatusCode.PERMISSION_DENIED


async def test_what_the_control_plane_explains_is_what_it_does(serve: Serve, file: Path) -> None:
    async with two_agents(serve, file, asks("agent-1")) as fleet, fleet.channel("client/admin") as channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        for target in ("agent-1", "agent-2"):
            request = policy_pb2.ExplainPolicyRequest(caller="client/cli", method="Execute", target=target)
            answer = await stub.ExplainPolicy(request)
            if answer.allowed:
                assert (await execute(fleet, target), answer.rule) == (target, "asks")
            else:
                with pytest.raises(aio.AioRpcError) as refused:
                    await execute(fleet, target)
                assert refused.value.details() == answer.why
        for wrong in ({"method": "Link"}, {"method": "x"}, {"method": "Execute", "target": "a/b"}):
            call = stub.ExplainPolicy(policy_pb2.ExplainPolicyRequest(caller="client/cli", **wrong))
            assert await code_of(call) is StatusCode.INVALID_ARGUMENT


# As it changes.


async def test_a_good_file_is_in_force_at_once(serve: Serve, file: Path, until: Until) -> None:
    async with two_agents(serve, file, asks("agent-1")) as fleet, fleet.client() as client:
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-2", "echo")
        write(file, asks("agent-2"))
        await until(lambda: fleet.plane.policy.loads["success"] == 1, PROMPTLY_S)
        assert (await client.analyze("agent-2", "echo")).value == "agent-2"
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-1", "echo")


@pytest.mark.parametrize(
    "bad",
    [
        "[[rule",
        asks("agent-2").replace("Execute", "Exekute"),
        asks("agent-2") + asks("agent-2"),
        f'{asks("agent-2")}[[rule]]\nname = "ops"\nwho = ["label:team=ops"]\nmay = ["administration"]\n',
        "",
        f"# {asks('agent-2')[:1]}",
        None,
    ],
    ids=["syntax", "unknown method", "duplicate rule", "lock-out", "empty", "cut off", "gone"],
)
async def test_a_bad_file_changes_nothing_and_is_told_once_until_it_is_mended(
    bad: str | None, serve: Serve, file: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_agents(serve, file, asks("agent-1")) as fleet, fleet.client() as client:
        policy = fleet.plane.policy
        write(file, bad)
        await until(lambda: bool(policy.problem), PROMPTLY_S)
        await policy.look()
        await policy.look()
        assert (await client.analyze("agent-1", "echo")).value == "agent-1"
        with pytest.raises(NotAuthorized):
            await client.analyze("agent-2", "echo")
        said = [each for each in caplog.records if each.getMessage().startswith("the policy cannot be used")]
        assert len(said) == 1
        assert str(file) in said[0].__dict__["cause"]
        metrics = await fleet.metrics()
        assert metrics['parallax_policy_loads_total{result="failure"}'] == 1
        assert metrics["parallax_policy_stale"] == 1
        _, ready = await fleet.http("/readyz")
        assert "the file cannot be used, the one before is in force" in ready
        write(file, asks("agent-1"))
        await until(lambda: not policy.problem, PROMPTLY_S)
        assert (await fleet.metrics())["parallax_policy_stale"] == 0


async def test_a_link_that_is_not_allowed_any_more_finishes_what_it_holds_and_takes_nothing_new(
    serve: Serve, file: Path, until: Until
) -> None:
    write(file, asks("agent-1"))
    async with serve(policy_file=file) as fleet, fleet.client() as client:
        agent = fleet.agent(Echo, "agent-1")
        async with agent:
            held = asyncio.create_task(client.analyze("agent-1", "wait"))
            await agent.begun.wait()
            write(file, asks("agent-1", who="client/other"))
            await until(lambda: fleet.plane.policy.loads["success"] == 1, PROMPTLY_S)
            with pytest.raises((NotAuthorized, Unavailable)):  # the link drains
                await client.analyze("agent-1", "echo")
            agent.release.set()
            assert (await held).value == "agent-1"
            await until_refused(lambda: client.analyze("agent-1", "echo"))


async def test_a_session_that_is_not_allowed_any_more_ends(serve: Serve, file: Path, until: Until) -> None:
    write(file, asks("*"))
    async with serve(policy_file=file) as fleet, fleet.channel("agent/agent-1") as channel:
        call = session_pb2_grpc.SessionServiceStub(channel).Connect()
        await call.wait_for_connection()
        write(file, asks("*").replace("agent/*", "agent/agent-2"))
        assert await code_of(call.read()) is StatusCode.PERMISSION_DENIED


async def test_a_watch_that_is_not_allowed_any_more_ends(serve: Serve, file: Path) -> None:
    looking = asks("*").replace('"ListAgents"', '"WatchAgents"').replace("'ListAgents'", "'WatchAgents'")
    write(file, looking)
    async with serve(policy_file=file) as fleet, fleet.channel("client/cli") as channel:
        watch = registry_pb2_grpc.RegistryServiceStub(channel).WatchAgents(registry_pb2.WatchAgentsRequest())
        await watch.read()
        write(file, asks("*"))
        async with asyncio.timeout(PROMPTLY_S):
            assert await code_of(watch.read()) is StatusCode.PERMISSION_DENIED


async def test_streams_that_begin_while_the_policy_changes_are_told_how_it_ends(fleet: Fleet) -> None:
    """None hangs, at whichever step of its beginning the change finds it."""
    nobody, everybody = Policy(()), fleet.plane.authorization.policy
    codes: Counter[StatusCode] = Counter()

    async def change() -> None:
        while True:
            for policy in (nobody, everybody):
                fleet.plane._adopt_policy(policy)
                await asyncio.sleep(0.002)

    async def begin(channel: aio.Channel) -> None:
        for _ in range(50):
            call: Any = dispatch_pb2_grpc.DispatchServiceStub(channel).Link()
            async with asyncio.timeout(PROMPTLY_S):
                with suppress(aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(link_pb2.LinkFrame(hello=hello()))
                    await call.read()
                    await call.done_writing()
                codes[await call.code()] += 1

    changing = asyncio.create_task(change())
    async with fleet.channel("client/cli") as channel:
        await asyncio.gather(*(begin(channel) for _ in range(8)))
    changing.cancel()
    await asyncio.wait({changing})
    assert codes[StatusCode.OK]
    assert codes[StatusCode.PERMISSION_DENIED]


async def test_a_call_that_is_under_way_is_not_cut_off(serve: Serve, file: Path, until: Until) -> None:
    write(file, asks("agent-1"))
    async with serve(policy_file=file) as fleet:
        agent = fleet.agent(Echo, "agent-1")
        async with agent, fleet.channel("client/cli") as channel:
            stub: Any = dispatch_pb2_grpc.DispatchServiceStub(channel)
            request = dispatch_pb2.ExecuteRequest(target="agent-1", task="wait", timeout_ms=20_000)
            call = stub.Execute(request)
            await agent.begun.wait()
            write(file, asks("agent-2"))
            await until(lambda: fleet.plane.policy.loads["success"] == 1, PROMPTLY_S)
            agent.release.set()
            assert (await call).outcome.HasField("value")
            assert await code_of(execute(fleet, "agent-1")) is StatusCode.PERMISSION_DENIED


async def test_a_control_plane_does_not_start_with_a_bad_file(
    pki: Pki, children: Children, file: Path
) -> None:
    write(file, asks("agent-1").replace("Execute", "Exekute"))
    child = children.start_control_plane(pki.environment | {"PARALLAX_POLICY_FILE": str(file)})
    assert await child.ended() == 2
    [line] = child.lines
    assert f"{file}: line " in line
    assert "'Exekute' is no method: write Execute" in line


async def test_without_a_file_the_built_in_policy_is_in_force(fleet: Fleet) -> None:
    assert fleet.plane.authorization.policy.text == BUILT_IN
    _, ready = await fleet.http("/readyz")
    assert "built in" in ready


# At agents that listen.


async def ask(agent: SecureAgent, fleet: Fleet) -> str | None:
    """Who answers at *agent*'s own port; None: nobody may be asked there."""
    metadata = {"id": agent.agent_id, "endpoint": str(agent.endpoint)}
    try:
        async with await SecureGrpcAgentProxy.from_metadata(metadata, fleet.tls) as proxy:
            return str((await proxy.analyze("echo", None))[0])
    except NotAuthorized:
        return None


async def until_asked(agent: SecureAgent, fleet: Fleet, answer: str | None) -> None:
    """Until it answers so; a link that a change of policy finds just opened drains."""
    async with asyncio.timeout(PROMPTLY_S):
        while True:
            with suppress(Unavailable):
                if await ask(agent, fleet) == answer:
                    return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("session", [True, False])
async def test_an_agent_that_listens_enforces_what_the_control_plane_has_in_force(
    serve: Serve, file: Path, *, session: bool
) -> None:
    write(file, asks("agent-1"))
    async with serve(policy_file=file) as fleet:
        agent = fleet.agent(Echo, "agent-1", listen="127.0.0.1:0", session=session)
        other = fleet.agent(Echo, "agent-2", listen="127.0.0.1:0", session=session)
        async with agent, other:
            await until_asked(other, fleet, None)
            assert await ask(agent, fleet) == "agent-1"
            write(file, asks("agent-2"))
            await until_asked(agent, fleet, None)
            await until_asked(other, fleet, "agent-2")


@pytest.mark.parametrize("session", [True, False])
async def test_an_agent_that_was_not_told_who_may_ask_lets_nobody_in_until_it_is(
    serve: Serve, pki: Pki, file: Path, until: Until, monkeypatch: pytest.MonkeyPatch, *, session: bool
) -> None:
    tell, may_tell = PolicyService.WatchPolicy, asyncio.Event()

    async def tell_late(*call: Any) -> None:
        """Of what is revoked it tells meanwhile."""
        await may_tell.wait()
        await tell(*call)

    monkeypatch.setattr(PolicyService, "WatchPolicy", tell_late)
    write(file, asks("agent-2"))
    name = [("grpc.ssl_target_name_override", "agent-1.agents.parallax.local")]
    credentials, request = pki.issue("client/cli").channel_credentials(), agent_pb2.GetCapabilitiesRequest()
    async with serve(policy_file=file) as fleet:
        agent = fleet.agent(Echo, "agent-1", listen="127.0.0.1:0", session=session)
        online = asyncio.create_task(agent.__aenter__())
        endpoint = await until(lambda: agent.endpoint)
        async with aio.secure_channel(endpoint, credentials, name) as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            said = ""
            async with asyncio.timeout(PROMPTLY_S):
                while "who may ask it" not in said:
                    with pytest.raises(aio.AioRpcError) as refused:
                        await stub.GetCapabilities(request)
                    assert refused.value.code() is StatusCode.UNAVAILABLE
                    said = str(refused.value.details())
            assert not online.done()
            may_tell.set()
            await online
            assert await code_of(stub.GetCapabilities(request)) is StatusCode.PERMISSION_DENIED
        await agent.__aexit__(None, None, None)


async def test_an_agent_that_listens_goes_by_the_label_that_it_was_granted(serve: Serve, file: Path) -> None:
    write(file, asks("label:env=prod"))
    async with serve(policy_file=file) as fleet:
        stated = {"env": "prod"}
        agent = fleet.agent(Echo, "agent-1", listen="127.0.0.1:0")
        other = fleet.agent(Echo, "agent-2", listen="127.0.0.1:0", labels=stated)
        async with agent, other:
            await until_asked(agent, fleet, None)
            await label(fleet, "agent/agent-1", env="prod")
            await until_asked(agent, fleet, "agent-1")
            await until_asked(other, fleet, None)
            await label(fleet, "agent/agent-1", "env")
            await until_asked(agent, fleet, None)


async def test_a_direct_call_ends_and_a_task_that_is_held_does_not_when_the_policy_changes(
    serve: Serve, file: Path
) -> None:
    write(file, asks("agent-1"))
    async with serve(policy_file=file) as fleet:
        agent = fleet.agent(Echo, "agent-1", listen="127.0.0.1:0")
        metadata = {"id": "agent-1"}
        async with agent:
            metadata["endpoint"] = str(agent.endpoint)
            async with await SecureGrpcAgentProxy.from_metadata(metadata, fleet.tls) as proxy:
                held = asyncio.create_task(proxy.analyze("wait", None))
                await agent.begun.wait()
                write(file, asks("agent-2"))
                await until_asked(agent, fleet, None)
                agent.release.set()
                assert (await held)[0] == "agent-1"
                await until_refused(lambda: proxy.analyze("echo", None))


async def test_an_agent_without_a_control_plane_enforces_the_built_in_policy(pki: Pki, listen: Any) -> None:
    async with listen(Echo, "agent-1") as agent:
        metadata = {"id": "agent-1", "endpoint": str(agent.endpoint)}
        async with await SecureGrpcAgentProxy.from_metadata(metadata, pki.tls()) as proxy:
            assert (await proxy.analyze("echo", None))[0] == "agent-1"


async def test_the_control_plane_reaches_an_agent_whatever_the_policy_says(serve: Serve, file: Path) -> None:
    at_agents = "'Link', 'Analyze', 'AnalyzeStream', 'GetCapabilities'"
    write(file, asks("*").replace(at_agents, "'DispatchService/Link'"))
    async with (
        serve(policy_file=file) as fleet,
        fleet.client() as client,
        fleet.agent(Echo, "agent-1", listen="127.0.0.1:0", session=False),
    ):
        result = await client.analyze("agent-1", "echo", wait_for_agent=PROMPTLY_S)
        assert result.value == "agent-1"


@pytest.mark.parametrize("who", ["client/cli", "client/admin", "service/agent-proxy"])
async def test_the_rules_for_agents_are_told_to_agents_alone(fleet: Fleet, who: str) -> None:
    async with fleet.channel(who) as channel:
        watch = policy_pb2_grpc.PolicyServiceStub(channel).WatchPolicy(policy_pb2.WatchPolicyRequest())
        assert await code_of(watch.read()) is StatusCode.PERMISSION_DENIED
    async with fleet.channel("agent/agent-1") as channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        watch = stub.WatchPolicy(policy_pb2.WatchPolicyRequest())
        told = await watch.read()
        assert "/parallax.v1.AgentService/Analyze" in {each for rule in told.rules for each in rule.methods}
        watch.cancel()


async def test_the_command_shows_and_explains_what_is_in_force(
    serve: Serve, file: Path, children: Children, until: Until
) -> None:
    write(file, asks("agent-1"))
    async with serve(policy_file=file) as fleet:
        write(file, "[[rule")
        await until(lambda: bool(fleet.plane.policy.problem), PROMPTLY_S)

        async def said(*words: str, who: str = "client/admin") -> tuple[int, str]:
            command = (sys.executable, "-m", "parallax.sdk.cli", "policy", *words, "--in-force")
            dials = {"PARALLAX_CONTROL_PLANE": fleet.address, "PARALLAX_IDENTITY": who}
            child = children.start(*command, **fleet.pki.environment, **dials)
            return await child.ended(), "\n".join(child.lines)

        code, text = await said("show")
        assert code == 0
        assert asks("agent-1") in text
        assert "the file holds something else, which cannot be used" in text
        asked = ("explain", "--as", "client/cli", "--call", "Execute", "--target")
        assert await said(*asked, "agent-1") == (
            0,
            "allowed: rule 'asks' lets spiffe://parallax.local/client/cli call Execute of agent-1",
        )
        assert (await said(*asked, "agent-2"))[0] == 1
        code, text = await said("show", who="client/cli")
        assert code == 77
        assert "act as --identity client/admin" in text


def test_a_file_that_is_not_there_is_refused_by_name(serve: Serve, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the policy .*policy\.toml: no such file"):
        asyncio.run(_enter(serve(policy_file=file)))


async def _enter(context: Any) -> None:
    async with context:
        pass


async def test_an_agent_that_nobody_vouches_for_is_told_why_it_is_told_no_rules(
    serve: Serve, pki: Pki
) -> None:
    """It listens and asks; to be refused, again and again, would look like an attack."""
    async with serve(tls=pki.tls(verify_client=False)) as fleet:
        async with fleet.channel("agent/agent-1") as channel:
            watch = policy_pb2_grpc.PolicyServiceStub(channel).WatchPolicy(policy_pb2.WatchPolicyRequest())
            with pytest.raises(aio.AioRpcError, match="PARALLAX_TLS_VERIFY_CLIENT=true") as refused:
                await watch.read()
            assert refused.value.code() is StatusCode.FAILED_PRECONDITION
        assert not sum(
            count
            for name, count in (await fleet.metrics()).items()
            if '_total{reason="not_authorized"' in name
        )
