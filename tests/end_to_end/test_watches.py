"""How often one identity may watch, whatever it is, and that others watch meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2

from parallax.protos import (
    certificate_pb2,
    certificate_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    revocation_feed_pb2,
    revocation_feed_pb2_grpc,
)
from parallax.runtime.watches import MAX_WATCHES

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet


@dataclass(frozen=True, slots=True)
class Watching:
    """
    A call that goes on.

    Args:
        by, beside: Two who may make it.
        what: As the one who makes it too often is told.
    """

    begin: Callable[[aio.Channel], Any]
    by: str
    beside: str
    what: str


CLIENTS, AGENTS = ("client/cli", "client/admin"), ("agent/agent-1", "agent/agent-2")
EACH = {
    "roots": Watching(
        lambda channel: certificate_pb2_grpc.CertificateServiceStub(channel).WatchTrustBundle(
            certificate_pb2.WatchTrustBundleRequest()
        ),
        *CLIENTS,
        "the roots",
    ),
    "revocations": Watching(
        lambda channel: revocation_feed_pb2_grpc.RevocationFeedServiceStub(channel).WatchRevocations(
            revocation_feed_pb2.WatchRevocationsRequest()
        ),
        *AGENTS,
        "what is revoked",
    ),
    "policy": Watching(
        lambda channel: policy_pb2_grpc.PolicyServiceStub(channel).WatchPolicy(
            policy_pb2.WatchPolicyRequest()
        ),
        *AGENTS,
        "the policy",
    ),
    "agents": Watching(
        lambda channel: registry_pb2_grpc.RegistryServiceStub(channel).WatchAgents(
            registry_pb2.WatchAgentsRequest()
        ),
        *CLIENTS,
        "the agents",
    ),
    "health": Watching(
        lambda channel: channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest()),
        *CLIENTS,
        "the health",
    ),
}


async def heard(call: Any) -> Any:
    message = await asyncio.wait_for(call.read(), 10)
    assert message is not aio.EOF
    return message


@pytest.mark.parametrize("name", EACH)
async def test_an_identity_watches_so_often_at_once_and_others_watch_too(fleet: Fleet, name: str) -> None:
    watching = EACH[name]
    async with fleet.channel(watching.by) as channel, fleet.channel(watching.beside) as other:
        watches = [watching.begin(channel) for _ in range(MAX_WATCHES)]
        for each in watches:
            await heard(each)
        for _ in range(2):  # nor does one that is refused count
            said = f"{watching.by} watches {watching.what} {MAX_WATCHES} times"
            with pytest.raises(aio.AioRpcError, match=said) as refused:
                await heard(watching.begin(channel))
            assert refused.value.code() is StatusCode.UNAVAILABLE
        await heard(watching.begin(other))
        watches[0].cancel()

        async def is_told_again() -> bool:
            try:
                await heard(watching.begin(channel))
            except aio.AioRpcError:
                return False
            return True

        async with asyncio.timeout(10):
            while not await is_told_again():
                await asyncio.sleep(0.05)


async def test_what_one_watches_leaves_room_for_the_rest(fleet: Fleet) -> None:
    async with fleet.channel("client/cli") as channel:
        for name in ("roots", "agents", "health"):
            for watch in [EACH[name].begin(channel) for _ in range(MAX_WATCHES)]:
                await heard(watch)
