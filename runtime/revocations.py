"""Following what is revoked, as a control plane tells it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, timedelta
from typing import TYPE_CHECKING, TypeAlias

from grpc import aio

from parallax.protos import revocation_feed_pb2, revocation_feed_pb2_grpc
from parallax.runtime.following import Follower
from parallax.runtime.status import error_of
from parallax.security.errors import ParallaxError
from parallax.security.identity import Identity
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.verification import CertificateId

if TYPE_CHECKING:
    from parallax.runtime.connection import Line

logger = logging.getLogger(__name__)

Told: TypeAlias = "revocation_feed_pb2.WatchRevocationsResponse"


class RevocationFollower(Follower):
    """
    Knows what is revoked, as a control plane tells it: what it told last, while it is away.

    Args:
        silence: How long the control plane may say nothing before it is asked again.
        identities_only: Whether nobody's certificate is seen here, so that serials are of no use.

    Attributes:
        on_change: Called after more has been revoked, or less.
    """

    def __init__(self, silence: timedelta, *, identities_only: bool = False) -> None:
        super().__init__()
        self.on_change: Callable[[], None] = lambda: None
        self._silence = silence
        self._identities_only = identities_only
        self._current = Revocations()

    def __len__(self) -> int:
        """How much is known to be revoked."""
        return len(self._current)

    def check_identity(self, identity: Identity) -> None:
        """Pass if *identity* is not known to be withdrawn; raises Revoked."""
        self._current.check_identity(identity)

    def _note_complete(self) -> None:
        """Everything has been told."""

    def _note_failure(self, cause: Exception) -> None:
        """It is not told, or not any more."""
        logger.debug("what is revoked is not told", extra={"cause": f"{type(cause).__name__}: {cause}"})

    async def _listen(self, line: Line) -> bool:
        went_well = False
        watch = line.stub(_feed).WatchRevocations(
            revocation_feed_pb2.WatchRevocationsRequest(
                max_age_ms=int(self._silence / timedelta(milliseconds=1)),
                identities_only=self._identities_only,
            )
        )
        anew: Revocations | None = None  # an account that is not complete yet
        try:
            while True:
                async with asyncio.timeout(self._silence.total_seconds()):
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
            self._note_failure(error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())))
        except (ParallaxError, TimeoutError) as exc:
            self._note_failure(exc)
        except Exception:  # a bug of ours must not end what still works
            logger.exception("what is revoked cannot be followed")
        finally:
            watch.cancel()
        return went_well


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
