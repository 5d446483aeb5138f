"""Publishing CRLs: which, when, under what number, and what becomes of them when something breaks."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.x509 import ReasonFlags
from prometheus_client import CollectorRegistry

from parallax.control_plane import crl as crl_module
from parallax.control_plane.crl import GATHER_S, CRLPublisher, Issuers, Obstacle
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issuer import IssuerFiles
from parallax.control_plane.metrics import PublishedCRLs
from parallax.control_plane.revoked import Revoked, RevokedCertificate
from parallax.runtime.telemetry import MetricsListener, Readiness
from parallax.security.authority import CertificateAuthority
from parallax.security.crl import CRL, LIFETIME, RevokedSerial
from parallax.security.errors import Expired
from parallax.security.files import replace_file
from parallax.security.keys import key_id
from parallax.security.layouts import Layout, save_authority
from parallax.security.revocation import Reason
from parallax.security.succession import discard_next, prepare_next, put_in_force
from parallax.security.verification import CertificateId

NOW: Final = datetime(2026, 6, 1, 12, tzinfo=UTC)
SECOND: Final = timedelta(seconds=1)
CA: Final = CertificateAuthority.create(now=NOW - timedelta(days=400))


WRITER: Final = Path(__file__).with_name("crl_writer.py")
FULL_DISK: Final = WRITER.with_name("crl_on_full_disk.py")


def name_of(authority: CertificateAuthority) -> str:
    return key_id(authority.certificate.public_key()).hex()


class Desk:
    """A publisher with a clock and revocations set by hand; its CAs are files."""

    def __init__(self, engine: SqliteEngine, root: Path) -> None:
        self.now = NOW
        self.revoked: dict[str, list[RevokedSerial]] = {}
        self.asked: list[Sequence[Revoked] | None] = []
        self.passphrase: bytes | None = None
        self.certs, self.directory = root / "certs", root / "data" / "crl"
        self.files = IssuerFiles(self.certs, lambda: self.passphrase)
        self.engine = engine
        self.publisher = CRLPublisher(
            engine,
            self.directory,
            Issuers(self.files.current, self.files.beside),
            self._revoked,
            lambda: self.now,
            LIFETIME,
        )

    async def _revoked(self, issuer: bytes, among: Sequence[Revoked] | None) -> dict[int, RevokedSerial]:
        self.asked.append(among)
        known = {each.serial: each for each in self.revoked.get(issuer.hex(), [])}
        if among is None:
            return known
        ids = [each.certificate for each in among if isinstance(each, RevokedCertificate)]
        return {each.serial: known[each.serial] for each in ids if each.issuer == issuer}

    def revoke(
        self, *serials: int, issuer: CertificateAuthority = CA, ends_at: datetime | None = None
    ) -> None:
        self.add(*serials, issuer=issuer, ends_at=ends_at)
        self.publisher.note()

    def revoke_one(self, serial: int, issuer: CertificateAuthority = CA) -> None:
        """Revoke it, and say which it was."""
        self.add(serial, issuer=issuer)
        certificate = CertificateId(bytes.fromhex(name_of(issuer)), serial)
        change = RevokedCertificate(certificate, None, None, Reason.SUPERSEDED, "", self.now)
        self.publisher.note(change)

    def add(self, *serials: int, issuer: CertificateAuthority = CA, ends_at: datetime | None = None) -> None:
        entries = [RevokedSerial(each, self.now, ReasonFlags.superseded, ends_at) for each in serials]
        self.revoked.setdefault(name_of(issuer), []).extend(entries)

    def shown(self, issuer: CertificateAuthority = CA) -> CRL:
        """The list as it is shown over HTTP, in both forms."""
        page, text = (self.publisher.page(f"/crl/{name_of(issuer)}.{form}") for form in ("crl", "pem"))
        assert page is not None
        assert text is not None
        crl = CRL.parse(page.body)
        assert CRL.parse(text.body) == crl
        return crl

    def filed(self, issuer: CertificateAuthority = CA) -> CRL:
        """The list as it lies on the disk, in both forms."""
        path = self.directory / f"{name_of(issuer)}.crl"
        crl = CRL.parse(path.read_bytes())
        assert CRL.parse(path.with_suffix(".pem").read_bytes()) == crl
        return crl

    async def published(self, issuer: CertificateAuthority = CA) -> CRL:
        """What there is once all is published that has to be."""
        await self.publisher.publish()
        assert self.shown(issuer) == self.filed(issuer)
        return self.filed(issuer)


@asynccontextmanager
async def desk_in(root: Path) -> AsyncIterator[Desk]:
    async with SqliteEngine(root / "data") as engine:
        desk = Desk(engine, root)
        await desk.publisher.load()
        yield desk


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    save_authority(tmp_path / "certs", Layout.PARALLAX, CA)
    async with desk_in(tmp_path) as made:
        yield made


async def test_whoever_ends_it_waits_for_a_slow_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else somebody who takes the directory away, or starts the next process on it, would meet it there."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(place: Any, name: str, file: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        replace_file(place, name, file)

    monkeypatch.setattr(crl_module, "replace_file", slow)
    running = asyncio.create_task(desk.publisher.run())
    assert await asyncio.to_thread(begun.wait, 10)
    running.cancel()
    await asyncio.wait({running}, timeout=0.1)
    assert not running.done()
    go_on.set()
    await asyncio.wait({running}, timeout=10)
    assert running.cancelled()
    assert desk.filed() == desk.shown()


# When there is another one.


async def test_there_is_one_before_anything_is_revoked(desk: Desk) -> None:
    crl = await desk.published()
    crl.check(CA.certificate, desk.now)
    assert len(crl) == 0
    assert desk.publisher.detail == "current"
    for path in desk.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


async def test_what_is_revoked_is_in_the_next_one(desk: Desk) -> None:
    before = await desk.published()
    desk.revoke(5, 7)
    after = await desk.published()
    assert (5 in after, 7 in after, 6 in after) == (True, True, False)
    assert after.number > before.number


async def test_what_is_reinstated_is_not(desk: Desk) -> None:
    desk.revoke(5)
    await desk.published()
    desk.revoked.clear()
    desk.publisher.note()
    assert 5 not in await desk.published()


async def test_news_that_change_nothing_make_none(desk: Desk) -> None:
    desk.revoke(5)
    before = await desk.published()
    for _ in range(3):
        desk.publisher.note()
        assert await desk.published() == before


async def test_one_is_replaced_when_half_of_its_life_is_over_and_not_before(desk: Desk) -> None:
    first = await desk.published()
    desk.now += LIFETIME / 2 - timedelta(minutes=5)
    assert await desk.published() == first
    desk.now += timedelta(minutes=5)
    second = await desk.published()
    assert (second.number > first.number, second.next_update) == (True, desk.now + LIFETIME)


async def test_revocations_are_not_looked_through_while_nothing_changes(desk: Desk) -> None:
    await desk.published()
    for _ in range(5):
        await desk.published()
    assert desk.asked == [None]


async def test_of_what_changed_that_alone_is_looked_at(desk: Desk) -> None:
    desk.revoke(5)
    await desk.published()
    desk.asked.clear()
    desk.revoke_one(6)
    desk.revoke_one(7)
    crl = await desk.published()
    assert (len(crl), 5 in crl, 6 in crl, 7 in crl) == (3, True, True, True)
    assert [among and len(among) for among in desk.asked] == [2]


async def test_when_one_is_due_by_time_all_is_looked_at(desk: Desk) -> None:
    """So whatever was missed is listed then, at the latest."""
    await desk.published()
    desk.add(5)
    desk.revoke_one(6)
    assert len(await desk.published()) == 1
    desk.now += LIFETIME / 2
    assert len(await desk.published()) == 2


async def test_what_could_not_be_listed_is_listed_later(desk: Desk) -> None:
    """With what was revoked since."""
    await desk.published()
    key = desk.certs / "ca" / "key.pem"
    key.rename(key.with_name("away"))
    desk.revoke_one(5)
    await desk.publisher.publish()
    assert list(desk.publisher.obstacles) == [Obstacle.UNSIGNED]
    desk.revoke_one(6)
    await desk.publisher.publish()
    key.with_name("away").rename(key)
    assert len(await desk.published()) == 2


async def test_a_ca_that_was_away_misses_nothing(desk: Desk) -> None:
    """It stands beside the one in force, so that nobody minds that it is away."""
    new = become(desk)
    await desk.published()
    (place,) = (desk.certs / "ca").glob("retired-*")
    place.rename(desk.certs / "elsewhere")
    desk.revoke_one(5)
    await desk.published(new)
    assert not desk.publisher.obstacles
    (desk.certs / "elsewhere").rename(place)
    assert 5 in await desk.published()


async def test_a_burst_makes_few_and_all_of_it_is_listed_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the machine has time, within a second: so long it gathers, and waits for no look at the clock."""
    assert GATHER_S <= 0.5
    monkeypatch.setattr(crl_module, "LOOK_S", 3_600.0)
    running = asyncio.create_task(desk.publisher.run())
    async with asyncio.timeout(20):
        while not desk.publisher.published:
            await asyncio.sleep(0.01)
        first = desk.shown().number
        begun = asyncio.get_running_loop().time()
        for serial in range(200):
            desk.revoke(serial)
            await asyncio.sleep(0)
        while len(desk.shown()) < 200:
            await asyncio.sleep(0.01)
        took = asyncio.get_running_loop().time() - begun
    running.cancel()
    assert desk.shown().number - first <= 1 + took / GATHER_S


