"""Two copies of one certificate betray themselves; a lost answer and an operator's hand do not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from parallax.control_plane.lineage import MAX_ISSUED, Lineages
from parallax.security.identity import Identity, Kind

AGENT_1: Final = Identity("parallax.local", Kind.AGENT, "agent-1")
AGENT_2: Final = Identity("parallax.local", Kind.AGENT, "agent-2")
BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)


class Renewals:
    """A certificate is called by a letter, and was made in the minute that `made` says."""

    def __init__(self, most: int = 10) -> None:
        self._lineages = Lineages(most)
        self._minute = 0
        self.made = {"a": 0}

    def __call__(self, presented: str, issued: str, identity: Identity = AGENT_1) -> bool:
        self._minute += 1
        made, now = (BEGIN + timedelta(minutes=m) for m in (self.made[presented], self._minute))
        self.made[issued] = self._minute
        return self._lineages.renewed(identity, presented.encode(), made, issued.encode(), now)

    def issued_by_hand(self, name: str) -> None:
        self._minute += 1
        self.made[name] = self._minute


@pytest.fixture
def renewals() -> Renewals:
    return Renewals()


def test_one_after_the_other_is_no_copy(renewals: Renewals) -> None:
    assert [renewals(*pair) for pair in ("ab", "bc", "cd", "de")] == [False] * 4


def test_an_answer_that_got_lost_is_asked_for_again(renewals: Renewals) -> None:
    assert [renewals(*pair) for pair in ("ab", "ac", "ad", "de")] == [False] * 4
    assert not renewals("e", "f")


def test_the_one_before_the_last_answer_may_be_the_one_that_arrived(renewals: Renewals) -> None:
    assert [renewals(*pair) for pair in ("ab", "ac", "bd")] == [False] * 3


def test_both_of_two_that_were_renewed_from_one_show_that_there_are_two(renewals: Renewals) -> None:
    assert [renewals(*pair) for pair in ("ab", "ac", "bd", "ce")] == [False, False, False, True]
    assert renewals("d", "f")


def test_the_old_one_beside_its_successor_shows_it_too(renewals: Renewals) -> None:
    assert [renewals(*pair) for pair in ("ab", "bc", "ad")] == [False, False, True]


def test_what_an_operator_has_issued_since_is_no_copy(renewals: Renewals) -> None:
    renewals("a", "b")
    renewals.issued_by_hand("x")
    assert not renewals("x", "y")
    assert not renewals("y", "z")


def test_identities_have_nothing_to_do_with_each_other(renewals: Renewals) -> None:
    renewals("a", "b")
    renewals("b", "c")
    assert not renewals("a", "d", AGENT_2)


def test_what_is_remembered_is_bounded() -> None:
    renewals = Renewals(most=1)
    renewals("a", "b")
    renewals("b", "c")
    renewals("a", "d", AGENT_2)
    assert not renewals("a", "e"), "it was forgotten, so that nothing can be said"
    for number in range(MAX_ISSUED):
        renewals("a", f"f{number}")
    assert renewals("e", "g"), "so many answers do not get lost"
