"""A root is taken out while calls are open under it: nothing new begins, and everybody else's go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grpc import StatusCode, aio

from parallax.protos import (
    dispatch_pb2,
    dispatch_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    task_pb2,
)
from parallax.runtime.outcome import OutcomeCode
from parallax.security.bundle import TrustBundle
from parallax.security.errors import TaskFailed
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.layouts import Layout, save_leaf
from tests.end_to_end.raw_link import Patient, RawLink, link_to_agent, link_to_control_plane
from tests.end_to_end.test_resumption import BUNDLE, CAPABILITIES, VERSIONS, Opener, open_session

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Listen, Pki, Serve, Until

WITHIN_S = 15.0


@pytest.fixture
def site(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """The PKI whose root stays."""
    return new_pki(tmp_path / "certs")


@pytest.fixture
def retired(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """The PKI whose root is taken out."""
    return new_pki(tmp_path / "retired")


def save_as(place: Pki, who: str, issuer: Pki, *roots: Pki) -> None:
    """In the directory of *place*, have *who* hold a new leaf of *issuer* and trust these roots."""
    bundle = TrustBundle(tuple(root for each in roots for root in each.authority.bundle.roots))
    leaf, identity = issuer.issue(who), Identity.parse_short(who, DEFAULT_TRUST_DOMAIN)
    save_leaf(place.directory, Layout.PARALLAX, identity, (leaf.certificate,), leaf.key, bundle)


def trust(site: Pki, who: str, *roots: Pki) -> None:
    """Have *who*, of *site*, trust these roots."""
    save_as(site, who, site, *roots)


def peers(leaf: Leaf, site: Pki) -> Leaf:
    """*leaf*, as somebody shows it who trusts the servers of *site*."""
    return type(leaf)(leaf.key_pem, leaf.chain_pem, site.authority.bundle.pem, leaf.key, leaf.certificate)


def is_untrusted(error: aio.AioRpcError) -> bool:
    trailers = dict(error.trailing_metadata() or ())
    return error.code() is StatusCode.UNAUTHENTICATED and trailers == {"parallax-error": "UntrustedChain"}


@pytest.fixture
async def fleet(site: Pki, retired: Pki, serve: Serve) -> AsyncIterator[Fleet]:
    """A control plane that trusts the root that is taken out, too, until `withdraw`."""
    site.save("agent/agent-1", "service/agent-proxy", "client/cli")
    trust(site, "service/control-plane", site, retired)
    async with serve(tls=site.tls()) as running:
        yield running


def withdraw(site: Pki) -> None:
    trust(site, "service/control-plane", site)


async def test_a_watch_under_a_root_ends_when_that_is_taken_out_and_no_other(
    fleet: Fleet, site: Pki, retired: Pki
) -> None:
    request = registry_pb2.WatchAgentsRequest()
    async with (
        fleet.channel(peers(retired.issue("client/cli"), site)) as old,
        fleet.channel(site.issue("client/cli")) as new,
    ):
        withdrawn, kept = (
            registry_pb2_grpc.RegistryServiceStub(each).WatchAgents(request) for each in (old, new)
        )
        await asyncio.gather(withdrawn.read(), kept.read())
        before = await fleet.metrics()
        withdraw(site)
        with pytest.raises(aio.AioRpcError) as ended:
            async with asyncio.timeout(WITHIN_S):
                while await withdrawn.read() is not aio.EOF:
                    pass
        assert is_untrusted(ended.value)
        reason = 'parallax_authentication_failures_total{reason="untrusted_chain"}'
        assert (await fleet.metrics())[reason] == before.get(reason, 0) + 1
        await asyncio.sleep(0.5)  # nothing is to happen: whatever would end it, does so by now
        assert not kept.done()
        kept.cancel()


async def test_a_session_under_a_root_that_is_taken_out_may_answer_and_is_given_nothing_more(
    fleet: Fleet, site: Pki, retired: Pki
) -> None:
    leaf = peers(retired.issue("agent/agent-1"), site)
    async with fleet.client() as client, fleet.raw_agent(leaf, agent_id="agent-1") as agent:
        asked = asyncio.create_task(client.analyze("agent-1", "echo", 7))
        task = await agent.task()
        withdraw(site)
        async with asyncio.timeout(WITHIN_S):
            while (await client.agent("agent-1")).state != "draining":
                await asyncio.sleep(0.02)
        with pytest.raises(TaskFailed) as late:
            await client.analyze("agent-1", "echo", 8)
        assert late.value.code == OutcomeCode.NO_AGENT
        await agent.answer(task.id, b"9")
        assert (await asked).value == b"9"
        assert is_untrusted(await agent.refusal())


async def test_a_session_under_a_root_that_is_taken_out_ends_if_it_holds_nothing(
    fleet: Fleet, site: Pki, retired: Pki
) -> None:
    leaf = peers(retired.issue("agent/agent-1"), site)
    async with fleet.raw_agent(leaf, agent_id="agent-1") as agent:
        withdraw(site)
        assert is_untrusted(await agent.refusal())


async def test_a_call_under_a_root_that_is_taken_out_is_answered_and_is_the_last(
    fleet: Fleet, site: Pki, retired: Pki, until: Until
) -> None:
    request = dispatch_pb2.ExecuteRequest(target="agent-1", task="wait", payload=task_pb2.Payload(data=b"7"))
    async with (
        fleet.agent(Patient) as agent,
        fleet.channel(peers(retired.issue("client/cli"), site)) as channel,
    ):
        stub = dispatch_pb2_grpc.DispatchServiceStub(channel)
        asked = stub.Execute(request)
        await agent.begun.wait()
        withdraw(site)
        with pytest.raises(aio.AioRpcError) as refused:
            async with asyncio.timeout(WITHIN_S):
                while True:
                    await stub.Execute(dispatch_pb2.ExecuteRequest(target="agent-1", task="echo"))
        assert is_untrusted(refused.value)
        agent.release.set()
        assert (await asked).outcome.HasField("value")


@pytest.fixture(params=["to the control plane", "to an agent"])
async def line(
    request: pytest.FixtureRequest, fleet: Fleet, site: Pki, retired: Pki, listen: Listen
) -> AsyncIterator[tuple[RawLink, Patient, Callable[[], None]]]:
    """A caller's link under the root that is taken out; the agent, and what takes it out."""
    leaf = peers(retired.issue("client/cli"), site)
    if request.param == "to the control plane":
        async with fleet.agent(Patient) as agent, link_to_control_plane(fleet, leaf) as link:
            yield link, agent, lambda: withdraw(site)
    else:
        trust(site, "agent/agent-1", site, retired)
        async with listen(Patient, tls=site.tls()) as agent, link_to_agent(agent, leaf) as link:
            yield link, agent, lambda: trust(site, "agent/agent-1", site)


