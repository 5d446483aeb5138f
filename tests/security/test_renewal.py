"""When a certificate is renewed, how urgent that is, and which answer is refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials
from parallax.security.errors import Expired, UntrustedChain, VerificationError, WrongIdentity
from parallax.security.identity import Identity
from parallax.security.keys import PrivateKey, generate_key
from parallax.security.profiles import LeafProfile
from parallax.security.renewal import (
    LONGEST_RETRY,
    SHORTEST_RETRY,
    RenewalPlan,
    Urgency,
    accept,
    plan_renewal,
    renewal_time,
    retry_in,
    spread_of,
)

if TYPE_CHECKING:
    from tests.security.conftest import Forge

AGENT: Final = Identity.parse_short("agent/agent-1")
START: Final = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE: Final = timedelta(minutes=1)
DAY: Final = timedelta(days=1)

Issue = Callable[..., Credentials]

lifetimes: Final = st.timedeltas(MINUTE, timedelta(days=365))
spreads: Final = st.floats(0, 1)


@pytest.fixture
def issue(authority: CertificateAuthority, now: datetime) -> Issue:
    def issue(
        identity: Identity = AGENT, *, by: CertificateAuthority = authority, lifetime: timedelta = DAY
    ) -> Credentials:
        key = generate_key()
        issued = by.issue(identity, key.public_key(), LeafProfile(lifetime), now)
        return Credentials(issued.chain, key, issued.bundle)

    return issue


class TestPlan:
    @given(lifetime=lifetimes, spread=spreads)
    def test_a_renewal_is_due_within_the_tenth_before_two_thirds_of_the_lifetime(
        self, lifetime: timedelta, spread: float
    ) -> None:
        due = renewal_time(START, START + lifetime, spread)
        assert lifetime * 0.566 <= due - START <= lifetime * 0.667

    @given(lifetime=lifetimes, spread=st.tuples(spreads, spreads))
    def test_who_draws_more_is_renewed_no_later(
        self, lifetime: timedelta, spread: tuple[float, float]
    ) -> None:
        less, more = sorted(spread)
        assert renewal_time(START, START + lifetime, more) <= renewal_time(START, START + lifetime, less)

    @pytest.mark.parametrize("lifetime", [MINUTE, 10 * MINUTE, DAY, 365 * DAY])
    def test_what_a_leaf_is_backdated_by_does_not_count(
        self, lifetime: timedelta, issue: Issue, now: datetime
    ) -> None:
        plan = plan_renewal(issue(lifetime=lifetime).leaf)
        assert lifetime * 0.55 <= plan.due - now <= lifetime * 0.68
        assert plan.due < plan.late < plan.critical < plan.not_after

    def test_the_spread_is_drawn_once_for_a_leaf_and_differs_between_leaves(self, issue: Issue) -> None:
        leaves = [issue().leaf for _ in range(20)]
        drawn = [spread_of(leaf) for leaf in leaves]
        assert drawn == [spread_of(leaf) for leaf in leaves]
        assert len(set(drawn)) == 20
        assert all(0 <= each <= 1 for each in drawn)
        assert max(drawn) - min(drawn) > 0.2

    def test_a_leaf_made_by_hand_for_ten_years_is_renewed_in_its_last_year(self, forge: Forge) -> None:
        """Nobody issues for longer than a year, so before its last year nothing would outlast it."""
        leaf = forge(not_before=timedelta(), not_after=3650 * DAY, uris=()).certificate
        assert 365 * DAY / 3 <= leaf.not_valid_after_utc - plan_renewal(leaf).due <= 365 * DAY / 2


class TestUrgency:
    PLAN: Final = RenewalPlan(*(START + n * MINUTE for n in (40, 48, 54, 60)))

    @pytest.mark.parametrize(
        ("minutes", "urgency"),
        [
            (-100, Urgency.FINE),
            (39.99, Urgency.FINE),
            (40, Urgency.DUE),
            (48, Urgency.LATE),
            (54, Urgency.CRITICAL),
            (60, Urgency.CRITICAL),
            (60.01, Urgency.EXPIRED),
            (1000, Urgency.EXPIRED),
        ],
    )
    def test_rises_as_the_end_comes_nearer(self, minutes: float, urgency: Urgency) -> None:
        assert self.PLAN.urgency(START + minutes * MINUTE) is urgency

    def test_grows_louder_and_is_unhealthy_only_once_it_is_too_late(self) -> None:
        levels = [urgency.level for urgency in Urgency]
        assert levels == sorted(levels)
        assert [urgency.is_healthy for urgency in Urgency] == [True, True, True, True, False]


class TestRetry:
    @given(
        attempt=st.integers(0, 10**6),
        left=st.timedeltas(timedelta(days=-400), timedelta(days=400)),
        spread=spreads,
    )
    def test_is_never_busy_and_never_outlives_the_certificate(
        self, attempt: int, left: timedelta, spread: float
    ) -> None:
        pause = retry_in(attempt, START, START + left, spread)
        assert SHORTEST_RETRY <= pause <= LONGEST_RETRY
        assert pause <= max(left / 10, SHORTEST_RETRY)

    @given(attempt=st.integers(0, 40), spread=spreads)
    def test_grows(self, attempt: int, spread: float) -> None:
        later = retry_in(attempt + 1, START, START + 365 * DAY, spread)
        assert retry_in(attempt, START, START + 365 * DAY, spread) <= later

    def test_leaves_a_leaf_of_a_minute_many_attempts_before_its_end(self) -> None:
        now, end, attempts = START, START + timedelta(seconds=20), 0
        while (now := now + retry_in(attempts, now, end, 1.0)) < end:
            attempts += 1
        assert 10 <= attempts <= 20

    @given(
        attempt=st.integers(0, 40),
        left=st.timedeltas(timedelta(days=-400), timedelta(days=400)),
        at_least=st.timedeltas(timedelta(0), timedelta(days=2)),
        spread=spreads,
    )
    def test_is_no_shorter_than_is_asked_for_while_that_leaves_half_of_the_time(
        self, attempt: int, left: timedelta, at_least: timedelta, spread: float
    ) -> None:
        unasked = retry_in(attempt, START, START + left, spread)
        pause = retry_in(attempt, START, START + left, spread, at_least)
        assert pause >= unasked
        assert pause >= min(at_least, left / 2)
        assert pause <= max(unasked, at_least)
        assert pause <= max(left / 2, SHORTEST_RETRY)

    def test_nobody_who_asks_for_more_time_than_there_is_prevents_the_next_attempts(self) -> None:
        now, end, attempts = START, START + timedelta(seconds=20), 0
        while (now := now + retry_in(attempts, now, end, 1.0, DAY)) < end:
            attempts += 1
        assert 4 <= attempts <= 8


class TestAnswer:
    def take(
        self, in_force: Credentials, new: Credentials, now: datetime, key: PrivateKey | None = None
    ) -> None:
        accept(Issued(new.chain, new.bundle), key or new.key, in_force, AGENT, now)

    def test_a_fresh_certificate_of_the_same_identity_is_taken(self, issue: Issue, now: datetime) -> None:
        in_force, new = issue(), issue(lifetime=2 * DAY)
        taken = accept(Issued(new.chain, new.bundle), new.key, in_force, AGENT, now)
        assert (taken.chain, taken.key, taken.bundle) == (new.chain, new.key, new.bundle)

    def test_one_that_ends_when_the_one_in_force_does_is_taken(self, issue: Issue, now: datetime) -> None:
        self.take(issue(), issue(), now)

    def test_one_of_somebody_else_is_refused(self, issue: Issue, now: datetime) -> None:
        with pytest.raises(WrongIdentity, match="agent-2"):
            self.take(issue(), issue(Identity.parse_short("agent/agent-2")), now)

    def test_one_for_another_key_is_refused(self, issue: Issue, now: datetime) -> None:
        with pytest.raises(UntrustedChain, match="key does not fit"):
            self.take(issue(), issue(), now, generate_key())

    def test_one_that_has_expired_is_refused(self, issue: Issue, now: datetime) -> None:
        with pytest.raises(Expired, match="expired at"):
            self.take(issue(), issue(lifetime=MINUTE), now + 2 * MINUTE)

    def test_one_that_ends_earlier_is_refused(self, issue: Issue, now: datetime) -> None:
        with pytest.raises(VerificationError, match="before the one in force"):
            self.take(issue(), issue(lifetime=DAY / 2), now)

    def test_one_that_its_own_roots_do_not_vouch_for_is_refused(self, issue: Issue, now: datetime) -> None:
        other = issue(by=CertificateAuthority.create(now=now))
        with pytest.raises(UntrustedChain, match="not issued by a CA"):
            self.take(issue(), Credentials(other.chain, other.key, issue().bundle), now)

    def test_one_with_other_roots_alone_is_refused(self, issue: Issue, now: datetime) -> None:
        with pytest.raises(UntrustedChain, match="other roots alone"):
            self.take(issue(), issue(by=CertificateAuthority.create(now=now)), now)

    def test_one_of_a_new_root_beside_the_old_one_is_taken(
        self, issue: Issue, now: datetime, authority: CertificateAuthority
    ) -> None:
        new = CertificateAuthority.create(now=now)
        both = TrustBundle((*authority.bundle.roots, *new.bundle.roots))
        self.take(issue(), issue(by=CertificateAuthority(new.certificate, new.key, both)), now)

    def test_more_roots_than_a_file_may_hold_are_refused(self, issue: Issue, now: datetime) -> None:
        new = issue()
        many = TrustBundle(new.bundle.roots * 2000)
        with pytest.raises(UntrustedChain, match="more than 1048576 bytes"):
            self.take(issue(), Credentials(new.chain, new.key, many), now)

    def test_no_certificate_is_refused(self, issue: Issue, now: datetime) -> None:
        good = issue()
        with pytest.raises(UntrustedChain, match="no certificate"):
            accept(Issued((), good.bundle), good.key, good, AGENT, now)
