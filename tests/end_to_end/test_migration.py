"""Agents whose certificate is replaced under load: the session moves, and no task notices."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import pytest
from cryptography import x509

from parallax.control_plane.registry import AgentRef
from parallax.runtime import backoff
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.sdk.keeper import WATCH_AFTER_S
from parallax.security.errors import TaskFailed
from tests.end_to_end.test_revocation import revoke, revoked

if TYPE_CHECKING:
    from parallax.control_plane.sessions import Session
    from tests.end_to_end.conftest import Child, Children, Fleet, Pki, Serve, Until

AgentT = TypeVar("AgentT", bound=SecureAgent)
NAME = "agent-1"


class Busy(SecureAgent):
    """Answers after as many seconds as it is told, or in as many parts."""

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        await asyncio.sleep(data["seconds"])
        return data, 1.0

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        for number in range(data["parts"]):
            await asyncio.sleep(data["seconds"])
            yield number, 1.0


class Patient(SecureAgent):
    """Answers a task, or ends its answer in parts, when the test lets it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun: set[str] = set()
        self.released: set[str] = set()
        self.cancelled: set[str] = set()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        self.begun.add(task)
        try:
            while task not in self.released:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.add(task)
            raise
        return task, 1.0

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        self.begun.add(task)
        while task not in self.released:
            await asyncio.sleep(0.05)
            yield task, 1.0
        yield "the last", 1.0


