"""Spans of time, as one types them: `90s`, `10m`, `1h`, `30d`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from parallax.security.errors import InvalidRequest
from parallax.security.identity import clip

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
# Five digits: three centuries at the most, which can be taken from any date of ours.
_SPAN: Final = re.compile(r"([0-9]{1,5})([smhd])", re.ASCII)


def parse_span(text: str) -> timedelta:
    """What *text* says; raises InvalidRequest."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise InvalidRequest(f"not a span of time: {clip(text)} (a number and s, m, h or d, such as 90m)")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])
