"""Nonces: of this process, for a minute, once."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

import pytest

from parallax.control_plane.nonces import LIFETIME_S, Nonces
from parallax.security.errors import InvalidRequest


class Clock:
    """Says what it was set to."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nonces(clock: Clock) -> Nonces:
    return Nonces(clock)


def test_one_is_good_once(nonces: Nonces) -> None:
    one, two = nonces.new(), nonces.new()
    nonces.spend(one)
    nonces.spend(two)
    with pytest.raises(InvalidRequest, match="ask for another"):
        nonces.spend(one)


def test_one_is_good_for_a_minute(nonces: Nonces, clock: Clock) -> None:
    early, late = nonces.new(), nonces.new()
    clock.now += LIFETIME_S - 0.1
    nonces.spend(early)
    clock.now += 0.1
    with pytest.raises(InvalidRequest):
        nonces.spend(late)


def test_one_that_was_spent_stays_so_for_as_long_as_it_would_be_good(nonces: Nonces, clock: Clock) -> None:
    nonce = nonces.new()
    nonces.spend(nonce)
    for _ in range(100):
        clock.now += LIFETIME_S / 50
        with pytest.raises(InvalidRequest):
            nonces.spend(nonce)


def test_what_has_ended_takes_no_memory(nonces: Nonces, clock: Clock) -> None:
    for _ in range(100):
        nonces.spend(nonces.new())
    clock.now += LIFETIME_S
    nonces.spend(nonces.new())
    assert len(nonces._spent) == 1


def test_asking_for_some_takes_none(nonces: Nonces) -> None:
    assert len({nonces.new() for _ in range(1_000)}) == 1_000
    assert not nonces._spent


def test_one_of_another_process_is_refused(nonces: Nonces, clock: Clock) -> None:
    with pytest.raises(InvalidRequest):
        nonces.spend(Nonces(clock).new())


def test_one_that_was_spelled_otherwise_is_the_same(nonces: Nonces) -> None:
    nonce = nonces.new()
    nonces.spend(nonce)
    for other in (f"{nonce}\n", f" {nonce}", f"{nonce[:4]}!{nonce[4:]}", f"{nonce}===="):
        with pytest.raises(InvalidRequest):
            nonces.spend(other)


def test_one_with_a_bit_changed_is_refused(nonces: Nonces) -> None:
    good = urlsafe_b64decode(nonces.new())
    for at in range(len(good)):
        wrong = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        with pytest.raises(InvalidRequest):
            nonces.spend(urlsafe_b64encode(wrong).decode())


@pytest.mark.parametrize("nonce", ["", "=", "a", "nonsense", "ä", "A" * 43, "A" * 10_000])
def test_what_is_none_is_refused(nonces: Nonces, nonce: str) -> None:
    with pytest.raises(InvalidRequest):
        nonces.spend(nonce)
