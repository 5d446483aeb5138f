"""A certificate is renewed before it ends; whatever fails about that, the last good one stays in force."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from parallax.runtime.renewal import Attempt, Renewer, Result, attempt_renewal
from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import (
    ConfigError,
    Expired,
    NotAuthorized,
    ParallaxError,
    Unavailable,
    UntrustedChain,
    VerificationError,
    WrongIdentity,
)
from parallax.security.identity import Identity
from parallax.security.keys import KeyType, generate_key
from parallax.security.layouts import Layout, leaf_paths, save_authority, save_leaf
from parallax.security.material import load_credentials
from parallax.security.profiles import LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.renewal import SHORTEST_RETRY, Urgency
from parallax.security.request import check_request

AGENT: Final = Identity.parse_short("agent/agent-1")
WITHIN_S: Final = 10.0
MANY_LOOKS: Final = 30  # more than in two turns of the renewer
LIFETIME: Final = timedelta(minutes=1)
DAY: Final = timedelta(days=1)


@dataclass
class Clock:
    """The real time, or that at which it was stopped, and how far it has been set."""

    ahead: timedelta = timedelta(0)
    looks: int = 0
    stopped: datetime | None = None

    def __call__(self) -> datetime:
        self.looks += 1
        return (self.stopped or datetime.now(UTC)) + self.ahead

    def stop(self) -> None:
        """From here on it goes on only as it is set."""
        self.stopped = datetime.now(UTC)


@dataclass
class Issuer:
    """What a control plane does with a request; or does not, if there is an *error* or it *hangs*."""

    authority: CertificateAuthority
    clock: Clock
    lifetime: timedelta = LIFETIME
    identity: Identity = AGENT
    error: ParallaxError | None = None
    hangs: bool = False
    asked: list[bytes] = field(default_factory=list)
    change: Callable[[Issued], Issued] = lambda issued: issued

    async def __call__(self, csr: bytes) -> Issued:
        self.asked.append(csr)
        if self.hangs:
            await asyncio.sleep(3600)
        if self.error is not None:
            raise self.error
        key = check_request(csr, AGENT, (), None)
        return self.change(self.authority.issue(self.identity, key, LeafProfile(self.lifetime), self.clock()))


@dataclass
class Site:
    """An agent whose certificate is renewed."""

    store: CredentialStore
    issuer: Issuer
    renewer: Renewer
    clock: Clock

    @property
    def serial(self) -> int:
        return self.store.current.leaf.serial_number

    async def until(self, is_so: Callable[[], bool], within_s: float = WITHIN_S) -> None:
        deadline = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {self.renewer.last}"
            await asyncio.sleep(0.005)

    async def looked(self) -> None:
        """Wait until the renewer has looked at the clock as it is now, and done what that leads to."""
        start = self.clock.looks
        await self.until(lambda: self.clock.looks >= start + MANY_LOOKS)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    """One that can also have issued something hours ago."""
    return CertificateAuthority.create(now=datetime.now(UTC) - 2 * DAY)


def credentials(
    authority: CertificateAuthority,
    at: datetime,
    lifetime: timedelta = LIFETIME,
    key_type: KeyType = KeyType.P256,
) -> Credentials:
    key = generate_key(key_type)
    issued = authority.issue(AGENT, key.public_key(), LeafProfile(lifetime, key_type), at)
    return Credentials(issued.chain, key, issued.bundle)


@pytest.fixture
def site(authority: CertificateAuthority) -> Site:
    """In memory; nothing runs yet."""
    return new_site(authority)


def new_site(
    authority: CertificateAuthority, *, sleep_s: float = 0.01, limit_s: float = 25.0, age: float = 0.0
) -> Site:
    clock = Clock()
    store = CredentialStore(AGENT, credentials(authority, clock() - LIFETIME * age), clock())
    issuer = Issuer(authority, clock)

    async def keep(new: Credentials, replacing: Credentials) -> None:
        assert store.current is replacing
        store.publish(new, clock())

    sleep = timedelta(seconds=sleep_s)
    renewer = Renewer(store, issuer, keep, clock=clock, longest_sleep=sleep, limit_s=limit_s)
    return Site(store, issuer, renewer, clock)


@asynccontextmanager
async def running(site: Site) -> AsyncIterator[None]:
    task = asyncio.create_task(site.renewer.run())
    try:
        await asyncio.sleep(0)
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class TestByItself:
    async def test_nothing_is_asked_before_it_is_due(self, site: Site) -> None:
        async with running(site):
            await asyncio.sleep(0.1)
        assert site.issuer.asked == []
        assert site.renewer.urgency is Urgency.FINE

    async def test_what_is_due_is_renewed_once_with_a_fresh_key(self, site: Site) -> None:
        before = site.store.current
        async with running(site):
            site.clock.ahead = LIFETIME * 0.7
            await site.until(lambda: site.store.current is not before)
            await asyncio.sleep(0.1)
        assert len(site.issuer.asked) == 1
        assert site.store.current.key.public_key() != before.key.public_key()
        assert site.renewer.counts == dict.fromkeys(Result, 0) | {Result.SUCCESS: 1}
        assert site.renewer.due > site.clock()

    async def test_it_goes_on_and_on(self, site: Site) -> None:
        serials = {site.serial}
        async with running(site):
            for _ in range(5):
                site.clock.ahead += LIFETIME * 0.7
                await site.until(lambda: site.serial not in serials)
                serials.add(site.serial)
        assert len(site.issuer.asked) == 5

    @pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
    async def test_the_new_key_is_of_the_kind_of_the_old_one(
        self, key_type: KeyType, authority: CertificateAuthority, site: Site
    ) -> None:
        site.store.publish(credentials(authority, site.clock(), key_type=key_type), site.clock())
        before = site.store.current.key
        async with running(site):
            await site.renewer.renew()
        assert type(site.store.current.key) is type(before)
        assert site.store.current.key.key_size == before.key_size

    async def test_it_sleeps_until_it_is_due_not_a_minute(self, authority: CertificateAuthority) -> None:
        """The real clock alone, and a sleep that would be far too long."""
        site = new_site(authority, sleep_s=3600)
        site.clock.ahead = site.renewer.due - datetime.now(UTC) - timedelta(seconds=0.2)
        before = site.serial
        async with running(site):
            await site.until(lambda: site.serial != before)

    async def test_new_files_in_the_middle_of_a_sleep_change_the_plan(
        self, authority: CertificateAuthority
    ) -> None:
        site = new_site(authority, sleep_s=3600)
        async with running(site):
            old = credentials(authority, site.clock() - LIFETIME * 0.7)
            site.store.publish(old, site.clock())
            await site.until(lambda: site.store.current is not old)

    async def test_a_root_that_comes_with_it_is_trusted_from_then_on_and_told(
        self, site: Site, authority: CertificateAuthority, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        added = CertificateAuthority.create(now=datetime.now(UTC)).bundle.roots
        both = TrustBundle((*authority.bundle.roots, *added))
        site.issuer.change = lambda issued: Issued(issued.chain, both)
        async with running(site):
            await site.renewer.renew()
            await site.renewer.renew()
        assert site.store.current.bundle == both
        assert [record.getMessage() for record in caplog.records].count("roots changed") == 1


class TestClock:
    @pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)])
    async def test_a_jump_within_the_lifetime_is_survived(
        self, jump: timedelta, authority: CertificateAuthority, site: Site
    ) -> None:
        site.issuer.lifetime = DAY
        site.store.publish(credentials(authority, site.clock() - timedelta(hours=2), DAY), site.clock())
        before = site.serial
        async with running(site):
            site.clock.ahead = jump
            await site.looked()
            assert (site.serial, site.renewer.urgency) == (before, Urgency.FINE)
            site.clock.ahead = DAY * 0.7
            await site.until(lambda: site.serial != before)

    async def test_an_hour_ahead_of_a_leaf_of_a_minute_and_back_again_is_no_end(self, site: Site) -> None:
        before = site.serial
        async with running(site):
            site.clock.ahead = timedelta(hours=1)
            await site.looked()
            assert (site.serial, site.renewer.urgency) == (before, Urgency.EXPIRED)
            site.clock.ahead = LIFETIME * 0.7
            await site.until(lambda: site.serial != before)

    async def test_an_hour_back_does_not_put_off_an_attempt_for_an_hour(
        self, authority: CertificateAuthority, site: Site
    ) -> None:
        site.store.publish(credentials(authority, site.clock(), DAY), site.clock())
        site.issuer.lifetime = DAY
        site.issuer.error = Unavailable("away")
        async with running(site):
            site.clock.ahead = DAY * 0.72
            await site.until(lambda: site.renewer.counts[Result.UNREACHABLE] == 1)
            site.clock.ahead -= timedelta(hours=1)  # still due
            site.issuer.error = None
            await site.until(lambda: site.renewer.counts[Result.SUCCESS] == 1)

    async def test_an_issuer_whose_clock_is_behind_makes_nobody_busy(
        self, authority: CertificateAuthority
    ) -> None:
        """What it issues is due again when it comes."""
        site = new_site(authority, age=0.75)
        site.clock.stop()
        site.issuer.clock = Clock(-LIFETIME * 0.7)
        before = site.serial
        async with running(site):
            await site.until(lambda: site.serial != before)
            site.clock.ahead += SHORTEST_RETRY * 0.9
            await site.looked()
        assert len(site.issuer.asked) == 1


class TestNobodyAnswers:
    async def test_it_is_tried_again_not_busily_and_the_answer_counts_when_it_comes(self, site: Site) -> None:
        before = site.serial
        site.issuer.error = Unavailable("connection refused")
        site.clock.stop()
        async with running(site):
            site.clock.ahead = LIFETIME * 0.7
            await site.until(lambda: len(site.issuer.asked) == 1)
            site.clock.ahead += SHORTEST_RETRY * 0.9
            await site.looked()
            assert len(site.issuer.asked) == 1
            assert site.serial == before
            site.issuer.error = None
            site.clock.ahead += SHORTEST_RETRY * 2
            await site.until(lambda: site.serial != before)
        assert site.renewer.counts[Result.UNREACHABLE] == 1

    async def test_who_asks_for_time_is_left_alone_for_so_long(
        self, authority: CertificateAuthority, site: Site
    ) -> None:
        site.store.publish(credentials(authority, site.clock(), DAY), site.clock())
        before = site.serial
        site.issuer.lifetime = DAY
        site.issuer.error = Unavailable("too often", retry_after=timedelta(minutes=10))
        async with running(site):
            site.clock.ahead = DAY * 0.7
            await site.until(lambda: len(site.issuer.asked) == 1)
            site.issuer.error = None
            site.clock.ahead += timedelta(minutes=9)  # by ourselves, after two seconds
            await site.looked()
            assert (len(site.issuer.asked), site.serial) == (1, before)
            site.clock.ahead += timedelta(minutes=2)
            await site.until(lambda: site.serial != before)

    async def test_who_asks_for_more_time_than_is_left_is_asked_before_the_end(
        self, authority: CertificateAuthority, site: Site
    ) -> None:
        site.store.publish(credentials(authority, site.clock(), DAY), site.clock())
        before = site.serial
        site.issuer.lifetime = DAY
        site.issuer.error = Unavailable("too often", retry_after=DAY)
        async with running(site):
            site.clock.ahead = DAY * 0.7
            await site.until(lambda: len(site.issuer.asked) == 1)
            site.issuer.error = None
            site.clock.ahead = DAY * 0.9
            await site.until(lambda: site.serial != before)

    async def test_who_wants_it_now_does_not_wait(self, site: Site) -> None:
        site.issuer.error = Unavailable("too often", retry_after=timedelta(minutes=10))
        async with running(site):
            with pytest.raises(Unavailable, match="too often"):
                await site.renewer.renew()
            site.issuer.error = None
            await site.renewer.renew()

    async def test_an_attempt_that_hangs_is_given_up(self, authority: CertificateAuthority) -> None:
        site = new_site(authority, limit_s=0.5)
        before = site.serial
        site.issuer.hangs = True
        async with running(site):
            site.clock.ahead = LIFETIME * 0.7
            await site.until(lambda: bool(site.issuer.asked))
            site.issuer.hangs = False
            await site.until(lambda: site.serial != before)
        assert site.renewer.counts[Result.UNREACHABLE]

    async def test_a_control_plane_without_a_ca_is_asked_rarely_and_told_once_and_softly(
        self, authority: CertificateAuthority, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        site.store.publish(credentials(authority, site.clock(), DAY), site.clock())
        site.issuer.error = ConfigError("there is no CA here")
        async with running(site):
            site.clock.ahead = DAY * 0.7
            await site.until(lambda: len(site.issuer.asked) == 1)
            site.clock.ahead += timedelta(minutes=20)
            await site.looked()
            assert len(site.issuer.asked) == 1
            site.clock.ahead += timedelta(minutes=45)
            await site.until(lambda: len(site.issuer.asked) == 2)
            await site.looked()
        lines = [record for record in caplog.records if record.getMessage().startswith("certificate")]
        assert [(line.levelno, getattr(line, "reason", "")) for line in lines] == [
            (logging.INFO, "no_issuer")
        ]

    async def test_it_grows_louder_towards_the_end_and_says_so_once_each(
        self, authority: CertificateAuthority, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        site.store.publish(credentials(authority, site.clock(), DAY), site.clock())
        site.issuer.error = Unavailable("away")
        async with running(site):
            for share, urgency in ((0.7, Urgency.DUE), (0.85, Urgency.LATE), (0.95, Urgency.CRITICAL)):
                asked = len(site.issuer.asked)
                site.clock.ahead = DAY * share
                await site.until(lambda asked=asked: len(site.issuer.asked) > asked)  # type: ignore[misc]
                assert site.renewer.urgency is urgency
            site.clock.ahead = DAY * 1.1
            await site.until(lambda: "certificate expired" in caplog.text)
            asked = len(site.issuer.asked)
            await site.looked()
            assert len(site.issuer.asked) == asked
        lines = [record for record in caplog.records if record.getMessage().startswith("certificate")]
        assert [line.levelname for line in lines] == ["INFO", "WARNING", "ERROR", "ERROR"]
        assert "parallax certs issue agent-1 --kind agent" in lines[-1].cause  # type: ignore[attr-defined]

    async def test_the_next_certificate_is_told_of_anew(
        self, authority: CertificateAuthority, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        site.issuer.error = Unavailable("away")
        async with running(site):
            for asked in (1, 2):
                site.store.publish(credentials(authority, site.clock()), site.clock())
                await site.looked()
                site.clock.ahead += LIFETIME * 0.7
                await site.until(lambda asked=asked: len(site.issuer.asked) == asked)  # type: ignore[misc]
            await site.looked()
        assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]

    async def test_the_end_is_told_of_though_it_comes_in_the_middle_of_an_attempt(
        self, authority: CertificateAuthority, caplog: pytest.LogCaptureFixture
    ) -> None:
        site = new_site(authority, age=0.7, limit_s=1)
        site.issuer.hangs = True
        async with running(site):
            await site.until(lambda: len(site.issuer.asked) == 1)
            site.clock.ahead = timedelta(hours=1)
            await site.until(lambda: "certificate expired" in caplog.text)
        assert "parallax certs issue agent-1 --kind agent" in caplog.records[-1].cause  # type: ignore[attr-defined]

    async def test_after_the_end_others_can_bring_it_back(
        self, authority: CertificateAuthority, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        site.issuer.error = Unavailable("away")
        async with running(site):
            site.clock.ahead = timedelta(hours=1)
            await site.until(lambda: "certificate expired" in caplog.text)
            with pytest.raises(Expired, match="parallax certs issue agent-1"):
                await site.renewer.renew()
            site.issuer.error = None
            issued = credentials(authority, site.clock())
            site.store.publish(issued, site.clock())
            await site.until(lambda: site.renewer.urgency is Urgency.FINE)
            site.clock.ahead += LIFETIME * 0.7
            await site.until(lambda: site.store.current is not issued)


def damaged(issued: Issued) -> Issued:
    return Issued((), issued.bundle)


class TestBadAnswers:
    async def refused(self, site: Site, error: type[ParallaxError], text: str) -> None:
        before = site.store.current
        async with running(site):
            with pytest.raises(error, match=text):
                await site.renewer.renew()
            assert site.store.current is before
            assert site.renewer.counts[Result.UNUSABLE] == 1

    async def test_a_certificate_of_somebody_else(self, site: Site) -> None:
        site.issuer.identity = Identity.parse_short("agent/agent-2")
        await self.refused(site, WrongIdentity, "agent-2")

    async def test_an_expired_certificate(self, site: Site) -> None:
        site.issuer.clock = Clock(-DAY)
        await self.refused(site, Expired, "expired at")

    async def test_a_certificate_that_ends_earlier(self, site: Site) -> None:
        site.issuer.lifetime = LIFETIME / 2
        await self.refused(site, VerificationError, "before the one in force")

    async def test_a_certificate_for_another_key(self, site: Site, authority: CertificateAuthority) -> None:
        stolen = credentials(authority, site.clock())
        site.issuer.change = lambda issued: Issued(stolen.chain, issued.bundle)
        await self.refused(site, UntrustedChain, "key does not fit")

    async def test_a_certificate_of_another_ca(self, site: Site) -> None:
        site.issuer.authority = CertificateAuthority.create(now=datetime.now(UTC) - DAY)
        await self.refused(site, UntrustedChain, "other roots alone")

    async def test_a_certificate_that_the_roots_with_it_do_not_vouch_for(
        self, site: Site, authority: CertificateAuthority
    ) -> None:
        site.issuer.authority = CertificateAuthority.create(now=datetime.now(UTC) - DAY)
        site.issuer.change = lambda issued: Issued(issued.chain, authority.bundle)
        await self.refused(site, UntrustedChain, "not issued by a CA")

    async def test_no_certificate(self, site: Site) -> None:
        site.issuer.change = damaged
        await self.refused(site, UntrustedChain, "no certificate")

    async def test_a_refusal_is_told_as_it_is(self, site: Site) -> None:
        site.issuer.error = NotAuthorized("agent-1 may not")
        async with running(site):
            with pytest.raises(NotAuthorized, match="may not"):
                await site.renewer.renew()
        assert site.renewer.counts[Result.REFUSED] == 1

    async def test_a_bug_ends_nothing_and_is_logged_as_one(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        def bug(_: Issued) -> Issued:
            raise KeyError("oops")

        site.issuer.change = bug
        async with running(site):
            with pytest.raises(ParallaxError, match="KeyError"):
                await site.renewer.renew()
            site.issuer.change = lambda issued: issued
            await site.renewer.renew()
        assert "oops" in caplog.text


class TestNow:
    async def test_calls_at_one_time_share_one_attempt(self, site: Site) -> None:
        async with running(site):
            await asyncio.gather(*(site.renewer.renew() for _ in range(10)))
        assert len(site.issuer.asked) == 1

    async def test_they_share_its_failure_too(self, site: Site) -> None:
        site.issuer.error = Unavailable("away")
        async with running(site):
            told = await asyncio.gather(*(site.renewer.renew() for _ in range(5)), return_exceptions=True)
        assert [type(each) for each in told] == [Unavailable] * 5
        assert len(site.issuer.asked) == 1

    async def test_who_gives_up_waiting_ends_it_for_nobody(self, site: Site) -> None:
        before = site.serial
        async with running(site):
            hurried = asyncio.create_task(site.renewer.renew())
            patient = asyncio.create_task(site.renewer.renew())
            await asyncio.sleep(0)
            hurried.cancel()
            await patient
        assert site.serial != before

    async def test_twice_within_a_second_is_twice(self, site: Site) -> None:
        async with running(site):
            await site.renewer.renew()
            await site.renewer.renew()
        assert len(site.issuer.asked) == 2

    async def test_while_it_does_not_run_it_says_so(self, site: Site) -> None:
        with pytest.raises(Unavailable, match="not online"):
            await site.renewer.renew()

    async def test_who_waits_when_it_stops_is_told(self, authority: CertificateAuthority) -> None:
        site = new_site(authority)
        site.issuer.hangs = True
        async with running(site):
            waiting = asyncio.create_task(site.renewer.renew())
            await site.until(lambda: bool(site.issuer.asked))
        with pytest.raises(Unavailable, match="went offline"):
            await waiting

    @pytest.mark.parametrize("missing", ["ask", "keep"])
    async def test_what_is_not_ours_to_renew_is_never_asked_for(
        self, missing: str, authority: CertificateAuthority, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        site.store.publish(credentials(authority, site.clock(), DAY), site.clock())
        ask = None if missing == "ask" else site.issuer
        keep = None if missing == "keep" else site.renewer._keep
        soon = timedelta(seconds=0.01)
        site.renewer = Renewer(site.store, ask, keep, clock=site.clock, longest_sleep=soon)
        async with running(site):
            with pytest.raises(ConfigError, match="by whoever put it there"):
                await site.renewer.renew()
            site.clock.ahead = DAY * 0.95
            await site.until(lambda: "certificate ends" in caplog.text)
            site.clock.ahead = DAY * 2
            await site.until(lambda: "certificate expired" in caplog.text)
        assert site.issuer.asked == []
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


@pytest.fixture
def certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    return tmp_path / "certs"


def place(certs: Path, layout: Layout, good: Credentials) -> None:
    save_leaf(certs, layout, AGENT, good.chain, good.key, good.bundle)


def provider_of(certs: Path) -> MTLSCredentialsProvider:
    return MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=AGENT)


async def attempt(provider: MTLSCredentialsProvider, ask: Callable[[bytes], Awaitable[Issued]]) -> Attempt:
    rotator = provider.rotator(timedelta(hours=1))
    keep = provider.keeper(rotator)
    assert keep is not None
    assert provider.store is not None
    return await attempt_renewal(provider.store, ask, keep)


class TestFiles:
    @pytest.mark.parametrize("layout", [Layout.PARALLAX, Layout.FLAT, Layout.HOME])
    async def test_in_layouts_of_ours_the_files_hold_what_is_in_force(
        self, layout: Layout, certs: Path, authority: CertificateAuthority
    ) -> None:
        place(certs, layout, credentials(authority, datetime.now(UTC)))
        provider = provider_of(certs)
        assert provider.store is not None
        before = provider.store.current
        for _ in range(3):
            done = await attempt(provider, Issuer(authority, Clock()))
            assert done.problem is None
        paths = leaf_paths(certs, layout, AGENT.name)
        found = load_credentials(paths, AGENT, datetime.now(UTC))
        assert found.leaf == provider.store.current.leaf != before.leaf
        assert paths.key.stat().st_mode & 0o777 == 0o600

    async def test_what_kubernetes_mounts_is_not_ours(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        paths = leaf_paths(certs, Layout.KUBERNETES, AGENT.name)
        self.by_hand(paths.cert.parent, paths, credentials(authority, datetime.now(UTC)))
        provider = provider_of(certs)
        assert provider.keeper(provider.rotator(DAY)) is None

    async def test_files_that_are_named_one_by_one_are_not_ours(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        paths = leaf_paths(certs, Layout.PARALLAX, AGENT.name)
        self.by_hand(paths.cert.parent, paths, credentials(authority, datetime.now(UTC)))
        config = MTLSConfig(enabled=True, cert_file=paths.cert, key_file=paths.key, ca_file=paths.ca)
        provider = MTLSCredentialsProvider(config, identity=AGENT)
        assert provider.keeper(provider.rotator(DAY)) is None

    async def test_files_made_by_hand_in_our_layout_are(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        paths = leaf_paths(certs, Layout.PARALLAX, AGENT.name)
        self.by_hand(paths.cert.parent, paths, credentials(authority, datetime.now(UTC)))
        done = await attempt(provider_of(certs), Issuer(authority, Clock()))
        assert done.result is Result.SUCCESS

    async def test_what_is_given_by_content_is_renewed_in_memory(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        good = credentials(authority, datetime.now(UTC))
        config = MTLSConfig(
            enabled=True,
            ca_pem=good.bundle_pem.decode(),
            cert_pem=good.chain_pem.decode(),
            key_pem=good.key_pem.decode(),  # type: ignore[arg-type]  # pydantic makes it a secret
        )
        provider = MTLSCredentialsProvider(config, identity=AGENT)
        assert (await attempt(provider, Issuer(authority, Clock()))).result is Result.SUCCESS
        assert provider.store is not None
        assert provider.store.current.leaf != good.leaf

    async def test_the_slower_of_two_processes_takes_what_the_faster_wrote(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        place(certs, Layout.PARALLAX, credentials(authority, datetime.now(UTC)))
        slow, fast = provider_of(certs), provider_of(certs)
        issuer = Issuer(authority, Clock())

        async def late(csr: bytes) -> Issued:
            issued = await issuer(csr)
            assert (await attempt(fast, issuer)).result is Result.SUCCESS
            return issued

        assert (await attempt(slow, late)) == Attempt(Result.OVERTAKEN)
        assert slow.store is not None
        assert fast.store is not None
        assert slow.store.current.leaf == fast.store.current.leaf

    @pytest.mark.parametrize("bad", ["torn", "gone", "other"])
    async def test_files_that_somebody_has_touched_are_left_alone(
        self, bad: str, certs: Path, authority: CertificateAuthority
    ) -> None:
        place(certs, Layout.PARALLAX, credentials(authority, datetime.now(UTC)))
        provider = provider_of(certs)
        paths = leaf_paths(certs, Layout.PARALLAX, AGENT.name)
        assert provider.store is not None
        before = provider.store.current
        match bad:
            case "torn":
                paths.cert.write_bytes(paths.cert.read_bytes()[:100])
            case "gone":
                paths.cert.unlink()
            case "other":  # its key is still to come
                paths.cert.write_bytes(credentials(authority, datetime.now(UTC)).chain_pem)
        left = paths.cert.read_bytes() if paths.cert.exists() else b""
        done = await attempt(provider, Issuer(authority, Clock()))
        assert done.result is Result.NOT_KEPT
        assert str(paths.cert) in str(done.problem)
        assert provider.store.current is before
        assert (paths.cert.read_bytes() if paths.cert.exists() else b"") == left

    def by_hand(self, directory: Path, paths: object, good: Credentials) -> None:
        cert, key, ca = (getattr(paths, part) for part in ("cert", "key", "ca"))
        directory.mkdir(parents=True)
        key.touch(0o600)
        key.write_bytes(good.key_pem)
        cert.write_bytes(good.chain_pem)
        ca.write_bytes(good.bundle_pem)


CHILD: Final = """
import asyncio, os, random, resource, signal, sys, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from parallax.runtime.renewal import attempt_renewal
from parallax.security import Identity, LeafProfile, MTLSConfig, MTLSCredentialsProvider, load_authority
from parallax.security import load_credentials
from parallax.security.layouts import Layout, leaf_paths
from parallax.security.request import check_request

