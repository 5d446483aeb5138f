"""A call that is not let in, and what that is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from parallax.runtime.caller import Caller
from parallax.security.errors import IdentityError, NotAuthorized, ParallaxError, VerificationError


def _reason(cls: type[ParallaxError]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


_REFUSALS: Final[tuple[type[ParallaxError], ...]] = (
    VerificationError,
    *VerificationError.__subclasses__(),
    NotAuthorized,
    IdentityError,
)
# What a refusal is called in logs and metrics: the error's class, spelled as handshakes' reasons are.
REASONS: Final = tuple(_reason(cls) for cls in _REFUSALS)


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    A call that was not let in, or was ended because it would not be any more.

    Args:
        caller: None if it is not known who that is.
        source: The peer's address, as gRPC spells it.
    """

    method: str
    caller: Caller | None
    source: str
    cause: ParallaxError

    @property
    def reason(self) -> str:
        """What it is called, one of `REASONS`."""
        return _reason(type(self.cause))
