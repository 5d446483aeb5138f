"""A link on a stream whose other end does not behave: no greeting, no reading, no protocol, no end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
from grpc import StatusCode, aio

from parallax.protos import link_pb2
from parallax.runtime import link_stream
from parallax.runtime.link import MAX_FRAME_BYTES, End, Link, Receiver, Said
from parallax.runtime.link_stream import converse, serve
from parallax.security.errors import InvalidRequest, NotAuthorized, ParallaxError, Unavailable
from tests.runtime.streams import HELLO, WELCOME, Context, Dial, Frame, served_by

SOON_S = 9.0  # for what should happen at once, on a machine that is busy; less than a peer has to greet


class Ear(Receiver):
    """Notes the cancellations it is told of; each may be refused."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.refusal: Exception | None = None
        self.greeted = asyncio.Event()

    def on_greeting(self, frame: Frame) -> None:
        self.greeted.set()

    def on_cancellations(self, task_ids: Iterable[int]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.heard.extend(task_ids)


class Server:
    """The end that serves; how its streams ended."""

    def __init__(self) -> None:
        self.ear = Ear()
        self.link = Link(End.WORKER, Said.HELLO, self.ear)
        self.link.greet(WELCOME)
        self.over = 0
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    async def __call__(self, context: Context) -> None:
        try:
            await serve(self.link, context, self._on_over)
        except Exception as exc:  # noqa: BLE001 - the test asks what it was
            self.ended.set_result(exc)
        except asyncio.CancelledError:
            if not self.ended.done():
                self.ended.set_result(None)
            raise
        else:
            self.ended.set_result(None)

    def _on_over(self) -> None:
        self.over += 1

    async def end(self) -> Exception | None:
        async with asyncio.timeout(SOON_S):
            return await asyncio.shield(self.ended)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, Dial]]:
    server = Server()
    async with served_by(server) as dial:
        yield server, dial


async def read_all(call: aio.StreamStreamCall[Frame, Frame]) -> list[Frame]:
    frames = []
    async with asyncio.timeout(SOON_S):
        while (frame := await call.read()) is not aio.EOF:
            assert isinstance(frame, Frame)
            frames.append(frame)
    return frames


class TestServe:
    async def test_carries_both_ways_until_the_other_end_is_done(self) -> None:
        async with serving() as (server, dial):
            call = dial()
            await call.write(HELLO)
            assert await call.read() == WELCOME
            await call.write(Frame(cancelled_task_ids=[1, 2]))
            server.link.answer(7, b"v")
            assert await call.read() == Frame(outcomes=[link_pb2.TaskOutcome(task_id=7, value=b"v")])
            await call.done_writing()
            assert await read_all(call) == []
            assert await server.end() is None
            assert await call.code() is StatusCode.OK
            assert (server.ear.heard, server.over) == ([1, 2], 1)

    async def test_says_all_that_was_said_when_the_other_end_is_done(self) -> None:
        async with serving() as (server, dial):
            call = dial()
            await call.write(HELLO)
            assert await call.read() == WELCOME
            for number in range(5):
                server.link.answer(number, b"x" * MAX_FRAME_BYTES)
            await call.done_writing()
            frames = await read_all(call)
            assert [o.task_id for frame in frames for o in frame.outcomes] == [0, 1, 2, 3, 4]

    async def test_ends_the_stream_when_its_own_link_is_closed(self) -> None:
        async with serving() as (server, dial):
            call = dial()
            await call.write(HELLO)
            assert await call.read() == WELCOME
            server.link.answer(1, b"last")
            server.link.say_goodbye(link_pb2.GOODBYE_REASON_SHUTTING_DOWN, "bye")
            [frame] = [await call.read()]
            assert isinstance(frame, Frame)
            assert frame.goodbye.message == "bye"
            assert len(frame.outcomes) == 1
            await call.done_writing()
            assert await read_all(call) == []
            assert await server.end() is None

    @pytest.mark.parametrize(
        "say",
        [
            [Frame()],
            [WELCOME],
            [Frame(cancelled_task_ids=[1])],
            [HELLO, HELLO],
            [HELLO, Frame(outcomes=[link_pb2.TaskOutcome()])],
            [HELLO, Frame(goodbye=link_pb2.Goodbye()), Frame(cancelled_task_ids=[1])],
            [HELLO, Frame(cancelled_task_ids=[1] * 5000)],
            [b"\xff\xff\xff"],
            [HELLO, b"\xff\xff\xff"],
        ],
    )
    async def test_of_who_breaks_the_protocol_ends_with_that(self, say: list[Frame | bytes]) -> None:
        async with serving() as (server, dial):
            call = dial()
            for frame in say:
                await call.write(frame)
            assert isinstance(await server.end(), InvalidRequest)
            assert server.over == 1
            assert server.link.is_closed
            assert server.ear.heard == []

    async def test_of_who_ends_before_its_greeting(self) -> None:
        async with serving() as (server, dial):
            await dial().done_writing()
            error = await server.end()
            assert isinstance(error, InvalidRequest)
            assert "before its greeting" in str(error)

    async def test_of_who_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_stream, "GREETING_S", 0.1)
        async with serving() as (server, dial):
            call = dial()
            await call.wait_for_connection()
            error = await server.end()
            assert isinstance(error, InvalidRequest)
            assert "no greeting" in str(error)

    async def test_of_who_hangs_up(self) -> None:
        async with serving() as (server, dial):
            call = dial()
            await call.write(HELLO)
            assert await call.read() == WELCOME
            call.cancel()
            assert not isinstance(await server.end(), ParallaxError)

    async def test_of_who_does_not_read_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_stream, "STALLED_S", 0.2)
        monkeypatch.setattr(link_stream, "PULSE_S", 0.05)
        monkeypatch.setattr(link_stream, "FLUSH_S", 0.1)
        async with serving() as (server, dial):
            call = dial()
            await call.write(HELLO)
            for number in range(64):
                server.link.answer(number, b"x" * MAX_FRAME_BYTES)
            error = await server.end()
            assert isinstance(error, Unavailable)
            assert "has not read" in str(error)
            assert server.link.backlog_bytes == 0, "what nobody will take is let go"
            call.cancel()

    async def test_of_a_refusing_receiver_ends_with_its_refusal(self) -> None:
        async with serving() as (server, dial):
            server.ear.refusal = NotAuthorized("not yours")
            call = dial()
            await call.write(HELLO)
            await call.write(Frame(cancelled_task_ids=[1]))
            assert await server.end() is server.ear.refusal

    async def test_beats_while_there_is_nothing_to_say(self) -> None:
        async with serving() as (server, dial):
            server.link.beat_s = 0.05
            call = dial()
            await call.write(HELLO)
            assert await call.read() == WELCOME
            async with asyncio.timeout(SOON_S):
                for _ in range(3):
                    assert await call.read() == Frame()
            await call.done_writing()


