from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.outcome import (
    MAX_PAYLOAD_BYTES,
    Failure,
    OutcomeCode,
    Payload,
    check_confidence,
    check_payload,
)
from parallax.security.errors import InvalidRequest


class Level(IntEnum):
    NONE = 0
    FULL = 1


@pytest.mark.parametrize("confidence", [0, 1, 0.0, -0.0, 1.0, 0.5, 5e-324, math.nextafter(1, 0), Level.FULL])
def test_a_number_from_0_to_1_is_a_confidence(confidence: float) -> None:
    checked = check_confidence(confidence)
    assert type(checked) is float
    assert checked == confidence


@pytest.mark.parametrize(
    "confidence",
    [
        *(math.nan, math.inf, -math.inf, 1.5, -1, -5e-324, math.nextafter(1, 2), 2, 10**400, -(10**5000)),
        *(True, False, None, "high", "0.5", b"1", [0.5], (0.5,), Decimal("0.5"), Fraction(1, 2), 1j),
    ],
    ids=lambda confidence: type(confidence).__name__,
)
def test_anything_else_is_none(confidence: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^confidence must be "):
        check_confidence(confidence)


@given(confidence=st.floats() | st.integers())
def test_every_number_is_a_confidence_or_refused(confidence: float) -> None:
    try:
        checked = check_confidence(confidence)
    except InvalidRequest:
        assert not 0 <= confidence <= 1
    else:
        assert 0 <= checked <= 1


@pytest.mark.parametrize(
    ("confidence", "message"),
    [
        (1.5, "confidence must be from 0 to 1, not 1.5"),
        (math.nan, "confidence must be from 0 to 1, not nan"),
        (-(10**400), "confidence must be from 0 to 1, not a huge integer"),
        (True, "confidence must be a number from 0 to 1, not bool"),
        (None, "confidence must be a number from 0 to 1, not NoneType"),
    ],
)
def test_the_refusal_says_what_it_got(confidence: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_confidence(confidence)
    assert str(raised.value) == message


def test_a_payload_may_have_as_many_bytes_as_the_limit_and_no_more() -> None:
    fits = Payload(b"12345")
    assert check_payload(fits, 5) is fits
    with pytest.raises(InvalidRequest, match=r"has 5 bytes, more than the 4 allowed"):
        check_payload(fits, 4)


def test_the_limit_is_4_mib_unless_told_otherwise() -> None:
    assert MAX_PAYLOAD_BYTES == 4 * 1024 * 1024
    check_payload(Payload(bytes(MAX_PAYLOAD_BYTES)))
    with pytest.raises(InvalidRequest):
        check_payload(Payload(bytes(MAX_PAYLOAD_BYTES + 1)))


def test_a_failure_keeps_everything_as_an_exception() -> None:
    failure = Failure(OutcomeCode.HANDLER_FAILED, "bad number", "ValueError", timedelta(seconds=2))
    error = failure.to_error()
    assert (error.code, error.error_type, error.retry_after) == (
        "HANDLER_FAILED",
        "ValueError",
        timedelta(seconds=2),
    )
    assert str(error) == "HANDLER_FAILED: ValueError: bad number"
