"""What a client refuses before it asks anybody."""

from __future__ import annotations

from datetime import timedelta

import pytest

from parallax.sdk import ParallaxClient
from parallax.security.errors import InvalidRequest


@pytest.mark.parametrize("name", ["timeout", "wait_for_agent"])
@pytest.mark.parametrize(
    "duration",
    [-1, -0.001, float("nan"), float("inf"), 86_401, 1e300, timedelta(seconds=-1), timedelta(days=2)],
)
async def test_a_duration_that_the_wire_cannot_carry_is_refused(name: str, duration: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} is .* s: give 0 to 86400 s$"):
        await ParallaxClient().analyze("agent-1", "x", **{name: duration})  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", [0, 0.0, timedelta(0)])
async def test_no_time_at_all_is_refused(nothing: float) -> None:
    """On the wire it would mean the default."""
    with pytest.raises(InvalidRequest, match=r"^timeout is 0: "):
        await ParallaxClient().analyze("agent-1", "x", timeout=nothing)
