"""A link on a gRPC stream: what is heard and what is said, until either end is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, Protocol

from grpc import StatusCode, aio

from parallax.protos import link_pb2
from parallax.runtime.link import Link, Said
from parallax.runtime.status import ERROR_KEY, error_of
from parallax.security.errors import InvalidRequest, ParallaxError, Unavailable

Call = aio.StreamStreamCall[link_pb2.LinkFrame, link_pb2.LinkFrame]

CAUSE_S: Final = 2.0
FLUSH_S: Final = 2.0  # for last frames, to a peer that may have stopped reading
STALLED_S: Final = 30.0  # a frame that nobody takes for so long: the peer does not read
PULSE_S: Final = 5.0
GREETING_S: Final = 10.0  # a peer that says nothing is not kept, authenticated or not

# What grpc.aio makes of a frame that could not be sent before the status arrived, which is lost then.
FROM_CORE: Final = "Internal error from Core"
# How grpc.aio says that a stream is no longer one.
BROKEN: Final = (aio.AioRpcError, aio.UsageError, aio.InternalError, asyncio.InvalidStateError)


class Stream(Protocol):
    """What a servicer's context and a client's call have in common."""

    async def read(self) -> Any:  # noqa: ANN401 - grpc.aio's own words
        """The next frame, or `aio.EOF`."""

    async def write(self, frame: link_pb2.LinkFrame) -> None:
        """Hand over a frame; returns when there is room for another."""


class Pump:
    """
    Moves the frames of one link over one stream.

    A frame goes out when the one before it was taken: alone when there is little to say,
    together with much else when there is much. No timer holds anything back.
    """

    def __init__(self, link: Link, stream: Stream) -> None:
        self._link = link
        self._stream = stream
        self._greeted = asyncio.Event()
        self._idle: asyncio.Future[None] | None = None  # of who waits for something to say
        self._said = 0  # frames
        self._writing_since: float | None = None
        self.closed = asyncio.Event()  # the link says nothing more
        link.on_filled = self._fill
        self._fill()  # with what was said before

    async def hear(self) -> None:
        """
        Take in frames until the other end is done.

        Raises:
            ParallaxError: It broke the protocol, or the receiver refused it.
        """
        read, hear = self._stream.read, self._link.hear
        try:
            async with asyncio.timeout(GREETING_S):
                frame = await read()
        except TimeoutError:
            raise self._silent(f"no greeting within {GREETING_S:g} s") from None
        if frame is aio.EOF:
            raise self._silent("the stream ended before its greeting")
        while frame is not aio.EOF:
            if frame is None:  # how a call of ours gives what is no frame
                raise InvalidRequest("a frame cannot be read")
            hear(frame)
            self._greeted.set()
            frame = await read()

    async def say(self) -> None:
        """Send frames until the link is closed and all is sent."""
        link, write, loop = self._link, self._stream.write, asyncio.get_running_loop()
        while True:
            while (frame := link.take()) is None:
                if link.is_closed:
                    return
                self._idle = loop.create_future()
                await self._idle
                if link.receiver.is_busy:
                    # Whoever else is ready now may have something to say, too. A frame costs ten times what
                    # an item in it does, and small frames make smaller ones: two turns of the loop double
                    # the rate of scattered answers, and steady it (docs/performance.md).
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
            self._writing_since = loop.time()
            await write(frame)
            self._writing_since = None
            self._said += 1

    async def pulse(self) -> None:
        """
        Stay heard, and notice who does not read.

        Raises:
            Unavailable: A frame was not taken for too long.
        """
        loop, link = asyncio.get_running_loop(), self._link
        await self._greeted.wait()
        while True:
            said = self._said
            await asyncio.sleep(PULSE_S if link.beat_s is None else link.beat_s / 2)
            if self._writing_since is not None:
                if loop.time() - self._writing_since > STALLED_S:
                    raise Unavailable(f"the peer has not read for {STALLED_S:g} s; the link ends")
            elif link.beat_s is not None and said == self._said:
                link.beat()

    def let_go(self) -> None:
        """The stream is over; pump and link would hold each other, and the connection with them."""
        self._link.on_filled = _nobody

    def _silent(self, what: str) -> ParallaxError:
        return Unavailable(what) if self._link.awaits is Said.WELCOME else InvalidRequest(what)

    def _fill(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        if self._link.is_closed:
            self.closed.set()


def _nobody() -> None:
    """Has nothing to take a frame to."""


async def serve(link: Link, context: Stream, on_over: Callable[[], None] = lambda: None) -> None:
    """
    Carry *link* on the stream of a call that is being handled, until either end is done.

    The other end is given a moment to end the stream in order: one that is cut off costs
    gRPC memory for ever (grpc/grpc#43360).

    Raises:
        ParallaxError: What the status of the call has to say.
    """
    pump = Pump(link, context)
    failures: list[ParallaxError] = []

    async def run(work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except ParallaxError as exc:
            failures.append(exc)
        except BROKEN:
            pass  # the peer has hung up

    async with asyncio.TaskGroup() as group:
        reader, writer, pulse, closed = (
            group.create_task(run(work))
            for work in (pump.hear(), pump.say(), pump.pulse(), pump.closed.wait())
        )
        await asyncio.wait({reader, writer, pulse, closed}, return_when=asyncio.FIRST_COMPLETED)
        on_over()
        link.close()
        if link.failure is not None:
            failures.append(link.failure)
        await asyncio.wait({writer} if failures else {writer, reader}, timeout=FLUSH_S)
        for task in (reader, writer, pulse, closed):
            task.cancel()
    pump.let_go()
    link.abandon()
    if failures:
        raise failures.pop()  # which would hold this frame, that holds it


async def converse(
    link: Link, call: Call, companion: Callable[[], Coroutine[Any, Any, None]] | None = None
) -> None:
    """
    Carry *link* on a call of ours, until the other end ends it.

    Args:
        companion: Runs beside it, no longer than it.

    Raises:
        ParallaxError: What the call ended with, or what the other end must not have said.
    """
    pump = Pump(link, call)
    failure: Exception | None = None

    async def say() -> None:
        with suppress(*BROKEN):  # whoever reads learns the cause
            await pump.say()
            await call.done_writing()

    async def pulse() -> None:
        nonlocal failure
        try:
            await pump.pulse()
        except Unavailable as exc:
            failure = exc
            call.cancel()

    async with asyncio.TaskGroup() as group:
        beside = [group.create_task(work()) for work in (say, pulse, companion) if work is not None]
        try:
            await _hear(pump)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or current.cancelling():
                raise
            failure = failure or Unavailable("the call was cancelled")  # it was, not we
        except (ParallaxError, *BROKEN) as exc:
            failure = failure or exc  # raised outside the group, which would wrap it
        finally:
            link.close()
            pump.let_go()
            for task in beside:
                task.cancel()
    try:
        if isinstance(failure, ParallaxError):
            raise failure
        if failure is not None:
            raise await cause(call) from None
    finally:
        failure = None  # its traceback holds this frame, which would hold it, and the call


async def _hear(pump: Pump) -> None:
    try:
        await pump.hear()
    except InvalidRequest as exc:  # the other end's fault, not the request of whoever is here: it may pass
        raise Unavailable(f"the other end broke the protocol: {exc}") from exc


async def cause(call: Call) -> ParallaxError:
    """Why *call* broke."""
    try:
        async with asyncio.timeout(CAUSE_S):
            code, details = await call.code(), await call.details()
            if code is StatusCode.RESOURCE_EXHAUSTED and not _is_ours(await call.trailing_metadata()):
                # gRPC itself: one message, and the next may fit.
                return Unavailable(f"{details}; set PARALLAX_MAX_PAYLOAD_BYTES alike on both sides")
            if code is StatusCode.INTERNAL and details == FROM_CORE:
                return Unavailable("the stream ended while a frame was sent")
            return error_of(code, details, await call.trailing_metadata() or ())
    except TimeoutError:
        return Unavailable("the stream broke without a status")


def _is_ours(metadata: aio.Metadata | None) -> bool:
    return any(key == ERROR_KEY for key, _ in metadata or ())
