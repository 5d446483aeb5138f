"""New files come into force by themselves; bad ones never do, and say why until they are mended."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.authority import CertificateAuthority
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import ConfigError, Defect
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, Paths, leaf_paths, locate, save_authority, save_leaf
from parallax.security.material import Material, Sources, load_credentials, parse_material
from parallax.security.port import SecurePort
from parallax.security.profiles import LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.rotation import RESULTS, CertificateRotator, RotationStatus, judge
from parallax.security.snapshot import Content
from parallax.security.swap import ServerSwap

AGENT: Final = Identity.parse_short("agent/agent-1")
OTHER: Final = Identity.parse_short("agent/agent-2")
NEVER: Final = timedelta(hours=1)  # a poll that does not help
WITHIN_S: Final = 10.0  # for what should happen at once, on a machine that is busy

Issue = Callable[..., Credentials]


@dataclass
class Clock:
    """The real time, and how far it has been set forward since."""

    ahead: timedelta = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Looking(CertificateRotator):
    """One that counts its looks."""

    looks = 0

    async def look(self) -> None:
        await super().look()
        self.looks += 1


@dataclass
class Site:
    """A certificate directory in use: what is in force there, and what follows it."""

    certs: Path
    paths: Paths
    store: CredentialStore
    rotator: CertificateRotator
    clock: Clock = field(default_factory=Clock)

    @property
    def serial(self) -> int:
        return self.store.current.leaf.serial_number

    async def until(self, is_so: Callable[[], bool], within_s: float = WITHIN_S) -> None:
        deadline = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {self.rotator.status}"
            await asyncio.sleep(0.005)

    async def in_force(self, new: Credentials, within_s: float = WITHIN_S) -> None:
        await self.until(lambda: self.serial == new.leaf.serial_number, within_s)
        await self.until(lambda: self.rotator.status.defect is None)

    async def found(self, defect: Defect | None) -> None:
        await self.until(lambda: self.rotator.status.defect == defect)


Follow = Callable[..., AbstractAsyncContextManager[Site]]


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    """One that can also have issued something hours ago."""
    return CertificateAuthority.create(now=datetime.now(UTC) - timedelta(days=1))


@pytest.fixture
def issue(authority: CertificateAuthority) -> Issue:
    def issue(
        identity: Identity = AGENT,
        *,
        by: CertificateAuthority = authority,
        at: datetime | None = None,
        lifetime: timedelta = timedelta(days=1),
    ) -> Credentials:
        key = generate_key()
        issued = by.issue(identity, key.public_key(), LeafProfile(lifetime), at or datetime.now(UTC))
        return Credentials(issued.chain, key, issued.bundle)

    return issue


@pytest.fixture
def certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    return tmp_path / "site" / "certs"


@pytest.fixture
def follow(certs: Path) -> Follow:
    """Runs a rotator for the files that are in the certificate directory."""

    @asynccontextmanager
    async def following(poll: timedelta = NEVER, paths: Paths | None = None) -> AsyncIterator[Site]:
        paths = paths or locate(certs, AGENT.name)
        clock = Clock()
        store = CredentialStore(AGENT, load_credentials(paths, AGENT, clock()), clock())
        source = Sources(paths.cert, paths.key, paths.ca)
        rotator = Looking(store, source, poll=poll, clock=clock)
        site = Site(certs, paths, store, rotator, clock)
        task = asyncio.create_task(rotator.run())
        try:
            # The whole way is watched, and no thread reads the files while a test writes one after the other.
            await site.until(lambda: rotator.looks > 0)
            yield site
            assert not task.done()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    return following


def by_hand(paths: Paths, credentials: Credentials) -> Paths:
    """Plain files in place, as a copy leaves them."""
    paths.cert.parent.mkdir(parents=True, exist_ok=True)
    paths.key.touch(0o600)
    paths.key.write_bytes(credentials.key_pem)
    paths.cert.write_bytes(credentials.chain_pem)
    paths.ca.write_bytes(credentials.bundle_pem)
    return paths


def as_kubernetes_does(certs: Path, credentials: Credentials) -> None:
    """A mounted secret's next version: a directory, links through `..data`, one rename."""
    version = certs / f"..{time.time_ns()}"
    version.mkdir(parents=True)
    (version / "tls.key").touch(0o600)
    for name, data in (
        ("tls.crt", credentials.chain_pem),
        ("tls.key", credentials.key_pem),
        ("ca.crt", credentials.bundle_pem),
    ):
        (version / name).write_bytes(data)
        if not (certs / name).is_symlink():
            (certs / name).symlink_to(f"..data/{name}")
    before = (certs / "..data").readlink() if (certs / "..data").is_symlink() else None
    (certs / "..data_tmp").symlink_to(version.name)
    (certs / "..data_tmp").rename(certs / "..data")
    if before is not None:
        shutil.rmtree(certs / before)


