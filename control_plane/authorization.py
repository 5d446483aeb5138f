"""The built-in policy: agents speak for themselves, clients dispatch and read, `client/admin` administers."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from parallax.control_plane.registry import ANONYMOUS, AgentRef
from parallax.runtime.interceptors import Anonymous, Caller
from parallax.security.errors import NotAuthorized
from parallax.security.identity import Identity, Kind, check_name, clip
from parallax.security.verification import Peer

ADMIN: Final = "admin"


class Role(Enum):
    """What a caller is to the policy."""

    AGENT = auto()
    CLIENT = auto()
    ADMIN = auto()
    SERVICE = auto()
    ANONYMOUS = auto()


_EVERYBODY: Final = frozenset(Role)
_AGENTS: Final = frozenset({Role.AGENT, Role.ANONYMOUS})
_CLIENTS: Final = frozenset({Role.CLIENT, Role.ADMIN, Role.ANONYMOUS})

# Who may call what. A method that is not listed is refused to everybody.
POLICY: Final[Mapping[str, frozenset[Role]]] = {
    "/parallax.v1.RegistryService/Register": _AGENTS,
    "/parallax.v1.RegistryService/Heartbeat": _AGENTS,
    "/parallax.v1.RegistryService/Deregister": _AGENTS | {Role.ADMIN},
    "/parallax.v1.RegistryService/GetAgent": _CLIENTS,
    "/parallax.v1.RegistryService/ListAgents": _CLIENTS,
    "/parallax.v1.RegistryService/WatchAgents": _CLIENTS,
    "/parallax.v1.DispatchService/Execute": _CLIENTS,
    "/parallax.v1.DispatchService/Link": _CLIENTS,
    "/parallax.v1.SessionService/Connect": _AGENTS,
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/List": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": _EVERYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _CLIENTS,
}


def role_of(caller: Caller) -> Role:
    """What *caller* is to the policy."""
    if isinstance(caller, Anonymous):
        return Role.ANONYMOUS
    match caller.identity.kind:
        case Kind.AGENT:
            return Role.AGENT
        case Kind.SERVICE:
            return Role.SERVICE
        case Kind.CLIENT:
            return Role.ADMIN if caller.identity.name == ADMIN else Role.CLIENT


def authorize(caller: Caller, method: str) -> None:
    """Return if *caller* may call *method*, a full gRPC method name; raises NotAuthorized."""
    allowed = POLICY.get(method, frozenset())
    if role_of(caller) not in allowed:
        who = str(caller.identity) if isinstance(caller, Peer) else "an anonymous caller"
        only_admin = Role.ADMIN in allowed and Role.CLIENT not in allowed
        other = f"--identity client/{ADMIN}" if only_admin else "another --identity"
        raise NotAuthorized(f"{who} may not call {clip(method)}; act as {other}")


def speaker(caller: Caller, stated: str) -> tuple[AgentRef, Identity | None]:
    """
    The agent that *caller* speaks as: its certificate says so, *stated* may only agree.

    Where nobody is authenticated, *stated* names an anonymous agent.

    Raises:
        NotAuthorized: *stated* is somebody else, or the caller is no agent.
        IdentityError: An anonymous caller states no usable name.
    """
    match caller:
        case Peer(identity=Identity(kind=Kind.AGENT) as identity):
            if stated not in ("", identity.name):
                raise NotAuthorized(f"{identity} may not speak for {clip(stated)}")
            return AgentRef(identity.name), identity
        case Peer(identity=identity):
            raise NotAuthorized(f"{identity} is not an agent")
        case Anonymous():
            return AgentRef(check_name(stated), verified=False), None


def removable(caller: Caller, stated: str) -> AgentRef:
    """The agent that *caller* may take out: itself, or for `client/admin` whichever it states."""
    if role_of(caller) is Role.ADMIN:
        return AgentRef.parse(stated)
    if isinstance(caller, Anonymous):
        stated = stated.removeprefix(ANONYMOUS)  # as listings spell the agents that such a caller may name
    return speaker(caller, stated)[0]
