"""Rotating the CA and its root: the stages in the engine, and the files and the fleet following them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.x509 import Certificate

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.engine import ABSENT, MAX_BYTES, MAX_WRITES, Engine, Event, Write
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issuer import IssuerFiles
from parallax.control_plane.root_rotation import RootRotation, Situation, Stage, advance, missing
from parallax.control_plane.survey import Survey
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore, check_usable
from parallax.security.errors import (
    ConfigError,
    InvalidRequest,
    InvalidTransition,
    ParallaxError,
    Unavailable,
    VerificationError,
)
from parallax.security.files import show
from parallax.security.identity import Identity
from parallax.security.keys import check_strength, generate_key, key_id
from parallax.security.path import find_path
from parallax.security.profiles import LeafProfile, sans_of
from parallax.security.provider import Keep
from parallax.security.request import new_request
from parallax.security.succession import discard_next, next_paths, prepare_next, put_in_force, read_next
from parallax.security.verification import Usage

logger = logging.getLogger(__name__)

RECORD: Final = "roots/rotation"
ADOPTED: Final = "roots/adopted/"
# Acknowledgements that nobody waits for, some 300 bytes each. Whoever is connected says it with each renewal.
MAX_IN_MIND: Final = 100_000
MAX_TOLD: Final = 50  # names of those left out, in one entry of the audit log
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

    def is_below(self, issuer: Certificate, now: datetime) -> bool:
        """Whether its leaf is good for those who trust *issuer* alone."""
        current = self.store.current
        try:
            check_usable(Credentials(current.chain, current.key, TrustBundle((issuer,))), self.identity, now)
        except VerificationError:
            return False
        return True

    def path_of(self, authority: CertificateAuthority, now: datetime) -> tuple[Certificate, ...]:
        """
        The way from the certificate of *authority* to its root, last.

        Another leaf of this identity proves it; nobody gets that.

        Raises:
            Expired, VerificationError: There is none now.
        """
        leaf = self.store.current.leaf
        profile = LeafProfile(sans=sans_of(leaf, self.identity))
        issued = authority.issue(self.identity, check_strength(leaf.public_key()), profile, now)
        return find_path(issued.chain, issued.bundle, now, Usage.CLIENT.oid)[1:]


@dataclass(frozen=True, slots=True)
class Desk:
    """
    What a rotation is done with.

    Args:
        certs_dir: Where the CA lies.
        issuer: The CA in force; blocks.
        issuance: For the control plane's own leaves.
        survey: What the ledger says; Unavailable while that is not known yet.
        unentered: How many certificates were seen that the ledger does not tell of yet.
        live: Who is connected.
        clock: Aware UTC.
    """

    certs_dir: Path
    issuer: IssuerFiles
    issuance: Issuance
    survey: Callable[[], Awaitable[Survey]]
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
    Takes the fleet from one CA to the next, and from its root to that of the next.

    A stage is first committed, then made true: `run` makes the files what the stage says, at the start as
    well, so that a crash anywhere loses nothing.

    Attributes:
        adoption: As of the last look, for metrics.
    """

    def __init__(self, engine: Engine, audit: AuditLog, desk: Desk, own: Sequence[Own]) -> None:
        self._engine = engine
        self._audit = audit
        self._desk = desk
        self._own = own
        self._rotation: RootRotation | None = None
        self._revision = ABSENT
        self._adopted: dict[Identity, bytes] = {}
        self._recorded = set[Identity]()  # whose acknowledgement is in the engine
        self._problem = ""
        self._lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self.adoption = 1.0

    @property
    def _us(self) -> str:
        return str(self._own[0].identity)

    @property
    def successor(self) -> bytes:
        """The key id of the CA from which everybody is to have a leaf by now; empty if there is none."""
        rotation = self._rotation
        if rotation is None or rotation.stage is not Stage.ACTIVE:
            return b""
        return key_id(rotation.new[0].public_key())

    async def load(self) -> None:
        """
        Read how far it has come, before anybody is told; from then on this process alone writes it.

        Raises:
            StorageFailed: It cannot be read.
        """
        record = await self._engine.get(RECORD)
        if record is None or record.value is None:
            return
        after = ""
        while page := await self._engine.scan(ADOPTED, after):
            for each in page:
                domain, short = each.key.removeprefix(ADOPTED).split("/", 1)
                self._adopted[Identity.parse_short(short, domain)] = each.value or b""
            after = page[-1].key
        self._rotation, self._revision = RootRotation.decode(record.value), record.revision
        self._recorded = set(self._adopted)
        self.adoption = 0.0 if self._rotation.replaces_root else 1.0  # until it is known

    async def run(self) -> None:
        """Go from stage to stage as soon as that may be, until cancelled."""
        while True:
            self._woken.clear()
            begun = monotonic()
            try:
                async with self._lock:
                    while await self._step():
                        pass
                self._note("")
            except ParallaxError as exc:
                self._note(str(exc))
            took = monotonic() - begun
            with suppress(TimeoutError):
                async with asyncio.timeout(max(PAUSE_S, took) if self._rotation is not None else None):
                    await self._woken.wait()
                    await asyncio.sleep(took)  # a large fleet tells so one by one: half of our time at most

    async def rotate(self, by: str, without: Collection[str] = (), *, force: bool = False) -> RootStatus:
        """
        Begin a rotation unless one is under way, and do not wait for those *without* whom it may go on.

        Args:
            by: Who asks for it, for the audit log.

        Raises:
            ConfigError: The CA or our own files cannot be replaced.
            InvalidRequest: Somebody is left out without *force*, or is nobody who is waited for.
            StorageFailed: It cannot be recorded.
            Unavailable: It is not known yet who is waited for, so nobody can be left out.
        """
        if without and not force:
            raise InvalidRequest(
                "whoever is left out loses the fleet if it comes back with the old root alone: "
                "state --force if that is meant"
            )
        async with self._lock:
            if without:
                situation = await self._situation()
                known = {member.short for member in situation.members | situation.unreplaced}
                if unknown := sorted(set(without) - known):
                    raise InvalidRequest(
                        f"nobody waits for {', '.join(unknown)[:200]}; see 'parallax ca status'"
                    )
            rotation = self._rotation
            if rotation is None:
                rotation = await asyncio.to_thread(self._prepare)
            await self._commit(rotation.excluding(without), by)
        self._woken.set()
        return await self.status()

    async def abort(self, by: str) -> RootStatus:
        """
        Take back a rotation whose new CA does not sign yet; that stays where it lies.

        Args:
            by: Who asks for it, for the audit log.

        Raises:
            InvalidTransition: It does, or there is none.
        """
        async with self._lock:
            if self._rotation is None:
                raise InvalidTransition("there is no rotation of the root to abort")
            await self._commit(self._rotation.abort(), by)
        self._woken.set()
        return await self.status()

    async def status(self) -> RootStatus:
        """How it stands."""
        async with self._lock:
            rotation = self._rotation
            try:
                survey = await self._desk.survey()
            except Unavailable as exc:  # how far it has come is known nevertheless
                return RootStatus(rotation, (), (), self.adoption, self._problem or str(exc))
            situation = await self._judged(survey)
            awaited = await asyncio.to_thread(missing, rotation, situation) if rotation else ()
            ours = {own.identity for own in self._own}
            others = await asyncio.to_thread(lambda: sorted(survey.cannot_renew() - ours, key=str))
            return RootStatus(rotation, awaited, tuple(others), self.adoption, self._problem)

    async def acknowledge(self, identity: Identity, bundle_hash: bytes) -> None:
        """
        Note that *identity* trusts the bundle with *bundle_hash*.

        Where nobody waits for it, it is only kept in mind: the root of the next CA may be in that bundle
        already, and nobody says the same twice. Written down is the first time that it is the right one: so
        nobody keeps the disk busy by telling now this, now that. What became of it since, whoever is
        connected tells again after a restart.

        Raises:
            StorageFailed: It cannot be recorded, so it does not count.
        """
        rotation = self._rotation
        if rotation is None or rotation.is_decided:
            self._keep_in_mind(identity, bundle_hash)
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
        if self._adopted.get(identity) != bundle_hash:
            self._adopted[identity] = bundle_hash
            self._woken.set()

    def _keep_in_mind(self, identity: Identity, bundle_hash: bytes) -> None:
        """Who goes does not say so: those who said it the longest ago are forgotten."""
        self._adopted.pop(identity, None)
        self._adopted[identity] = bundle_hash
        while len(self._adopted) > MAX_IN_MIND:
            del self._adopted[next(iter(self._adopted))]

    async def _step(self) -> bool:
        """Make true what the stage says, then go to the next one if that may be; whether there was one."""
        rotation = self._rotation
        if rotation is None:
            self.adoption = 1.0
            return False
        await self._realize(rotation)
        if rotation.is_decided:
            await self._settle(rotation)
            return True
        following = await asyncio.to_thread(advance, rotation, await self._situation())
        if following is None or self._desk.unentered():
            return False
        # Once more, with what waited to be entered when it was looked first.
        if await asyncio.to_thread(advance, rotation, await self._situation()) is None:
            return False
        if following.stage is Stage.ACTIVE:  # it has lain there for as long as somebody was missing
            await asyncio.to_thread(self._check_next, rotation)
        await self._commit(following, self._us)
        return True

    async def _realize(self, rotation: RootRotation) -> None:
        """Have files and own credentials follow; what is so already costs a look."""
        desk = self._desk
        if rotation.is_decided:  # first: the CA issues only below roots that we trust
            await asyncio.to_thread(put_in_force, desk.certs_dir, rotation.signs, rotation.bundle)
        for own in self._own:
            if own.lacks(rotation.bundle):
                before = own.store.current
                await self._keep(own, Credentials(before.chain, before.key, rotation.bundle))
        if not rotation.is_decided:
            await asyncio.to_thread(put_in_force, desk.certs_dir, rotation.signs, rotation.bundle)
        if rotation.stage is Stage.ACTIVE:
            for own in self._own:
                if not own.is_below(rotation.new[0], desk.clock()):
                    await self._renew(own)

    async def _renew(self, own: Own) -> None:
        before, key = own.store.current, generate_key()
        issued = await self._desk.issuance.renew(own.identity, before.leaf, new_request(own.identity, key))
        await self._keep(own, Credentials(issued.chain, key, issued.bundle))

    async def _keep(self, own: Own, new: Credentials) -> None:
        if own.keep is None:
            raise ConfigError(_NOT_OURS.format(own.identity))
        await own.keep(new, own.store.current)

    async def _settle(self, rotation: RootRotation) -> None:
        """End a rotation of which all is done."""
        if rotation.stage is Stage.RETIRING:
            await asyncio.to_thread(discard_next, self._desk.certs_dir, rotation.new[0])
        while page := await self._engine.scan(ADOPTED, limit=MAX_WRITES):
            await self._engine.commit(Event("roots/forgotten"), [Write(each.key, None) for each in page])
        deed = _deed_of(rotation, Stage.IDLE, self._us)
        await self._audit.commit(deed, [Write(RECORD, None, self._revision)])
        self._rotation, self._revision, self._recorded = None, ABSENT, set()
        logger.info("root rotation ended", extra={"how": rotation.stage.value})

    def _prepare(self) -> RootRotation:
        desk, own = self._desk, self._own
        for each in own:
            if each.keep is None:
                raise ConfigError(_NOT_OURS.format(each.identity))
        authority = desk.issuer.current()
        old, *_ = [each.path_of(authority, desk.clock()) for each in own]
        roots = own[0].store.current.bundle.roots
        if old[-1] not in roots:
            raise ConfigError("the CA on this host is none of those that this control plane trusts")
        new = prepare_next(desk.certs_dir, authority, desk.issuer.passphrase, desk.clock())
        return RootRotation(Stage.PREPARED, roots, old, self._path_of_next(new))

    def _check_next(self, rotation: RootRotation) -> None:
        """Pass if what lies there is still the CA that is to sign, and can."""
        desk = self._desk
        new = self._path_of_next(read_next(desk.certs_dir, desk.issuer.current(), desk.issuer.passphrase))
        if new != rotation.new:
            cert = show(next_paths(desk.certs_dir).cert)
            raise ConfigError(f"{cert} is no more the CA that the fleet was told: restore it, or abort")

    def _path_of_next(self, authority: CertificateAuthority) -> tuple[Certificate, ...]:
        """See `Own.path_of`; we need leaves of it ourselves first of all."""
        try:
            path, *_ = [own.path_of(authority, self._desk.clock()) for own in self._own]
        except ParallaxError as exc:
            cert = show(next_paths(self._desk.certs_dir).cert)
            raise ConfigError(f"the CA in {cert} cannot take over: {exc}: put another there") from exc
        return path

    async def _commit(self, rotation: RootRotation, by: str) -> None:
        """
        Let *rotation* be how it stands.

        Whoever asks for it may go away meanwhile. What is written then must not go unnoticed here.
        """
        committing = asyncio.ensure_future(self._write(rotation, by))
        try:
            await asyncio.shield(committing)
        except asyncio.CancelledError:
            await asyncio.wait({committing})
            self._woken.set()
            raise

    async def _write(self, rotation: RootRotation, by: str) -> None:
        content = rotation.encode()
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"the roots and those left out do not fit into {MAX_BYTES} bytes: "
                "trust fewer roots, or leave fewer out at a time"
            )
        write = Write(RECORD, content, self._revision)
        (self._revision,) = await self._audit.commit(_deed_of(rotation, rotation.stage, by), [write])
        before, self._rotation = self._rotation, rotation
        if before is None or before.stage is not rotation.stage or before.without != rotation.without:
            logger.info(
                "root rotation",
                extra={"stage": rotation.stage.value, "without": ", ".join(sorted(rotation.without))},
            )

    async def _situation(self) -> Situation:
        return await self._judged(await self._desk.survey())

    async def _judged(self, survey: Survey) -> Situation:
        """The fleet as it is: of a large one in a thread, while calls go on."""
        rotation, live, adopted = self._rotation, self._desk.live(), dict(self._adopted)
        situation = await asyncio.to_thread(self._judge, rotation, survey, live, adopted)
        if rotation is not None and rotation.replaces_root:
            self.adoption = await asyncio.to_thread(situation.adoption, rotation.bundle)
        else:
            self.adoption = 1.0
        return situation

    def _judge(
        self,
        rotation: RootRotation | None,
        survey: Survey,
        live: frozenset[Identity],
        adopted: dict[Identity, bytes],
    ) -> Situation:
        """Of ourselves we know better than the ledger, for nobody authenticates us."""
        now = self._desk.clock()
        ours = frozenset(own.identity for own in self._own)
        unreplaced = frozenset[Identity]()
        if rotation is not None:
            going = rotation.going(survey.issuers)
            unreplaced = (survey.unreplaced(going, rotation.new_issuer) - ours) | frozenset(
                own.identity for own in self._own if not own.is_below(rotation.new[0], now)
            )
        adopted |= {own.identity: own.store.current.bundle.hash for own in self._own}
        return Situation(live | ours, survey.holders, adopted, unreplaced)

    def _note(self, problem: str) -> None:
        if problem != self._problem and problem:
            logger.warning("the root rotation does not go on", extra={"cause": problem})
        self._problem = problem


def _deed_of(rotation: RootRotation, stage: Stage, by: str) -> Deed:
    """That *rotation* has come to *stage*."""
    left_out = sorted(rotation.without)
    detail = {
        "old_issuer": rotation.old[0].fingerprint(hashes.SHA256()).hex(),
        "new_issuer": rotation.new[0].fingerprint(hashes.SHA256()).hex(),
        "without": ", ".join(left_out[:MAX_TOLD]),
        "without_count": str(len(left_out)),
    }
    return Deed(f"root/{stage}", by, detail=detail)


_NOT_OURS: Final = (
    "the files of {} are not ours to write: put certificates of the new root there by hand, "
    "or have the control plane use the layout parallax"
)
