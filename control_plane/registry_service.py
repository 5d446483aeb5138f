"""The gRPC service of the registry: who calls, which domain call, and the translation between the two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

from grpc import aio

from parallax.control_plane.authorization import removable, speaker
from parallax.control_plane.registry import AgentRecord, AgentRef, Registry
from parallax.control_plane.sessions import Sessions
from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.address import parse_address
from parallax.runtime.interceptors import current_caller
from parallax.security.errors import ConfigError, InvalidRequest

Context = aio.ServicerContext[Any, Any]


class RegistryService(registry_pb2_grpc.RegistryServiceServicer):
    """Registry records over gRPC."""

    def __init__(self, registry: Registry, sessions: Sessions, clock: Callable[[], datetime]) -> None:
        self._registry = registry
        self._sessions = sessions
        self._clock = clock

    async def Register(
        self, request: registry_pb2.RegisterRequest, context: Context
    ) -> registry_pb2.RegisterResponse:
        ref, identity = speaker(current_caller(), request.description.agent_id)
        description = wire.description_from_proto(request.description)
        registration = self._registry.register(
            ref,
            identity,
            description,
            endpoint=_endpoint(request.endpoint),
            now=_monotonic(),
            at=self._clock(),
        )
        self._sessions.describe(ref, description)
        return registry_pb2.RegisterResponse(
            generation=registration.generation, lease_ms=wire.milliseconds(self._registry.lease)
        )

    async def Heartbeat(
        self, request: registry_pb2.HeartbeatRequest, context: Context
    ) -> registry_pb2.HeartbeatResponse:
        ref, _ = speaker(current_caller(), request.agent_id)
        self._registry.heartbeat(ref, _monotonic(), request.generation)
        return registry_pb2.HeartbeatResponse(lease_ms=wire.milliseconds(self._registry.lease))

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: Context
    ) -> registry_pb2.DeregisterResponse:
        ref = removable(current_caller(), request.agent_id)
        beside = self._registry.retract(ref, request.generation)
        if not beside and not self._sessions.remove(ref, request.generation):
            self._registry.get(ref)  # says so if there is none; an older generation has no effect
        return registry_pb2.DeregisterResponse()

    async def GetAgent(
        self, request: registry_pb2.GetAgentRequest, context: Context
    ) -> registry_pb2.GetAgentResponse:
        record = self._registry.get(AgentRef.parse(request.agent_id))
        return registry_pb2.GetAgentResponse(agent=self._to_proto(record))

    async def ListAgents(
        self, request: registry_pb2.ListAgentsRequest, context: Context
    ) -> registry_pb2.ListAgentsResponse:
        return registry_pb2.ListAgentsResponse(agents=map(self._to_proto, self._registry.records()))

    def _to_proto(self, record: AgentRecord) -> registry_pb2.Agent:
        instance = self._sessions.instance(record.ref)
        if instance is None:
            state = registry_pb2.AGENT_STATE_REGISTERED
        elif instance.active is None:
            state = registry_pb2.AGENT_STATE_DRAINING
        else:
            state = registry_pb2.AGENT_STATE_READY
        agent = registry_pb2.Agent(
            agent_id=str(record.ref),
            identity=str(record.identity or ""),
            verified=record.ref.verified,
            description=wire.description_to_proto(record.description, record.ref.name),
            endpoint=record.endpoint,
            state=state,
            generation=record.generation,
            in_flight=len(instance.held) if instance else 0,
        )
        agent.registered_at.FromDatetime(record.presence.since)
        return agent


def _endpoint(stated: str) -> str:
    """*stated* itself, if it is empty or an address: everybody who reads the registry gets it."""
    if stated:
        try:
            _, port = parse_address(stated)
        except ConfigError as exc:
            raise InvalidRequest(str(exc)) from exc
        if not port:
            raise InvalidRequest(f"{stated} is not an endpoint: nobody can dial port 0")
    return stated


def _monotonic() -> float:
    return asyncio.get_running_loop().time()
