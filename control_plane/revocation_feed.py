"""The gRPC service that tells what is revoked: everything in pieces, each change, and that this is all."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any, Final

from grpc import aio

from parallax.control_plane.beats import beat_s, wait
from parallax.control_plane.revoked import Revoked, RevokedCertificate
from parallax.control_plane.watch import shutting_down
from parallax.protos import revocation_feed_pb2, revocation_feed_pb2_grpc
from parallax.runtime.watches import Watches
from parallax.security.identity import Identity
from parallax.security.revocation import WITHDRAWN, Revocations

PIECE: Final = 1_000  # entries in a message, of 160 bytes at the most
REMEMBERED: Final = 10_000  # changes; who reads slower than that is told everything once more

Context = aio.ServicerContext[Any, Any]
Response = revocation_feed_pb2.WatchRevocationsResponse


class RevocationFeedService(revocation_feed_pb2_grpc.RevocationFeedServiceServicer):
    """
    What is revoked, over gRPC. Nobody waits for who reads slowly, nor keeps more for him than for others.

    Args:
        current: What is in force; `note` is told of each change of it.
    """

    def __init__(self, current: Revocations) -> None:
        self._current = current
        self._recent: deque[Revoked] = deque(maxlen=REMEMBERED)
        self._count = 0  # of all changes, those too that are remembered no more
        self._changed = asyncio.Event()  # replaced by a new one with every change
        self._is_closed = False
        self._watches = Watches("what is revoked")

    def note(self, entry: Revoked) -> None:
        """Tell everybody of *entry*, which is in force."""
        self._recent.append(entry)
        self._count += 1
        self._wake()

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        self._wake()

    async def WatchRevocations(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request: revocation_feed_pb2.WatchRevocationsRequest, context: Context
    ) -> None:
        """Tell everything, then what changes; raises Unavailable if the caller is told so often already."""
        with self._watches.one_more():
            await self._tell(request, context)
        raise shutting_down()

    async def _tell(self, request: revocation_feed_pb2.WatchRevocationsRequest, context: Context) -> None:
        """Tell, until it is closed."""
        pause_s = beat_s(request.max_age_ms)
        told: int | None = None  # of all changes
        while not self._is_closed:
            changed, count = self._changed, self._count
            missed = count - told if told is not None else REMEMBERED + 1
            if missed > len(self._recent):
                pieces = everything(self._current, identities_only=request.identities_only)
            else:
                missing = list(self._recent)[len(self._recent) - missed :]
                pieces = _changes(missing, identities_only=request.identities_only)
            for piece in pieces:
                await context.write(piece)
            told = count
            if told == self._count:
                await context.write(Response(complete=True))
                await wait(changed, pause_s)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def everything(current: Revocations, *, identities_only: bool = False) -> Iterator[Response]:
    """All that is revoked, in pieces; of what changes while they are taken, some may be missing."""
    yield Response(restart=True)
    for issuer, serials in () if identities_only else current.certificates():
        while piece := list(islice(serials, PIECE)):
            yield Response(certificates=[_certificates(issuer, piece)])
    cut_offs = current.identities()
    while some := list(islice(cut_offs, PIECE)):
        yield Response(identities=[_identity(*each) for each in some])


def _changes(entries: Iterable[Revoked], *, identities_only: bool) -> Iterator[Response]:
    """*entries*, in pieces and in their order."""
    rest = (each for each in entries if not (identities_only and isinstance(each, RevokedCertificate)))
    while some := list(islice(rest, PIECE)):
        response = Response()
        for entry in some:
            if isinstance(entry, RevokedCertificate):
                issuer, serial = entry.certificate
                response.certificates.append(_certificates(issuer, [serial]))
            else:
                response.identities.append(_identity(entry.identity, entry.cut_off))
        yield response


def _certificates(issuer: bytes, serials: Iterable[int]) -> revocation_feed_pb2.RevokedCertificates:
    encoded = [serial.to_bytes((serial.bit_length() + 7) // 8) for serial in serials]
    return revocation_feed_pb2.RevokedCertificates(issuer=issuer, serials=encoded)


def _identity(identity: Identity, cut_off: datetime) -> revocation_feed_pb2.RevokedIdentity:
    message = revocation_feed_pb2.RevokedIdentity(identity=str(identity))
    if cut_off != WITHDRAWN:
        message.issued_before.FromDatetime(cut_off)
    return message
