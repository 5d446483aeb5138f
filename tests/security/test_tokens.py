"""Enrollment tokens: how they are spelled, whom they admit, how often."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.errors import EnrollmentError, IdentityError, InvalidRequest, ParallaxError
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind
from parallax.security.tokens import (
    ALLOTTED,
    LONGEST,
    MAX_USES,
    REFUSED,
    Admission,
    Grant,
    Token,
    check_labels,
    check_ttl,
)

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
AGENT = Identity.parse_short("agent/agent-7")
KEY, OTHER_KEY = "aa" * 32, "bb" * 32


def grant(names: str = "agent-7", kind: Kind = Kind.AGENT, uses: int = 1) -> Grant:
    return Grant(DEFAULT_TRUST_DOMAIN, kind, names, uses=uses)


AGENT_7 = grant()


def admission(token: Token, what: Grant = AGENT_7, redeemed: Mapping[str, str] | None = None) -> Admission:
    return Admission(
        token.id,
        token.digest,
        what,
        "spiffe://parallax.local/client/admin",
        NOW,
        NOW + timedelta(minutes=10),
        redeemed or {},
    )


# The secret.


def test_a_token_is_read_as_it_was_made_and_does_not_show_its_secret() -> None:
    token = Token.generate()
    assert Token.parse(token.text) == token
    assert token.text.startswith(f"plxt_{token.id}_")
    assert len(token.text.rpartition(f"{token.id}_")[2]) == 43  # 256 bits
    assert token.text not in repr(token)
    assert token.digest == hashlib.sha256(token.text.encode()).hexdigest()


def test_what_is_kept_of_a_token_shows_neither_it_nor_its_digest() -> None:
    token = Token.generate()
    assert token.text not in repr(admission(token))
    assert token.digest not in repr(admission(token))


@given(st.text(max_size=80))
def test_what_is_no_token_reads_like_one_that_is_not_known(text: str) -> None:
    with pytest.raises(EnrollmentError) as refused:
        Token.parse(text)
    assert str(refused.value) == REFUSED


# Whom it admits.


def test_a_good_token_admits() -> None:
    token = Token.generate()
    admission(token).check(token, NOW)


def other_secret(token: Token) -> Token:
    return replace(token, text=token.text[:-1] + ("A" if token.text[-1] != "A" else "B"))


def test_another_secret_does_not_admit() -> None:
    token = Token.generate()
    with pytest.raises(EnrollmentError, match=REFUSED):
        admission(token).check(other_secret(token), NOW)


def test_a_token_that_has_ended_does_not_admit() -> None:
    token = Token.generate()
    admission(token).check(token, NOW + timedelta(minutes=10, microseconds=-1))
    with pytest.raises(EnrollmentError, match=REFUSED):
        admission(token).check(token, NOW + timedelta(minutes=10))


@pytest.mark.parametrize(
    ("names", "kind", "short", "admits"),
    [
        ("agent-7", Kind.AGENT, "agent/agent-7", True),
        ("agent-7", Kind.AGENT, "agent/agent-70", False),
        ("agent-7", Kind.AGENT, "client/agent-7", False),
        ("agent-7", Kind.AGENT, "service/agent-7", False),
        ("edge-*", Kind.AGENT, "agent/edge-1", True),
        ("edge-*", Kind.AGENT, "agent/edge-", True),
        ("edge-*", Kind.AGENT, "agent/edg-1", False),
        ("edge-*", Kind.AGENT, "client/edge-1", False),
        ("edge.*", Kind.AGENT, "agent/edge-1", False),
        (ALLOTTED, Kind.AGENT, "agent/00000007", True),
        (ALLOTTED, Kind.AGENT, "client/00000007", False),
    ],
)
def test_names_that_a_token_admits(names: str, kind: Kind, short: str, admits: bool) -> None:  # noqa: FBT001
    assert grant(names, kind).admits(Identity.parse_short(short)) is admits


def test_another_trust_domain_is_not_admitted() -> None:
    assert not grant().admits(Identity("elsewhere.local", Kind.AGENT, "agent-7"))


# How often.


def test_it_is_redeemed_once() -> None:
    redeemed = admission(Token.generate()).redeem(AGENT, KEY)
    assert redeemed == {"agent-7": KEY}
    spent = admission(Token.generate(), redeemed=redeemed)
    assert spent.is_spent
    assert spent.redeem(AGENT, KEY) == redeemed  # the answer was lost
    for who, key in ((AGENT, OTHER_KEY), (Identity.parse_short("client/agent-7"), KEY)):
        with pytest.raises(EnrollmentError, match=REFUSED):
            spent.redeem(who, key)


def test_a_name_that_was_allotted_is_redeemed_by_the_key_that_it_was_for() -> None:
    named, other = Identity.parse_short("agent/00000007"), Identity.parse_short("agent/00000008")
    held = admission(Token.generate(), grant(ALLOTTED))
    held = replace(held, allotted=held.allot(named.name, KEY))
    assert (held.name_of(KEY), held.name_of(OTHER_KEY)) == (named.name, None)
    assert held.is_spent
    for who, key in ((named, OTHER_KEY), (other, KEY), (Identity.parse_short("client/00000007"), KEY)):
        with pytest.raises(EnrollmentError, match=REFUSED):
            held.redeem(who, key)
    with pytest.raises(EnrollmentError, match=REFUSED):
        held.allot(other.name, OTHER_KEY)
    held = replace(held, redeemed=held.redeem(named, KEY))
    assert held.redeemed == {named.name: KEY}
    assert held.names == (named.name,)


def test_a_pattern_admits_as_many_names_as_it_has_uses() -> None:
    first, second, third = (Identity.parse_short(f"agent/edge-{number}") for number in range(3))
    held = admission(Token.generate(), grant("edge-*", uses=2))
    held = replace(held, redeemed=held.redeem(first, KEY))
    assert not held.is_spent
    with pytest.raises(EnrollmentError):  # or the token would hand one holder's name to the next
        held.redeem(first, OTHER_KEY)
    held = replace(held, redeemed=held.redeem(second, OTHER_KEY))
    assert held.is_spent
    with pytest.raises(EnrollmentError):
        held.redeem(third, "cc" * 32)


# What can be granted.


@pytest.mark.parametrize(
    ("names", "kind", "uses", "error"),
    [
        ("control-plane", Kind.SERVICE, 1, InvalidRequest),
        ("ca", Kind.AGENT, 1, IdentityError),
        ("Agent-7", Kind.AGENT, 1, IdentityError),
        ("*", Kind.AGENT, 1, IdentityError),
        ("../*", Kind.AGENT, 1, IdentityError),
        ("e*g", Kind.AGENT, 1, IdentityError),
        ("edge-**", Kind.AGENT, 1, IdentityError),
        ("e" * 63 + "*", Kind.AGENT, 1, IdentityError),
        ("agent-7", Kind.AGENT, 0, InvalidRequest),
        ("agent-7", Kind.AGENT, 2, InvalidRequest),
        ("edge-*", Kind.AGENT, MAX_USES + 1, InvalidRequest),
    ],
)
def test_what_cannot_be_granted(names: str, kind: Kind, uses: int, error: type[ParallaxError]) -> None:
    with pytest.raises(error):
        grant(names, kind, uses)


@pytest.mark.parametrize("labels", [{"": "a"}, {"a b": ""}, {"a": "b\n"}, {"a": "x" * 64}])
def test_what_is_no_label_is_refused(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="not a label"):
        check_labels(labels)


def test_labels_are_bounded() -> None:
    assert check_labels({"zone": "a", "site/building": ""})
    with pytest.raises(InvalidRequest, match="65 labels"):
        check_labels({f"label{number}": "" for number in range(65)})


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(seconds=-1), LONGEST + timedelta(seconds=1)])
def test_how_long_a_token_may_not_last(ttl: timedelta) -> None:
    with pytest.raises(InvalidRequest):
        check_ttl(ttl)
