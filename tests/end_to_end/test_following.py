"""Whoever dials follows its files: new calls show the new certificate, and none is lost on the way."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from cryptography import x509

from parallax.runtime.agent_server import AgentServer
from parallax.runtime.authorization import Authorization
from parallax.runtime.dialling import Moved
from parallax.sdk import ParallaxClient, SecureAgent, SecureGrpcAgentProxy, SyncParallaxClient
from parallax.sdk import keeper as keeper_module
from parallax.security.bundle import TrustBundle
from parallax.security.errors import Expired, TaskFailed, Unavailable, UntrustedChain, WrongIdentity
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.layouts import Layout, save_leaf
from parallax.security.verification import Peer
from tests.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from parallax.runtime.caller import Caller
    from parallax.sdk.route import Route
    from tests.end_to_end.conftest import Leaf, Listen, Pki, Serve, Until

CLI = "client/cli"
LINK = "/parallax.v1.DispatchService/Link"
LIST = "/parallax.v1.RegistryService/ListAgents"
WATCH = "/parallax.v1.RegistryService/WatchAgents"
BOTH = pytest.mark.parametrize("link", [True, False], ids=["link", "unary"])


class Held(SecureAgent):
    """Goes on with what it is to hold once it may."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.release = asyncio.Event()


class Echo(Held):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        if task == "hold":
            await self.release.wait()
        return data, 1.0


class Count(Held):
    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        for number in range(data):
            if task == "hold" and number == data // 2:
                await self.release.wait()
            yield number, 1.0


@pytest.fixture(autouse=True)
def _follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "WATCH_AFTER_S", 0.0)


@pytest.fixture
def site(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """A certificate directory that a test may change."""
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "agent/agent-2", CLI)
    return pki


class Seen:
    """The serials of each identity that a server has let in, by method."""

    def __init__(self) -> None:
        self._serials: dict[tuple[str, str], set[int]] = defaultdict(set)

    def __call__(self, short: str, method: str) -> set[int]:
        return self._serials[short, method]

    def note(self, caller: Caller, method: str) -> None:
        if isinstance(caller, Peer):
            self(caller.identity.short, method).add(caller.serial)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the gates of this process see; they decide as ever."""
    seen = Seen()
    for owner, name in ((Authorization, "authorize"), (AgentServer, "_authorize")):
        decide: Callable[[Any, Caller, str], None] = getattr(owner, name)

        def authorize(
            self: Any, caller: Caller, method: str, decide: Callable[[Any, Caller, str], None] = decide
        ) -> None:
            seen.note(caller, method)
            decide(self, caller, method)

        monkeypatch.setattr(owner, name, authorize)
    return seen


def serial(site: Pki, name: str = "cli") -> int:
    return x509.load_pem_x509_certificate((site.directory / name / "cert.pem").read_bytes()).serial_number


def sockets(port: int) -> int:
    opened = [each for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED"]
    return len([each for each in opened if each.raddr.port == port])


def route_of(dialler: ParallaxClient | SecureGrpcAgentProxy) -> Route:
    assert dialler._route is not None
    return dialler._route


def serial_used(dialler: ParallaxClient | SecureGrpcAgentProxy) -> int:
    """Of the certificate that its new calls present; `moves` counts for all that share one."""
    credentials = route_of(dialler).connection.use().credentials
    assert credentials is not None
    return credentials.leaf.serial_number


class Load:
    """Callers that ask without a pause; the first failure is raised by `stop`."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._stopping = asyncio.Event()
        self.answers = 0

    def add(self, ask: Callable[[], Any], times: int) -> None:
        for _ in range(times):
            self._group.create_task(self._run(ask))

    async def _run(self, ask: Callable[[], Any]) -> None:
        while not self._stopping.is_set():
            await ask()
            self.answers += 1

    def stop(self) -> None:
        self._stopping.set()


def ends_soon(site: Pki) -> datetime:
    """Give the client a certificate for five seconds; when it ends."""
    ends = datetime.now(UTC) + timedelta(seconds=5)
    site.save(CLI, now=ends - timedelta(days=1))
    return ends


async def rotate(site: Pki, short: str = CLI) -> int:
    await asyncio.to_thread(site.save, short)
    return serial(site, short.partition("/")[2])


