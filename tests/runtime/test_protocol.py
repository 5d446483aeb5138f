"""Which protocol two ends speak."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.protocol import THIS_PROGRAM, Agreed, Speaks, negotiate
from parallax.security.errors import InvalidTransition

BITS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("theirs", "ours", "agreed"),
    [
        (Speaks(1, 1), Speaks(1, 1), 1),
        (Speaks(1, 1), Speaks(1, 9), 1),  # an old peer
        (Speaks(1, 9), Speaks(1, 1), 1),  # an old self
        (Speaks(3, 5), Speaks(1, 4), 4),
        (Speaks(1, 4), Speaks(3, 5), 4),
        (Speaks(2, 3), Speaks(3, 4), 3),
        (Speaks(0, 1), Speaks(1, 1), 1),  # the oldest left unset
    ],
)
def test_the_newest_that_both_speak(theirs: Speaks, ours: Speaks, agreed: int) -> None:
    assert negotiate(theirs, ours).version == agreed


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (Speaks(1, 1), Speaks(2, 3)),  # too old a peer
        (Speaks(2, 3), Speaks(1, 1)),  # too new a peer
        (Speaks(0, 0), Speaks(1, 1)),  # a hello that says nothing
        (Speaks(5, 1), Speaks(1, 9)),  # a hello that contradicts itself
        (Speaks(0, 0), Speaks(0, 5)),  # zero is no version
    ],
)
def test_none_in_common_is_an_error_that_says_what_each_speaks(theirs: Speaks, ours: Speaks) -> None:
    with pytest.raises(InvalidTransition, match="update the older one") as caught:
        negotiate(theirs, ours)
    assert f"{theirs.oldest} to {theirs.newest}" in str(caught.value)
    assert f"{ours.oldest} to {ours.newest}" in str(caught.value)


def test_unknown_capability_bits_are_ignored() -> None:
    assert negotiate(Speaks(1, 1, 0b0110), Speaks(1, 1, 0b0011)) == Agreed(1, 0b0010)
    assert negotiate(Speaks(1, 1, 2**64 - 1)).capability_bits == THIS_PROGRAM.capability_bits


@given(*[st.integers(0, 6)] * 4, BITS, BITS)
def test_is_what_a_search_would_find_and_the_same_from_both_ends(
    a: int, b: int, c: int, d: int, these: int, those: int
) -> None:
    one, other = Speaks(a, b, these), Speaks(c, d, those)
    common = [v for v in range(1, 7) if a <= v <= b and c <= v <= d]
    for theirs, ours in ((one, other), (other, one)):
        if common:
            assert negotiate(theirs, ours) == Agreed(max(common), these & those)
        else:
            with pytest.raises(InvalidTransition):
                negotiate(theirs, ours)


def test_this_program_speaks_with_itself() -> None:
    assert negotiate(THIS_PROGRAM) == Agreed(THIS_PROGRAM.newest, THIS_PROGRAM.capability_bits)
