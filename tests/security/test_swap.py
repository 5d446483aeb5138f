"""What a port shows changes once for each time that it may."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import grpc
import pytest

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, Served
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile
from parallax.security.swap import ServerSwap

SERVICE = Identity.parse_short("service/control-plane")

Make = Callable[[], Served]


@pytest.fixture(scope="module")
def make(authority: CertificateAuthority, now: datetime) -> Make:
    def make() -> Served:
        key = generate_key()
        issued = authority.issue(SERVICE, key.public_key(), LeafProfile(), now)
        return Served(Credentials(issued.chain, key, issued.bundle))

    return make


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def swap(make: Make, clock: Clock) -> ServerSwap:
    return ServerSwap(make(), verify_client=True, clock=clock)


def test_nothing_changes_unless_something_is_armed(swap: ServerSwap) -> None:
    before = swap.in_force
    assert [swap.fetch() for _ in range(3)] == [None] * 3
    assert swap.in_force is before


def test_what_is_armed_is_handed_out_once(swap: ServerSwap, make: Make, clock: Clock) -> None:
    """gRPC builds a TLS context from whatever it is given: at every handshake that would kill it."""
    new = make()
    swap.arm(new, until=clock.now)
    assert isinstance(swap.fetch(), grpc.ServerCertificateConfiguration)
    assert swap.in_force is new
    assert swap.fetch() is None


def test_what_is_armed_is_not_handed_out_too_late(swap: ServerSwap, make: Make, clock: Clock) -> None:
    """By then nothing may hold the old context any more."""
    before = swap.in_force
    swap.arm(make(), until=clock.now + 5)
    clock.now += 5.001
    assert swap.fetch() is None
    clock.now -= 5
    assert swap.fetch() is None
    assert swap.disarm() is before


def test_what_is_disarmed_is_not_handed_out(swap: ServerSwap, make: Make, clock: Clock) -> None:
    before = swap.in_force
    swap.arm(make(), until=clock.now + 5)
    assert swap.disarm() is before
    assert swap.fetch() is None
    assert swap.in_force is before


def test_disarming_tells_what_was_handed_out_before(swap: ServerSwap, make: Make, clock: Clock) -> None:
    new = make()
    swap.arm(new, until=clock.now + 5)
    swap.fetch()
    assert swap.disarm() is new


def test_the_newest_replaces_what_is_armed(swap: ServerSwap, make: Make, clock: Clock) -> None:
    newest = make()
    for new in (make(), newest):
        swap.arm(new, until=clock.now + 5)
    assert swap.fetch() is not None
    assert swap.in_force is newest
    assert swap.fetch() is None


def test_nothing_is_handed_out_after_disarming_on_another_thread(swap: ServerSwap, make: Make) -> None:
    """gRPC's thread fetches while ours arms and disarms, thousands of times."""
    fetched = [0]
    over = threading.Event()

    def handshakes() -> None:
        while not over.is_set():
            if swap.fetch() is not None:
                fetched[0] += 1

    thread = threading.Thread(target=handshakes)
    thread.start()
    changes = 0
    try:
        pair = (make(), make())
        for turn in range(5000):
            before, new = swap.in_force, pair[turn % 2]
            if before is new:
                continue
            swap.arm(new, until=200.0)
            settled = swap.disarm()
            assert settled is before or settled is new
            assert swap.fetch() is None
            assert swap.in_force is settled
            changes += settled is new
    finally:
        over.set()
        thread.join()
    assert fetched[0] == changes


class TestRoots:
    """gRPC takes `b""` for roots without a word, and then refuses everybody."""

    def test_are_never_none_however_a_bundle_is_made(self, bundle: TrustBundle) -> None:
        with pytest.raises(ConfigError, match="holds no certificate"):
            TrustBundle(())
        with pytest.raises(ConfigError, match="holds no certificate"):
            replace(bundle, roots=())
        for pem in (b"", b"\n", b"# all roots were taken out\n"):
            with pytest.raises(ConfigError, match="not a certificate"):
                TrustBundle.parse(pem)

    def test_of_credentials_cannot_be_given_beside_the_bundle(self, make: Make) -> None:
        """The PEM is made from the roots, and nobody can set it."""
        good = make().credentials
        assert TrustBundle.parse(good.bundle_pem) == good.bundle
        with pytest.raises((TypeError, ValueError)):
            replace(good, bundle_pem=b"")  # type: ignore[call-arg]
        with pytest.raises((TypeError, ValueError)):
            replace(good.bundle, pem=b"")
        for name, on in (("bundle_pem", good), ("pem", good.bundle)):
            with pytest.raises((AttributeError, TypeError)):
                setattr(on, name, b"")
        assert good.bundle_pem

    def test_that_have_all_expired_still_stand_in_the_bundle(self, now: datetime) -> None:
        """Whether they are good is for the one who verifies; a bundle does not shrink by itself."""
        long_ago = now - timedelta(days=20000)
        assert CertificateAuthority.create(now=long_ago).bundle.pem
