"""Following what is revoked, at an agent that lets others in itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

from grpc import aio

from parallax.protos import revocation_feed_pb2, revocation_feed_pb2_grpc
from parallax.runtime.following import Follower
from parallax.runtime.status import error_of
from parallax.security.errors import ParallaxError, Unavailable
from parallax.security.identity import Identity
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.verification import CertificateId

if TYPE_CHECKING:
    from parallax.runtime.connection import Line
    from parallax.security.verification import Peer

logger = logging.getLogger(__name__)

Told: TypeAlias = "revocation_feed_pb2.WatchRevocationsResponse"


class RevocationFollower(Follower):
    """
    Knows what is revoked, as a control plane tells it, and whether it knows that still.

    Args:
        max_age: How long ago it may have been told that it knows everything.
        clock: Aware UTC.

    Attributes:
        on_change: Called after more has been revoked.
        on_stale: Called once what is known has become too old, with what to tell whoever asks.
    """

    def __init__(self, max_age: timedelta, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__()
        self.on_change: Callable[[], None] = lambda: None
        self.on_stale: Callable[[ParallaxError], None] = lambda _: None
        self._max_age = max_age
        self._clock = clock
        self._current = Revocations()
        self._complete_at: datetime | None = None
        self._known = asyncio.Event()
        self._said = ""
        self._timer: asyncio.TimerHandle | None = None  # runs out when what is known becomes too old

    def __len__(self) -> int:
        """How much is known to be revoked."""
        return len(self._current)

    def check(self, peer: Peer) -> None:
        """Pass if nothing that proves *peer* is known to be revoked; raises Revoked."""
        self._current.check(peer)

    def check_identity(self, identity: Identity) -> None:
        """Pass if *identity* is not known to be withdrawn; raises Revoked."""
        self._current.check_identity(identity)

    def check_fresh(self) -> None:
        """
        Pass if what is known is complete, and was so lately.

        By the wall clock, which goes on while a machine sleeps.

        Raises:
            Unavailable: It is not.
        """
        if self._complete_at is None or abs(self._clock() - self._complete_at) > self._max_age:
            raise self._too_old()

    async def known(self) -> None:
        """Wait until it has been told everything once."""
        await self._known.wait()

    async def _listen(self, line: Line) -> bool:
        went_well = False
        watch = line.stub(_feed).WatchRevocations(
            revocation_feed_pb2.WatchRevocationsRequest(
                max_age_ms=int(self._max_age / timedelta(milliseconds=1))
            )
        )
        anew: Revocations | None = None  # an account that is not complete yet
        try:
            while True:
                async with asyncio.timeout(self._max_age.total_seconds()):
                    told = await watch.read()
                if not isinstance(told, revocation_feed_pb2.WatchRevocationsResponse):
                    break
                if told.restart:
                    anew = Revocations()
                enter(told, self._current if anew is None else anew)
                if told.complete:
                    if anew is not None:
                        self._current, anew = anew, None
                    self._note_complete()
                    went_well = True
                if anew is None:
                    self.on_change()
        except aio.AioRpcError as exc:
            self._say(error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())))
        except (ParallaxError, TimeoutError) as exc:
            self._say(exc)
        except Exception:  # a bug of ours must not end what still works
            logger.exception("what is revoked cannot be followed")
        finally:
            watch.cancel()
        return went_well

    def _note_complete(self) -> None:
        self._complete_at = self._clock()
        self._known.set()
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._max_age.total_seconds(), self._become_stale)

    def _become_stale(self) -> None:
        cause = self._too_old()
        logger.warning("nobody is let in", extra={"cause": str(cause)})
        self.on_stale(cause)

    def _too_old(self) -> Unavailable:
        since = f"since {self._complete_at:%Y-%m-%dT%H:%M:%SZ} " if self._complete_at else ""
        return Unavailable(
            f"this agent has not heard {since}from its control plane what is revoked, and lets nobody in "
            "until it does: see its log, or ask it through the control plane"
        )

    def _say(self, cause: Exception) -> None:
        text = f"{type(cause).__name__}: {cause}"
        if self._complete_at is None and text != self._said:  # later, there is time to try again
            self._said = text
            logger.warning("nobody is let in yet: what is revoked is not told", extra={"cause": text})


def enter(told: Told, revocations: Revocations) -> None:
    """
    Put what was *told* into *revocations*.

    Raises:
        IdentityError: It names somebody who cannot be, as a newer control plane may.
    """
    for each in told.certificates:
        for serial in each.serials:
            revocations.revoke(CertificateId(each.issuer, int.from_bytes(serial)))
    for each_identity in told.identities:
        before = WITHDRAWN
        if each_identity.HasField("issued_before"):
            before = each_identity.issued_before.ToDatetime(UTC)
        revocations.cut(Identity.parse(each_identity.identity), before)


def _feed(channel: aio.Channel) -> revocation_feed_pb2_grpc.RevocationFeedServiceAsyncStub:
    return revocation_feed_pb2_grpc.RevocationFeedServiceStub(channel)
