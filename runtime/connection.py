"""The connection to one peer: new calls use the credentials in force, and old ones end where they began."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from parallax.runtime.backoff import backoff_s, move_after_s
from parallax.runtime.dialling import Dialling, Moved, lets_in
from parallax.security.credentials import may_stay
from parallax.security.errors import ParallaxError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import TracebackType

    from grpc import aio

    from parallax.security.credentials import Credentials, CredentialStore

logger = logging.getLogger(__name__)

StubT = TypeVar("StubT")

TRIAL_S: Final = 5.0  # a peer that is there lets a channel in, or refuses it, within milliseconds


class Line:
    """
    One channel, with the credentials that it was opened with; `with` it, while a call on it is under way.

    Attributes:
        credentials: What it presents; None in plaintext.
        is_retired: Others are in use for new calls; it closes after its last one.
    """

    __slots__ = ("_on_retire", "_stubs", "_unused", "_users", "channel", "credentials", "is_retired")

    def __init__(self, channel: aio.Channel, credentials: Credentials | None) -> None:
        self.channel = channel
        self.credentials = credentials
        self.is_retired = False
        self._users = 0
        self._unused = asyncio.Event()  # told only once it is retired: it is on the path of every call
        self._stubs: dict[Any, Any] = {}
        self._on_retire: set[Callable[[], object]] = set()

    def __enter__(self) -> Self:
        self._users += 1
        return self

    def take(self) -> None:
        """As entering `with`, for a call that outlives the block it begins in; `release` it."""
        self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._users -= 1
        if self.is_retired and not self._users:
            self._unused.set()

    def release(self) -> None:
        """As leaving `with`."""
        self.__exit__(None, None, None)

    def stub(self, make: Callable[[aio.Channel], StubT]) -> StubT:
        """The stub of a service on this channel, made once."""
        found: StubT | None = self._stubs.get(make)
        if found is None:
            found = self._stubs[make] = make(self.channel)
        return found

    def on_retire(self, leave: Callable[[], object]) -> Callable[[], None]:
        """Have *leave* called when other credentials come into use; what takes that back."""
        self._on_retire.add(leave)
        return lambda: self._on_retire.discard(leave)

    def retire(self) -> None:
        """Take no new call, as far as its owner is concerned."""
        self.is_retired = True
        while self._on_retire:
            self._on_retire.pop()()
        if not self._users:
            self._unused.set()

    async def drained(self) -> None:
        """Wait until it is retired and its last call has ended."""
        await self._unused.wait()


async def _stay(_: Line) -> None:
    """Nothing has to move but calls."""


class Connection:
    """
    The connection to one peer.

    gRPC's channels keep their credentials for life. So after a rotation there is another channel for
    new calls, and the old one closes after its last call: closed before, whatever its grace, it
    would end them.

    Args:
        dial: Opens a channel with what is then current in *store*.
        store: The credentials in force; None in plaintext, where there is nothing to follow.
        peer: Who is at the other end, for the log.
        clock: Aware UTC.
        dialling: Told how it goes.

    Attributes:
        moves: How often other credentials came into use, or did not; of all who share *dialling*.
    """

    def __init__(
        self,
        dial: Callable[[], aio.Channel],
        store: CredentialStore | None,
        peer: str,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        dialling: Dialling | None = None,
    ) -> None:
        self._dialling = dialling or Dialling()
        self.moves = self._dialling.moves
        self._dial = dial
        self._store = store
        self._peer = peer
        self._clock = clock
        self._line = self._open()
        self._retired: set[Line] = set()

    def use(self) -> Line:
        """What a new call goes over: `with connection.use() as line:` around the whole of it."""
        return self._line

    @asynccontextmanager
    async def following(self, move: Callable[[Line], Awaitable[None]] = _stay) -> AsyncIterator[Self]:
        """`follow` for as long as the block, then `close`."""
        task = asyncio.create_task(self._follow_on(move))  # awaited below, whatever happens
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait({task})
            await self.close()

    async def follow(self, move: Callable[[Line], Awaitable[None]] = _stay) -> None:
        """
        Use for new calls what the store publishes, until cancelled; without it, nothing changes.

        Other credentials are tried first. Where the peer lets in only the old ones, these stay in use,
        and the others are tried again until it does, or the old ones have expired; unless a root was
        taken out, which counts at once.

        Args:
            move: Called with a line that the peer has let in, before new calls go there: takes along
                what is not a call, or raises ParallaxError, and then the peer has not let it in.
        """
        if self._store is None:
            return
        async with asyncio.TaskGroup() as closing:
            while True:
                await self._outdated(self._store)
                old = await self._move(self._store, move)
                self._retired.add(old)
                old.retire()
                closing.create_task(self._close_drained(old))

    async def close(self) -> None:
        """Close it; calls under way end. Not while `follow` runs."""
        for line in (self._line, *self._retired):
            await line.channel.close()
        self._retired.clear()

    async def _follow_on(self, move: Callable[[Line], Awaitable[None]]) -> None:
        try:
            await self.follow(move)
        except Exception:  # a bug of ours must not end what still works
            logger.exception("new certificates are not used any more", extra={"peer": self._peer})

    async def _outdated(self, store: CredentialStore) -> None:
        """Wait until it is time to use others than those in use."""
        used = self._line.credentials
        in_force = await store.changed(used)
        spread = random.random()  # noqa: S311 - spreads load, hides nothing
        pause = move_after_s(used, in_force, self._clock(), spread)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await store.changed(in_force)

    async def _move(self, store: CredentialStore, move: Callable[[Line], Awaitable[None]]) -> Line:
        """Put other credentials in use, however long it takes; the line that was in use."""
        attempt = 0
        refused: Credentials | None = None
        while True:
            new = self._open()
            result = Moved.REFUSED
            try:
                result, cause = await self._try(new, move)
            finally:
                if result is Moved.REFUSED:
                    await new.channel.close()
            self.moves[result] += 1
            if result is not Moved.REFUSED or new.credentials is not refused:
                self._say(new, result, cause)
            if result is not Moved.REFUSED:
                old, self._line = self._line, new
                return old
            if new.credentials is not refused:
                refused, attempt = new.credentials, 0
            pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(pause, self._left_s()))):
                    await store.changed(refused)

    async def _try(self, new: Line, move: Callable[[Line], Awaitable[None]]) -> tuple[Moved, str]:
        """Whether *new* is to be used, and what speaks against it."""
        try:
            if not await self._dialling.lets_in(new.channel, TRIAL_S):
                raise Unavailable("it cannot be reached with the new certificate")
            await move(new)
        except ParallaxError as exc:
            stays = self._left_s() > 0 and may_stay(self._line.credentials, new.credentials)
            if stays and await lets_in(self._line.channel, TRIAL_S):
                return Moved.REFUSED, str(exc)
            return Moved.UNTRIED, str(exc)
        return Moved.TRIED, ""

    async def _close_drained(self, line: Line) -> None:
        await line.drained()
        await line.channel.close()
        self._retired.discard(line)

    def _open(self) -> Line:
        return Line(self._dial(), self._store.current if self._store is not None else None)

    def _left_s(self) -> float:
        """For how long what is in use is still valid."""
        credentials = self._line.credentials
        if credentials is None:
            return 0.0
        return (credentials.leaf.not_valid_after_utc - self._clock()).total_seconds()

    def _say(self, new: Line, result: Moved, cause: str) -> None:
        extra = {"peer": self._peer}
        if new.credentials is not None:
            extra["serial"] = f"{new.credentials.leaf.serial_number:x}"
        if result is Moved.TRIED:
            logger.info("new certificate in use", extra=extra)
        elif result is Moved.UNTRIED:
            logger.warning("new certificate in use untried", extra=extra | {"cause": cause})
        else:
            logger.warning(
                "the peer does not let in the new certificate, the old one stays in use",
                extra=extra | {"cause": cause, "old_expires_in_s": f"{self._left_s():.0f}"},
            )