class TestClient:
    @pytest.mark.timeout(120)
    async def test_rotates_forty_times_under_load_and_loses_nothing(
        self, site: Pki, serve: Serve, seen: Seen, until: Until
    ) -> None:
        async with (
            serve(tls=site.tls()) as fleet,
            fleet.agent(Echo),
            fleet.agent(Count, "agent-2"),
            fleet.client() as client,
            asyncio.TaskGroup() as group,
        ):
            load = Load(group)

            async def link() -> None:
                assert (await client.analyze("agent-1", "echo", 7)).value == 7

            async def unary() -> None:
                assert len(await client.agents()) == 2

            async def parts() -> None:
                found = [part.value async for part in client.stream("agent-2", "count", 5)]
                assert found == [0, 1, 2, 3, 4]

            load.add(link, 200)
            load.add(unary, 8)
            load.add(parts, 20)
            for count in range(40):
                new = await rotate(site)
                await until(lambda: route_of(client).connection.moves[Moved.TRIED] == count + 1)  # noqa: B023
                await until(lambda: new in seen(CLI, LINK) & seen(CLI, LIST))  # noqa: B023
            load.stop()
            await until(lambda: sockets(fleet.port) == 3)  # the client's, and two agents'
            assert load.answers > 1000

    async def test_a_task_that_began_before_ends_well_and_then_its_connection(
        self, site: Pki, serve: Serve, seen: Seen, until: Until
    ) -> None:
        async with (
            serve(tls=site.tls()) as fleet,
            fleet.agent(Echo) as echo,
            fleet.agent(Count, "agent-2") as counter,
        ):
            async with fleet.client() as client, asyncio.TaskGroup() as group:
                slow = group.create_task(client.analyze("agent-1", "hold", 3))
                stream = group.create_task(_all(client.stream("agent-2", "hold", 20)))
                await until(lambda: len(fleet.plane.dispatcher) == 2)
                new = await rotate(site)
                await until(lambda: new in seen(CLI, LINK))
                assert (await client.analyze("agent-1", "echo", 7)).value == 7
                assert not slow.done()
                assert not stream.done()
                assert sockets(fleet.port) == 4
                echo.release.set()
                counter.release.set()
                assert (await slow).value == 3
                assert await stream == [*range(20)]
                await until(lambda: sockets(fleet.port) == 3)
            await until(lambda: sockets(fleet.port) == 2)

    async def test_works_on_past_the_end_of_its_first_certificate(
        self, site: Pki, serve: Serve, until: Until
    ) -> None:
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo):
            ends = ends_soon(site)
            async with fleet.client() as client, aclosing(client.watch_agents()) as events:
                assert [(await anext(events)).kind for _ in range(2)] == ["added", "synced"]
                assert (await client.analyze("agent-1", "echo", 7)).value == 7
                await rotate(site)
                await until(lambda: route_of(client).connection.moves.total() > 0)
                await until(lambda: datetime.now(UTC) > ends + timedelta(seconds=1.5))
                assert (await client.analyze("agent-1", "echo", 7)).value == 7
                assert len(await client.agents()) == 1
                async with fleet.agent(Echo, "agent-2"):
                    event = await anext(events)
                    assert (event.kind, event.agent and event.agent.agent_id) == ("added", "agent-2")

    async def test_that_has_expired_says_so_and_why(self, site: Pki, serve: Serve, until: Until) -> None:
        """And it works again as soon as there are good files."""
        (site.directory / "ca" / "key.pem").unlink()  # else it would be renewed
        key = site.directory / "cli" / "key.pem"
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo):
            ends = ends_soon(site)
            async with fleet.client() as client:
                await client.analyze("agent-1", "echo", 7)
                key.write_bytes(key.read_bytes()[:80])
                await until(lambda: datetime.now(UTC) > ends + timedelta(seconds=1.5))
                for _ in range(2):
                    with pytest.raises(Expired, match=r"our certificate.* expired at .*key\.pem"):
                        await client.agents()
                    with pytest.raises(Expired, match=r"our certificate.* expired at .*key\.pem"):
                        await client.analyze("agent-1", "echo", 7)
                await rotate(site)
                await until(lambda: route_of(client).connection.moves[Moved.TRIED] == 1)
                assert (await client.analyze("agent-1", "echo", 7)).value == 7

    async def test_a_watch_moves_and_tells_nothing_twice(
        self, site: Pki, serve: Serve, seen: Seen, until: Until
    ) -> None:
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo), fleet.client() as client:
            told: list[tuple[str, str]] = []

            async def watch() -> None:
                async for event in client.watch_agents():
                    told.append((event.kind, event.agent.agent_id if event.agent else ""))  # noqa: PERF401

            watching = asyncio.create_task(watch())
            await until(lambda: len(told) == 2)
            for _ in range(5):
                new = await rotate(site)
                await until(lambda: new in seen(CLI, WATCH))  # noqa: B023
            async with fleet.agent(Echo, "agent-2"):
                await until(lambda: len(told) == 3)
            await until(lambda: told[-1][0] == "removed")
            drained = ("changed", "agent-2")  # several changes are one for whoever hears of them late
            if drained in told:
                told.remove(drained)
            assert told == [
                ("added", "agent-1"),
                ("synced", ""),
                ("added", "agent-2"),
                ("removed", "agent-2"),
            ]
            await until(lambda: sockets(fleet.port) == 2)
            await client.close()
            async with asyncio.timeout(15):
                await watching

    async def test_credentials_that_are_not_let_in_are_not_used(
        self, site: Pki, serve: Serve, until: Until, new_pki: type[Pki], caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo), fleet.client() as client:
            await client.analyze("agent-1", "echo", 7)
            before = serial(site)
            other = new_pki(site.directory.parent / "other")
            save(site, other.issue(CLI), other.authority.bundle, site.authority.bundle)
            await until(lambda: route_of(client).connection.moves[Moved.REFUSED] >= 2)
            assert serial(site) != before
            assert (await client.analyze("agent-1", "echo", 7)).value == 7
            assert len(await client.agents()) == 1
            refusals = [each for each in caplog.records if "does not let in" in each.message]
            assert [each.levelno for each in refusals] == [logging.WARNING]
            await rotate(site)
            await until(lambda: route_of(client).connection.moves[Moved.TRIED] > 0)
            assert (await client.analyze("agent-1", "echo", 7)).value == 7

    async def test_a_root_that_is_taken_out_is_not_trusted_through_an_old_link(
        self, site: Pki, serve: Serve, until: Until, new_pki: type[Pki]
    ) -> None:
        other = new_pki(site.directory.parent / "other")
        save(site, site.issue(CLI), site.authority.bundle, other.authority.bundle)
        own = site.directory / "cli"  # named one by one: else the control plane's roots take their place
        named = site.tls().model_copy(
            update={"ca_file": own / "ca.pem", "cert_file": own / "cert.pem", "key_file": own / "key.pem"}
        )
        async with (
            serve(tls=site.tls()) as fleet,
            fleet.agent(Echo) as agent,
            ParallaxClient(fleet.address, named, identity=CLI) as client,
        ):
            slow = asyncio.create_task(client.analyze("agent-1", "hold", 2))
            await until(lambda: len(fleet.plane.dispatcher) == 1)
            save(site, other.issue(CLI), other.authority.bundle)
            await until(lambda: route_of(client).connection.moves[Moved.UNTRIED] == 1)
            with pytest.raises(UntrustedChain):
                await client.analyze("agent-1", "echo", 7)
            assert not slow.done()
            agent.release.set()
            assert (await slow).value == 2

    async def test_is_back_after_the_control_plane_was_away_at_the_rotation(
        self, site: Pki, serve: Serve, seen: Seen, until: Until
    ) -> None:
        port = free_port()  # that nobody else is given meanwhile
        async with serve(tls=site.tls(), listen=f"127.0.0.1:{port}") as fleet:
            client = fleet.client()
            await client.agents()
        new = await rotate(site)
        await until(lambda: route_of(client).connection.moves[Moved.UNTRIED] > 0)
        async with serve(tls=site.tls(), listen=f"127.0.0.1:{port}") as fleet, fleet.agent(Echo):
            while True:
                try:
                    assert (await client.analyze("agent-1", "echo", 7)).value == 7
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            assert seen(CLI, LINK) == {new}
            await client.close()

    async def test_closes_in_the_middle_of_a_move(self, site: Pki, serve: Serve, until: Until) -> None:
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo):
            for pause in (0.0, 0.1, 0.2, 0.3):
                async with fleet.client() as client:
                    slow = asyncio.create_task(client.analyze("agent-1", "hold", 60))
                    await until(lambda: len(fleet.plane.dispatcher) == 1)
                    await rotate(site)
                    await asyncio.sleep(pause)
                with pytest.raises(TaskFailed):
                    await slow
                await until(lambda: sockets(fleet.port) == 1)
                await until(lambda: len(fleet.plane.dispatcher) == 0)
        assert not followers()

    async def test_used_without_with_ends_its_tasks_when_closed(self, site: Pki, serve: Serve) -> None:
        async with serve(tls=site.tls()) as fleet:
            client = fleet.client()
            for _ in range(2):  # it can be used again
                await client.agents()
                assert followers()
                await client.close()
                assert not followers()

    async def test_that_cannot_connect_leaves_no_task(self, site: Pki) -> None:
        with pytest.raises(Unavailable):
            async with ParallaxClient("127.0.0.1:1", site.tls(), identity=CLI):
                pass
        assert not followers()

    async def test_the_synchronous_face_follows_too(
        self, site: Pki, serve: Serve, seen: Seen, until: Until
    ) -> None:
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo):

            def use() -> None:
                with SyncParallaxClient(fleet.address, site.tls(), identity=CLI) as client:
                    while len(seen(CLI, LINK)) < 2:
                        assert client.analyze("agent-1", "echo", 7).value == 7

            using = asyncio.create_task(asyncio.to_thread(use))
            await until(lambda: len(seen(CLI, LINK)) == 1)
            await rotate(site)
            async with asyncio.timeout(15):
                await using


