"""A connection follows its store, over real handshakes: no call is lost, and nobody else is let in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psutil
import pytest
from cryptography import x509
from grpc import ChannelConnectivity, aio

from parallax.runtime import connection as connection_module
from parallax.runtime.connection import Connection, Line
from parallax.runtime.dialling import Dialling, Moved
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import Unavailable
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile
from parallax.security.tls import channel_credentials, identity_options
from tests.ports import free_port

SERVICE = Identity.parse_short("service/control-plane")
AGENT = Identity.parse_short("agent/agent-1")
CLIENT = Identity.parse_short("client/cli")
WITHIN_S = 10.0
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW - timedelta(days=7), name="CA")


@pytest.fixture(scope="module")
def stranger() -> CertificateAuthority:
    """Consistent in itself, and nobody here trusts it."""
    return CertificateAuthority.create(now=NOW - timedelta(days=7), name="Stranger")


def issue(authority: CertificateAuthority, identity: Identity = CLIENT, **lifetime: float) -> Credentials:
    key = generate_key()
    profile = LeafProfile(lifetime=timedelta(**lifetime or {"days": 1}))
    issued = authority.issue(identity, key.public_key(), profile, NOW)
    return Credentials(issued.chain, key, issued.bundle)


def foreign(authority: CertificateAuthority, stranger: CertificateAuthority) -> Credentials:
    """Of the stranger's CA, by one who trusts ours: good in itself, but a server of ours refuses it."""
    both = TrustBundle((*stranger.bundle.roots, *authority.bundle.roots))
    return issue(CertificateAuthority(stranger.certificate, stranger.key, both))


