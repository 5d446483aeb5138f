"""Putting new files in force without a restart, and never a bad one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from parallax.security.errors import ConfigError, Defect
from parallax.security.lookout import Lookout
from parallax.security.material import parse_material, read_material

if TYPE_CHECKING:
    from collections.abc import Callable

    from parallax.security.credentials import Credentials, CredentialStore
    from parallax.security.identity import Identity
    from parallax.security.material import Material, Sources

logger = logging.getLogger(__name__)

SUCCESS: Final = "success"
RESULTS: Final = (SUCCESS, *map(str, Defect))
"""How an attempt to put files in force can end."""
DEFAULT_POLL: Final = timedelta(seconds=30)


def judge(material: Material, identity: Identity, in_force: Credentials, now: datetime) -> Credentials | None:
    """
    What to put in force now that the files hold *material*; None if they hold what is *in_force*.

    Only what differs counts: who writes the same bytes again, or others around the same PEM, changes nothing.

    Raises:
        ConfigError: They cannot be used at *now*, those in force included; its `defect` says why.
    """
    found = parse_material(material, identity, now)
    if found.parts == in_force.parts:
        return None
    return found


@dataclass(frozen=True, slots=True)
class RotationStatus:
    """
    How it stands with the files of an identity.

    Attributes:
        since: When the files became what they are: good, or wrong in this way.
        defect: Why they are not in force; None while they are.
        reason: The same in a line with file and remedy.
        last_success: When they last came to be what is in force, the start included.
        last_failure: When files were last found that cannot be; None if never.
        counts: Attempts by result, see `RESULTS`; looking again at what was found before is none.
        restarts: How often the observer of the files had to be started again.
    """

    since: datetime
    last_success: datetime
    defect: Defect | None = None
    reason: str = ""
    last_failure: datetime | None = None
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType(dict.fromkeys(RESULTS, 0)))
    restarts: int = 0

    @property
    def result(self) -> str:
        """How the last attempt ended: one of `RESULTS`."""
        return self.defect or SUCCESS

    def rotated(self, now: datetime) -> RotationStatus:
        """After other credentials came into force."""
        return replace(self._good(now), counts=self._counted(SUCCESS))

    def unchanged(self, now: datetime) -> RotationStatus:
        """After the files were found to hold what is in force."""
        return self if self.defect is None else self._good(now)

    def kept(self, problem: ConfigError, now: datetime) -> RotationStatus:
        """After the files were found to be unusable; the same as before is no news."""
        defect = problem.defect or Defect.UNREADABLE
        if (defect, str(problem)) == (self.defect, self.reason):
            return self
        return replace(
            self,
            since=now,
            defect=defect,
            reason=str(problem),
            last_failure=now,
            counts=self._counted(defect),
        )

    def _good(self, now: datetime) -> RotationStatus:
        return replace(self, since=now, defect=None, reason="", last_success=now)

    def _counted(self, result: str) -> Mapping[str, int]:
        return MappingProxyType({**self.counts, result: self.counts[result] + 1})


class CertificateRotator:
    """
    Keeps in *store* what the files of *source* hold, for as long as `run` runs.

    Whatever is wrong with them, the last good credentials stay in force: it is logged once, and
    `status` tells it until the files are good. A file that is in place when it is read is in force
    0.05 to 0.3 seconds after its last change; where events do not reach us, after *poll*.

    Args:
        store: What is in force, and whose it is.
        source: Where it came from. Parts given by content do not change.
        poll: How often to look without being told of a change.
        clock: Aware UTC.
        log: This module's own by default.
    """

    def __init__(
        self,
        store: CredentialStore,
        source: Sources,
        *,
        poll: timedelta = DEFAULT_POLL,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        log: logging.Logger | None = None,
    ) -> None:
        self._store = store
        self._source = source
        self._clock = clock
        self._log = log or logger
        now = clock()
        self._status = RotationStatus(since=now, last_success=now)
        self._looking = asyncio.Lock()
        paths = [part for part in (source.cert, source.key, source.ca) if isinstance(part, Path)]
        self._lookout = Lookout(paths, poll)

    @property
    def identity(self) -> Identity:
        """Whose certificate it is."""
        return self._store.identity

    @property
    def status(self) -> RotationStatus:
        """How it stands with the files."""
        return replace(self._status, restarts=self._lookout.restarts)

    async def run(self) -> None:
        """Follow the files until cancelled; its owner's task, once."""
        await self._lookout.run(self.look)

    async def look(self) -> None:
        """Read the files now, and put in force what they hold if that is other than before and good."""
        async with self._looking:
            in_force, now = self._store.current, self._clock()
            try:
                new = await asyncio.to_thread(self._read, in_force, now)
                if new is not None and self._store.current is in_force:
                    self._store.publish(new, now)
            except ConfigError as exc:
                self._keep(exc, now)
                return
            except Exception as exc:  # noqa: BLE001 - a bug of ours must not end what still serves
                problem = ConfigError(f"{type(exc).__name__} while they were read", Defect.DAMAGED)
                self._keep(problem, now, is_bug=True)
                return
            if self._store.current is not in_force and self._store.current is not new:
                self._lookout.wake()  # somebody else was faster: what was read may be older
            elif new is not None:
                self._status = self._status.rotated(now)
                leaf = new.leaf
                self._say("certificate rotated", serial=f"{leaf.serial_number:x}", not_after=_until(new))
            elif self._status.defect is not None:
                self._status = self._status.unchanged(now)
                self._say("certificate files are usable again", not_after=_until(in_force))

    def _read(self, in_force: Credentials, now: datetime) -> Credentials | None:
        return judge(read_material(self._source, self.identity), self.identity, in_force, now)

    def _keep(self, problem: ConfigError, now: datetime, *, is_bug: bool = False) -> None:
        before, self._status = self._status, self._status.kept(problem, now)
        if self._status is not before:
            self._log.warning(
                "certificate files cannot be used, what was in force stays so",
                exc_info=is_bug,
                extra={
                    "identity": str(self.identity),
                    "reason": self._status.result,
                    "cause": str(problem),
                    "in_force_until": _until(self._store.current),
                },
            )

    def _say(self, event: str, **fields: str) -> None:
        self._log.info(event, extra={"identity": str(self.identity), **fields})


def _until(credentials: Credentials) -> str:
    return f"{credentials.leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