class TestConverse:
    """The same from the side that dialled."""

    @asynccontextmanager
    async def conversing(
        self, peer: Callable[[Context], object]
    ) -> AsyncIterator[tuple[Link, Ear, asyncio.Task[None]]]:
        async def handle(context: Context) -> None:
            await peer(context)  # type: ignore[misc]

        async with served_by(handle) as dial:
            ear = Ear()
            link = Link(End.WORKER, Said.WELCOME, ear)
            link.greet(HELLO)
            task = asyncio.create_task(converse(link, dial()))
            try:
                yield link, ear, task
            finally:
                task.cancel()
                await asyncio.wait({task})

    async def failure_of(self, peer: Callable[[Context], object]) -> BaseException | None:
        async with self.conversing(peer) as (link, _, task):
            await asyncio.wait({task}, timeout=SOON_S)
            assert link.is_closed
            return task.exception()

    async def test_ends_in_order_when_the_other_end_does(self) -> None:
        async def peer(context: Context) -> None:
            assert await context.read() == HELLO
            await context.write(WELCOME)
            await context.write(Frame(cancelled_task_ids=[1]))

        async with self.conversing(peer) as (_, ear, task):
            async with asyncio.timeout(SOON_S):
                await task
            assert ear.heard == [1]

    async def test_says_all_and_half_closes_when_its_link_is_closed(self) -> None:
        heard: list[Frame] = []

        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            while (frame := await context.read()) is not aio.EOF:
                heard.append(frame)

        async with self.conversing(peer) as (link, ear, task):
            async with asyncio.timeout(SOON_S):
                await ear.greeted.wait()
                link.answer(1, b"x" * MAX_FRAME_BYTES)
                link.answer(2, b"y")
                link.close()
                await task
        assert heard[0] == HELLO
        assert [o.task_id for frame in heard for o in frame.outcomes] == [1, 2]

    async def test_of_who_breaks_the_protocol_may_pass(self) -> None:
        async def peer(context: Context) -> None:
            await context.write(Frame(cancelled_task_ids=[1]))
            await context.read()
            await context.read()

        failure = await self.failure_of(peer)
        assert type(failure) is Unavailable
        assert "broke the protocol" in str(failure)

    @pytest.mark.parametrize("greets", [False, True])
    async def test_of_who_sends_no_frames_at_all(self, greets: bool) -> None:  # noqa: FBT001
        async def peer(context: Context) -> None:
            if greets:
                await context.write(WELCOME)
            await context.write(b"\xff\xff\xff")
            await context.read()
            await context.read()

        failure = await self.failure_of(peer)
        assert type(failure) is Unavailable
        assert "cannot be read" in str(failure)

    async def test_of_who_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_stream, "GREETING_S", 0.1)

        async def peer(context: Context) -> None:
            while await context.read() is not aio.EOF:
                pass

        failure = await self.failure_of(peer)
        assert type(failure) is Unavailable
        assert "no greeting" in str(failure)

    async def test_of_who_ends_before_its_greeting(self) -> None:
        async def peer(context: Context) -> None:
            await context.read()

        assert type(await self.failure_of(peer)) is Unavailable

    async def test_of_who_refuses_ends_with_the_status(self) -> None:
        async def peer(context: Context) -> None:
            await context.abort(StatusCode.PERMISSION_DENIED, "no")

        failure = await self.failure_of(peer)
        assert isinstance(failure, NotAuthorized)
        assert "no" in str(failure)

    async def test_of_who_does_not_read_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_stream, "STALLED_S", 0.2)
        monkeypatch.setattr(link_stream, "PULSE_S", 0.05)

        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            await asyncio.sleep(60)

        async with self.conversing(peer) as (link, _, task):
            for number in range(64):
                link.answer(number, b"x" * MAX_FRAME_BYTES)
            await asyncio.wait({task}, timeout=SOON_S)
            failure = task.exception()
            assert type(failure) is Unavailable
            assert "has not read" in str(failure)

    async def test_that_is_cancelled_is_cancelled(self) -> None:
        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            await context.read()
            await context.read()

        async with self.conversing(peer) as (link, ear, task):
            await ear.greeted.wait()
            task.cancel()
            await asyncio.wait({task}, timeout=SOON_S)
            assert task.cancelled()
            assert link.is_closed