class Who:
    """A server that tells callers their serial, at once or when they are released."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.held = 0
        self.release = asyncio.Event()
        self.port = free_port()  # it is given up, and taken again
        self._server: aio.Server | None = None

    async def start(self) -> None:
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "AmI": grpc.unary_unary_rpc_method_handler(self._say),
            "AmIStill": grpc.unary_unary_rpc_method_handler(self._say_later),
        }
        self._server = aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", methods),))
        mine = self.credentials
        secured = grpc.ssl_server_credentials(
            [(mine.key_pem, mine.chain_pem)], mine.bundle_pem, require_client_auth=True
        )
        self._server.add_secure_port(f"127.0.0.1:{self.port}", secured)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def _say(self, _: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        auth: dict[str, list[bytes]] = context.auth_context()  # type: ignore[assignment]
        leaf = x509.load_pem_x509_certificate(auth["x509_pem_cert"][0])
        return f"{leaf.serial_number:x}".encode()

    async def _say_later(self, request: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        self.held += 1
        await self.release.wait()
        self.held -= 1
        return await self._say(request, context)


async def ask(connection: Connection, method: str = "AmI") -> str:
    with connection.use() as line:
        am_i: aio.UnaryUnaryMultiCallable[bytes, bytes] = line.channel.unary_unary(f"/test.Who/{method}")
        # One that is held lasts as long as the test.
        return (await am_i(b"?", timeout=WITHIN_S if method == "AmI" else None)).decode()


def serial(credentials: Credentials) -> str:
    return f"{credentials.leaf.serial_number:x}"


async def until(probe: Callable[[], object]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not probe():
            await asyncio.sleep(0.005)


def sockets(port: int) -> int:
    """How many connections of this process lead to *port*."""
    opened = [each for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED"]
    return len([each for each in opened if each.raddr.port == port])


@pytest.fixture
async def who(authority: CertificateAuthority) -> AsyncIterator[Who]:
    server = Who(issue(authority, SERVICE))
    await server.start()
    yield server
    server.release.set()
    await server.stop()


@pytest.fixture
def store(authority: CertificateAuthority) -> CredentialStore:
    return CredentialStore(CLIENT, issue(authority), NOW)


def dialled(store: CredentialStore, who: Who, expected: Identity = SERVICE, **more: Any) -> Connection:
    def dial() -> aio.Channel:
        return aio.secure_channel(
            f"127.0.0.1:{who.port}",
            channel_credentials(store.current),
            options=[
                *identity_options(expected),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
            ],
        )

    return Connection(dial, store, "the peer", **more)


@pytest.fixture
async def connection(store: CredentialStore, who: Who) -> AsyncIterator[Connection]:
    async with dialled(store, who).following() as following:
        yield following


class TestFollow:
    async def test_new_calls_present_the_new_certificate(
        self, connection: Connection, store: CredentialStore, authority: CertificateAuthority
    ) -> None:
        assert await ask(connection) == serial(store.current)
        for count in (1, 2, 3):
            new = issue(authority)
            store.publish(new, NOW)
            await until(lambda: connection.use().credentials is new)  # noqa: B023 - in this round
            assert await ask(connection) == serial(new)
            assert connection.moves == {Moved.TRIED: count}

    async def test_it_is_told_how_long_the_peer_took_to_let_the_new_one_in(
        self,
        store: CredentialStore,
        who: Who,
        authority: CertificateAuthority,
        stranger: CertificateAuthority,
    ) -> None:
        dialling, took = Dialling(), list[float]()
        dialling.on_let_in = took.append
        async with dialled(store, who, dialling=dialling).following() as connection:
            await ask(connection)
            assert not took
            store.publish(foreign(authority, stranger), NOW)
            await until(lambda: dialling.moves[Moved.REFUSED])
            assert not took
            store.publish(issue(authority), NOW)
            await until(lambda: dialling.moves[Moved.TRIED])
        [seconds] = took
        assert 0 < seconds < WITHIN_S

    async def test_a_call_under_way_goes_on_with_the_old_one_which_closes_after_it(
        self, connection: Connection, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        old = store.current
        async with asyncio.TaskGroup() as group:
            slow = group.create_task(ask(connection, "AmIStill"))
            await until(lambda: who.held)
            store.publish(issue(authority), NOW)
            await until(lambda: connection.moves[Moved.TRIED])
            assert await ask(connection) == serial(store.current)
            assert sockets(who.port) == 2
            who.release.set()
        assert slow.result() == serial(old)
        await until(lambda: sockets(who.port) == 1)

    async def test_a_line_nobody_uses_closes_at_once(
        self, connection: Connection, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        await ask(connection)
        old = connection.use()
        store.publish(issue(authority), NOW)
        await until(lambda: old.channel.get_state() is ChannelConnectivity.SHUTDOWN)
        await until(lambda: sockets(who.port) == 1)

    @pytest.mark.usefixtures("moves_at_once")
    async def test_forty_rotations_under_load_lose_no_call_and_leave_no_socket(
        self, connection: Connection, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        seen: set[str] = set()
        stopping = asyncio.Event()

        async def keep_asking() -> int:
            count = 0
            while not stopping.is_set():
                seen.add(await ask(connection))
                count += 1
            return count

        async with asyncio.TaskGroup() as group:
            askers = [group.create_task(keep_asking()) for _ in range(50)]
            slow = [group.create_task(ask(connection, "AmIStill")) for _ in range(5)]
            rotated = []
            for number in range(40):
                new = issue(authority)
                rotated.append(serial(new))
                store.publish(new, NOW)
                await until(lambda: connection.moves[Moved.TRIED] == number + 1)  # noqa: B023
                await until(lambda: rotated[-1] in seen)
            stopping.set()
            who.release.set()
        assert set(rotated) <= seen
        assert len({each.result() for each in slow}) == 1
        assert sum(each.result() for each in askers) > 200
        await until(lambda: sockets(who.port) == 1)
        assert not connection._retired

    async def test_what_is_published_meanwhile_is_used_next(
        self, connection: Connection, store: CredentialStore, authority: CertificateAuthority
    ) -> None:
        await ask(connection)
        for _ in range(5):
            store.publish(issue(authority), NOW)
        await until(lambda: connection.use().credentials is store.current)
        assert await ask(connection) == serial(store.current)

    async def test_who_waits_for_the_end_of_a_line_is_told(
        self, connection: Connection, store: CredentialStore, authority: CertificateAuthority
    ) -> None:
        told: list[str] = []
        connection.use().on_retire(lambda: told.append("stayed"))
        connection.use().on_retire(lambda: told.append("left"))()
        store.publish(issue(authority), NOW)
        await until(lambda: told)
        assert told == ["stayed"]

    async def test_in_plaintext_there_is_nothing_to_follow(self) -> None:
        connection = Connection(lambda: aio.insecure_channel("127.0.0.1:1"), None, "the peer")
        await connection.follow()
        assert connection.use().credentials is None
        await connection.close()


class TestRefused:
    async def test_the_old_one_stays_in_use_and_one_line_says_so(
        self,
        connection: Connection,
        store: CredentialStore,
        who: Who,
        authority: CertificateAuthority,
        stranger: CertificateAuthority,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        old = store.current
        await ask(connection)
        store.publish(foreign(authority, stranger), NOW)
        await until(lambda: connection.moves[Moved.REFUSED] >= 2)
        assert await ask(connection) == serial(old)
        refusals = [each for each in caplog.records if "does not let in" in each.message]
        assert [each.levelno for each in refusals] == [logging.WARNING]
        await until(lambda: sockets(who.port) == 1)  # the next trial may be under way

        good = issue(authority)
        store.publish(good, NOW)
        await until(lambda: connection.use().credentials is good)
        assert await ask(connection) == serial(good)

    async def test_a_channel_nobody_used_for_long_is_asked_whether_it_still_works(
        self,
        connection: Connection,
        store: CredentialStore,
        authority: CertificateAuthority,
        stranger: CertificateAuthority,
    ) -> None:
        old = store.current
        assert connection.use().channel.get_state() is ChannelConnectivity.IDLE
        store.publish(foreign(authority, stranger), NOW)
        await until(lambda: connection.moves[Moved.REFUSED])
        assert await ask(connection) == serial(old)

    async def test_files_of_another_ca_altogether_change_nothing(
        self, connection: Connection, store: CredentialStore, stranger: CertificateAuthority
    ) -> None:
        old = store.current
        await ask(connection)
        store.publish(issue(stranger), NOW)
        await until(lambda: connection.moves[Moved.REFUSED])
        assert await ask(connection) == serial(old)

    async def test_a_root_that_is_taken_out_is_not_trusted_until_the_old_certificate_ends(
        self, who: Who, authority: CertificateAuthority, stranger: CertificateAuthority
    ) -> None:
        """The peer still has a certificate of that root; so would whoever has stolen its key."""
        first = issue(authority)
        both = TrustBundle((*authority.bundle.roots, *stranger.bundle.roots))
        store = CredentialStore(CLIENT, Credentials(first.chain, first.key, both), NOW)
        async with dialled(store, who).following() as connection:
            await ask(connection)
            store.publish(issue(stranger), NOW)
            await until(lambda: connection.moves[Moved.UNTRIED])
            with pytest.raises(aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
                await ask(connection)

    async def test_what_has_to_move_along_can_refuse(
        self, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        asked: list[Line] = []

        async def move(line: Line) -> None:
            asked.append(line)
            if len(asked) == 1:
                raise Unavailable("not yet")

        old = store.current
        async with dialled(store, who).following(move) as connection:
            await ask(connection)
            store.publish(issue(authority), NOW)
            await until(lambda: connection.moves[Moved.REFUSED])
            assert await ask(connection) == serial(old)
            await until(lambda: connection.moves[Moved.TRIED])
            assert connection.use() is asked[-1]

    async def test_another_identity_at_the_address_is_refused_after_a_rotation_as_before(
        self, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        """The negative twin: a good certificate of the same CA, but somebody else's."""
        impostor = Who(issue(authority, AGENT))
        await impostor.start()
        async with dialled(store, who).following() as connection:
            old = await ask(connection)
            port, who.port = who.port, impostor.port  # whoever dials from here on gets there
            store.publish(issue(authority), NOW)
            await until(lambda: connection.moves[Moved.REFUSED])
            assert await ask(connection) == old
            who.port = port
            await until(lambda: connection.moves[Moved.TRIED])
            assert await ask(connection) == serial(store.current)
        await impostor.stop()

    async def test_an_impostor_is_refused_also_when_the_peer_was_away_at_the_rotation(
        self, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        async with dialled(store, who).following() as connection:
            await ask(connection)
            await who.stop()
            store.publish(issue(authority), NOW)
            await until(lambda: connection.moves[Moved.UNTRIED])
            impostor = Who(issue(authority, AGENT))
            impostor.port = who.port
            await impostor.start()
            with pytest.raises(aio.AioRpcError, match="Hostname Verification"):
                await until_not_refused(connection)
            await impostor.stop()


async def until_not_refused(connection: Connection) -> None:
    """Ask until the peer's port is open again."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                await ask(connection)
            except aio.AioRpcError as exc:
                if "refused" not in (exc.details() or ""):
                    raise
                await asyncio.sleep(0.05)
            else:
                return


class TestAway:
    async def test_the_new_one_is_used_untried_when_the_peer_is_away(
        self, connection: Connection, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        await ask(connection)
        await who.stop()
        store.publish(issue(authority), NOW)
        await until(lambda: connection.moves[Moved.UNTRIED])
        assert connection.use().credentials is store.current
        await who.start()
        await until_not_refused(connection)
        assert await ask(connection) == serial(store.current)

    async def test_a_peer_that_accepts_and_is_silent_changes_nothing_while_the_old_channel_works(
        self,
        store: CredentialStore,
        who: Who,
        authority: CertificateAuthority,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(connection_module, "TRIAL_S", 0.2)
        old = store.current
        async with silent() as hole, dialled(store, who).following() as connection:
            await ask(connection)
            port, who.port = who.port, hole
            store.publish(issue(authority), NOW)
            await until(lambda: connection.moves[Moved.REFUSED])
            assert await ask(connection) == serial(old)
            monkeypatch.setattr(connection_module, "TRIAL_S", WITHIN_S)
            who.port = port
            await until(lambda: connection.moves[Moved.TRIED])
            assert await ask(connection) == serial(store.current)

    async def test_what_has_expired_is_not_kept(
        self,
        store: CredentialStore,
        who: Who,
        authority: CertificateAuthority,
        stranger: CertificateAuthority,
    ) -> None:
        late = NOW
        async with dialled(store, who, clock=lambda: late).following() as connection:
            await ask(connection)
            store.publish(foreign(authority, stranger), NOW)
            await until(lambda: connection.moves[Moved.REFUSED])
            late = NOW + timedelta(days=2)
            await until(lambda: connection.moves[Moved.UNTRIED])
            assert connection.use().credentials is store.current


@asynccontextmanager
async def silent() -> AsyncIterator[int]:
    """A port that takes connections, and never says anything."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    async with server:
        name: tuple[str, int] = server.sockets[0].getsockname()
        yield name[1]
        for writer in writers:
            writer.close()


class TestClose:
    async def test_in_the_middle_of_a_trial_nothing_is_left(
        self, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        async with silent() as hole, AsyncExitStack() as stack:
            connection = await stack.enter_async_context(dialled(store, who).following())
            await ask(connection)
            port, who.port = who.port, hole
            store.publish(issue(authority), NOW)
            await until(lambda: sockets(hole))
            await stack.aclose()
            await until(lambda: not sockets(hole) and not sockets(port))

    async def test_calls_on_old_lines_end_too(
        self, store: CredentialStore, who: Who, authority: CertificateAuthority
    ) -> None:
        async with dialled(store, who).following() as connection:
            slow = asyncio.create_task(ask(connection, "AmIStill"))
            await until(lambda: who.held)
            store.publish(issue(authority), NOW)
            await until(lambda: connection.moves[Moved.TRIED])
        with suppress(asyncio.CancelledError, aio.AioRpcError):
            async with asyncio.timeout(WITHIN_S):
                await slow
        assert slow.done()
        await until(lambda: not sockets(who.port))
