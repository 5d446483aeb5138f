"""Rotating the root: the stages in the engine, and the files and the fleet following them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography.x509 import Certificate

from parallax.control_plane.engines.engine import ABSENT, MAX_BYTES, MAX_WRITES, Engine, Event, Write
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issuer import IssuerFiles
from parallax.control_plane.root_rotation import RootRotation, Situation, Stage, advance, missing
from parallax.control_plane.survey import Survey
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore, check_usable
from parallax.security.errors import (
    ConfigError,
    InvalidRequest,
    InvalidTransition,
    ParallaxError,
    VerificationError,
)
from parallax.security.identity import Identity
from parallax.security.keys import generate_key, key_id
from parallax.security.profiles import sans_of
from parallax.security.provider import Keep
from parallax.security.request import new_request
from parallax.security.succession import check_replaceable, discard_next, prepare_next, put_in_force

logger = logging.getLogger(__name__)

RECORD: Final = "roots/rotation"
ADOPTED: Final = "roots/adopted/"
_AGE: Final = timedelta(seconds=5)  # of what decides about waiting on; before a step it is looked again
PAUSE_S: Final = 2.0  # between two looks while a rotation is under way; an acknowledgement wakes it


@dataclass(frozen=True, slots=True)
class Own:
    """
    An identity of the control plane itself.

    Args:
        keep: Puts other credentials of it in force; None: its files are somebody else's to write.
    """

    store: CredentialStore
    keep: Keep | None

    @property
    def identity(self) -> Identity:
        """Which one."""
        return self.store.identity

    def lacks(self, bundle: TrustBundle) -> bool:
        """Whether another one than *bundle* is in force."""
        return self.store.current.bundle.hash != bundle.hash

    def is_below(self, roots: Sequence[Certificate], now: datetime) -> bool:
        """Whether its leaf is good for those who trust *roots* alone."""
        current = self.store.current
        try:
            check_usable(
                Credentials(current.chain, current.key, TrustBundle(tuple(roots))), self.identity, now
            )
        except VerificationError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Desk:
    """
    What a rotation is done with.

    Args:
        certs_dir: Where the CA lies.
        issuer: The CA in force; blocks.
        issuance: For the control plane's own leaves.
        survey: What the ledger says, at most so old.
        unentered: How many certificates were seen that the ledger does not tell of yet.
        live: Who is connected.
        clock: Aware UTC.
    """

    certs_dir: Path
    issuer: IssuerFiles
    issuance: Issuance
    survey: Callable[[timedelta], Awaitable[Survey]]
    unentered: Callable[[], int]
    live: Callable[[], frozenset[Identity]]
    clock: Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class RootStatus:
    """
    How it stands.

    Args:
        rotation: None while there is none.
        missing: Who keeps it from its next stage.
        cannot_renew: Who has to be issued a certificate by hand.
        adoption: Which part of the fleet has the roots in force that it is told.
        problem: What keeps us from the next step ourselves; empty if nothing does.
    """

    rotation: RootRotation | None
    missing: tuple[Identity, ...]
    cannot_renew: tuple[Identity, ...]
    adoption: float
    problem: str


class Roots:
    """
    Takes the fleet from one root to the next.

    A stage is first committed, then made true: `run` makes the files what the stage says, at the start as
    well, so that a crash anywhere loses nothing.

    Attributes:
        adoption: As of the last look, for metrics.
    """

    def __init__(self, engine: Engine, desk: Desk, own: Sequence[Own]) -> None:
        self._engine = engine
        self._desk = desk
        self._own = own
        self._rotation: RootRotation | None = None
        self._revision = ABSENT
        self._is_loaded = False
        self._adopted: dict[Identity, bytes] = {}
        self._recorded = set[Identity]()  # whose acknowledgement is in the engine
        self._problem = ""
        self._lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self.adoption = 1.0

    @property
    def successor(self) -> bytes:
        """The key id of the root from which everybody is to have a leaf by now; empty if there is none."""
        rotation = self._rotation
        if rotation is None or rotation.stage is not Stage.ACTIVE:
            return b""
        return key_id(rotation.new.public_key())

    async def run(self) -> None:
        """Go from stage to stage as soon as that may be, until cancelled."""
        while True:
            self._woken.clear()
            try:
                async with self._lock:
                    await self._load()
                    while await self._step():
                        pass
                self._note("")
            except ParallaxError as exc:
                self._note(str(exc))
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S if self._rotation is not None else None):
                    await self._woken.wait()

    async def rotate(self, without: Collection[str] = (), *, force: bool = False) -> RootStatus:
        """
        Begin a rotation unless one is under way, and do not wait for those *without* whom it may go on.

        Raises:
            ConfigError: The CA or our own files cannot be replaced.
            InvalidRequest: Somebody is left out without *force*, or is nobody who is waited for.
            StorageFailed: It cannot be recorded.
        """
        if without and not force:
            raise InvalidRequest(
                "whoever is left out loses the fleet if it comes back with the old root alone: "
                "state --force if that is meant"
            )
        async with self._lock:
            await self._load()
            situation = await self._situation(timedelta(0))
            known = {member.short for member in situation.members | situation.unreplaced}
            if unknown := sorted(set(without) - known):
                raise InvalidRequest(f"nobody waits for {', '.join(unknown)[:200]}; see 'parallax ca status'")
            rotation = self._rotation
            if rotation is None:
                rotation = await asyncio.to_thread(self._prepare)
            await self._commit(rotation.excluding(without))
        self._woken.set()
        return await self.status()

    async def abort(self) -> RootStatus:
        """
        Take back a rotation whose new root does not sign yet.

        Raises:
            InvalidTransition: It does, or there is none.
        """
        async with self._lock:
            await self._load()
            if self._rotation is None:
                raise InvalidTransition("there is no rotation of the root to abort")
            await self._commit(self._rotation.abort())
        self._woken.set()
        return await self.status()

    async def status(self) -> RootStatus:
        """How it stands."""
        async with self._lock:
            await self._load()
            survey = await self._desk.survey(_AGE)
            situation = self._judge(survey)
            rotation = self._rotation
            awaited = missing(rotation, situation) if rotation else ()
            others = survey.cannot_renew() - {own.identity for own in self._own}
            return RootStatus(rotation, awaited, tuple(sorted(others, key=str)), self.adoption, self._problem)

    async def acknowledge(self, identity: Identity, bundle_hash: bytes) -> None:
        """
        Note that *identity* trusts the bundle with *bundle_hash*; without a rotation it is of no interest.

        Written down is the first time that it is the right one: so nobody keeps the disk busy by telling now
        this, now that. What became of it since, whoever is connected tells again after a restart.

        Raises:
            StorageFailed: It cannot be recorded, so it does not count.
        """
        await self._load()
        rotation = self._rotation
        if rotation is None or self._adopted.get(identity) == bundle_hash:
            return
        if rotation.bundle.hash != bundle_hash:
            self._adopted.pop(identity, None)
            return
        if identity not in self._recorded:
            key = f"{ADOPTED}{identity.trust_domain}/{identity.short}"
            await self._engine.commit(
                Event("roots/adopted", str(identity).encode()), [Write(key, bundle_hash)]
            )
            self._recorded.add(identity)
        self._adopted[identity] = bundle_hash
        self._woken.set()

    async def _load(self) -> None:
        """Read what is stored, once; afterwards this process alone writes it."""
        if self._is_loaded:
            return
        record = await self._engine.get(RECORD)
        if record is None or record.value is None:
            self._is_loaded = True
            return
        after, adopted = "", dict[Identity, bytes]()
        while page := await self._engine.scan(ADOPTED, after):
            for each in page:
                domain, short = each.key.removeprefix(ADOPTED).split("/", 1)
                adopted[Identity.parse_short(short, domain)] = each.value or b""
            after = page[-1].key
        self._rotation, self._revision = RootRotation.decode(record.value), record.revision
        self._adopted, self._recorded, self._is_loaded = adopted, set(adopted), True

    async def _step(self) -> bool:
        """Make true what the stage says, then go to the next one if that may be; whether there was one."""
        rotation = self._rotation
        if rotation is None:
            self.adoption = 1.0
            return False
        await self._realize(rotation)
        if rotation.stage in {Stage.RETIRING, Stage.ABORTING}:
            await self._settle(rotation)
            return True
        following = advance(rotation, await self._situation(_AGE))
        if following is None or self._desk.unentered():
            return False
        if advance(rotation, await self._situation(timedelta(0))) is None:
            return False
        await self._commit(following)
        return True

    async def _realize(self, rotation: RootRotation) -> None:
        """Have files and own credentials follow; what is so already costs a look."""
        desk = self._desk
        shrinks = rotation.stage in {Stage.RETIRING, Stage.ABORTING}
        if shrinks:  # first: the CA issues only below roots that we trust
            await asyncio.to_thread(put_in_force, desk.certs_dir, rotation.issuer, rotation.bundle)
        for own in self._own:
            if own.lacks(rotation.bundle):
                before = own.store.current
                await self._keep(own, Credentials(before.chain, before.key, rotation.bundle))
        if not shrinks:
            await asyncio.to_thread(put_in_force, desk.certs_dir, rotation.issuer, rotation.bundle)
        if rotation.stage is Stage.ACTIVE:
            for own in self._own:
                if not own.is_below([rotation.new], desk.clock()):
                    await self._renew(own)

    async def _renew(self, own: Own) -> None:
        before, key = own.store.current, generate_key()
        request = new_request(own.identity, key, sans_of(before.leaf, own.identity))
        issued = await self._desk.issuance.renew(own.identity, before.leaf, request)
        await self._keep(own, Credentials(issued.chain, key, issued.bundle))

    async def _keep(self, own: Own, new: Credentials) -> None:
        if own.keep is None:
            raise ConfigError(_NOT_OURS.format(own.identity))
        await own.keep(new, own.store.current)

    async def _settle(self, rotation: RootRotation) -> None:
        """End a rotation of which all is done."""
        await asyncio.to_thread(discard_next, self._desk.certs_dir)
        while page := await self._engine.scan(ADOPTED, limit=MAX_WRITES):
            await self._engine.commit(Event("roots/forgotten"), [Write(each.key, None) for each in page])
        event = Event(f"roots/{Stage.IDLE}", rotation.encode())
        await self._engine.commit(event, [Write(RECORD, None, self._revision)])
        self._rotation, self._revision = None, ABSENT
        self._adopted, self._recorded = {}, set()
        logger.info("root rotation ended", extra={"how": rotation.stage.value})

    def _prepare(self) -> RootRotation:
        authority = self._desk.issuer.current()
        check_replaceable(self._desk.certs_dir, authority)
        roots = self._own[0].store.current.bundle.roots if self._own else ()
        for own in self._own:
            if own.keep is None:
                raise ConfigError(_NOT_OURS.format(own.identity))
        if authority.certificate not in roots:
            raise ConfigError("the CA on this host is none of those that this control plane trusts")
        new = prepare_next(self._desk.certs_dir, authority, self._desk.issuer.passphrase, self._desk.clock())
        return RootRotation(Stage.PREPARED, roots, authority.certificate, new)

    async def _commit(self, rotation: RootRotation) -> None:
        content = rotation.encode()
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"the roots and those left out do not fit into {MAX_BYTES} bytes: "
                "trust fewer roots, or leave fewer out at a time"
            )
        write = Write(RECORD, content, self._revision)
        (self._revision,) = await self._engine.commit(Event(f"roots/{rotation.stage}", content), [write])
        before, self._rotation = self._rotation, rotation
        if before is None or before.stage is not rotation.stage or before.without != rotation.without:
            logger.info(
                "root rotation",
                extra={"stage": rotation.stage.value, "without": ", ".join(sorted(rotation.without))},
            )

    async def _situation(self, age: timedelta) -> Situation:
        return self._judge(await self._desk.survey(age))

    def _judge(self, survey: Survey) -> Situation:
        """The fleet as it is; of ourselves we know better than the ledger, for nobody authenticates us."""
        rotation, now = self._rotation, self._desk.clock()
        ours = frozenset(own.identity for own in self._own)
        unreplaced = frozenset[Identity]()
        if rotation is not None:
            old, new = rotation.old_issuer, key_id(rotation.new.public_key()).hex()
            unreplaced = (survey.unreplaced(old, new) - ours) | frozenset(
                own.identity for own in self._own if not own.is_below([rotation.new], now)
            )
        adopted = self._adopted | {own.identity: own.store.current.bundle.hash for own in self._own}
        situation = Situation(self._desk.live() | ours, survey.holders, adopted, unreplaced)
        self.adoption = situation.adoption(rotation.bundle) if rotation is not None else 1.0
        return situation

    def _note(self, problem: str) -> None:
        if problem != self._problem and problem:
            logger.warning("the root rotation does not go on", extra={"cause": problem})
        self._problem = problem


_NOT_OURS: Final = (
    "the files of {} are not ours to write: put certificates of the new root there by hand, "
    "or have the control plane use the layout parallax"
)
