"""What a caller asks the fleet for, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from parallax.control_plane.registry import AgentRef
from parallax.runtime.description import check_capability
from parallax.runtime.outcome import Complete, Failure

if TYPE_CHECKING:
    from parallax.control_plane.sessions import Instance, Session

# How far ahead of its reader an answer in parts may be made: what the control plane holds of it at most.
MAX_PART_CREDIT: Final = 8 * 1024 * 1024

Answer = bytes | Failure | Complete  # a serialized Value travels as it is


@dataclass(frozen=True, slots=True)
class Capability:
    """A target that any agent of this capability can serve."""

    name: str

    def __str__(self) -> str:
        return f"capability:{self.name}"


Target = AgentRef | Capability


@lru_cache(maxsize=4096)  # every task spells its target, and most spell one of a few
def parse_target(text: str) -> Target:
    """The target spelled `agent-1`, `anonymous/agent-1` or `capability:sentiment`; raises if it is none."""
    prefix, colon, name = text.partition(":")
    if colon and prefix == "capability":
        return Capability(check_capability(name))
    return AgentRef.parse(text)


class Caller(Protocol):
    """Who is told how an order goes on, and whom it may be given to. Must not raise."""

    key: str  # orders of the same key take turns with those of others

    def ended(self, order: Order, answer: Answer) -> None:
        """It ended, once and for all."""

    def part(self, order: Order, value: bytes) -> None:
        """Its answer goes on."""

    def may_ask(self, target: Target, ref: AgentRef) -> bool:
        """Whether *ref* may be given what is asked of *target*, as things stand now."""


class Place(Enum):
    """Where an order is."""

    NOWHERE = auto()
    WAITING = auto()  # for an agent to appear
    QUEUED = auto()  # for its agent to have room
    GIVEN = auto()  # to its agent
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Order:
    """
    One thing that a caller asks for; the dispatcher keeps the second half.

    Args:
        target: Who is to do it.
        work: What; a serialized Work. Let go once it is given, unless it may have to be given again.
        timeout_s: For everything, waiting included.
        caller: Who asks.
        number: The caller's own name for it.
        wait_s: How long to wait for an eligible agent; zero fails at once.
        idempotent: May run more than once, so it is tried elsewhere if its agent is lost.
        allow_unverified: An agent that no certificate vouches for will do, by id as by capability.
        part_credit: Above zero, the answer is wanted in parts: how many bytes of them may come.
    """

    target: Target
    work: bytes
    timeout_s: float
    caller: Caller
    number: int = 0
    wait_s: float = 0.0
    idempotent: bool = False
    allow_unverified: bool = False
    part_credit: int = 0

    place: Place = field(default=Place.NOWHERE, init=False)
    began: float = field(default=0.0, init=False)
    timer: int = field(default=0, init=False)  # what `Deadlines` wants back
    task_id: int = field(default=0, init=False)  # of the last attempt
    attempts: int = field(default=0, init=False)
    instance: Instance | None = field(default=None, init=False)  # that it is queued for or given to
    session: Session | None = field(default=None, init=False)  # that it was given on
    agent: AgentRef | None = field(default=None, init=False)  # who had it last
    failure: Failure | None = field(default=None, init=False)  # of the attempt before
    has_parts: bool = field(default=False, init=False)  # some were passed on

    @property
    def agent_id(self) -> str:
        """Who had it last; empty when nobody had."""
        return str(self.agent or "")
