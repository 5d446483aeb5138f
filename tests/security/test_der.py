"""DER of parts that are encoded already."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.der import SEQUENCE, element, instant, integer, octet_string


@pytest.mark.parametrize(
    ("size", "length"),
    [(0, "00"), (1, "01"), (127, "7f"), (128, "8180"), (255, "81ff"), (256, "820100"), (65_536, "83010000")],
)
def test_a_length_takes_as_few_octets_as_it_can(size: int, length: str) -> None:
    """X.690 §10.1."""
    assert octet_string(bytes(size)) == bytes.fromhex(f"04{length}") + bytes(size)


@given(st.integers(0, 2**160), st.integers(0, 2**160))
def test_numbers_are_read_as_they_were(one: int, other: int) -> None:
    """By the reader of ECDSA signatures, which takes nothing but DER."""
    assert decode_dss_signature(element(SEQUENCE, integer(one), integer(other))) == (one, other)


@pytest.mark.parametrize(
    ("at", "content"),
    [
        (datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC), b"\x17\x0d491231235959Z"),
        (datetime(2050, 1, 1, tzinfo=UTC), b"\x18\x0f20500101000000Z"),
    ],
)
def test_the_year_has_two_digits_until_2049(at: datetime, content: bytes) -> None:
    assert instant(at) == content
