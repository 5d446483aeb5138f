"""Labels that callers were granted, at agents that listen: what lets in there, and what does not."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from grpc import StatusCode, aio

from parallax.control_plane.policy_feed import PolicyFeed
from parallax.protos import agent_pb2, agent_pb2_grpc, policy_pb2, policy_pb2_grpc
from parallax.sdk import SecureAgent, SecureGrpcAgentProxy
from parallax.security.identity import Identity
from tests.end_to_end.test_direct_revocation import dialled, linked
from tests.end_to_end.test_policy import PROMPTLY_S, Echo, asks, code_of, label, until_refused, write
from tests.end_to_end.test_revocation import end_of, revoke

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Serve

AUDITORS: Final = asks("*", who="label:team=audit")
MAX_AGE_S: Final = 8.0  # a busy machine has time enough to ask before that


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the policy is: whoever was granted `team=audit` may ask every agent."""
    path = tmp_path / "policy.toml"
    write(path, AUDITORS)
    return path


def listening(fleet: Fleet, name: str = "agent-1", **options: Any) -> Echo:
    return fleet.agent(Echo, name, listen="127.0.0.1:0", **options)


async def verdict(agent: SecureAgent, fleet: Fleet, who: str) -> str:
    """What becomes of a call of *who* at the own port of *agent*: "" if it is let in, else why not."""
    name = Identity.parse_short(f"agent/{agent.agent_id}").dns_name
    options = [("grpc.ssl_target_name_override", name)]
    credentials = fleet.pki.issue(who).channel_credentials()
    async with aio.secure_channel(str(agent.endpoint), credentials, options=options) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        try:
            await stub.GetCapabilities(agent_pb2.GetCapabilitiesRequest(), timeout=PROMPTLY_S)
        except aio.AioRpcError as exc:
            return f"{exc.code().name}: {exc.details()}"
    return ""


async def until_let_in(agent: SecureAgent, fleet: Fleet, who: str) -> None:
    async with asyncio.timeout(PROMPTLY_S):
        while await verdict(agent, fleet, who):
            await asyncio.sleep(0.02)


async def until_kept_out(agent: SecureAgent, fleet: Fleet, who: str) -> None:
    async with asyncio.timeout(PROMPTLY_S):
        while not (said := await verdict(agent, fleet, who)):
            await asyncio.sleep(0.02)
    assert said.startswith("PERMISSION_DENIED")


@pytest.mark.parametrize("session", [True, False])
async def test_a_label_lets_its_holder_in_until_it_is_taken_back(
    serve: Serve, file: Path, *, session: bool
) -> None:
    async with serve(policy_file=file) as fleet, listening(fleet, session=session) as agent:
        assert (await verdict(agent, fleet, "client/olga")).startswith("PERMISSION_DENIED")
        await label(fleet, "client/olga", team="audit")
        await until_let_in(agent, fleet, "client/olga")
        assert (await verdict(agent, fleet, "client/omar")).startswith("PERMISSION_DENIED")
        await label(fleet, "client/olga", "team")
        await until_kept_out(agent, fleet, "client/olga")


async def test_another_label_lets_nobody_in_nor_does_the_same_name_of_another_kind(
    serve: Serve, file: Path
) -> None:
    async with serve(policy_file=file) as fleet:
        await label(fleet, "client/omar", team="sales")
        await label(fleet, "agent/olga", team="audit")
        async with listening(fleet) as agent:
            await until_let_in(agent, fleet, "agent/olga")
            assert (await verdict(agent, fleet, "client/omar")).startswith("PERMISSION_DENIED")
            assert (await verdict(agent, fleet, "client/olga")).startswith("PERMISSION_DENIED")


async def test_a_label_that_its_caller_states_when_it_registers_lets_nobody_in(
    serve: Serve, file: Path
) -> None:
    async with (
        serve(policy_file=file) as fleet,
        listening(fleet) as agent,
        listening(fleet, "agent-2", labels={"team": "audit"}),
    ):
        await label(fleet, "client/olga", team="audit")
        await until_let_in(agent, fleet, "client/olga")
        assert (await verdict(agent, fleet, "agent/agent-2")).startswith("PERMISSION_DENIED")
        await label(fleet, "agent/agent-2", team="audit")
        await until_let_in(agent, fleet, "agent/agent-2")


