"""The built-in policy: agents speak for themselves, clients dispatch and read, `client/admin` administers."""

from __future__ import annotations

from typing import Final

from parallax.control_plane.registry import ANONYMOUS, AgentRef
from parallax.runtime.gate import Anonymous, Caller
from parallax.runtime.roles import CLIENTS, EVERYBODY, HEALTH_POLICY, Policy, Role, apply, role_of
from parallax.security.errors import NotAuthorized
from parallax.security.identity import Identity, Kind, check_name, clip
from parallax.security.verification import Peer

_AGENTS: Final = frozenset({Role.AGENT, Role.ANONYMOUS})

# Who may call what. A method that is not listed is refused to everybody.
POLICY: Final[Policy] = {
    "/parallax.v1.RegistryService/Register": _AGENTS,
    "/parallax.v1.RegistryService/Heartbeat": _AGENTS,
    "/parallax.v1.RegistryService/Deregister": _AGENTS | {Role.ADMIN},
    "/parallax.v1.RegistryService/GetAgent": CLIENTS,
    "/parallax.v1.RegistryService/ListAgents": CLIENTS,
    "/parallax.v1.RegistryService/WatchAgents": CLIENTS,
    "/parallax.v1.DispatchService/Execute": CLIENTS,
    "/parallax.v1.DispatchService/Link": CLIENTS,
    "/parallax.v1.SessionService/Connect": _AGENTS,
    # Each for itself. Anonymous callers are told which setting keeps them from it.
    "/parallax.v1.CertificateService/Renew": EVERYBODY,
    "/parallax.v1.CertificateService/GetTrustBundle": EVERYBODY,
    "/parallax.v1.CertificateService/WatchTrustBundle": EVERYBODY,
    "/parallax.v1.CertificateService/AcknowledgeTrustBundle": EVERYBODY,
    "/parallax.v1.RootService/GetRootRotation": frozenset({Role.ADMIN}),
    "/parallax.v1.RootService/RotateRoot": frozenset({Role.ADMIN}),
    "/parallax.v1.RootService/AbortRootRotation": frozenset({Role.ADMIN}),
    "/parallax.v1.LedgerService/ListCertificates": frozenset({Role.ADMIN}),
    "/parallax.v1.AuditService/ListAuditEntries": frozenset({Role.ADMIN}),
    **HEALTH_POLICY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": CLIENTS,
}


def authorize(caller: Caller, method: str) -> None:
    """Return if *caller* may call *method*, a full gRPC method name; raises NotAuthorized."""
    apply(POLICY, caller, method)


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