certs, agent = Path(sys.argv[1]), Identity.parse_short("agent/agent-1")
authority, paths = load_authority(certs), leaf_paths(certs, Layout.PARALLAX, agent.name)
os.fsync = lambda fd: None  # a killed process loses nothing that it has written; it only takes time here

async def ask(csr):
    return authority.issue(agent, check_request(csr, agent, (), None), LeafProfile(), datetime.now(UTC))

async def renew(times):
    provider = MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=agent)
    keep = provider.keeper(provider.rotator(timedelta(hours=1)))
    while times:
        yield await attempt_renewal(provider.store, ask, keep)
        times -= 1

async def on_a_full_disk(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    attempts = renew(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    async for done in attempts:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(done.result, done.problem, flush=True)

async def for_ever(told):
    async for done in renew(-1):
        assert done.problem is None, done
        os.write(told, b".")

def killed(rounds):
    seen, rng = set(), random.Random(1)
    for _ in range(rounds):
        heard, told = os.pipe()
        child = os.fork()
        if not child:
            asyncio.run(for_ever(told))
        os.close(told)
        assert os.read(heard, 1) == b"."
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard)
        seen.add(load_credentials(paths, agent, datetime.now(UTC)).leaf.serial_number)
    print(len(seen))

async def some(times):
    async for done in renew(times):
        assert done.problem is None, done

def racing(rivals):
    for _ in range(rivals):
        if not os.fork():
            asyncio.run(some(25))
            os._exit(0)
    print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(rivals)))