def place(certs: Path, layout: Layout, credentials: Credentials) -> None:
    """As whoever owns *layout* writes there."""
    if layout is Layout.KUBERNETES:
        as_kubernetes_does(certs, credentials)
    else:
        save_leaf(certs, layout, AGENT, credentials.chain, credentials.key, credentials.bundle)


@pytest.fixture
def own(certs: Path) -> Paths:
    """Where agent-1's files lie in the layout `parallax`."""
    return leaf_paths(certs, Layout.PARALLAX, AGENT.name)


class TestChangesAreSeen:
    @pytest.mark.parametrize("layout", Layout)
    async def test_in_every_layout_again_and_again(
        self, layout: Layout, certs: Path, issue: Issue, follow: Follow
    ) -> None:
        place(certs, layout, issue())
        async with follow() as site:
            for _ in range(3):
                new = issue()
                place(certs, layout, new)
                await site.in_force(new)
            assert site.rotator.status.counts["success"] == 3

    @pytest.mark.parametrize("layout", Layout)
    async def test_of_files_made_by_hand_in_every_layout(
        self, layout: Layout, certs: Path, issue: Issue, follow: Follow
    ) -> None:
        paths = by_hand(leaf_paths(certs, layout, AGENT.name), issue())
        async with follow() as site:
            new = issue()
            by_hand(paths, new)
            await site.in_force(new)

    @pytest.mark.parametrize("order", [("cert", "key"), ("key", "cert")])
    async def test_written_one_after_the_other_with_a_long_pause(
        self, order: tuple[str, str], own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow() as site:
            new, before = issue(), site.store.current
            content = {"cert": new.chain_pem, "key": new.key_pem}
            first, second = order
            getattr(own, first).write_bytes(content[first])
            await site.found(Defect.MISMATCHED_KEY)  # however long the pause: that is a state, not a moment
            assert site.store.current is before
            getattr(own, second).write_bytes(content[second])
            await site.in_force(new)

    async def test_by_an_editor_that_renames(self, own: Paths, issue: Issue, follow: Follow) -> None:
        by_hand(own, issue())
        async with follow() as site:
            new = issue()
            for path, data in ((own.key, new.key_pem), (own.cert, new.chain_pem)):
                temporary = path.with_suffix(".swp")
                temporary.touch(0o600)
                temporary.write_bytes(data)
                temporary.rename(path)
            await site.in_force(new)

    async def test_of_the_roots_alone(
        self, own: Paths, issue: Issue, follow: Follow, authority: CertificateAuthority
    ) -> None:
        by_hand(own, issue())
        other = CertificateAuthority.create(now=datetime.now(UTC))
        async with follow() as site:
            own.ca.write_bytes(authority.bundle.pem + other.bundle.pem)
            await site.until(lambda: len(site.store.current.bundle.roots) == 2)

    async def test_in_a_directory_deleted_and_made_again(
        self, certs: Path, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow() as site:
            for top in (own.cert.parent, certs, certs.parent):
                shutil.rmtree(top)
                await site.found(Defect.MISSING)
                new = issue()
                by_hand(own, new)
                await site.in_force(new)

    async def test_in_a_directory_made_again_before_anybody_looked(
        self, certs: Path, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow() as site:
            for _ in range(5):
                new = issue()
                shutil.rmtree(certs)
                by_hand(own, new)
                await site.in_force(new)

    async def test_in_a_directory_renamed_away_and_replaced(
        self, certs: Path, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow() as site:
            for top in (own.cert.parent, certs, certs.parent):
                new = issue()
                staged = top.with_name("staged")
                by_hand(Paths(*(staged / path.relative_to(top) for path in (own.cert, own.key, own.ca))), new)
                top.rename(top.with_name(f"old-{top.name}"))
                staged.rename(top)
                await site.in_force(new)

    async def test_behind_links_to_directories_and_files(
        self, tmp_path: Path, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        releases = [tmp_path / "releases" / str(number) for number in range(3)]
        for release in releases:
            by_hand(Paths(*(release / name for name in ("c", "k", "a"))), issue())
        (tmp_path / "current").symlink_to("releases/0")
        own.cert.parent.mkdir(parents=True)
        for path, name in ((own.cert, "c"), (own.key, "k"), (own.ca, "a")):
            path.symlink_to(tmp_path / "current" / name)
        async with follow() as site:
            for release in releases[1:]:
                (tmp_path / "next").symlink_to(release)
                (tmp_path / "next").rename(tmp_path / "current")
                new = load_credentials(own, AGENT, datetime.now(UTC))
                await site.in_force(new)
            newest = issue()  # written in place, three links away
            by_hand(Paths(*(releases[-1] / name for name in ("c", "k", "a"))), newest)
            await site.in_force(newest)

    async def test_though_somebody_never_stops_touching_a_file(
        self, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        is_over = threading.Event()

        def touch() -> None:
            while not is_over.wait(0.001):
                own.ca.chmod(0o644)

        async with follow() as site:
            thread = threading.Thread(target=touch)
            thread.start()
            try:
                new = issue()
                by_hand(own, new)
                await site.in_force(new)
            finally:
                is_over.set()
                thread.join()

    async def test_within_a_second(self, certs: Path, issue: Issue, follow: Follow) -> None:
        place(certs, Layout.PARALLAX, issue())
        took = []
        async with follow() as site:
            for _ in range(5):
                new = issue()
                place(certs, Layout.PARALLAX, new)
                began = time.monotonic()
                await site.in_force(new)
                took.append(time.monotonic() - began)
        assert min(took) < 0.5, took  # a machine that is busy only adds to it

    async def test_before_the_first_look(self, own: Paths, issue: Issue, follow: Follow) -> None:
        """Between the start's own reading and the rotator's."""
        by_hand(own, issue())
        new = issue()
        store = CredentialStore(AGENT, load_credentials(own, AGENT, datetime.now(UTC)), datetime.now(UTC))
        by_hand(own, new)
        rotator = CertificateRotator(store, Sources(own.cert, own.key, own.ca), poll=NEVER)
        await rotator.look()
        assert store.current.leaf == new.leaf


def mismatched(paths: Paths, issue: Issue) -> None:
    paths.key.write_bytes(issue().key_pem)


def truncated(paths: Paths, issue: Issue) -> None:
    paths.cert.write_bytes(issue().chain_pem[:200])


def truncated_key(paths: Paths, issue: Issue) -> None:
    paths.key.write_bytes(paths.key.read_bytes()[:100])


def truncated_ca(paths: Paths, issue: Issue) -> None:
    paths.ca.write_bytes(paths.ca.read_bytes()[:100])


def empty(paths: Paths, issue: Issue) -> None:
    paths.cert.write_bytes(b"")


def no_root(paths: Paths, issue: Issue) -> None:
    paths.ca.write_bytes(b"\n")


def of_somebody_else(paths: Paths, issue: Issue) -> None:
    by_hand(paths, issue(OTHER))


def expired(paths: Paths, issue: Issue) -> None:
    by_hand(paths, issue(at=datetime.now(UTC) - timedelta(hours=3), lifetime=timedelta(hours=1)))


def of_the_future(paths: Paths, issue: Issue) -> None:
    by_hand(paths, issue(at=datetime.now(UTC) + timedelta(hours=3)))


def of_another_ca(paths: Paths, issue: Issue) -> None:
    other = CertificateAuthority.create(now=datetime.now(UTC))
    ca = paths.ca.read_bytes()
    by_hand(paths, issue(by=other))
    paths.ca.write_bytes(ca)


def directory(paths: Paths, issue: Issue) -> None:
    paths.cert.unlink()
    paths.cert.mkdir()


def fifo(paths: Paths, issue: Issue) -> None:
    paths.key.unlink()
    os.mkfifo(paths.key, 0o600)


def deleted(paths: Paths, issue: Issue) -> None:
    paths.ca.unlink()


def wide_key(paths: Paths, issue: Issue) -> None:
    paths.key.chmod(0o644)


def link_in_a_circle(paths: Paths, issue: Issue) -> None:
    paths.cert.unlink()
    paths.cert.symlink_to(paths.cert)


def huge(paths: Paths, issue: Issue) -> None:
    paths.ca.write_bytes(b"\n" * (1 << 21))


BAD: Final[dict[Callable[[Paths, Issue], None], Defect]] = {
    mismatched: Defect.MISMATCHED_KEY,
    truncated: Defect.DAMAGED,
    truncated_key: Defect.DAMAGED,
    truncated_ca: Defect.DAMAGED,
    empty: Defect.DAMAGED,
    no_root: Defect.DAMAGED,
    of_somebody_else: Defect.WRONG_IDENTITY,
    expired: Defect.EXPIRED,
    of_the_future: Defect.NOT_YET_VALID,
    of_another_ca: Defect.UNTRUSTED_CHAIN,
    directory: Defect.UNREADABLE,
    fifo: Defect.UNREADABLE,
    deleted: Defect.MISSING,
    wide_key: Defect.OPEN_TO_OTHERS,
    link_in_a_circle: Defect.UNREADABLE,
    huge: Defect.UNREADABLE,
}


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


class TestBadFiles:
    @pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
    async def test_never_come_into_force_and_say_why_once_until_good_ones_do(
        self,
        spoil: Callable[[Paths, Issue], None],
        own: Paths,
        issue: Issue,
        follow: Follow,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        defect = BAD[spoil]
        by_hand(own, issue())
        async with follow() as site:
            before = site.store.current
            spoil(own, issue)
            await site.found(defect)
            for _ in range(3):
                await site.rotator.look()  # as every poll does
            status = site.rotator.status
            assert site.store.current is before
            assert (status.result, status.counts[defect], status.last_failure) == (defect, 1, status.since)
            last = warnings(caplog)[-1]
            assert (last.__dict__["reason"], last.__dict__["cause"]) == (defect, status.reason)
            assert sum(record.__dict__.get("reason") == defect for record in warnings(caplog)) == 1
            assert "PRIVATE KEY" not in caplog.text

            shutil.rmtree(own.cert.parent)
            new = issue()
            by_hand(own, new)
            await site.in_force(new)
            assert site.rotator.status.reason == ""

    async def test_that_are_taken_back_change_nothing(
        self, own: Paths, issue: Issue, follow: Follow, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        by_hand(own, issue())
        async with follow() as site:
            before, cert = site.store.current, own.cert.read_bytes()
            own.cert.write_bytes(cert[:100])
            await site.found(Defect.DAMAGED)
            own.cert.write_bytes(cert)
            await site.found(None)
            assert site.store.current is before
            assert site.rotator.status.counts["success"] == 0
            assert caplog.records[-1].getMessage() == "certificate files are usable again"

    async def test_of_one_kind_after_another_are_each_told(
        self, own: Paths, issue: Issue, follow: Follow, caplog: pytest.LogCaptureFixture
    ) -> None:
        by_hand(own, issue())
        async with follow() as site:
            own.cert.write_bytes(b"")
            await site.found(Defect.DAMAGED)
            own.cert.unlink()
            await site.found(Defect.MISSING)
        assert [record.__dict__["reason"] for record in warnings(caplog)] == ["damaged", "missing"]

    async def test_are_never_left_by_a_writer_of_ours_that_is_killed(
        self, certs: Path, issue: Issue, follow: Follow, authority: CertificateAuthority
    ) -> None:
        save_authority(certs, Layout.PARALLAX, authority)
        place(certs, Layout.PARALLAX, issue())
        async with follow() as site:
            for wait_s in (0.05, 0.13, 0.21):
                child = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", WRITER, certs, stdout=asyncio.subprocess.PIPE
                )
                assert child.stdout is not None
                before = site.rotator.status.counts["success"]
                async with asyncio.timeout(WITHIN_S):
                    await child.stdout.readline()
                    while site.rotator.status.counts["success"] == before:
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(wait_s)
                    child.kill()
                    await child.wait()
            new = issue()
            place(certs, Layout.PARALLAX, new)
            await site.in_force(new)
            counts = dict(site.rotator.status.counts)
            assert counts.pop("success") > 3
            assert set(counts.values()) == {0}

    def test_that_this_process_may_no_longer_read_are_told(self, issue: Issue) -> None:
        """Root may read everything: a child of another uid tells."""
        uid = 12345 if os.geteuid() == 0 else os.geteuid()
        outside = Path(tempfile.mkdtemp())
        try:
            outside.chmod(0o755)
            paths = by_hand(Paths(*(outside / "agent-1" / name for name in ("cert", "key", "ca"))), issue())
            for path in (paths.cert.parent, paths.cert, paths.key, paths.ca):
                os.chown(path, uid, -1)
            code = CHILD.format(uid=uid, files=[str(paths.cert), str(paths.key), str(paths.ca)])
            done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        finally:
            shutil.rmtree(outside)
        assert (done.returncode, done.stdout.split()) == (0, ["unreadable", "good"]), done.stderr


WRITER: Final = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from parallax.security import Identity, Layout, LeafProfile, load_authority, save_leaf
from parallax.security.keys import generate_key

certs, agent = Path(sys.argv[1]), Identity.parse_short("agent/agent-1")
authority = load_authority(certs)
print("begun", flush=True)
while True:
    key = generate_key()
    issued = authority.issue(agent, key.public_key(), LeafProfile(), datetime.now(UTC))
    save_leaf(certs, Layout.PARALLAX, agent, issued.chain, key, issued.bundle)
"""

CHILD: Final = """
import asyncio, os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from parallax.security.credentials import CredentialStore
from parallax.security.identity import Identity
from parallax.security.material import Sources, load_credentials
from parallax.security.rotation import CertificateRotator

async def main():
    agent, source = Identity.parse_short("agent/agent-1"), Sources(*map(Path, {files}))
    if os.geteuid() == 0:
        await asyncio.to_thread(load_credentials, source, agent, datetime.now(UTC))  # all imports it needs
        os.setgroups([])
        os.setgid({uid})
        os.setuid({uid})
    store = CredentialStore(agent, load_credentials(source, agent, datetime.now(UTC)), datetime.now(UTC))
    rotator = CertificateRotator(store, source, poll=timedelta(hours=1))
    running = asyncio.create_task(rotator.run())
    async with asyncio.timeout(10):
        while rotator._lookout._watcher is None or not rotator._lookout._watcher._watches:
            await asyncio.sleep(0.01)
        source.key.chmod(0)
        while rotator.status.defect is None:
            await asyncio.sleep(0.01)
        print(rotator.status.result)
        source.key.chmod(0o600)
        while rotator.status.defect is not None:
            await asyncio.sleep(0.01)
        print("good")
    running.cancel()

asyncio.run(main())
"""


class TestClock:
    @pytest.mark.parametrize("jump", [timedelta(days=2), timedelta(days=-2)])
    async def test_a_jump_out_of_validity_and_back_is_told_and_changes_nothing(
        self, jump: timedelta, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow(poll=timedelta(seconds=0.05)) as site:
            before = site.store.current
            site.clock.ahead = jump
            await site.found(Defect.EXPIRED if jump > timedelta(0) else Defect.NOT_YET_VALID)
            site.clock.ahead = timedelta(0)
            await site.found(None)
            assert site.store.current is before

    @pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)])
    async def test_a_jump_within_validity_does_not_stop_a_rotation(
        self, jump: timedelta, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        start = datetime.now(UTC) - timedelta(hours=2)
        by_hand(own, issue(at=start))
        async with follow() as site:
            site.clock.ahead = jump
            new = issue(at=start)
            by_hand(own, new)
            await site.in_force(new)

    async def test_a_certificate_comes_into_force_when_it_becomes_valid(
        self, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue(lifetime=timedelta(days=3)))
        async with follow(poll=timedelta(seconds=0.05)) as site:
            new = issue(at=datetime.now(UTC) + timedelta(days=1))
            by_hand(own, new)
            await site.found(Defect.NOT_YET_VALID)
            site.clock.ahead = timedelta(days=1)
            await site.in_force(new)


class TestSameContent:
    async def test_written_again_is_not_put_in_force_again(
        self, certs: Path, issue: Issue, follow: Follow
    ) -> None:
        same = issue()
        place(certs, Layout.PARALLAX, same)
        async with follow() as site:
            before = site.store.current
            place(certs, Layout.PARALLAX, same)
            await site.rotator.look()
            own = by_hand(site.paths, same)
            own.cert.write_bytes(b"# a comment\n" + same.chain_pem)
            await site.rotator.look()
            own.ca.write_bytes(b"")  # an event that is seen to have arrived, after all others
            await site.found(Defect.DAMAGED)
            assert site.store.current is before
            assert site.rotator.status.counts["success"] == 0

    async def test_published_by_somebody_else_meanwhile_is_not_undone(
        self, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        """A renewal writes the files, then puts the same in force itself."""
        by_hand(own, issue())
        async with follow() as site:
            new = issue()
            by_hand(own, new)
            site.store.publish(new, datetime.now(UTC))
            await site.rotator.look()
            assert site.store.current is new
            assert site.rotator.status.counts["success"] == 0


class TestRun:
    async def test_a_poll_finds_what_no_event_told(self, own: Paths, issue: Issue, follow: Follow) -> None:
        by_hand(own, issue())
        async with follow(poll=timedelta(seconds=0.05)) as site:
            assert site.rotator._lookout._watcher is not None
            site.rotator._lookout._watcher.close()
            new = issue()
            by_hand(own, new)
            await site.in_force(new)

    @pytest.mark.parametrize("part", ["dispatcher", "reader"])
    async def test_an_observer_that_died_is_replaced_and_counted(
        self, part: str, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow(poll=timedelta(seconds=0.5)) as site:
            watcher = site.rotator._lookout._watcher
            assert watcher is not None
            observer = watcher._observer
            assert observer is not None
            thread = observer if part == "dispatcher" else getattr(observer, "_inotify_fd", observer)
            thread.stop()
            await asyncio.to_thread(thread.join)
            await site.until(lambda: site.rotator.status.restarts == 1)
            await asyncio.to_thread(watcher.arrange)
            seen = threading.Event()
            watcher._handler._on_change = seen.set
            by_hand(own, issue())
            assert await asyncio.to_thread(seen.wait, WITHIN_S)

    async def test_it_stops_at_once_and_leaves_no_thread(
        self, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        before = set(threading.enumerate())
        async with follow():
            began = time.monotonic()
        assert time.monotonic() - began < WITHIN_S
        left = [thread for thread in set(threading.enumerate()) - before if "asyncio" not in thread.name]
        assert not left

    async def test_an_event_after_the_loop_has_ended_harms_nobody(self, own: Paths, issue: Issue) -> None:
        by_hand(own, issue())
        now = datetime.now(UTC)
        store = CredentialStore(AGENT, load_credentials(own, AGENT, now), now)
        rotator = CertificateRotator(store, Sources(own.cert, own.key, own.ca), poll=NEVER)

        def run_and_break_off() -> None:
            loop = asyncio.new_event_loop()
            task = loop.create_task(rotator.run())
            loop.run_until_complete(asyncio.sleep(0.2))
            task.cancel()
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            loop.close()

        await asyncio.to_thread(run_and_break_off)
        assert rotator._lookout._watcher is not None
        rotator._lookout._watcher._handler._on_change()


class TestTls:
    async def test_the_next_handshake_shows_the_new_certificate_and_an_old_connection_lives(
        self, own: Paths, issue: Issue, follow: Follow
    ) -> None:
        by_hand(own, issue())
        async with follow() as site:
            server = aio.server()
            swap, swapped = ServerSwap(site.store.served, verify_client=False), asyncio.Event()
            port = server.add_secure_port("127.0.0.1:0", swap.grpc_credentials)
            await server.start()
            own_port = SecurePort(port, ("127.0.0.1", port), site.store, swap, lambda _: swapped.set())
            following = asyncio.create_task(own_port.follow())
            try:
                first = await asyncio.to_thread(connect, port)
                with first:
                    assert served(first) == site.serial
                    mismatched(own, issue)
                    await site.found(Defect.MISMATCHED_KEY)
                    with await asyncio.to_thread(connect, port) as second:
                        assert served(second) == served(first)
                    new = issue()
                    by_hand(own, new)
                    await site.in_force(new)
                    async with asyncio.timeout(WITHIN_S):
                        await swapped.wait()
                    with await asyncio.to_thread(connect, port) as third:
                        assert served(third) == new.leaf.serial_number
                    first.setblocking(False)  # noqa: FBT003 - socket's signature
                    first.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            finally:
                await server.stop(0)
                following.cancel()


def connect(port: int) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10))


def served(connection: ssl.SSLSocket) -> int:
    der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


class TestProvider:
    @pytest.fixture(autouse=True)
    def _clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [*os.environ]:
            if name.startswith("PARALLAX_"):
                monkeypatch.delenv(name)

    def test_its_rotator_follows_the_files_it_was_loaded_from(
        self, certs: Path, issue: Issue, own: Paths
    ) -> None:
        by_hand(own, issue())
        provider = MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=AGENT)
        rotator = provider.rotator(NEVER)
        assert rotator is not None
        assert rotator.identity == AGENT
        new = issue()
        by_hand(own, new)
        asyncio.run(rotator.look())
        assert provider.store is not None
        assert provider.store.current.leaf == new.leaf

    def test_in_plaintext_there_is_nothing_to_follow(self, certs: Path) -> None:
        assert MTLSCredentialsProvider(MTLSConfig(), identity=AGENT).rotator(NEVER) is None

    def test_content_in_the_environment_does_not_change(self, issue: Issue) -> None:
        good = issue()
        config = MTLSConfig(
            enabled=True,
            ca_pem=good.bundle_pem.decode(),
            cert_pem=good.chain_pem.decode(),
            key_pem=good.key_pem.decode(),  # type: ignore[arg-type]  # pydantic makes it a secret
        )
        assert MTLSCredentialsProvider(config, identity=AGENT).rotator(NEVER) is None

    def test_a_single_file_beside_content_is_followed(self, issue: Issue, own: Paths) -> None:
        good = issue()
        by_hand(own, good)
        config = MTLSConfig(
            enabled=True,
            ca_file=own.ca,
            cert_pem=good.chain_pem.decode(),
            key_pem=good.key_pem.decode(),  # type: ignore[arg-type]
        )
        assert MTLSCredentialsProvider(config, identity=AGENT).rotator(NEVER) is not None


class TestDecision:
    def material(self, credentials: Credentials) -> Material:
        return Material(
            Content("cert", credentials.chain_pem),
            Content("key", credentials.key_pem),
            Content("ca", credentials.bundle_pem),
        )

    def test_what_is_in_force_asks_for_nothing(self, issue: Issue, now: datetime) -> None:
        good = issue(at=now)
        assert judge(self.material(good), AGENT, good, now) is None

    def test_what_differs_in_any_part_is_put_in_force(
        self, issue: Issue, now: datetime, authority: CertificateAuthority
    ) -> None:
        good, new = issue(at=now), issue(at=now)
        found = judge(self.material(new), AGENT, good, now)
        assert found is not None
        assert found.leaf == new.leaf
        root = CertificateAuthority.create(now=now)
        wider = Material(
            Content("cert", good.chain_pem),
            Content("key", good.key_pem),
            Content("ca", good.bundle_pem + root.bundle.pem),
        )
        assert judge(wider, AGENT, good, now) is not None

    def test_what_is_in_force_and_has_expired_is_said_to_be(self, issue: Issue, now: datetime) -> None:
        good = issue(at=now)
        with pytest.raises(ConfigError) as refused:
            judge(self.material(good), AGENT, good, now + timedelta(days=2))
        assert refused.value.defect is Defect.EXPIRED

    @given(noise=st.binary(max_size=300), part=st.sampled_from(["cert", "key", "ca"]), wrapped=st.booleans())
    def test_noise_in_any_part_is_refused_with_a_defect(
        self, noise: bytes, part: str, *, wrapped: bool
    ) -> None:
        if wrapped:
            label = b"PRIVATE KEY" if part == "key" else b"CERTIFICATE"
            noise = ssl.DER_cert_to_PEM_cert(noise).encode().replace(b"CERTIFICATE", label)
        contents = {
            name: Content(name, noise if name == part else getattr(GOOD, attribute))
            for name, attribute in (("cert", "chain_pem"), ("key", "key_pem"), ("ca", "bundle_pem"))
        }
        with pytest.raises(ConfigError) as refused:
            parse_material(Material(**contents), AGENT, datetime.now(UTC))
        assert refused.value.defect is Defect.DAMAGED


class TestStatus:
    START: Final = datetime(2026, 1, 1, tzinfo=UTC)
    LATER: Final = START + timedelta(minutes=1)
    LATEST: Final = START + timedelta(minutes=2)

    def test_at_the_start_all_results_are_there_and_zero(self) -> None:
        status = RotationStatus(self.START, self.START)
        assert status.counts == dict.fromkeys(RESULTS, 0)
        assert (status.result, status.last_failure) == ("success", None)

    def test_a_failure_is_counted_once_however_often_it_is_found(self) -> None:
        problem = ConfigError("torn", Defect.DAMAGED)
        first = RotationStatus(self.START, self.START).kept(problem, self.LATER)
        assert first.kept(problem, self.LATEST) is first
        assert (first.since, first.last_failure, first.last_success) == (self.LATER, self.LATER, self.START)
        assert first.counts["damaged"] == 1

    def test_another_text_is_another_failure(self) -> None:
        status = RotationStatus(self.START, self.START)
        status = status.kept(ConfigError("a torn", Defect.DAMAGED), self.LATER)
        status = status.kept(ConfigError("b torn", Defect.DAMAGED), self.LATEST)
        assert (status.counts["damaged"], status.reason) == (2, "b torn")

    def test_good_files_end_it_and_count_only_if_they_are_new(self) -> None:
        bad = RotationStatus(self.START, self.START).kept(ConfigError("x", Defect.MISSING), self.LATER)
        back, new = bad.unchanged(self.LATEST), bad.rotated(self.LATEST)
        assert back.defect is new.defect is None
        assert (back.last_success, back.counts["success"]) == (self.LATEST, 0)
        assert (new.last_success, new.counts["success"]) == (self.LATEST, 1)
        assert back.last_failure == self.LATER

    def test_nothing_new_is_the_same_status(self) -> None:
        status = RotationStatus(self.START, self.START)
        assert status.unchanged(self.LATER) is status


def _good() -> Credentials:
    now = datetime.now(UTC)
    key = generate_key()
    issued = CertificateAuthority.create(now=now).issue(AGENT, key.public_key(), LeafProfile(), now)
    return Credentials(issued.chain, key, issued.bundle)


GOOD: Final = _good()
