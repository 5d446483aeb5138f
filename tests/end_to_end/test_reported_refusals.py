"""Whom an agent that listens does not let in is in the control plane's audit log, as that agent's word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from grpc import StatusCode, aio

from parallax.control_plane.audit import Deed
from parallax.control_plane.registry import AgentRef
from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.runtime.refusal_counts import MAX_KINDS, MAX_REPORTED
from tests.end_to_end.test_audit import LOOPBACK, told
from tests.end_to_end.test_direct_revocation import WITHIN_S, capabilities, dialled, listening
from tests.end_to_end.test_revocation import revoke_leaf

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Serve

REPORTED = "agent/refused"


@pytest.fixture
async def fleet(serve: Serve) -> AsyncIterator[Fleet]:
    """With heartbeats every second."""
    async with serve(lease_seconds=3) as fleet:
        yield fleet


@pytest.fixture
async def patient(serve: Serve) -> AsyncIterator[Fleet]:
    """Where no lease runs out while a slow machine comes to what keeps it."""
    async with serve(lease_seconds=600) as fleet:
        yield fleet


async def reported(fleet: Fleet, count: int) -> list[Deed]:
    """What was entered of reports, once so many refusals are told of."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            await fleet.plane.refusals.enter()
            deeds = [entry.deed for entry in await told(fleet, REPORTED)]
            if sum(int(deed.detail["count"]) for deed in deeds) >= count:
                return deeds
            await asyncio.sleep(0.1)


async def heartbeat(fleet: Fleet, who: str, *report: registry_pb2.RefusedCalls) -> None:
    async with fleet.channel(who) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.Heartbeat(registry_pb2.HeartbeatRequest(refused=report), timeout=WITHIN_S)


async def register(fleet: Fleet, who: str) -> None:
    async with fleet.channel(who) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.Register(registry_pb2.RegisterRequest(endpoint="localhost:1"), timeout=WITHIN_S)


async def test_who_may_not_ask_and_who_is_revoked_are_told_by_the_agent(fleet: Fleet, pki: Pki) -> None:
    stolen = pki.issue("client/cli")
    async with listening(fleet) as agent:
        async with dialled(agent, stolen) as channel:
            await capabilities(channel)
            await revoke_leaf(fleet, stolen)
            async with asyncio.timeout(WITHIN_S):
                while True:
                    try:
                        await capabilities(channel)
                    except aio.AioRpcError:
                        break
        async with dialled(agent, pki.issue("agent/agent-2")) as channel:
            for _ in range(3):
                with pytest.raises(aio.AioRpcError):
                    await capabilities(channel)
        deeds = await reported(fleet, 4)
    assert {deed.by for deed in deeds} == {"spiffe://parallax.local/agent/agent-1"}
    assert {(deed.subject[24:], deed.detail["reason"], deed.source in LOOPBACK) for deed in deeds} == {
        ("client/cli", "revoked", True),
        ("agent/agent-2", "not_authorized", True),
    }
    assert {deed.detail["method"] for deed in deeds} == {"/parallax.v1.AgentService/GetCapabilities"}


async def test_what_a_heartbeat_that_failed_has_told_is_told_again(fleet: Fleet, pki: Pki) -> None:
    async with listening(fleet) as agent, dialled(agent, pki.issue("agent/agent-2")) as channel:
        with pytest.raises(aio.AioRpcError):
            await capabilities(channel)
        fleet.plane.registry.unregister(AgentRef("agent-1"))  # so that the next one is refused
        [deed] = await reported(fleet, 1)
    assert (deed.subject[24:], deed.detail["count"]) == ("agent/agent-2", "1")


async def test_an_agent_that_stops_tells_the_last_of_them(patient: Fleet, pki: Pki) -> None:
    """No heartbeat comes by itself."""
    async with listening(patient) as agent, dialled(agent, pki.issue("agent/agent-2")) as channel:
        with pytest.raises(aio.AioRpcError):
            await capabilities(channel)
    [deed] = await reported(patient, 1)
    assert (deed.by[24:], deed.subject[24:]) == ("agent/agent-1", "agent/agent-2")


async def test_what_an_agent_says_of_others_is_its_own_word(patient: Fleet) -> None:
    """No report makes an entry such as the control plane's own refusals are."""
    fleet = patient
    await register(fleet, "agent/agent-2")
    lie = registry_pb2.RefusedCalls(
        caller="spiffe://parallax.local/client/admin", reason="revoked", count=1, methods=["/x/Y"]
    )
    await heartbeat(fleet, "agent/agent-2", lie)
    [deed] = await reported(fleet, 1)
    assert (deed.action, deed.by) == (REPORTED, "spiffe://parallax.local/agent/agent-2")
    assert not await told(fleet, "call/refused")


async def test_an_agent_that_reports_without_end_hides_neither_others_nor_what_is_refused_here(
    patient: Fleet,
) -> None:
    fleet = patient
    await register(fleet, "agent/agent-1")
    await register(fleet, "agent/agent-2")
    for number in range(20):
        lies = [registry_pb2.RefusedCalls(caller=f"{number}-{each}", count=1) for each in range(50)]
        await heartbeat(fleet, "agent/agent-2", *lies)
    await heartbeat(fleet, "agent/agent-1", registry_pb2.RefusedCalls(caller="unknown", count=1))
    with pytest.raises(aio.AioRpcError):
        await heartbeat(fleet, "client/cli", registry_pb2.RefusedCalls(caller="unknown", count=1))
    deeds = await reported(fleet, 20 * (MAX_KINDS + 1) + 1)
    assert [deed.by[24:] for deed in deeds] == [*["agent/agent-2"] * (MAX_REPORTED + 1), "agent/agent-1"]
    assert deeds[MAX_REPORTED].subject == "others"
    [refused] = await told(fleet, "call/refused")
    assert refused.deed.by[24:] == "client/cli"


async def test_who_is_not_registered_reports_nothing(fleet: Fleet) -> None:
    with pytest.raises(aio.AioRpcError) as refused:
        await heartbeat(fleet, "agent/agent-2", registry_pb2.RefusedCalls(caller="x", count=1))
    assert refused.value.code() is StatusCode.NOT_FOUND
    await fleet.plane.refusals.enter()
    assert not await told(fleet, REPORTED)