async def test_what_is_open_on_a_link_when_its_root_is_taken_out_is_answered_and_nothing_new_begins(
    line: tuple[RawLink, Patient, Callable[[], None]],
) -> None:
    link, agent, take_out = line
    await link.ask(1, "wait")
    await agent.begun.wait()
    agent.begun.clear()
    take_out()
    await link.draining()
    await link.ask(2, "wait")
    refused = await link.outcome()
    assert (refused.task_id, refused.failure.error_type) == (2, "UntrustedChain")
    assert not agent.begun.is_set()
    agent.release.set()
    kept = await link.outcome()
    assert (kept.task_id, kept.WhichOneof("result")) == (1, "value")
    assert is_untrusted(await link.end())


# A TLS session from before, which a handshake resumes without a look at the certificate.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("at", ["control plane", "agent"])
async def test_a_session_that_is_resumed_does_not_outlive_the_root(
    fleet: Fleet,
    site: Pki,
    retired: Pki,
    listen: Listen,
    require_tool: Callable[[str], str],
    tmp_path: Path,
    at: str,
    version: str,
) -> None:
    who, method = (
        ("service/control-plane", BUNDLE) if at == "control plane" else ("agent/agent-1", CAPABILITIES)
    )
    if at == "agent":  # a control plane that read another certificate now would begin its sessions anew
        trust(site, who, site, retired)
    async with listen(Patient, tls=site.tls()) as agent:
        port = fleet.port if at == "control plane" else int(str(agent.endpoint).rpartition(":")[2])
        one, other = (tmp_path / name for name in ("one", "other"))
        for directory in (one, other):
            directory.mkdir()
        openssl = require_tool("openssl")
        opened = Opener(openssl, one, peers(retired.issue("client/cli"), site), port, version)
        kept = Opener(openssl, other, site.issue("client/cli"), port, version)
        for each in (opened, kept):
            await open_session(each, method)
        trust(site, who, site)
        async with asyncio.timeout(WITHIN_S):
            while (answer := await opened.call(method)).status is StatusCode.OK:
                await asyncio.sleep(0.05)  # the files are looked at
        for _ in range(3):
            assert answer.status in {None, StatusCode.UNAUTHENTICATED}, answer.text
            answer = await opened.call(method)
        assert (await kept.call(method)).status is StatusCode.OK


# Whoever dialled finds the other end under a root that it is to trust no longer.


async def test_an_agent_that_was_dialled_is_given_nothing_more_when_its_root_is_taken_out(
    fleet: Fleet, site: Pki, retired: Pki, until: Until
) -> None:
    trust(site, "service/agent-proxy", site, retired)
    save_as(retired, "agent/agent-1", retired, site, retired)
    agent = Patient(
        "agent-1",
        "x",
        [],
        tls=retired.tls(),
        control_plane=fleet.address,
        session=False,
        listen="127.0.0.1:0",
    )
    async with agent, fleet.client() as client:
        await until(lambda: len(fleet.plane.proxies) == 1)  # once its new roots are in force
        asked = asyncio.create_task(client.analyze("agent-1", "wait", 7))
        await agent.begun.wait()
        withdraw(site)
        trust(site, "service/agent-proxy", site)
        with pytest.raises(TaskFailed) as refused:
            async with asyncio.timeout(WITHIN_S):
                while True:
                    await client.analyze("agent-1", "echo", 8)
        assert refused.value.code == OutcomeCode.NO_AGENT
        agent.release.set()
        assert (await asked).value == 7


async def test_an_agent_leaves_a_control_plane_whose_root_is_taken_out(
    site: Pki, retired: Pki, serve: Serve, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_DRAIN_SECONDS", "0.5")
    save_as(retired, "service/control-plane", retired, site, retired)
    save_as(retired, "client/cli", site, site, retired)
    save_as(site, "agent/agent-1", site, site, retired)
    own = site.directory / "agent-1"  # named one by one: else the control plane's roots take their place
    named = site.tls().model_copy(
        update={"ca_file": own / "ca.pem", "cert_file": own / "cert.pem", "key_file": own / "key.pem"}
    )
    async with serve(tls=retired.tls()) as fleet, fleet.client() as client:
        agent = Patient("agent-1", "x", [], tls=named, control_plane=fleet.address)
        async with agent:
            asked = asyncio.create_task(client.analyze("agent-1", "wait", 7))
            await agent.begun.wait()
            save_as(site, "agent/agent-1", site, site)
            await until(lambda: not len(fleet.plane.sessions))
            with pytest.raises(TaskFailed) as refused:
                await client.analyze("agent-1", "echo", 8)
            assert refused.value.code == OutcomeCode.NO_AGENT
            with pytest.raises(TaskFailed):
                await asked
