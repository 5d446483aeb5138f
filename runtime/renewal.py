"""Renewing the certificate in force before it ends, for as long as its holder runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography.hazmat.primitives import hashes

from parallax.security.errors import (
    ConfigError,
    Expired,
    ParallaxError,
    Unavailable,
)
from parallax.security.keys import generate_like
from parallax.security.layouts import advise_issue
from parallax.security.renewal import Urgency, accept, plan_renewal, retry_in, spread_of
from parallax.security.request import new_request

if TYPE_CHECKING:
    from parallax.security.authority import Issued
    from parallax.security.credentials import Credentials, CredentialStore
    from parallax.security.identity import Identity
    from parallax.security.provider import Keep

logger = logging.getLogger(__name__)

LONGEST_SLEEP: Final = timedelta(
    seconds=60
)  # a machine that was asleep, or whose clock was set, is late by no more
ATTEMPT_S: Final = 25.0  # a key of RSA-4096, an answer, and a directory that is locked, each at its slowest
RARELY: Final = (
    16  # as if so many attempts had failed: what the control plane has not got, it will not have soon
)

Ask: TypeAlias = Callable[[bytes], Awaitable["Issued"]]
"""Has a certificate issued for a request (PKCS#10, DER), as whom the credentials in force prove."""


class Result(StrEnum):
    """How an attempt can end."""

    SUCCESS = "success"
    OVERTAKEN = "overtaken"
    """Somebody else has put newer files there meanwhile, and these are in force."""
    UNREACHABLE = "unreachable"
    NO_ISSUER = "no_issuer"
    """The control plane has no CA, or authenticates nobody."""
    REFUSED = "refused"
    UNUSABLE = "unusable"
    """The answer would not do; the log says why."""
    NOT_KEPT = "not_kept"
    """It could not be written: a full disk, or files that are not as they were left."""


_PATIENT: Final = frozenset({Result.UNREACHABLE, Result.NO_ISSUER})  # nobody has done wrong


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one attempt ended: well if there is no *problem*."""

    result: Result
    problem: ParallaxError | None = None
    is_bug: bool = False

    @property
    def retry_after(self) -> timedelta:
        """How long whoever was asked wants to be left alone."""
        return self.problem.retry_after if isinstance(self.problem, Unavailable) else timedelta(0)


async def attempt_renewal(
    store: CredentialStore,
    ask: Ask,
    keep: Keep,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    limit_s: float = ATTEMPT_S,
) -> Attempt:
    """
    Try to put another certificate for a new key in force in *store*; whatever fails, nothing changes.

    The key never leaves this process but for where *keep* puts it. An attempt that takes longer than
    *limit_s* is given up.
    """
    in_force, result = store.current, Result.REFUSED
    try:
        async with asyncio.timeout(limit_s):
            key = await asyncio.to_thread(generate_like, in_force.key)
            issued = await ask(new_request(store.identity, key))
            result = Result.UNUSABLE
            new = accept(issued, key, in_force, store.identity, clock())
            result = Result.NOT_KEPT
            await keep(new, in_force)
    except TimeoutError:
        problem = Unavailable(f"no certificate within {limit_s:g} s: the control plane or this host hangs")
        return Attempt(result if result is Result.NOT_KEPT else Result.UNREACHABLE, problem)
    except ParallaxError as exc:
        return Attempt(_refusal(exc) if result is Result.REFUSED else result, exc)
    except Exception as exc:  # noqa: BLE001 - a bug of ours must not end what still serves
        bug = ParallaxError(f"{type(exc).__name__} while the certificate was renewed")
        bug.__cause__ = exc
        return Attempt(result, bug, is_bug=True)
    return Attempt(Result.SUCCESS if store.current.leaf == new.leaf else Result.OVERTAKEN)


def _refusal(exc: ParallaxError) -> Result:
    match exc:
        case Unavailable():
            return Result.UNREACHABLE
        case ConfigError():
            return Result.NO_ISSUER
        case _:
            return Result.REFUSED


class Renewer:
    """
    Renews what is in force in *store*, when it is due and when somebody wants it, while `run` runs.

    A control plane that is away, hung or answers nonsense changes nothing: it is asked again, ever more
    rarely, but more often towards the end, and not before the time that it asks for. A certificate that has
    expired cannot be renewed, since nobody would take it; once others have put a new one in force, all goes
    on.

    Args:
        store: What is in force, and whose it is.
        ask: Who issues; None: there is nobody to ask.
        keep: See `MTLSCredentialsProvider.keeper`; None: it is somebody else's to renew.
        clock: Aware UTC.
        longest_sleep: How often to look at the clock, at least.
        limit_s: For one attempt.
    """

    def __init__(
        self,
        store: CredentialStore,
        ask: Ask | None,
        keep: Keep | None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        longest_sleep: timedelta = LONGEST_SLEEP,
        limit_s: float = ATTEMPT_S,
    ) -> None:
        self._store = store
        self._ask = ask
        self._keep = keep
        self._clock = clock
        self._longest_sleep = longest_sleep
        self._limit_s = limit_s
        self._counts = dict.fromkeys(Result, 0)
        self._failures = 0  # in a row; also successes after which it was due again at once
        self._last_try: datetime | None = None
        self._last = Attempt(Result.SUCCESS)
        self._said: tuple[Urgency, Result | None] | None = None  # without a result: the end alone
        self._woken = asyncio.Event()
        self._waiting: asyncio.Future[ParallaxError | None] | None = None
        self._is_running = False

    @property
    def identity(self) -> Identity:
        """Whose certificate it is."""
        return self._store.identity

    @property
    def is_ours(self) -> bool:
        """Whether it is renewed here at all."""
        return self._ask is not None and self._keep is not None

    @property
    def due(self) -> datetime:
        """When it is, or was, to be renewed."""
        return plan_renewal(self._store.current.leaf).due

    @property
    def urgency(self) -> Urgency:
        """How urgent that is now."""
        return plan_renewal(self._store.current.leaf).urgency(self._clock())

    @property
    def last(self) -> Attempt:
        """How the last attempt ended; well, if there was none."""
        return self._last

    @property
    def counts(self) -> Mapping[Result, int]:
        """Attempts by how they ended."""
        return MappingProxyType(self._counts)

    async def run(self) -> None:
        """Renew whenever it is due, until cancelled; its owner's task, once."""
        self._is_running = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._notice_changes(self._store.current))
                while True:
                    if self._waiting is not None or self._is_time():
                        await self._try()
                    self._watch_end()
                    await self._sleep()
        finally:
            self._is_running = False
            self._answer(Unavailable(f"{self.identity.name} went offline"))

    async def renew(self) -> None:
        """
        Renew now; returns once another certificate is in force. Calls at one time share one attempt.

        Raises:
            Unavailable: `run` does not run, or nobody answered in time.
            Expired: It is too late; the text names the way back.
            ConfigError: It is somebody else's to renew, there is no CA, or it cannot be kept.
            ParallaxError: The control plane refuses, or its answer cannot be used.
        """
        if not self.is_ours:
            raise ConfigError(
                f"the certificate of {self.identity} is renewed by whoever put it there, not here"
            )
        if not self._is_running:
            raise Unavailable(
                f"{self.identity.name} is not online, so nobody can be asked: try again once it is"
            )
        if self.urgency is Urgency.EXPIRED:
            raise Expired(self._expired())
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
            self._woken.set()
        problem = await asyncio.shield(self._waiting)
        if problem is not None:
            raise problem

    def _is_time(self) -> bool:
        """Whether to try now by ourselves."""
        now, leaf = self._clock(), self._store.current.leaf
        plan = plan_renewal(leaf)
        if plan.urgency(now) is Urgency.FINE:
            self._failures, self._said = 0, None
            return False
        if not self.is_ours or plan.urgency(now) is Urgency.EXPIRED:
            return False
        return self._wait() <= timedelta(0)

    def _wait(self) -> timedelta:
        """How long until the next attempt, after those that failed."""
        now, leaf = self._clock(), self._store.current.leaf
        if not self._failures or self._last_try is None or now < self._last_try:  # or the clock was set back
            return timedelta(0)
        end, asked_for = leaf.not_valid_after_utc, self._last.retry_after
        pause = retry_in(self._failures - 1, self._last_try, end, spread_of(leaf), asked_for)
        return self._last_try + pause - now

    async def _sleep(self) -> None:
        """Until it may be time, somebody wants it or other credentials are in force; a minute at most."""
        self._woken.clear()
        if self._waiting is not None:
            return
        wait = self._longest_sleep
        if self.is_ours and self.urgency is Urgency.FINE:
            wait = self.due - self._clock()
        elif self.is_ours and self.urgency is not Urgency.EXPIRED:
            wait = self._wait()
        seconds = min(wait, self._longest_sleep).total_seconds()
        try:
            async with asyncio.timeout(max(seconds, 0.001)):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _notice_changes(self, seen: Credentials) -> None:
        while True:
            seen = await self._store.changed(seen)
            self._woken.set()

    async def _try(self) -> None:
        assert self._ask is not None, "asked before"  # noqa: S101 - `is_ours`
        assert self._keep is not None, "asked before"  # noqa: S101
        before = self._store.current
        done = await attempt_renewal(self._store, self._ask, self._keep, self._clock, self._limit_s)
        self._last, self._last_try = done, self._clock()
        self._counts[done.result] += 1
        self._failures = RARELY if done.result is Result.NO_ISSUER else self._failures + 1
        self._tell(done, before)
        self._answer(done.problem)

    def _answer(self, problem: ParallaxError | None) -> None:
        """Let those who wait for an attempt go."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(problem)

    def _tell(self, done: Attempt, before: Credentials) -> None:
        current = self._store.current
        if done.problem is None:
            self._said = None
            event = "certificate renewed"
            if done.result is Result.OVERTAKEN:
                event = "certificate was renewed by somebody else meanwhile"
            self._log(logging.INFO, event, serial=_serial(current), replaces=_serial(before))
            if set(current.bundle.roots) != set(before.bundle.roots):
                self._log(logging.INFO, "roots changed", roots=_roots(current), replaces=_roots(before))
            return
        state = self.urgency, done.result
        is_news, self._said = state != self._said, state
        level = max(self.urgency.level, logging.INFO if done.result in _PATIENT else logging.WARNING)
        self._log(
            level if is_news else logging.DEBUG,
            "certificate not renewed, what was in force stays so",
            exc_info=done.problem.__cause__ if done.is_bug else None,
            reason=done.result,
            cause=f"{type(done.problem).__name__}: {done.problem}",
        )

    def _watch_end(self) -> None:
        """Tell of an end that no attempt tells of: none is made."""
        urgency = self.urgency
        if urgency is not Urgency.EXPIRED and (self.is_ours or urgency in {Urgency.FINE, Urgency.DUE}):
            return
        if self._said == (urgency, None):
            return
        self._said = urgency, None
        if urgency is Urgency.EXPIRED:
            self._log(urgency.level, "certificate expired", cause=self._expired())
        else:
            self._log(urgency.level, "certificate ends", cause="whoever put it there has not renewed it")

    def _expired(self) -> str:
        end = self._store.current.leaf.not_valid_after_utc
        remedy = advise_issue(self.identity.name, self.identity.kind)
        return f"the certificate of {self.identity} expired at {end:%Y-%m-%dT%H:%M:%SZ}: {remedy}"

    def _log(self, level: int, event: str, *, exc_info: BaseException | None = None, **fields: str) -> None:
        until = f"{self._store.current.leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        extra = {"identity": str(self.identity), "in_force_until": until, **fields}
        logger.log(level, event, exc_info=exc_info, extra=extra)


def _serial(credentials: Credentials) -> str:
    return f"{credentials.leaf.serial_number:x}"


def _roots(credentials: Credentials) -> str:
    """As `/metrics` calls them."""
    fingerprints = (root.fingerprint(hashes.SHA256()).hex() for root in credentials.bundle.roots)
    return " ".join(sorted(f"root:{fingerprint[:8]}" for fingerprint in fingerprints))
