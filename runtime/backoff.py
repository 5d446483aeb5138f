"""How long to wait before the next attempt at a peer that is away."""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 0.2
LONGEST_S: Final = 30.0
STEADY_S: Final = 5.0  # what held this long begins anew with the first


def backoff_s(attempt: int, spread: float) -> float:
    """Seconds before reconnect *attempt*, from 0: doubling, of which *spread* in [0, 1] decides one half."""
    longest: float = min(LONGEST_S, FIRST_S * 2 ** min(attempt, 16))
    return longest * (1 + spread) / 2
