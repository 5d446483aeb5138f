"""What an agent says of itself: validated once, wherever it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from parallax.security.errors import InvalidRequest
from parallax.security.identity import clip

MAX_CONCURRENCY: Final = 4_096  # a bound on what one agent may have in flight, whatever it claims
MAX_ENTRIES: Final = 64
MAX_TEXT_BYTES: Final = 256

_CAPABILITY: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AgentDescription:
    """
    What an agent can do, in its own words; grants nothing.

    Args:
        display_name: For people; at most 256 bytes.
        capabilities: Each `[a-z0-9]` then up to 62 of `[a-z0-9._-]`; at most 64; repeats are dropped.
        labels: Stated labels; at most 64 pairs of at most 256 bytes each.
        metadata: For people; the same bounds.
        max_concurrency: Tasks it works on at once, 1 to 4,096.

    Raises:
        InvalidRequest: A bound is broken; the message names the field.
    """

    display_name: str = ""
    capabilities: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_concurrency: int = 1

    def __post_init__(self) -> None:
        _check_text("display_name", self.display_name)
        object.__setattr__(self, "capabilities", tuple(dict.fromkeys(self.capabilities)))
        if len(self.capabilities) > MAX_ENTRIES:
            raise InvalidRequest(
                f"capabilities has {len(self.capabilities)} entries, more than {MAX_ENTRIES}"
            )
        for capability in self.capabilities:
            check_capability(capability)
        for name, pairs in (("labels", self.labels), ("metadata", self.metadata)):
            if len(pairs) > MAX_ENTRIES:
                raise InvalidRequest(f"{name} has {len(pairs)} entries, more than {MAX_ENTRIES}")
            for key, value in pairs.items():
                _check_text(f"a key of {name}", key)
                _check_text(f"{name}[{clip(key)}]", value)
        if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            raise InvalidRequest(
                f"max_concurrency must be from 1 to {MAX_CONCURRENCY}, not {self.max_concurrency}"
            )


def check_capability(name: str) -> str:
    """*name* itself, if it can name a capability."""
    if not _CAPABILITY.fullmatch(name):
        raise InvalidRequest(
            f"not a capability: {clip(name)} (1 to 63 characters: a-z, 0-9, then also . _ -)"
        )
    return name


def _check_text(what: str, text: str) -> None:
    if not text.isprintable():  # first: a lone surrogate has no bytes
        raise InvalidRequest(f"{what} has characters that cannot be shown: {clip(text)}")
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{what} has {size} bytes, more than {MAX_TEXT_BYTES}")