class TestProxy:
    @BOTH
    async def test_rotates_under_load_and_loses_nothing(
        self, site: Pki, listen: Listen, seen: Seen, until: Until, *, link: bool
    ) -> None:
        method = f"/parallax.v1.AgentService/{'Link' if link else 'Analyze'}"
        async with listen(Echo, tls=site.tls()) as agent:
            metadata = {"id": "agent-1", "endpoint": agent.endpoint}
            port = int(agent.endpoint.rpartition(":")[2])
            proxy = await SecureGrpcAgentProxy.from_metadata(metadata, site.tls(), identity=CLI, link=link)
            async with proxy, asyncio.TaskGroup() as group:
                load = Load(group)

                async def ask() -> None:
                    assert await proxy.analyze("echo", 7) == (7, 1.0)

                slow = group.create_task(proxy.analyze("hold", 3))
                load.add(ask, 30)
                for count in range(10):
                    new = await rotate(site)
                    await until(lambda: route_of(proxy).connection.moves[Moved.TRIED] == count + 1)  # noqa: B023
                    await until(lambda: new in seen(CLI, method))  # noqa: B023
                load.stop()
                assert not slow.done()
                agent.release.set()
                assert await slow == (3, 1.0)
                await until(lambda: sockets(port) == 1)

    @BOTH
    async def test_answers_in_parts_leave_no_connection_behind(
        self, site: Pki, listen: Listen, until: Until, *, link: bool
    ) -> None:
        """Without waiting for the garbage collector: a call that was cut off holds its channel."""
        async with listen(Count, tls=site.tls()) as agent:
            metadata = {"id": "agent-1", "endpoint": agent.endpoint}
            port = int(agent.endpoint.rpartition(":")[2])
            proxy = await SecureGrpcAgentProxy.from_metadata(metadata, site.tls(), identity=CLI, link=link)
            async with proxy:
                gc.collect()
                gc.disable()
                try:
                    for count in range(10):
                        assert [value async for value, _ in proxy.stream("echo", 3)] == [0, 1, 2]
                        await rotate(site)
                        await until(lambda: route_of(proxy).connection.moves[Moved.TRIED] == count + 1)  # noqa: B023
                    await until(lambda: sockets(port) == 1)
                finally:
                    gc.enable()

    @BOTH
    async def test_an_impostor_is_refused_after_a_rotation_as_before(
        self, site: Pki, listen: Listen, until: Until, *, link: bool
    ) -> None:
        endpoint = f"127.0.0.1:{free_port()}"  # that nobody else is given meanwhile
        async with listen(Echo, tls=site.tls(), listen=endpoint):
            metadata = {"id": "agent-1", "endpoint": endpoint}
            proxy = await SecureGrpcAgentProxy.from_metadata(metadata, site.tls(), identity=CLI, link=link)
            await rotate(site)
            await until(lambda: route_of(proxy).connection.moves[Moved.TRIED] > 0)
        async with proxy, listen(Echo, "agent-2", tls=site.tls(), listen=endpoint):
            deadline = asyncio.get_running_loop().time() + 15
            while True:
                assert asyncio.get_running_loop().time() < deadline
                try:
                    await proxy.analyze("echo", 7)
                except WrongIdentity:
                    break
                except (TaskFailed, Unavailable):
                    await asyncio.sleep(0.1)
                else:
                    pytest.fail("it was let in")

    @BOTH
    async def test_whose_certificate_has_expired_says_so_and_why(
        self, site: Pki, listen: Listen, until: Until, *, link: bool
    ) -> None:
        key = site.directory / "cli" / "key.pem"
        async with listen(Echo, tls=site.tls()) as agent:
            ends = ends_soon(site)
            metadata = {"id": "agent-1", "endpoint": agent.endpoint}
            proxy = await SecureGrpcAgentProxy.from_metadata(metadata, site.tls(), identity=CLI, link=link)
            async with proxy:
                assert await proxy.analyze("echo", 7) == (7, 1.0)
                key.write_bytes(key.read_bytes()[:80])
                await until(lambda: datetime.now(UTC) > ends + timedelta(seconds=1.5))
                with pytest.raises(Expired, match=r"our certificate.* expired at .*key\.pem"):
                    await proxy.analyze("echo", 7)
                await rotate(site)
                await until(lambda: route_of(proxy).connection.moves[Moved.TRIED] == 1)
                assert await proxy.analyze("echo", 7) == (7, 1.0)

    async def test_many_of_one_identity_share_what_watches_the_files(
        self, site: Pki, listen: Listen, until: Until
    ) -> None:
        async with listen(Echo, tls=site.tls()) as agent, AsyncExitStack() as stack:
            metadata = {"id": "agent-1", "endpoint": agent.endpoint}
            proxies = [
                await stack.enter_async_context(
                    await SecureGrpcAgentProxy.from_metadata(metadata, site.tls(), identity=CLI)
                )
                for _ in range(20)
            ]
            assert len(followers()) == 22
            await asyncio.sleep(0.5)
            before = threading.active_count()
            assert before < 40
            first = await rotate(site)
            for proxy in proxies:
                await until(lambda: serial_used(proxy) == first)  # noqa: B023
            await proxies.pop().close()  # who leaves takes nothing from the others
            second = await rotate(site)
            for proxy in proxies:
                await until(lambda: serial_used(proxy) == second)  # noqa: B023
                assert await proxy.analyze("echo", 7) == (7, 1.0)
            late = await SecureGrpcAgentProxy.from_metadata(metadata, site.tls(), identity=CLI)
            async with late:
                assert await late.analyze("echo", 7) == (7, 1.0)
        assert not followers()