@pytest.fixture
def site(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """A certificate directory that a test may change."""
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", f"agent/{NAME}", "client/cli", "client/admin")
    return pki


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def rotate(site: Pki, short: str = f"agent/{NAME}") -> int:
    """Put a new certificate in the place of the old one; its serial."""
    site.save(short)
    path = site.directory / short.partition("/")[2] / "cert.pem"
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def session(fleet: Fleet) -> Session | None:
    """The session that tasks are given on."""
    instance = fleet.plane.sessions.instance(AgentRef(NAME))
    return instance.active if instance is not None else None


def serial_of(session: Session | None) -> int | None:
    """Of the certificate that *session* was opened with."""
    receiver: Any = session.link.receiver if session is not None else None
    return getattr(getattr(receiver, "caller", None), "serial", None)


def uses(fleet: Fleet, serial: int) -> Callable[[], bool]:
    """Whether tasks are given on a session of that certificate, and it is the only one."""
    return lambda: serial_of(session(fleet)) == serial and len(fleet.plane.sessions) == 1


def connections(fleet: Fleet) -> int:
    """Ends in this process of what leads to the control plane's port."""
    of = psutil.Process().net_connections("tcp")
    return sum(getattr(each.raddr, "port", None) == fleet.port for each in of)


class Load:
    """Callers who ask again as soon as they are answered, and count."""

    def __init__(self, client: ParallaxClient) -> None:
        self.client = client
        self.answered = 0
        self.is_over = False

    @asynccontextmanager
    async def on(self, quick: int, slow: int, in_parts: int) -> AsyncIterator[None]:
        """So many callers of each kind, for as long as the block; it fails if any of them does."""
        async with asyncio.TaskGroup() as group:
            for number in range(quick):
                group.create_task(self._ask(number / quick / 100))
            for number in range(slow):
                group.create_task(self._ask(0.2 + number / slow / 5))
            for _ in range(in_parts):
                group.create_task(self._read(10, 0.03))
            yield
            self.is_over = True

    async def _ask(self, seconds: float) -> None:
        while not self.is_over:
            data = {"seconds": seconds, "number": self.answered}
            assert (await self.client.analyze(NAME, "x", data)).value == data
            self.answered += 1

    async def _read(self, parts: int, seconds: float) -> None:
        while not self.is_over:
            stream = self.client.stream(NAME, "x", {"parts": parts, "seconds": seconds})
            assert [part.value async for part in stream] == list(range(parts))
            self.answered += 1


async def test_forty_rotations_under_load_fail_and_lose_nothing(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with (
        serve(tls=site.tls(), drain_seconds=30) as fleet,
        fleet.agent(Busy, NAME, max_concurrency=400),
        fleet.client() as client,
    ):
        load, generations = Load(client), set()
        async with load.on(quick=100, slow=150, in_parts=50):
            for _ in range(40):
                serial, before = rotate(site), load.answered
                await until(lambda: load.answered > before + 1_000)  # noqa: B023 - awaited at once
                generations.add(session(fleet).generation)  # type: ignore[union-attr]  # there always is one
                assert len(fleet.plane.sessions) <= 2
            await until(uses(fleet, serial))
            assert (await client.analyze(NAME, "x", {"seconds": 0})).value == {"seconds": 0}
        assert len(generations) > 5
        assert (await fleet.metrics())["parallax_session_take_overs_total"] == 0
        [agent] = await client.agents()
        assert (agent.in_flight, agent.state) == (0, "ready")


@pytest.mark.usefixtures("moves_at_once")
async def test_a_hundred_rotations_leave_nothing_behind(
    site: Pki, serve: Serve, until: Until, no_collector: None
) -> None:
    """No connection, no session and no task, without waiting for the garbage collector."""
    async with (
        serve(tls=site.tls()) as fleet,
        fleet.agent(Busy, NAME),
        fleet.client() as client,
    ):
        await client.analyze(NAME, "x", {"seconds": 0})
        await asyncio.sleep(WATCH_AFTER_S + 0.5)  # by then the client watches its own files
        before, generation = (connections(fleet), len(asyncio.all_tasks())), 0
        for _ in range(100):
            await until(uses(fleet, rotate(site)))
            now = session(fleet)
            assert now is not None
            assert now.generation > generation
            generation = now.generation
            assert (await client.analyze(NAME, "x", {"seconds": 0})).agent_id == NAME
        await until(lambda: (connections(fleet), len(asyncio.all_tasks())) == before)


# What is open when the certificate changes.


@asynccontextmanager
async def patient(
    site: Pki, serve: Serve, drain_seconds: float
) -> AsyncIterator[tuple[Fleet, Patient, ParallaxClient]]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PARALLAX_DRAIN_SECONDS", str(drain_seconds))
        async with (
            serve(tls=site.tls(), drain_seconds=drain_seconds) as fleet,
            fleet.agent(Patient, NAME) as agent,
            fleet.client() as client,
        ):
            assert isinstance(agent, Patient)
            yield fleet, agent, client


@asynccontextmanager
async def asked(
    client: ParallaxClient, agent: Patient, task: str, until: Until, *, in_parts: bool = False
) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that the agent has begun: the caller who waits for it."""

    async def whole() -> Any:
        return (await client.analyze(NAME, task, {})).value

    async def parts() -> Any:
        return [part.value async for part in client.stream(NAME, task, {})][-1]

    waiting = asyncio.create_task(parts() if in_parts else whole())
    try:
        await until(lambda: task in agent.begun)
        yield waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


async def test_what_came_by_the_old_stream_is_answered_on_it_and_then_it_ends(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with patient(site, serve, 30) as (fleet, agent, client), asked(client, agent, "old", until) as old:
        before = session(fleet)
        serial = rotate(site)
        await until(lambda: serial_of(session(fleet)) == serial)
        async with asked(client, agent, "new", until) as new:
            now = session(fleet)
            assert before is not None
            assert now is not None
            assert (before.held, before.takes_tasks, now.held) == (1, False, 1)
            assert now.generation > before.generation
            agent.released |= {"old"}
            assert await old == "old"
            await until(uses(fleet, serial))
            assert not new.done()
            agent.released |= {"new"}
            assert await new == "new"


async def test_what_is_unfinished_after_the_drain_time_is_answered_on_the_new_stream(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with patient(site, serve, 1) as (fleet, agent, client), asked(client, agent, "old", until) as old:
        await until(uses(fleet, rotate(site)))
        assert not old.done()
        agent.released |= {"old"}
        assert await old == "old"


async def test_a_caller_who_leaves_after_that_still_ends_the_handler(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with patient(site, serve, 0.2) as (fleet, agent, client):
        async with asked(client, agent, "old", until):
            await until(uses(fleet, rotate(site)))
        await until(lambda: "old" in agent.cancelled)
        assert (await client.agent(NAME)).in_flight == 0


async def test_answers_in_parts_outlast_the_drain_time_where_they_began(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with (
        patient(site, serve, 0.3) as (fleet, agent, client),
        asked(client, agent, "parts", until, in_parts=True) as parts,
    ):
        serial = rotate(site)
        await until(lambda: serial_of(session(fleet)) == serial)
        await asyncio.sleep(1)  # three times as long as all else would have
        assert len(fleet.plane.sessions) == 2
        agent.released |= {"parts"}
        assert await parts == "the last"
        await until(uses(fleet, serial))


async def test_answers_in_parts_give_way_to_the_next_change_after_the_drain_time(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with (
        patient(site, serve, 0.3) as (fleet, agent, client),
        asked(client, agent, "parts", until, in_parts=True) as parts,
    ):
        first = rotate(site)
        await until(lambda: serial_of(session(fleet)) == first)
        await until(uses(fleet, rotate(site)))
        with pytest.raises(TaskFailed, match="some may be lost; ask again") as failed:
            await parts
        assert failed.value.code == "INVALID_RESULT"


async def test_of_several_changes_the_latest_is_followed_and_there_are_never_more_than_two_streams(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with patient(site, serve, 30) as (fleet, agent, client), asked(client, agent, "old", until) as old:
        serials = []
        most = 0
        for _ in range(5):
            serials.append(rotate(site))
            await until(lambda: serial_of(session(fleet)) == serials[0])
            for _ in range(10):
                most = max(most, len(fleet.plane.sessions), connections(fleet) - 1)  # and one is the client's
                await asyncio.sleep(0.01)
        assert most == 2
        assert serial_of(session(fleet)) == serials[0]
        agent.released |= {"old"}
        assert await old == "old"
        await until(uses(fleet, serials[-1]))


# A new certificate that is not let in.


async def test_a_new_certificate_that_is_refused_costs_nothing_and_is_told_once(
    site: Pki, serve: Serve, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[logging.LogRecord]:
        return [each for each in caplog.records if "no session with the new certificate" in each.message]

    async with patient(site, serve, 30) as (fleet, agent, client):
        before = session(fleet)
        async with asked(client, agent, "old", until) as old:
            site.save_foreign(f"agent/{NAME}")
            await until(told)
            await asyncio.sleep(2)  # for a few more attempts
            assert session(fleet) is before
            assert len(told()) == 1
            agent.released |= {"old", "another"}
            assert await old == "old"
        assert (await client.analyze(NAME, "another", {})).value == "another"
        await until(uses(fleet, rotate(site)))


# What may happen in the middle.


@asynccontextmanager
async def held(
    client: ParallaxClient, file: Path, until: Until, name: str = NAME
) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that a worker holds until *file* is gone: the caller who waits for it."""
    waiting = asyncio.create_task(client.analyze(name, "hold", str(file)))
    try:
        await until(file.exists)
        yield waiting
    finally:
        file.unlink(missing_ok=True)  # noqa: ASYNC240
        waiting.cancel()
        await asyncio.wait({waiting})


async def migrating(site: Pki, child: Child, fleet: Fleet) -> None:
    """Have *child* move to a new stream, while it holds something on the old one."""
    serial = rotate(site)
    await child.said("session moved")
    assert serial_of(session(fleet)) == serial
    instance = fleet.plane.sessions.instance(AgentRef(NAME))
    assert instance is not None
    assert len(instance.sessions) == 2


async def test_an_agent_that_is_killed_in_the_middle_loses_only_its_own_tasks(
    site: Pki, serve: Serve, children: Children, tmp_path: Path, until: Until
) -> None:
    site.save("agent/agent-2")
    async with serve(tls=site.tls()) as fleet, fleet.client() as client:
        fleet.pki = site
        child = await children.agent(fleet)
        async with (
            fleet.raw_agent("agent/agent-2", agent_id="agent-2") as other,
            held(client, tmp_path / "old", until) as old,
        ):
            await migrating(site, child, fleet)
            async with held(client, tmp_path / "new", until) as new:
                kept = asyncio.create_task(client.analyze("agent-2", "x"))
                task = await other.task()
                child.process.kill()
                for lost in (old, new):
                    with pytest.raises(TaskFailed) as failed:
                        await lost
                    assert failed.value.code == "AGENT_LOST"
                await other.answer(task.id, b"kept")
                assert (await kept).value == b"kept"
        await until(lambda: session(fleet) is None)


async def test_an_agent_that_is_told_to_stop_in_the_middle_finishes_what_both_streams_brought(
    site: Pki, serve: Serve, children: Children, tmp_path: Path, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet, fleet.client() as client:
        fleet.pki = site
        child = await children.agent(fleet)
        async with held(client, tmp_path / "old", until) as old:
            await migrating(site, child, fleet)
            async with held(client, tmp_path / "new", until) as new:
                child.process.send_signal(signal.SIGTERM)
                while (await client.agent(NAME)).state != "draining":
                    await asyncio.sleep(0.01)
                for name, kept in (("new", new), ("old", old)):
                    (tmp_path / name).unlink()
                    assert (await kept).value == str(tmp_path / name)
        assert await child.ended() == 0
        assert len(fleet.plane.sessions) == 0


async def test_an_agent_that_is_superseded_in_the_middle_stops_for_good(
    site: Pki, serve: Serve, children: Children, tmp_path: Path, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet, fleet.client() as client:
        fleet.pki = site
        child = await children.agent(fleet)
        async with held(client, tmp_path / "old", until) as lost:
            await migrating(site, child, fleet)
            async with fleet.raw_agent(agent_id=NAME):
                assert await child.ended() == 78
                with pytest.raises(TaskFailed) as failed:
                    await lost
                assert failed.value.code == "AGENT_LOST"
                assert len(fleet.plane.sessions) == 1
        assert (await fleet.metrics())["parallax_session_take_overs_total"] == 1


async def test_a_control_plane_that_hangs_in_the_middle_finds_everything_as_it_was(
    site: Pki, children: Children, tmp_path: Path, until: Until
) -> None:
    plane, fleet = await children.fleet(site)
    child = await children.agent(fleet)
    async with fleet.client() as client, held(client, tmp_path / "old", until) as old:
        plane.process.send_signal(signal.SIGSTOP)
        try:
            rotate(site)
            await child.said("certificate rotated")
            await asyncio.sleep(1)
        finally:
            plane.process.send_signal(signal.SIGCONT)
        await child.said("session moved")
        assert (await client.analyze(NAME, "echo", 1)).value == 1
        (tmp_path / "old").unlink()
        assert (await old).value == str(tmp_path / "old")
        assert len(child.records("connected")) == 1
    assert await child.stop() == 0


async def test_a_control_plane_that_is_killed_in_the_middle_is_found_again(
    site: Pki, children: Children, tmp_path: Path, until: Until
) -> None:
    plane, fleet = await children.fleet(site)
    child = await children.agent(fleet)
    async with fleet.client() as client, held(client, tmp_path / "old", until) as old:
        rotate(site)
        await child.said("session moved")
        plane.process.kill()
        with pytest.raises(TaskFailed):
            await old
    again, fleet = await children.fleet(site, PARALLAX_LISTEN=f"127.0.0.1:{fleet.port}")
    await until(lambda: len(child.records("connected")) == 2)
    async with fleet.client() as client:
        assert (await client.analyze(NAME, "echo", 1, wait_for_agent=5)).value == 1
        assert (await fleet.metrics())["parallax_sessions"] == 1
    assert await child.stop() == 0
    assert await again.stop() == 0


async def test_an_agent_whose_certificate_ran_out_is_back_as_soon_as_there_is_a_new_one(
    site: Pki,
    serve: Serve,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (site.directory / "ca" / "key.pem").unlink()  # else it would be renewed
    site.save(f"agent/{NAME}", lifetime=timedelta(seconds=8), now=datetime.now(UTC))
    async with serve(tls=site.tls()) as fleet, fleet.agent(Busy, NAME), fleet.client() as client:
        for limit in ("FIRST_S", "LONGEST_S"):  # of the pause between two attempts: it would not be over
            monkeypatch.setattr(backoff, limit, 600.0)
        await until(lambda: session(fleet) is None)
        with pytest.raises(TaskFailed) as failed:
            await client.analyze(NAME, "x", {"seconds": 0})
        assert failed.value.code == "NO_AGENT"
        await until(lambda: [each for each in caplog.records if each.message == "not connected"])
        serial = rotate(site)
        await until(uses(fleet, serial))
        assert (await client.analyze(NAME, "x", {"seconds": 0})).agent_id == NAME


# Where the control plane dials: the certificate that it dials with changes.


@asynccontextmanager
async def dialled(
    site: Pki, serve: Serve, cls: type[AgentT], drain_seconds: float = 30, **options: Any
) -> AsyncIterator[tuple[Fleet, AgentT, ParallaxClient]]:
    """An agent that listens, and has been dialled."""
    options |= {"session": False, "listen": "127.0.0.1:0"}
    async with (
        serve(tls=site.tls(), drain_seconds=drain_seconds) as fleet,
        fleet.agent(cls, NAME, **options) as agent,
        fleet.client() as client,
    ):
        while (await client.agent(NAME)).state != "ready":
            await asyncio.sleep(0.01)
        yield fleet, agent, client


def dialled_with(agent: SecureAgent) -> list[int]:
    """The serials of the certificates that its links were opened with."""
    assert agent._server is not None
    callers: list[Any] = [worker.caller for worker in agent._server._service._links]
    return [caller.serial for caller in callers]


PROXY = "service/agent-proxy"


async def test_forty_rotations_of_the_agent_proxy_under_load_fail_and_lose_nothing(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with dialled(site, serve, Busy, max_concurrency=400) as (fleet, agent, client):
        load, seen, open_before = Load(client), set(), len(psutil.Process().net_connections("tcp"))
        async with load.on(quick=100, slow=150, in_parts=50):
            for _ in range(40):
                serial, before = rotate(site, PROXY), load.answered
                await until(lambda: load.answered > before + 1_000)  # noqa: B023 - awaited at once
                seen |= set(dialled_with(agent))
                assert len(dialled_with(agent)) <= 2
            await until(lambda: dialled_with(agent) == [serial])
        assert len(seen) > 5
        metrics = await fleet.metrics()
        moved = metrics['parallax_connections_moved_total{result="tried"}']
        assert moved >= len(seen) - 1
        assert metrics['parallax_tls_handshake_duration_seconds_count{side="peer"}'] == moved + 1
        await until(lambda: len(fleet.plane.sessions) == 1)  # the agent's end is over before ours
        await until(lambda: len(psutil.Process().net_connections("tcp")) <= open_before)
        assert (await client.agent(NAME)).in_flight == 0


async def test_what_was_given_on_the_old_link_is_answered_on_it_and_then_it_ends(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with dialled(site, serve, Patient) as (fleet, agent, client):
        async with asked(client, agent, "old", until) as old:
            [first] = dialled_with(agent)
            second = rotate(site, PROXY)
            await until(lambda: sorted(dialled_with(agent)) == sorted([first, second]))
            await until(lambda: len(fleet.plane.sessions) == 2)  # the agent's welcome has arrived
            async with asked(client, agent, "new", until) as new:
                agent.released |= {"old"}
                assert await old == "old"
                await until(lambda: dialled_with(agent) == [second])
                assert not new.done()
                agent.released |= {"new"}
                assert await new == "new"
        await until(lambda: len(fleet.plane.sessions) == 1)


async def test_what_was_given_on_the_old_link_gives_way_to_the_next_change_after_the_drain_time(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with dialled(site, serve, Patient, 0.5) as (_, agent, client):
        async with asked(client, agent, "old", until) as old:
            second = rotate(site, PROXY)
            await until(lambda: second in dialled_with(agent))
            await asyncio.sleep(1)  # twice the drain time
            assert not old.done()
            third = rotate(site, PROXY)
            await until(lambda: dialled_with(agent) == [third])
            with pytest.raises(TaskFailed) as failed:
                await old
            assert failed.value.code == "AGENT_LOST"
        await until(lambda: "old" in agent.cancelled)
        agent.released |= {"next"}
        assert (await client.analyze(NAME, "next", {})).value == "next"


async def test_both_links_to_an_agent_that_is_revoked_end_at_once_whatever_one_waits_for(
    site: Pki, serve: Serve, until: Until
) -> None:
    def is_hurried() -> bool:
        return any(each.is_hurried for each in fleet.plane.proxies._proxies[AgentRef(NAME)]._links)

    async with dialled(site, serve, Patient) as (fleet, agent, client):
        async with asked(client, agent, "old", until) as old:
            rotate(site, PROXY)
            await until(lambda: len(fleet.plane.sessions) == 2)
            async with asked(client, agent, "new", until) as new:
                rotate(site, PROXY)  # for which the older link has the drain time left
                await until(is_hurried)
                await revoke(fleet, site.issue("client/admin"), identity=f"agent/{NAME}")
                await revoked(old, NAME)
                await revoked(new, NAME)
        await until(lambda: agent.cancelled == {"old", "new"})
        await until(lambda: len(fleet.plane.sessions) == 0)


async def test_a_new_certificate_that_the_agent_refuses_costs_nothing_and_is_told_once(
    site: Pki, serve: Serve, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[logging.LogRecord]:
        return [each for each in caplog.records if "no link with the new certificate" in each.message]

    async with dialled(site, serve, Patient) as (fleet, agent, client):
        before = dialled_with(agent)
        async with asked(client, agent, "old", until) as old:
            site.save_foreign(PROXY)
            await until(told)
            refused = 'parallax_connections_moved_total{result="refused"}'
            async with asyncio.timeout(15):
                while (await fleet.metrics())[refused] < 4:  # a few more attempts
                    await asyncio.sleep(0.1)
            assert dialled_with(agent) == before
            assert len(told()) == 1
            metrics = await fleet.metrics()
            assert metrics['parallax_connections_moved_total{result="tried"}'] == 0
            assert metrics['parallax_tls_handshake_duration_seconds_count{side="peer"}'] == 1
            agent.released |= {"old", "another"}
            assert await old == "old"
        assert (await client.analyze(NAME, "another", {})).value == "another"
        good = rotate(site, PROXY)
        await until(lambda: dialled_with(agent) == [good])


async def test_an_agent_with_a_session_of_its_own_is_not_dialled_because_of_a_certificate(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet, fleet.agent(Busy, NAME, listen="127.0.0.1:0") as agent:
        (proxy,) = [each for each in fleet.plane.rotators if each.identity.name == "agent-proxy"]
        rotate(site, PROXY)
        await until(lambda: proxy.status.counts["success"] == 1)
        await asyncio.sleep(0.5)
        assert dialled_with(agent) == []
        assert len(fleet.plane.sessions) == 1