async def test_a_certificate_that_is_over_leaves_after_a_list_of_its_own(desk: Desk) -> None:
    desk.revoke(5, ends_at=NOW + SECOND)
    desk.revoke(6)
    for _ in range(4):
        assert 5 in await desk.published()
        desk.now += LIFETIME / 2
    assert 5 not in await desk.published()
    assert 6 in desk.shown()


# Clocks.


async def test_a_clock_set_back_makes_another_one_with_a_higher_number(desk: Desk) -> None:
    first = await desk.published()
    desk.now -= timedelta(days=300)
    later = await desk.published()
    assert later.number > first.number


async def test_what_left_while_the_clock_was_wrong_is_back_when_it_is_right(desk: Desk) -> None:
    desk.revoke(5, ends_at=NOW + timedelta(days=30))
    await desk.published()
    for _ in range(3):
        desk.now = NOW + timedelta(days=400)
        await desk.published()
        desk.now += LIFETIME
    assert 5 not in await desk.published()
    desk.now = NOW + SECOND
    crl = await desk.published()
    assert 5 in crl
    crl.check(CA.certificate, desk.now)


# Restarts.


async def test_a_restart_shows_the_last_one_at_once_and_then_another(tmp_path: Path) -> None:
    save_authority(tmp_path / "certs", Layout.PARALLAX, CA)
    async with desk_in(tmp_path) as desk:
        desk.revoke(5)
        before = await desk.published()
    async with desk_in(tmp_path) as desk:
        assert desk.shown() == before
        desk.revoke(5)
        after = await desk.published()
        assert (after.number > before.number, 5 in after) == (True, True)


