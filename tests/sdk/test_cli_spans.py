"""Spans of time, as one types them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from parallax.sdk.cli.spans import parse_span
from parallax.security.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("0s", timedelta(0)),
        ("90s", timedelta(seconds=90)),
        ("10m", timedelta(minutes=10)),
        ("1h", timedelta(hours=1)),
        ("030d", timedelta(days=30)),
    ],
)
def test_a_span_is_a_number_and_a_unit(text: str, span: timedelta) -> None:
    assert parse_span(text) == span


@pytest.mark.parametrize(
    "text", ["", "1", "h", "1w", "-1h", "1.5h", "1h30m", "1 h", "1h\n", "\u0661h", "100000d"]
)
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not a span of time"):
        parse_span(text)


def test_the_longest_one_can_be_taken_from_now() -> None:
    assert datetime(2026, 1, 1, tzinfo=UTC) - parse_span("99999d") > datetime(1700, 1, 1, tzinfo=UTC)