if sys.argv[2] == "killed":
    killed(int(sys.argv[3]))
elif sys.argv[2] == "racing":
    racing(int(sys.argv[3]))
else:
    asyncio.run(on_a_full_disk(int(sys.argv[3])))
"""


def child(certs: Path, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(certs), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=25,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class TestCrashes:
    @pytest.fixture(autouse=True)
    def _issuer(self, certs: Path, authority: CertificateAuthority) -> None:
        save_authority(certs, Layout.PARALLAX, authority)
        place(certs, Layout.PARALLAX, credentials(authority, datetime.now(UTC)))

    def test_killed_at_any_moment_it_leaves_one_whole_good_set(self, certs: Path) -> None:
        rounds = 60
        assert child(certs, "killed", rounds) == [str(rounds)]

    def test_several_processes_of_one_directory_tear_nothing_and_all_succeed(self, certs: Path) -> None:
        assert child(certs, "racing", 3) == ["0 0 0"]
        paths = leaf_paths(certs, Layout.PARALLAX, AGENT.name)
        load_credentials(paths, AGENT, datetime.now(UTC))
        assert len(list(paths.cert.parent.iterdir())) == 5

    @pytest.mark.parametrize("limit", [1, 200, 700])
    def test_a_full_disk_changes_nothing_and_is_named(self, limit: int, certs: Path) -> None:
        full, mended = child(certs, "full", limit)
        assert full.startswith(f"not_kept cannot write to {certs}/agent-1: file too large")
        assert mended == "success None"
        paths = leaf_paths(certs, Layout.PARALLAX, AGENT.name)
        load_credentials(paths, AGENT, datetime.now(UTC))
        left = [each.name for each in paths.cert.parent.iterdir()]
        assert len(left) == 5, left  # three links, `..data` and one version