async def test_a_label_opens_the_agents_alone_that_its_rule_names(serve: Serve, file: Path) -> None:
    write(file, asks("agent-1", "label:env=prod", who="label:team=audit"))
    async with (
        serve(policy_file=file) as fleet,
        listening(fleet, "agent-1") as named,
        listening(fleet, "agent-2", labels={"env": "prod"}) as other,
    ):
        await label(fleet, "client/olga", team="audit")
        await until_let_in(named, fleet, "client/olga")
        assert (await verdict(other, fleet, "client/olga")).startswith("PERMISSION_DENIED")
        await label(fleet, "agent/agent-2", env="prod")
        await until_let_in(other, fleet, "client/olga")
        await label(fleet, "agent/agent-2", "env")
        await until_kept_out(other, fleet, "client/olga")


async def test_an_agent_that_starts_later_and_a_control_plane_that_starts_again_know_the_labels(
    serve: Serve, file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    async with serve(policy_file=file, data_dir=data) as fleet:
        await label(fleet, "client/olga", team="audit")
        await label(fleet, "client/omar", team="audit")
        await label(fleet, "client/omar", "team")
    async with serve(policy_file=file, data_dir=data) as fleet, listening(fleet) as agent:
        assert await verdict(agent, fleet, "client/olga") == ""
        assert (await verdict(agent, fleet, "client/omar")).startswith("PERMISSION_DENIED")


async def test_another_policy_goes_by_labels_that_were_granted_before(serve: Serve, file: Path) -> None:
    async with serve(policy_file=file) as fleet, listening(fleet) as agent:
        await label(fleet, "client/olga", team="audit", zone="a")
        await until_let_in(agent, fleet, "client/olga")
        write(file, asks("*", who="label:zone=b"))
        await until_kept_out(agent, fleet, "client/olga")
        write(file, asks("*", who="label:zone=a"))
        await until_let_in(agent, fleet, "client/olga")


async def test_a_link_whose_holder_loses_the_label_finishes_what_it_holds_and_takes_nothing_new(
    serve: Serve, file: Path
) -> None:
    async with serve(policy_file=file) as fleet, listening(fleet) as agent:
        await label(fleet, "client/cli", team="audit")
        await until_let_in(agent, fleet, "client/cli")
        metadata = {"id": "agent-1", "endpoint": str(agent.endpoint)}
        async with await SecureGrpcAgentProxy.from_metadata(metadata, fleet.tls) as proxy:
            held = asyncio.create_task(proxy.analyze("wait", None))
            await agent.begun.wait()
            await label(fleet, "client/cli", "team")
            await until_kept_out(agent, fleet, "client/cli")
            agent.release.set()
            assert (await held)[0] == "agent-1"
            await until_refused(lambda: proxy.analyze("echo", None))


async def test_whoever_is_revoked_is_refused_whatever_labels_he_has(serve: Serve, file: Path) -> None:
    async with serve(policy_file=file) as fleet, listening(fleet) as agent:
        await label(fleet, "client/olga", team="audit")
        await until_let_in(agent, fleet, "client/olga")
        await revoke(fleet, identity="client/olga")
        async with asyncio.timeout(PROMPTLY_S):
            while not (said := await verdict(agent, fleet, "client/olga")):
                await asyncio.sleep(0.02)
        assert said.startswith("UNAUTHENTICATED")


@pytest.mark.timeout(60)
async def test_an_agent_that_has_not_heard_lately_who_has_labels_lets_nobody_in_until_it_does(
    serve: Serve, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is revoked it hears all the time."""
    monkeypatch.setenv("PARALLAX_REVOCATION_MAX_AGE", str(MAX_AGE_S))
    tell, may_tell = PolicyFeed.tell, asyncio.Event()
    may_tell.set()

    async def tell_while_it_may(
        self: PolicyFeed, agent: Identity, beat_s: float, write: Callable[[Any], Awaitable[object]]
    ) -> None:
        async def write_late(piece: Any) -> None:
            await may_tell.wait()
            await write(piece)

        await tell(self, agent, beat_s, write_late)

    monkeypatch.setattr(PolicyFeed, "tell", tell_while_it_may)
    async with serve(policy_file=file) as fleet, listening(fleet) as agent:
        await label(fleet, "client/olga", team="audit")
        await until_let_in(agent, fleet, "client/olga")
        async with dialled(agent, fleet.pki.issue("client/olga")) as channel:
            link = await linked(channel)
            may_tell.clear()
            await label(fleet, "client/olga", "team")
            assert await verdict(agent, fleet, "client/olga") == ""  # it is allowed to be that old
            ended = await end_of(link)
            assert (ended.code(), "who may ask it" in str(ended.details())) == (StatusCode.UNAVAILABLE, True)
        said = await verdict(agent, fleet, "client/olga")
        assert said.startswith("UNAVAILABLE: this agent has not heard since")
        assert "who may ask it" in said
        may_tell.set()
        async with asyncio.timeout(40):
            while (await verdict(agent, fleet, "client/olga")).startswith("UNAVAILABLE"):
                await asyncio.sleep(0.1)
        assert (await verdict(agent, fleet, "client/olga")).startswith("PERMISSION_DENIED")


async def test_what_is_explained_of_a_label_is_what_agents_do(serve: Serve, file: Path) -> None:
    write(file, asks("agent-1", who="label:team=audit"))
    async with (
        serve(policy_file=file) as fleet,
        listening(fleet, "agent-1") as first,
        listening(fleet, "agent-2") as second,
        fleet.channel("client/admin") as channel,
    ):
        await label(fleet, "client/olga", team="audit")
        await label(fleet, "client/omar", team="sales")
        await until_let_in(first, fleet, "client/olga")
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        allowed = set()
        for who in ("client/olga", "client/omar", "agent/agent-2"):
            for agent in (first, second):
                request = policy_pb2.ExplainPolicyRequest(
                    caller=who, method="GetCapabilities", target=agent.agent_id
                )
                answer = await stub.ExplainPolicy(request, timeout=PROMPTLY_S)
                said = await verdict(agent, fleet, who)
                assert said.partition(":")[0] == ("" if answer.allowed else "PERMISSION_DENIED")
                if answer.allowed:
                    allowed.add((who, agent.agent_id))
        assert allowed == {("client/olga", "agent-1")}


# Who may grant.


@pytest.mark.parametrize("who", ["client/cli", "client/olga", "agent/agent-1", "service/agent-proxy"])
async def test_nobody_but_the_administrator_grants_labels_or_reads_them(fleet: Fleet, who: str) -> None:
    async with fleet.channel(who) as channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        change = policy_pb2.ChangeLabelsRequest(identity=who, granted={"team": "audit"})
        assert await code_of(stub.ChangeLabels(change)) is StatusCode.PERMISSION_DENIED
        assert await code_of(stub.ListLabels(policy_pb2.ListLabelsRequest())) is StatusCode.PERMISSION_DENIED
    assert not fleet.plane.grants.labels_of(Identity.parse_short(who))


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "olga", "granted": {"team": "audit"}},
        {"identity": "client/../olga", "granted": {"team": "audit"}},
        {"identity": "client/olga", "granted": {"team": "a b"}},
        {"identity": "client/olga", "granted": {"team=audit": "x"}},
        {"identity": "client/olga", "taken": ["team"]},
    ],
    ids=["no kind", "no name", "blank", "equals sign", "not granted"],
)
async def test_what_is_no_label_or_nobody_is_refused(fleet: Fleet, change: dict[str, Any]) -> None:
    async with fleet.channel("client/admin") as channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        call = stub.ChangeLabels(policy_pb2.ChangeLabelsRequest(**change))
        assert await code_of(call) is StatusCode.INVALID_ARGUMENT
    assert not fleet.plane.grants.labels_of(Identity.parse_short("client/olga"))


@pytest.mark.timeout(90)  # seven processes start one after the other, each within seconds
async def test_the_command_grants_takes_back_and_shows(fleet: Fleet, children: Children) -> None:
    async def said(*words: str, who: str = "client/admin") -> tuple[int, str]:
        command = (sys.executable, "-m", "parallax.sdk.cli", "agents", "label", *words)
        dials = {"PARALLAX_CONTROL_PLANE": fleet.address, "PARALLAX_IDENTITY": who}
        child = children.start(*command, **fleet.pki.environment, **dials)
        return await child.ended(), "\n".join(child.lines)

    assert await said() == (
        0,
        "nobody was granted a label: 'parallax agents label KIND/NAME KEY=VALUE' grants one",
    )
    assert await said("client/olga") == (0, "client/olga has no labels")
    assert await said("client/olga", "team=audit", "env=prod") == (0, "client/olga: env=prod team=audit")
    code, text = await said("client/olga", "env-", "team=sales", "--json")
    assert (code, json.loads(text)) == (0, {"identity": "client/olga", "labels": {"team": "sales"}})
    code, text = await said("--json")
    assert json.loads(text) == [{"identity": "client/olga", "labels": {"team": "sales"}}]
    code, text = await said("client/olga", "taem-")
    assert code != 0
    assert "there is no label 'taem' to take back: it has 'team=sales'" in text
    code, text = await said("client/olga", who="client/cli")
    assert (code, "act as --identity client/admin" in text) == (77, True)