async def test_a_registration_shows_the_new_certificate(
    site: Pki, serve: Serve, seen: Seen, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    beat = "/parallax.v1.RegistryService/Heartbeat"
    async with (
        serve(tls=site.tls(), lease_seconds=6) as fleet,  # of which a machine may stand still for two thirds
        fleet.agent(Echo, session=False, listen="127.0.0.1:0"),
        fleet.client() as client,
    ):
        await until(lambda: len(seen("agent/agent-1", beat)) == 1)
        before = await client.agent("agent-1")
        new = await rotate(site, "agent/agent-1")
        await until(lambda: new in seen("agent/agent-1", beat))
        assert await client.agent("agent-1") == before  # it was never gone
    assert not [each for each in caplog.records if each.message == "not registered"]


def followers() -> list[asyncio.Task[Any]]:
    """The tasks that clients and proxies have beside their calls."""
    ours = ("Route._follow", "Keeper._keep", "_Followed._run")
    return [each for each in asyncio.all_tasks() if any(name in repr(each.get_coro()) for name in ours)]


async def _all(parts: AsyncIterator[Any]) -> list[object]:
    return [part.value async for part in parts]


def save(site: Pki, leaf: Leaf, *trusted: TrustBundle) -> None:
    """The client's files, as somebody else writes them who trusts others, too."""
    bundle = TrustBundle(tuple(root for each in trusted for root in each.roots))
    who = Identity.parse_short(CLI, DEFAULT_TRUST_DOMAIN)
    save_leaf(site.directory, Layout.PARALLAX, who, (leaf.certificate,), leaf.key, bundle)
