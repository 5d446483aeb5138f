"""Calls over a link: each ends once, whatever the other end does or does not do."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from grpc import StatusCode, aio

from parallax.protos import link_pb2
from parallax.runtime import calls as calls_module
from parallax.runtime import link_stream
from parallax.runtime.calls import Calls, Reply
from parallax.runtime.executor import Executor
from parallax.runtime.link import End, Link, Said, answer_of
from parallax.runtime.link_stream import serve
from parallax.runtime.outcome import Complete, Failure, Outcome, OutcomeCode, Payload, Value
from parallax.runtime.wire import encode_work
from parallax.runtime.worker import Bench, Worker
from parallax.security.errors import NotAuthorized, ParallaxError, TaskFailed, Unavailable
from tests.runtime.streams import WELCOME, Context, Frame, served_by

SOON_S = 9.0  # on a machine that is busy; less than a peer has to greet
WORK = encode_work("task", Payload(b"in"))


class Lost(ParallaxError):
    """What a call ends with whose link broke under it."""


def lost(failure: ParallaxError) -> ParallaxError:
    return Lost(str(failure))


class Script:
    """The other end, as a test writes it: what it has heard, and what it says."""

    def __init__(self, *, greets: bool = True) -> None:
        self.greets = greets
        self.tasks: asyncio.Queue[link_pb2.Task] = asyncio.Queue()
        self.cancelled: asyncio.Queue[int] = asyncio.Queue()
        self.credit = 0
        self.half_closed = asyncio.Event()
        self.context: Context
        self.end = asyncio.Event()

    async def __call__(self, context: Context) -> None:
        self.context = context
        if self.greets:
            await context.write(WELCOME)
        reader = asyncio.create_task(self._read(context))
        try:
            await self.end.wait()
        finally:
            reader.cancel()

    async def _read(self, context: Context) -> None:
        while (frame := await context.read()) is not aio.EOF:
            for task in frame.tasks:
                self.tasks.put_nowait(task)
            for number in frame.cancelled_task_ids:
                self.cancelled.put_nowait(number)
            self.credit += sum(credit.bytes for credit in frame.credits)
        self.half_closed.set()
        self.end.set()

    async def say(self, frame: Frame | bytes) -> None:
        await self.context.write(frame)

    async def answer(self, *outcomes: Reply) -> None:
        await self.say(Frame(outcomes=outcomes))

    async def task(self) -> link_pb2.Task:
        async with asyncio.timeout(SOON_S):
            return await self.tasks.get()

    async def cancellation(self) -> int:
        async with asyncio.timeout(SOON_S):
            return await self.cancelled.get()


def reply(number: int, value: bytes = b"v") -> Reply:
    return Reply(task_id=number, value=value)


@asynccontextmanager
async def calling(peer: Callable[[Context], Awaitable[None]]) -> AsyncIterator[Calls]:
    async with served_by(peer) as dial:
        calls = Calls("the peer", lost)
        async with asyncio.timeout(SOON_S):
            await calls.open(dial())
        try:
            yield calls
        finally:
            async with asyncio.timeout(SOON_S):
                await calls.close()


def begin(calls: Calls, timeout_s: float = 60) -> asyncio.Task[Reply]:
    return asyncio.create_task(calls.call(WORK, timeout_s))


async def soon(task: asyncio.Task[Any]) -> Any:
    async with asyncio.timeout(SOON_S):
        return await task


class TestCall:
    async def test_each_gets_its_own_answer_in_any_order(self) -> None:
        script = Script()
        async with calling(script) as calls:
            assert calls.max_payload_bytes == 1000
            tasks = [begin(calls) for _ in range(3)]
            asked = [await script.task() for _ in tasks]
            assert [t.work for t in asked] == [WORK] * 3
            assert len({t.id for t in asked}) == 3
            for one in reversed(asked):
                await script.answer(reply(one.id, str(one.id).encode()))
            replies = [await soon(task) for task in tasks]
            assert [r.value for r in replies] == [str(t.id).encode() for t in asked]
            assert not calls._open
            assert not calls._deadlines
            assert script.cancelled.empty()

    async def test_answers_twice_or_to_nobody_are_passed_over(self) -> None:
        script = Script()
        async with calling(script) as calls:
            call = begin(calls)
            number = (await script.task()).id
            await script.answer(reply(number, b"first"), reply(number, b"second"), reply(2**64 - 1), reply(0))
            assert (await soon(call)).value == b"first"
            await script.answer(reply(number, b"third"))
            again = begin(calls)
            await script.answer(reply((await script.task()).id))
            await soon(again)

    async def test_that_nobody_waits_for_is_cancelled(self) -> None:
        script = Script()
        async with calling(script) as calls:
            call = begin(calls)
            number = (await script.task()).id
            call.cancel()
            assert await script.cancellation() == number
            await script.answer(reply(number))
            assert not calls._open
            assert not calls._deadlines

    async def test_that_is_not_answered_in_time_fails_and_is_cancelled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calls_module, "GRACE_S", 0.0)
        monkeypatch.setattr(calls_module, "TICK_S", 0.05)
        script = Script()
        async with calling(script) as calls:
            call = begin(calls, 0.5)
            task = await script.task()
            assert task.timeout_ms == 500
            with pytest.raises(TaskFailed, match="did not answer in time"):
                await soon(call)
            assert await script.cancellation() == task.id

    @pytest.mark.parametrize("options", [{"wait_for_agent_ms": 2**64}, {"target": "\ud800"}])
    async def test_that_cannot_be_asked_leaves_nothing_open(self, options: dict[str, Any]) -> None:
        script = Script()
        async with calling(script) as calls:
            with pytest.raises(ValueError, match=r"range|surrogates"):
                await calls.call(WORK, 1, **options)
            with pytest.raises(ValueError, match=r"range|surrogates"):
                await anext(calls.stream(WORK, 1, **options))
            assert not calls._open
            assert not calls._parts
            call = begin(calls)
            await script.answer(reply((await script.task()).id))
            await soon(call)


class TestEnd:
    async def test_of_the_stream_loses_what_is_open(self) -> None:
        script = Script()
        async with calling(script) as calls:
            pending = [begin(calls) for _ in range(3)]
            await script.task()
            script.end.set()
            for call in pending:
                with pytest.raises(Lost, match="the peer ended the link"):
                    await soon(call)
            assert calls.is_broken
            with pytest.raises(Unavailable):
                await calls.call(WORK, 1)

    async def test_with_a_status_is_told(self) -> None:
        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            while not (await context.read()).tasks:
                pass
            await context.abort(StatusCode.PERMISSION_DENIED, "no longer")

        async with calling(peer) as calls:
            with pytest.raises(Lost, match="no longer"):
                await soon(begin(calls))

    async def test_while_something_is_sent_is_told_as_such(self) -> None:
        """gRPC may not know why, but it is no fault of its own."""
        opened = asyncio.Event()

        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            await opened.wait()
            await context.abort(StatusCode.PERMISSION_DENIED, "no longer")

        for _ in range(5):
            opened.clear()
            async with calling(peer) as calls:
                call = begin(calls)
                opened.set()
                with pytest.raises(Lost, match=r"no longer|ended while a frame was sent"):
                    await soon(call)

    async def test_with_a_goodbye_loses_what_is_open(self) -> None:
        script = Script()
        async with calling(script) as calls:
            call = begin(calls)
            await script.task()
            await script.say(Frame(goodbye=link_pb2.Goodbye(message="the peer stops")))
            with pytest.raises(Lost, match="the peer stops"):
                await soon(call)
            async with asyncio.timeout(SOON_S):
                await script.half_closed.wait()

    @pytest.mark.parametrize(
        "said",
        [WELCOME, Frame(tasks=[link_pb2.Task()]), Frame(credits=[link_pb2.Credit()]), b"\xff\xff\xff"],
        ids=["greets twice", "gives tasks", "gives credit", "garbage"],
    )
    async def test_by_a_broken_protocol_loses_what_is_open(self, said: Frame | bytes) -> None:
        script = Script()
        async with calling(script) as calls:
            call = begin(calls)
            await script.task()
            await script.say(said)
            with pytest.raises(Lost):
                await soon(call)
            assert calls.is_broken

    async def test_by_ourselves_finishes_the_stream(self) -> None:
        script = Script()
        async with served_by(script) as dial:
            calls = Calls("the peer", lost)
            await calls.open(dial())
            call = begin(calls)
            await script.task()
            async with asyncio.timeout(SOON_S):
                await calls.close()
                with pytest.raises(Lost, match="the client was closed"):
                    await call
                await script.half_closed.wait()
                await calls.close()
            with pytest.raises(Unavailable, match="closed"):
                await calls.call(WORK, 1)

    async def test_by_ourselves_does_not_wait_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls_module, "FLUSH_S", 0.1)

        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            await asyncio.sleep(60)

        async with calling(peer) as calls:
            begin_at = asyncio.get_running_loop().time()
            await calls.close()
            assert asyncio.get_running_loop().time() - begin_at < SOON_S

    async def test_when_retired_waits_for_the_last_call_and_takes_no_other(self) -> None:
        script = Script()
        over = asyncio.Event()
        async with served_by(script) as dial:
            calls = Calls("the peer", lost)
            await calls.open(dial(), on_over=over.set)
            call = begin(calls)
            number = (await script.task()).id
            calls.retire()
            await asyncio.sleep(2 * calls_module.TICK_S)
            assert not script.half_closed.is_set()
            await script.answer(reply(number))
            assert (await soon(call)).value == b"v"
            async with asyncio.timeout(SOON_S):
                await script.half_closed.wait()
                await over.wait()
            with pytest.raises(Unavailable, match="ended for another"):
                await calls.call(WORK, 1)

    async def test_when_retired_does_not_wait_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls_module, "FLUSH_S", 0.1)
        over = asyncio.Event()

        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            await asyncio.sleep(60)

        async with served_by(peer) as dial:
            calls = Calls("the peer", lost)
            await calls.open(dial(), on_over=over.set)
            calls.retire()
            async with asyncio.timeout(SOON_S):
                await over.wait()

    async def test_for_who_does_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_stream, "STALLED_S", 0.2)
        monkeypatch.setattr(link_stream, "PULSE_S", 0.05)
        monkeypatch.setattr(calls_module, "FLUSH_S", 0.1)

        async def peer(context: Context) -> None:
            await context.write(WELCOME)
            await asyncio.sleep(60)

        async with calling(peer) as calls:
            big = [asyncio.create_task(calls.call(b"x" * 1024 * 1024, 60)) for _ in range(32)]
            for call in big:
                with pytest.raises(Lost, match="has not read"):
                    await soon(call)

    async def test_draining_takes_nothing_new_and_answers_the_rest(self) -> None:
        script = Script()
        async with calling(script) as calls:
            call = begin(calls)
            task = await script.task()
            await script.say(Frame(draining=True))
            while calls.link.state.name != "DRAINING":
                await asyncio.sleep(0.01)
            with pytest.raises(Unavailable, match="shutting down"):
                await calls.call(WORK, 1)
            assert not calls.is_broken
            await script.answer(reply(task.id))
            assert (await soon(call)).value == b"v"


class TestOpen:
    async def test_of_who_does_not_greet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_stream, "GREETING_S", 0.1)
        with pytest.raises(Unavailable, match="no greeting"):
            async with calling(Script(greets=False)):
                pytest.fail("it is not open")

    async def test_of_who_refuses(self) -> None:
        async def peer(context: Context) -> None:
            await context.abort(StatusCode.PERMISSION_DENIED, "not you")

        with pytest.raises(NotAuthorized, match="not you"):
            async with calling(peer):
                pytest.fail("it is not open")

    async def test_that_is_given_up_ends_the_stream(self) -> None:
        script = Script(greets=False)
        async with served_by(script) as dial:
            calls = Calls("the peer", lost)
            call = dial()
            opening = asyncio.create_task(calls.open(call))
            await call.wait_for_connection()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            async with asyncio.timeout(SOON_S):
                assert await call.code() is StatusCode.CANCELLED
                while not calls.is_broken:
                    await asyncio.sleep(0.01)

    async def test_that_is_closed_meanwhile_lets_go_of_the_stream(self) -> None:
        """A connection lives as long as a call that it carried; no collection is to be waited for."""
        script = Script(greets=False)
        async with served_by(script) as dial:
            gc.disable()
            try:
                calls = Calls("the peer", lost)
                dialled: list[Any] = [dial()]
                call = weakref.ref(dialled[0])
                opening = asyncio.create_task(calls.open(dialled.pop()))
                while not hasattr(script, "context"):
                    await asyncio.sleep(0.01)
                await calls.close()
                with pytest.raises(Unavailable, match="the client was closed"):
                    await opening
                async with asyncio.timeout(SOON_S):
                    while call() is not None:
                        await asyncio.sleep(0.01)
            finally:
                gc.enable()

    async def test_calls_before_it_are_refused(self) -> None:
        calls = Calls("the peer", lost)
        with pytest.raises(Unavailable):
            await calls.call(WORK, 1)
        await calls.close()


class Source:
    """An agent that counts, and says how far it is."""

    def __init__(self, size: int, count: int) -> None:
        self.size, self.count = size, count
        self.made = 0
        self.is_closed = asyncio.Event()

    async def stream(self, name: str, payload: Payload) -> Any:
        try:
            for _ in range(self.count):
                self.made += 1
                yield Value(Payload(b"x" * self.size), 1.0)
        finally:
            self.is_closed.set()

    async def whole(self, name: str, payload: Payload) -> Outcome:
        return Failure(OutcomeCode.HANDLER_FAILED, "asked for all at once")

    async def __call__(self, context: Context) -> None:
        async with Executor(self.whole, max_concurrency=2, queue_limit=2, grace=timedelta(0)) as executor:
            worker = Worker(Bench(executor, self.stream))
            worker.link = Link(End.WORKER, Said.HELLO, worker)
            worker.link.greet(WELCOME)
            await serve(worker.link, context, worker.withdraw_all)


class TestStream:
    async def test_gives_all_parts_and_how_it_ended(self) -> None:
        async with calling(Source(10, 5)) as calls, asyncio.timeout(SOON_S):
            items = [item async for item in calls.stream(WORK, 60)]
            assert [type(item) for item in items] == [link_pb2.Part] * 5 + [Reply]
            assert isinstance(items[-1], Reply)
            assert answer_of(items[-1]) == Complete(5)
            assert not calls._open
            assert not calls._parts
            assert not calls._deadlines

    async def test_of_a_slow_reader_holds_back_the_generator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls_module, "PART_CREDIT", 1000)
        source = Source(100, 50)
        async with calling(source) as calls, asyncio.timeout(SOON_S):
            taken = 0
            async with aclosing(calls.stream(WORK, 60)) as items:
                async for item in items:
                    if isinstance(item, Reply):
                        assert answer_of(item) == Complete(50)
                        break
                    taken += 1
                    await asyncio.sleep(0.005)
                    # So many fit into the credit; one more may go beyond it, one waits to be sent.
                    assert source.made <= taken + 1000 // 100 + 2
            assert taken == 50

    async def test_that_is_left_closes_the_generator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls_module, "PART_CREDIT", 1000)
        source = Source(100, 50)
        async with calling(source) as calls, asyncio.timeout(SOON_S):
            async with aclosing(calls.stream(WORK, 60)) as items:
                await anext(items)
            await source.is_closed.wait()
            assert source.made < 50
            assert not calls._parts

    async def test_of_who_sends_more_than_there_is_room_for_fails(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else an agent could fill the memory of whoever asks it."""
        monkeypatch.setattr(calls_module, "PART_CREDIT", 1000)
        script = Script()
        async with calling(script) as calls, asyncio.timeout(SOON_S):
            async with aclosing(calls.stream(WORK, 60)) as items:
                first = asyncio.create_task(anext(items))
                task = await script.task()
                assert task.part_credit == 1000
                part = link_pb2.Part(task_id=task.id, value=b"x" * 600)
                await script.say(Frame(parts=[part] * 5))
                assert await first == part
                assert await anext(items) == part
                with pytest.raises(TaskFailed, match="no room for"):
                    await anext(items)
            assert await script.cancellation() == task.id
            assert script.credit == 1200

    async def test_of_parts_without_content_is_bounded_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls_module, "PART_CREDIT", 100)
        script = Script()
        async with (
            calling(script) as calls,
            asyncio.timeout(SOON_S),
            aclosing(calls.stream(WORK, 60)) as items,
        ):
            first = asyncio.create_task(anext(items))
            task = await script.task()
            await script.say(Frame(parts=[link_pb2.Part(task_id=task.id)] * 4000))
            await first
            while not calls._open[task.id].done():
                await asyncio.sleep(0.01)
            assert len(calls._parts[task.id].waiting) <= 100

    async def test_parts_of_nobody_are_passed_over(self) -> None:
        script = Script()
        async with calling(script) as calls:
            await script.say(Frame(parts=[link_pb2.Part(task_id=5, value=b"x")] * 3))
            call = begin(calls)
            task = await script.task()
            await script.say(Frame(parts=[link_pb2.Part(task_id=task.id, value=b"x")]))
            await script.answer(reply(task.id))
            await soon(call)
            assert not calls._parts

    async def test_whose_link_breaks_gives_what_has_come_and_then_is_lost(self) -> None:
        script = Script()
        async with (
            calling(script) as calls,
            asyncio.timeout(SOON_S),
            aclosing(calls.stream(WORK, 60)) as items,
        ):
            first = asyncio.create_task(anext(items))
            task = await script.task()
            parts = [link_pb2.Part(task_id=task.id, value=bytes([n])) for n in range(3)]
            await script.say(Frame(parts=parts))
            assert await first == parts[0]
            script.end.set()
            while not calls.is_broken:
                await asyncio.sleep(0.01)
            assert [await anext(items), await anext(items)] == parts[1:]
            with pytest.raises(Lost):
                await anext(items)

    async def test_that_is_left_as_its_link_breaks_leaves_no_complaint(self) -> None:
        """An error that nobody asks for any more is not one that was forgotten."""
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        script = Script()
        async with calling(script) as calls, asyncio.timeout(SOON_S):
            items = calls.stream(WORK, 60)
            first = asyncio.create_task(anext(items))
            task = await script.task()
            await script.say(Frame(parts=[link_pb2.Part(task_id=task.id, value=b"x")]))
            await first
            script.end.set()
            while not calls.is_broken:
                await asyncio.sleep(0.01)
            await items.aclose()
        gc.collect()
        await asyncio.sleep(0)
        assert complaints == []
