"""What a caller is to a policy, by its certificate alone, and what a policy is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from parallax.runtime.gate import Anonymous, Caller
from parallax.security.errors import NotAuthorized
from parallax.security.identity import AGENT_PROXY, Kind, clip
from parallax.security.verification import Peer

ADMIN: Final = "admin"


class Role(Enum):
    """What a caller is to a policy."""

    AGENT = auto()
    CLIENT = auto()
    ADMIN = auto()
    PROXY = auto()  # of the control plane, which dials agents
    SERVICE = auto()
    ANONYMOUS = auto()


# Who may call what. A method that is not listed is refused to everybody.
Policy = Mapping[str, frozenset[Role]]

EVERYBODY: Final = frozenset(Role)
CLIENTS: Final = frozenset({Role.CLIENT, Role.ADMIN, Role.ANONYMOUS})
HEALTH_POLICY: Final[Policy] = {
    "/grpc.health.v1.Health/Check": EVERYBODY,
    "/grpc.health.v1.Health/List": EVERYBODY,
    "/grpc.health.v1.Health/Watch": EVERYBODY,
}


def role_of(caller: Caller) -> Role:
    """What *caller* is to a policy."""
    if isinstance(caller, Anonymous):
        return Role.ANONYMOUS
    match caller.identity.kind:
        case Kind.AGENT:
            return Role.AGENT
        case Kind.SERVICE:
            return Role.PROXY if caller.identity.name == AGENT_PROXY else Role.SERVICE
        case Kind.CLIENT:
            return Role.ADMIN if caller.identity.name == ADMIN else Role.CLIENT


def apply(policy: Policy, caller: Caller, method: str) -> None:
    """Return if *policy* lets *caller* call *method*, a full gRPC method name; raises NotAuthorized."""
    allowed = policy.get(method, frozenset())
    if role_of(caller) not in allowed:
        who = str(caller.identity) if isinstance(caller, Peer) else "an anonymous caller"
        only_admin = Role.ADMIN in allowed and Role.CLIENT not in allowed
        other = f"--identity client/{ADMIN}" if only_admin else "another --identity"
        raise NotAuthorized(f"{who} may not call {clip(method)}; act as {other}")
