"""As whom a caller acts: agents for themselves, clients towards those whom the policy lets them ask."""

from __future__ import annotations

from dataclasses import dataclass

from parallax.control_plane.order import Capability, Target
from parallax.control_plane.registry import ANONYMOUS, AgentRef
from parallax.runtime.authorization import Authorization
from parallax.runtime.caller import Anonymous, Caller, name_of
from parallax.security.errors import NotAuthorized
from parallax.security.identity import Identity, Kind, check_name, clip
from parallax.security.verification import Peer


@dataclass(frozen=True, slots=True)
class Grant:
    """
    Whom *caller* may ask by *method*, as the policy says at each moment.

    Args:
        method: Its full name.
    """

    authorization: Authorization
    caller: Caller
    method: str

    @property
    def key(self) -> str:
        """Who asks, for taking turns with others."""
        return name_of(self.caller)

    def check(self, target: Target) -> None:
        """Return if *target*, or somebody who offers it, may be asked; raises NotAuthorized."""
        self.authorization.check(self.caller, self.method, str(target))

    def covers(self, target: Target, ref: AgentRef) -> bool:
        """Whether *ref* may be asked for what *target* is asked for."""
        caller = self.caller.identity if isinstance(self.caller, Peer) else None
        if isinstance(target, Capability):
            decision = self.authorization.decide(caller, self.method, str(target))
            if decision.allowed and not decision.only:
                return True
        return self.authorization.decide(caller, self.method, str(ref)).allowed


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
    """The agent that *caller*, whom the policy lets take agents out, may: an agent itself, others any."""
    match caller:
        case Anonymous():
            stated = stated.removeprefix(ANONYMOUS)  # as listings spell the agents that it may name
        case Peer(identity=identity) if identity.kind is not Kind.AGENT:
            return AgentRef.parse(stated)
    return speaker(caller, stated)[0]