async def test_a_restart_with_a_clock_set_back_numbers_on(tmp_path: Path) -> None:
    save_authority(tmp_path / "certs", Layout.PARALLAX, CA)
    numbers = []
    for hours in (0, -3, -2, -3):
        async with desk_in(tmp_path) as desk:
            desk.now += timedelta(hours=hours) + timedelta(hours=4)
            numbers.append((await desk.published()).number)
    assert numbers == sorted(set(numbers))


async def test_files_from_elsewhere_are_not_shown(tmp_path: Path) -> None:
    save_authority(tmp_path / "certs", Layout.PARALLAX, CA)
    (tmp_path / "data" / "crl").mkdir(parents=True)
    for name in ("other.crl", "0" * 63 + ".crl", "A" * 64 + ".crl", "1" * 64 + ".crl"):
        (tmp_path / "data" / "crl" / name).write_bytes(b"nothing of ours")
    async with desk_in(tmp_path) as desk:
        assert desk.publisher.published == []
        await desk.published()
    assert (tmp_path / "data" / "crl" / "other.crl").read_bytes() == b"nothing of ours"


@pytest.mark.timeout(120)
def test_no_number_is_seen_twice_whenever_the_process_is_killed(tmp_path: Path) -> None:
    """Also between the record of a number and the file; the clock stands still: the record alone counts."""
    save_authority(tmp_path / "certs", Layout.PARALLAX, CA)
    highest = 0
    for wanted in range(1, 16):
        with subprocess.Popen(
            [sys.executable, WRITER, tmp_path], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            seen = [int(writer.stdout.readline()) for _ in range(wanted)]
            time.sleep(0.001 * wanted)  # another moment of the next one
            writer.kill()
            seen += [int(line) for line in writer.stdout if line.endswith("\n")]
        (path,) = (tmp_path / "data" / "crl").glob("*.crl")
        filed = [CRL.parse(each.read_bytes()).number for each in (path, path.with_suffix(".pem"))]
        assert [highest, *seen] == sorted({highest, *seen})
        assert all(number >= seen[-1] for number in filed)
        highest = max([*seen, *filed])


@pytest.mark.timeout(120)
def test_on_a_full_disk_the_old_file_stays_whole_and_the_new_one_follows(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    """See `crl_on_full_disk.py`."""
    ended = subprocess.run(
        [*own_mounts, sys.executable, FULL_DISK, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr


# Rotations.


def become(desk: Desk) -> CertificateAuthority:
    """Have the next CA sign, as a rotation does."""
    new = prepare_next(desk.certs, desk.files.current(), lambda: b"", desk.now)
    put_in_force(desk.certs, [new.certificate], new.bundle)
    discard_next(desk.certs, new.certificate)
    return new


async def test_the_next_ca_has_one_before_it_signs_anything(desk: Desk) -> None:
    """A peer that checks all lists must have it before the first certificate comes."""
    new = prepare_next(desk.certs, desk.files.current(), lambda: b"", desk.now)
    await desk.published()
    (await desk.published(new)).check(new.certificate, desk.now)


async def test_a_ca_that_gave_way_lists_what_is_revoked_as_long_as_its_key_is_here(desk: Desk) -> None:
    new = become(desk)
    desk.revoke(5)
    desk.revoke(6, issuer=new)
    old = await desk.published()
    young = await desk.published(new)
    assert (5 in old, 6 in old, 5 in young, 6 in young) == (True, False, False, True)
    assert name_of(new) != name_of(CA)


async def test_the_last_one_of_a_ca_whose_key_is_gone_stays_until_it_is_stale(desk: Desk) -> None:
    last = await desk.published()
    become(desk)
    last = await desk.published()
    for place in (desk.certs / "ca").glob("retired-*"):
        shutil.rmtree(place)
    desk.revoke(5)
    desk.now = last.next_update
    assert await desk.published() == last
    desk.now += SECOND
    await desk.publisher.publish()
    assert desk.publisher.page(f"/crl/{name_of(CA)}.crl") is None
    assert not list(desk.directory.glob(f"*{name_of(CA)}*"))
    assert desk.publisher.detail == "current"


async def test_one_that_is_gone_stays_over_a_restart_too(desk: Desk, tmp_path: Path) -> None:
    await desk.published()
    new = become(desk)
    for place in (desk.certs / "ca").glob("retired-*"):
        shutil.rmtree(place)
    other = Desk(desk.engine, tmp_path)
    await other.publisher.load()
    await other.published(new)
    assert other.shown() == desk.shown()


async def test_a_ca_beside_that_cannot_be_used_is_named_once_and_hinders_nobody(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    new = become(desk)
    (key,) = (desk.certs / "ca").glob("retired-*/key.pem")
    key.resolve().write_bytes(b"torn")
    for _ in range(3):
        await desk.publisher.publish()
    await desk.published(new)
    told = [each for each in caplog.records if each.message == "a CA beside the one in force cannot be used"]
    assert len(told) == 1
    assert desk.publisher.detail == "current"


# What is in the way.


async def test_without_a_ca_there_is_none_and_it_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with desk_in(tmp_path) as desk:
        for _ in range(3):
            await desk.publisher.publish()
        assert desk.publisher.detail == "none, unsigned"
        assert [each.message for each in caplog.records].count("a crl is not published") == 1
        save_authority(desk.certs, Layout.PARALLAX, CA)
        await desk.published()
        assert desk.publisher.detail == "current"


async def test_a_key_with_a_passphrase_needs_it_and_is_used_once_it_is_there(tmp_path: Path) -> None:
    save_authority(tmp_path / "certs", Layout.PARALLAX, CA, b"secret")
    async with desk_in(tmp_path) as desk:
        await desk.publisher.publish()
        assert "needs a passphrase" in desk.publisher.obstacles[Obstacle.UNSIGNED]
        desk.passphrase = b"secret"
        await desk.published()
        assert desk.publisher.obstacles == {}


async def test_when_the_key_is_gone_the_last_one_stays_and_is_called_stale(desk: Desk) -> None:
    last = await desk.published()
    (desk.certs / "ca" / "key.pem").unlink()
    desk.now = last.next_update + SECOND
    await desk.publisher.publish()
    assert desk.shown() == last
    assert desk.publisher.detail == "stale since 2026-06-02T12:00:00Z, unsigned"
    with pytest.raises(Expired):
        desk.shown().check(CA.certificate, desk.now)


async def test_a_ca_that_has_expired_signs_none(desk: Desk) -> None:
    desk.now = CA.certificate.not_valid_after_utc + SECOND
    await desk.publisher.publish()
    assert desk.publisher.published == []
    assert "expired at" in desk.publisher.obstacles[Obstacle.UNSIGNED]


async def test_what_cannot_be_numbered_is_not_shown_and_is_tried_again(desk: Desk, tmp_path: Path) -> None:
    before = await desk.published()
    desk.revoke(5)
    database = tmp_path / "data" / "parallax.db"
    database.rename(tmp_path / "away")
    await desk.publisher.publish()
    assert desk.shown() == before
    assert list(desk.publisher.obstacles) == [Obstacle.UNRECORDED]
    (tmp_path / "away").rename(database)
    assert 5 in await desk.published()


async def test_what_cannot_be_written_is_shown_and_the_file_follows_under_the_same_number(desk: Desk) -> None:
    before = await desk.published()
    shutil.rmtree(desk.directory)
    desk.directory.write_bytes(b"in the way")
    desk.revoke(5)
    for _ in range(3):
        await desk.publisher.publish()
    shown = desk.shown()
    assert (5 in shown, shown.number - before.number) == (True, 1)
    assert desk.publisher.detail == "current, unwritten"
    desk.directory.unlink()
    assert await desk.published() == shown


async def test_what_is_shown_is_recorded(desk: Desk) -> None:
    crl = await desk.published()
    record = await desk.engine.get(f"crls/{name_of(CA)}")
    assert record is not None
    assert json.loads(record.value or b"")["number"] == crl.number


# What is shown.


async def test_the_index_names_all_of_them(desk: Desk) -> None:
    new = become(desk)
    await desk.published()
    page = desk.publisher.page("/crl/")
    assert page is not None
    listed = {each["issuer"]: each for each in json.loads(page.body)}
    assert listed.keys() == {name_of(CA), name_of(new)}
    assert listed[name_of(CA)]["der"] == f"/crl/{name_of(CA)}.crl"
    assert listed[name_of(CA)]["number"] == desk.shown().number


@pytest.mark.parametrize(
    "path",
    [
        "/crl",
        "/crl/x.crl",
        "/crl/../parallax.db",
        "/crl//etc/passwd",
        "/crl/{issuer}",
        "/crl/{issuer}.key",
        "/crl/{issuer}.crl/",
        "/crl/../crl/{issuer}.crl",
        "/crl/{issuer}.crl.pem",
        "/CRL/{issuer}.crl",
    ],
)
async def test_only_what_is_published_is_shown(desk: Desk, path: str) -> None:
    await desk.published()
    assert desk.publisher.page(path.format(issuer=name_of(CA))) is None


async def test_no_cache_may_keep_one_for_longer_than_a_minute_or_until_it_is_stale(desk: Desk) -> None:
    crl = await desk.published()
    path = f"/crl/{name_of(CA)}.crl"
    for left, age in ((LIFETIME, timedelta(minutes=1)), (20 * SECOND, 20 * SECOND)):
        desk.now = crl.next_update - left
        page = desk.publisher.page(path)
        assert page is not None
        assert page.max_age == age


@pytest.mark.timeout(120)
async def test_whoever_fetches_while_lists_change_gets_a_whole_one_and_never_an_older_one(desk: Desk) -> None:
    await desk.published()
    url, stop = f"/crl/{name_of(CA)}.crl", asyncio.Event()
    seen: list[list[int]] = [[], [], []]

    def follow(port: int, numbers: list[int]) -> None:
        """Note the numbers of all lists seen, each fetched again only if it is another."""
        etag = ""
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            while not stop.is_set():
                connection.request("GET", url, headers={"If-None-Match": etag})
                answer = connection.getresponse()
                body, etag = answer.read(), answer.headers["etag"]
                if answer.status == 200:
                    crl = CRL.parse(body)
                    crl.check(CA.certificate, NOW)
                    numbers.append(crl.number)

    async def all_have_seen(number: int) -> None:
        while not all(numbers[-1:] == [number] for numbers in seen):
            await asyncio.sleep(0.01)

    listener = MetricsListener(
        "127.0.0.1:0", CollectorRegistry(), lambda: Readiness(ready=True), desk.publisher.page
    )
    async with listener, asyncio.timeout(100), asyncio.TaskGroup() as readers:
        for numbers in seen:
            readers.create_task(asyncio.to_thread(follow, listener.port, numbers))
        try:
            await all_have_seen(desk.shown().number)
            for start in range(0, 30_000, 3_000):  # of several pieces
                desk.revoke(*range(start, start + 3_000))
                await desk.publisher.publish()
            await all_have_seen(desk.shown().number)
        finally:
            stop.set()
    for numbers in seen:
        assert len(numbers) > 1
        assert numbers == sorted(set(numbers))


async def test_metrics_show_each_and_what_is_in_the_way(desk: Desk) -> None:
    registry = CollectorRegistry()
    registry.register(PublishedCRLs(desk.publisher))
    desk.revoke(5, 6)
    crl = await desk.published()
    (desk.certs / "ca" / "key.pem").unlink()
    await desk.publisher.publish()
    labels = {"issuer": name_of(CA)[:8]}
    for name, value in (
        ("parallax_crl_next_update_timestamp_seconds", crl.next_update.timestamp()),
        ("parallax_crl_number", crl.number),
        ("parallax_crl_entries", 2),
    ):
        assert registry.get_sample_value(name, labels) == value
    for reason, value in (("unsigned", 1), ("unrecorded", 0), ("unwritten", 0)):
        assert registry.get_sample_value("parallax_crl_obstacle", {"reason": reason}) == value
