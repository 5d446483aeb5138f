"""Which protocol two ends speak, so that old and new can meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from parallax.protos import link_pb2
from parallax.security.errors import InvalidTransition


@dataclass(frozen=True, slots=True)
class Speaks:
    """
    What one end can do.

    Args:
        oldest, newest: The protocol versions it speaks, from 1.
        capability_bits: Optional behaviour, one bit each; bits that the other end does not know are ignored.
    """

    oldest: int
    newest: int
    capability_bits: int = 0


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both ends will do."""

    version: int
    capability_bits: int


THIS_PROGRAM: Final = Speaks(oldest=1, newest=1)


def negotiate(theirs: Speaks, ours: Speaks = THIS_PROGRAM) -> Agreed:
    """The newest version both speak and the behaviour both can do; raises InvalidTransition if none."""
    version = min(theirs.newest, ours.newest)
    if version < max(theirs.oldest, ours.oldest, 1):
        raise InvalidTransition(
            f"no common protocol version: the peer speaks {theirs.oldest} to {theirs.newest}, "
            f"this program {ours.oldest} to {ours.newest}; update the older one"
        )
    return Agreed(version, theirs.capability_bits & ours.capability_bits)


def hello() -> link_pb2.Hello:
    """What this program says of itself when it dials."""
    return link_pb2.Hello(
        protocol_version=THIS_PROGRAM.newest,
        min_protocol_version=THIS_PROGRAM.oldest,
        capability_bits=THIS_PROGRAM.capability_bits,
    )
