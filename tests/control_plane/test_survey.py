"""What the ledger comes to in numbers: one bucket for each identity, and the soonest ten."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.survey import Holdings, Survey
from parallax.security.identity import Identity, Kind

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)


def entry(
    name: str, left: timedelta, *, issuer: str = "old", seen: bool = True, asked: bool = False
) -> IssuedCertificate:
    identity = Identity("parallax.local", Kind.AGENT, name)
    return IssuedCertificate(
        identity=identity,
        serial="1",
        issuer=issuer,
        fingerprint="",
        key_fingerprint="",
        not_before=NOW,
        not_after=NOW + left,
        issued_at=NOW,
        recorded_at=NOW,
        requested_by=str(identity) if asked else None,
        seen_at=NOW if seen else None,
        key="",
    )


def survey(*entries: IssuedCertificate) -> Survey:
    holdings = Holdings()
    for each in entries:
        holdings.enter(each)
    return holdings.at(NOW)


def names(identities: Iterable[Identity]) -> list[str]:
    return sorted(identity.name for identity in identities)


@pytest.mark.parametrize(
    ("left", "bucket"),
    [
        (timedelta(0), "1h"),
        (timedelta(hours=1), "1h"),
        (timedelta(hours=1, seconds=1), "1d"),
        (timedelta(days=7), "7d"),
        (timedelta(days=30), "30d"),
        (timedelta(days=31), "later"),
    ],
)
def test_an_identity_is_in_one_bucket(left: timedelta, bucket: str) -> None:
    counts = survey(entry("a", left)).outlook().buckets
    assert {name: n for name, n in counts.items() if n} == {bucket: 1}


def test_the_certificate_that_ends_last_counts() -> None:
    found = survey(entry("a", timedelta(minutes=1)), entry("a", timedelta(days=2))).outlook()
    assert found.buckets["7d"] == 1
    assert [end for _, end in found.soonest] == [NOW + timedelta(days=2)]


def test_the_soonest_ten_are_shown_and_no_more() -> None:
    found = survey(*(entry(f"a{n:02}", timedelta(hours=n)) for n in range(30)))
    assert [who.name for who, _ in found.outlook().soonest] == [f"a{n:02}" for n in range(10)]


def test_one_depends_on_the_old_issuer_until_it_was_seen_with_the_new() -> None:
    day = timedelta(days=1)
    found = survey(
        entry("only-old", day),
        entry("not-seen", day),
        entry("not-seen", day, issuer="new", seen=False),
        entry("renewed", day),
        entry("renewed", day, issuer="new"),
        entry("new-only", day, issuer="new"),
    )
    assert names(found.unreplaced(frozenset({"old"}), "new")) == ["not-seen", "only-old"]
    assert found.issuers == {"old", "new"}


def test_who_has_a_pinned_certificate_is_a_member_and_depends_on_no_issuer() -> None:
    pinned = replace(entry("device", timedelta(days=1), issuer="its own key"), key_fingerprint="its own key")
    found = survey(pinned, entry("a", timedelta(days=1)))
    assert names(found.holders) == ["a", "device"]
    assert found.issuers == {"old"}
    assert names(found.unreplaced(found.issuers, "new")) == ["a"]


def test_one_of_several_issuers_that_go_is_enough_to_depend_on() -> None:
    day = timedelta(days=1)
    found = survey(
        entry("below-another", day, issuer="other"),
        entry("elsewhere", day, issuer="stays"),
        entry("both", day, issuer="other"),
        entry("both", day, issuer="stays"),
    )
    assert names(found.unreplaced(frozenset({"old", "other"}), "new")) == ["below-another", "both"]
    assert names(found.unreplaced(frozenset({"old"}), "new")) == []


def test_who_never_asked_for_a_certificate_cannot_renew() -> None:
    found = survey(entry("by-hand", timedelta(1)), entry("asks", timedelta(1), asked=True))
    assert names(found.cannot_renew()) == ["by-hand"]


def test_a_certificate_that_nobody_has_used_makes_no_member() -> None:
    assert names(survey(entry("a", timedelta(1), seen=False), entry("b", timedelta(1))).holders) == ["b"]


def test_what_has_ended_is_held_no_more() -> None:
    holdings = Holdings()
    holdings.enter(entry("a", timedelta(hours=1), issuer="old"))
    holdings.enter(entry("a", timedelta(hours=2), issuer="new", seen=False))
    assert names(holdings.at(NOW + timedelta(hours=1)).unreplaced(frozenset({"old"}), "new")) == ["a"]
    later = holdings.at(NOW + timedelta(minutes=90))
    assert later.issuers == {"new"}
    assert not later.holders
    last = holdings.at(NOW + timedelta(hours=3))
    assert not last.issuers
    assert not any(last.outlook().buckets.values())


def test_what_has_ended_is_forgotten_unless_more_was_entered_meanwhile() -> None:
    holdings = Holdings()
    for name in ("gone", "back", "stays"):
        holdings.enter(entry(name, timedelta(hours=1)))
    holdings.enter(entry("stays", timedelta(days=1), issuer="new"))
    then = NOW + timedelta(hours=2)
    ended = holdings.at(then).ended()
    assert names(ended) == ["back", "gone", "stays"]
    holdings.enter(entry("back", timedelta(days=1)))
    holdings.drop(ended, then)
    assert names(holdings.at(then).holdings) == ["back", "stays"]
    assert names(holdings.at(NOW).unreplaced(frozenset({"old"}), "new")) == ["back"]


def test_an_earlier_certificate_is_no_news() -> None:
    found = survey(entry("a", timedelta(days=2), asked=True), entry("a", timedelta(days=1), seen=False))
    assert [end for _, end in found.outlook().soonest] == [NOW + timedelta(days=2)]
    assert names(found.holders) == ["a"]
    assert not found.cannot_renew()


def test_whoever_is_left_out_is_not_surveyed() -> None:
    found = survey(entry("a", timedelta(1)), entry("b", timedelta(1)))
    gone = Identity("parallax.local", Kind.AGENT, "b")
    assert names(found.without([gone]).holders) == ["a"]
    assert names(found.holders) == ["a", "b"]
