"""One CRL per issuer, for whoever asks: signed once something is revoked, and before the last is stale."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Final, TypeAlias

from parallax.control_plane.engines.engine import ABSENT, Engine, Event, Write
from parallax.control_plane.revoked import Revoked
from parallax.runtime.telemetry import Page
from parallax.security.authority import CertificateAuthority
from parallax.security.crl import CRL, RevokedSerial, check_may_sign, issue_crl, next_number, still_listed
from parallax.security.errors import ConfigError, Unavailable, VerificationError
from parallax.security.files import PUBLIC, File, read_file, remove_file, replace_file, show, writing
from parallax.security.keys import key_id

logger = logging.getLogger(__name__)

FOLDER: Final = "crl"
INDEX: Final = f"/{FOLDER}/"
RECORDS: Final = "crls/"
GATHER_S: Final = 0.25  # what is revoked within it goes into one list
LOOK_S: Final = 5.0  # the clock and the files of CAs change without anybody saying so
MAX_BYTES: Final = 256 << 20  # some five million entries
MAX_AGE: Final = timedelta(minutes=1)  # in caches: a day would hide what was revoked meanwhile

_NAME: Final = re.compile(r"[0-9a-f]{64}")  # the issuer's key id: how the ledger calls it

Withdrawn: TypeAlias = Mapping[int, RevokedSerial]
"""By serial number, so each certificate once."""

Withdrawing = Callable[[bytes, Sequence[Revoked] | None], Awaitable[Withdrawn]]
"""What the issuer with that key id has withdrawn: by those changes, or at all."""


class Obstacle(StrEnum):
    """What keeps a list from being published."""

    UNSIGNED = "unsigned"
    """The CA in force, or its key, is not on this host, or it cannot sign."""
    UNRECORDED = "unrecorded"
    """Its number cannot be recorded."""
    UNWRITTEN = "unwritten"
    """It is shown, but its file cannot be replaced."""


@dataclass(frozen=True, slots=True)
class Issuers:
    """
    Whose lists can be signed here; both may block.

    Args:
        in_force: Raises ConfigError if there is none.
        beside: Those that are to follow or went before.
    """

    in_force: Callable[[], CertificateAuthority]
    beside: Callable[[], Sequence[CertificateAuthority]]


@dataclass(frozen=True, slots=True)
class Published:
    """
    A list as everybody may have it.

    Args:
        issuer: The id of its key.
        revoked: What it was made of; None: not known, for it is by an earlier process, or was not kept up.
    """

    issuer: str
    crl: CRL
    pem: bytes = field(repr=False)
    etag: str
    revoked: Withdrawn | None = field(repr=False)

    @classmethod
    def of(cls, issuer: str, crl: CRL, revoked: Withdrawn | None = None) -> Published:
        """*crl* in the other forms in which it is shown."""
        return cls(issuer, crl, crl.pem, hashlib.sha256(crl.der).hexdigest(), revoked)

    def is_due(self, now: datetime) -> bool:
        """Whether another has to follow by time: half of its life is over, or the clock was set back."""
        crl = self.crl
        return self.revoked is None or not (
            crl.this_update <= now < crl.this_update + (crl.next_update - crl.this_update) / 2
        )

    def page(self, body: bytes, media_type: str, now: datetime) -> Page:
        """What the listener is to answer."""
        max_age = min(MAX_AGE, self.crl.next_update - now)
        return Page(body, media_type, self.etag, self.crl.this_update, max_age)


class CRLPublisher:
    """
    Keeps one list of each issuer published: over HTTP, see `page`, and as files.

    A list is numbered in the engine before anybody sees it, so that after a crash at any moment the next
    one has a higher number. The last list of an issuer that is gone stays until it is stale.

    Args:
        directory: For the files; made if need be.
        clock: Aware UTC.
        lifetime: How long a list is good; half-way through it is replaced.

    Attributes:
        obstacles: What is in the way now, and why.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        issuers: Issuers,
        withdrawing: Withdrawing,
        clock: Callable[[], datetime],
        lifetime: timedelta,
    ) -> None:
        self._engine = engine
        self._directory = directory
        self._issuers = issuers
        self._withdrawing = withdrawing
        self._clock = clock
        self._lifetime = lifetime
        self._published: dict[str, Published] = {}
        self._unwritten: set[str] = set()
        self._changes: list[Revoked] | None = []  # since the last lists; None: who knows
        self._woken = asyncio.Event()
        self.obstacles: dict[Obstacle, str] = {}

    @property
    def published(self) -> list[Published]:
        """What is shown, those first that are stale first."""
        return sorted(self._published.values(), key=lambda each: each.crl.next_update)

    @property
    def detail(self) -> str:
        """How it stands, for `/readyz`; the log has the whole reason."""
        now = self._clock()
        if stale := [each for each in self.published if each.crl.next_update < now]:
            state = f"stale since {stale[0].crl.next_update:%Y-%m-%dT%H:%M:%SZ}"
        else:
            state = "current" if self._published else "none"
        return ", ".join([state, *self.obstacles])

    def note(self, change: Revoked | None = None) -> None:
        """Have *change*, which is in force, listed within a second; None: look at all that is revoked."""
        self._changes = _joined(self._changes, [change] if change else None)
        self._woken.set()

    def page(self, path: str) -> Page | None:
        """The list or index at *path* of the metrics listener."""
        if not path.startswith(INDEX):
            return None
        if path == INDEX:
            return self._index()
        issuer, _, form = path.removeprefix(INDEX).partition(".")
        published = self._published.get(issuer)
        if published is None:
            return None
        match form:
            case "crl":
                return published.page(published.crl.der, "application/pkix-crl", self._clock())
            case "pem":
                return published.page(published.pem, "application/x-pem-file", self._clock())
        return None

    async def load(self) -> None:
        """Show what an earlier process has published, until there is more."""
        self._published = await asyncio.to_thread(self._read)

    async def run(self) -> None:
        """Publish whatever is due, until cancelled."""
        while True:
            self._woken.clear()
            begun = monotonic()
            await self.publish()
            took = monotonic() - begun
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()
                    await asyncio.sleep(max(GATHER_S, took))  # a long list takes half of our time at most

    async def publish(self) -> None:
        """Publish each list that is due by time, or that lacks what was noted."""
        changes, self._changes = self._changes, []
        obstacles: dict[Obstacle, str] = {}
        now = self._clock()
        authorities = await asyncio.to_thread(self._signers, now, obstacles)
        for issuer in self._published.keys() - authorities.keys():  # who may be back, and has missed these
            self._published[issuer] = replace(self._published[issuer], revoked=None)
        if not obstacles:  # else it is not known who is gone
            self._withdraw(authorities.keys(), now)
        for issuer, authority in authorities.items():
            try:
                await self._update(issuer, authority, now, changes)
            except Unavailable as exc:
                obstacles[Obstacle.UNRECORDED] = str(exc)
        try:
            await self._file()
        except ConfigError as exc:
            obstacles[Obstacle.UNWRITTEN] = str(exc)
        if obstacles:
            self._changes = _joined(changes, self._changes)
        self._tell(obstacles)

    async def _update(
        self, issuer: str, authority: CertificateAuthority, now: datetime, changes: list[Revoked] | None
    ) -> None:
        """Have a list of *authority* that is not due and lists what is revoked."""
        published = self._published.get(issuer)
        if published is None or published.is_due(now):
            revoked = await self._withdrawing(bytes.fromhex(issuer), None)
        elif changes == []:
            return
        else:
            found = await self._withdrawing(bytes.fromhex(issuer), changes)
            revoked = found if changes is None else {**(published.revoked or {}), **found}
            if published.revoked == revoked:
                return
        key = f"{RECORDS}{issuer}"
        record = await self._engine.get(key)
        last = json.loads(record.value) if record and record.value else {}
        number = next_number(last.get("number", 0), now)
        # A list that began in the future shows that the clock was wrong, and lets nothing leave.
        before = min(datetime.fromisoformat(last["this_update"]), now) if last else None

        def issue() -> Published:
            listed = still_listed(revoked.values(), before, self._lifetime)
            return Published.of(issuer, issue_crl(authority, number, listed, now, self._lifetime), revoked)

        shown = await asyncio.to_thread(issue)
        crl = shown.crl
        detail = {
            "number": str(number),
            "entries": str(len(crl)),
            "next_update": crl.next_update.isoformat(),
        }
        value = json.dumps({"number": number, "this_update": crl.this_update.isoformat()}).encode()
        # Not audited: it follows from what was, and from the time.
        event = Event("crl/published", json.dumps({"issuer": issuer, **detail}).encode())
        await self._engine.commit(event, [Write(key, value, record.revision if record else ABSENT)])
        self._published[issuer] = shown
        self._unwritten.add(issuer)
        logger.info("crl published", extra={"issuer": issuer, **detail})

    def _signers(self, now: datetime, obstacles: dict[Obstacle, str]) -> dict[str, CertificateAuthority]:
        """Who can sign lists here, by the id of their keys."""
        found: dict[str, CertificateAuthority] = {}
        try:
            authority = self._issuers.in_force()
            found[check_signer(authority, now)] = authority
        except (ConfigError, VerificationError) as exc:
            obstacles[Obstacle.UNSIGNED] = str(exc)
        for authority in self._issuers.beside():
            with suppress(VerificationError):  # one that has expired, for instance
                found.setdefault(check_signer(authority, now), authority)
        return found

    def _withdraw(self, issuers: Iterable[str], now: datetime) -> None:
        """Show no longer what is stale and of an issuer that is gone."""
        for issuer in self._published.keys() - issuers:
            if self._published[issuer].crl.next_update < now:
                del self._published[issuer]
                self._unwritten.add(issuer)

    async def _file(self) -> None:
        """`_write` in a thread. That cannot be cancelled: who tries waits until it has written."""
        writing = asyncio.create_task(asyncio.to_thread(self._write))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise

    def _write(self) -> None:
        """Have the files follow what is shown; raises ConfigError."""
        for issuer in sorted(self._unwritten):
            published = self._published.get(issuer)
            with writing(self._directory) as place:
                if published is not None:
                    replace_file(place, f"{issuer}.crl", File(published.crl.der, PUBLIC))
                    replace_file(place, f"{issuer}.pem", File(published.pem, PUBLIC))
                else:
                    remove_file(place, f"{issuer}.crl")
                    remove_file(place, f"{issuer}.pem")
            self._unwritten.remove(issuer)

    def _read(self) -> dict[str, Published]:
        found = {}
        for path in sorted(self._directory.glob("*.crl")):
            if _NAME.fullmatch(path.stem):
                try:
                    crl = load_crl(path, remedy="remove it")
                except ConfigError as exc:
                    logger.warning("a published crl cannot be read", extra={"cause": str(exc)})
                else:
                    found[path.stem] = Published.of(path.stem, crl)
        return found

    def _index(self) -> Page:
        lists = [
            {
                "issuer": each.issuer,
                "name": each.crl.issuer.rfc4514_string(),
                "number": each.crl.number,
                "this_update": each.crl.this_update.isoformat(),
                "next_update": each.crl.next_update.isoformat(),
                "entries": len(each.crl),
                "der": f"{INDEX}{each.issuer}.crl",
                "pem": f"{INDEX}{each.issuer}.pem",
            }
            for each in self.published
        ]
        body = json.dumps(lists).encode()
        modified = max((each.crl.this_update for each in self.published), default=self._clock())
        etag = hashlib.sha256(body).hexdigest()
        return Page(body, "application/json", etag, modified, timedelta(0))

    def _tell(self, obstacles: dict[Obstacle, str]) -> None:
        """Log what is in the way, once for each cause."""
        for kind, cause in obstacles.items():
            if self.obstacles.get(kind) != cause:
                logger.warning("a crl is not published", extra={"obstacle": kind.value, "cause": cause})
        if self.obstacles and not obstacles:
            logger.info("crls are published again")
        self.obstacles = obstacles


def _joined(before: list[Revoked] | None, after: list[Revoked] | None) -> list[Revoked] | None:
    """All changes, in their order; None once any are not known."""
    return None if before is None or after is None else [*before, *after]


def load_crl(path: Path, *, remedy: str) -> CRL:
    """The list in the file *path*, unchecked; raises ConfigError, which names it."""
    content = read_file(path, remedy=remedy, max_bytes=MAX_BYTES)
    try:
        return CRL.parse(content)
    except ConfigError as exc:
        raise ConfigError(f"{show(path)}: {exc}: {remedy}") from None


def check_signer(authority: CertificateAuthority, now: datetime) -> str:
    """The id of the key of *authority*, if it can sign lists at *now*; raises VerificationError."""
    authority.check_usable(now)
    check_may_sign(authority.certificate)
    return key_id(authority.certificate.public_key()).hex()
