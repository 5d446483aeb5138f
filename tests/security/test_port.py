"""A port follows its store, over real handshakes; how a change is protected, and what if it cannot be."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime

import grpc.aio
import pytest
from cryptography import x509

from parallax.security import port as port_module
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.pin import Where, where_to_dial
from parallax.security.port import PATIENCE_S, SecurePort, ServerPort, Swapped
from parallax.security.profiles import LeafProfile
from parallax.security.swap import ServerSwap
from parallax.security.tls import channel_credentials, identity_options
from tests.ports import free_port

SERVICE = Identity.parse_short("service/control-plane")
AGENT = Identity.parse_short("agent/agent-1")
WITHIN_S = 10.0

Make = Callable[..., Credentials]


@pytest.fixture(scope="module")
def make(authority: CertificateAuthority, now: datetime) -> Make:
    def make(identity: Identity = SERVICE, by: CertificateAuthority = authority) -> Credentials:
        key = generate_key()
        issued = by.issue(identity, key.public_key(), LeafProfile(), now)
        return Credentials(issued.chain, key, issued.bundle)

    return make


@pytest.fixture
def store(make: Make, now: datetime) -> CredentialStore:
    return CredentialStore(SERVICE, make(), now)


async def say(_: bytes, context: object) -> bytes:
    return b"you"


@dataclass
class Server:
    """A running server whose port follows *store*."""

    number: int
    store: CredentialStore
    swap: ServerSwap
    port: SecurePort
    swaps: list[Swapped] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_swap(self, how: Swapped) -> None:
        self.swaps.append(how)
        self.changed.set()

    async def publish(self, *new: Credentials, now: datetime) -> None:
        """Publish one after the other without a pause, and wait for the next change."""
        self.changed.clear()
        for each in new:
            self.store.publish(each, now)
        await self.change()

    async def change(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            await self.changed.wait()

    async def shows(self) -> x509.Certificate:
        """The leaf that it presents in a new handshake; it may go on to refuse the client."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        async with asyncio.timeout(WITHIN_S):
            _, writer = await asyncio.open_connection("127.0.0.1", self.number, ssl=context)
        secured = writer.get_extra_info("ssl_object")
        der = secured.getpeercert(binary_form=True)
        writer.transport.abort()
        return x509.load_der_x509_certificate(der)

    def channel(self, client: Credentials | None) -> grpc.aio.Channel:
        secured = (
            channel_credentials(client)
            if client
            else grpc.ssl_channel_credentials(self.store.current.bundle_pem)
        )
        return grpc.aio.secure_channel(f"127.0.0.1:{self.number}", secured, options=identity_options(SERVICE))

    async def lets_in(self, client: Credentials | None) -> bool:
        async with self.channel(client) as channel:
            try:
                return await ask(channel) == "you"
            except grpc.aio.AioRpcError:
                return False


async def ask(channel: grpc.aio.Channel) -> str:
    am: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Who/Am")
    return (await am(b"I?", timeout=WITHIN_S)).decode()


@asynccontextmanager
async def serving(
    store: CredentialStore,
    address: str = "127.0.0.1:0",
    *,
    verify_client: bool = True,
    where: Callable[[int], Where] | None = None,
    patience_s: float = PATIENCE_S,
    grace_s: float = 1,
) -> AsyncIterator[Server]:
    """*where* says how the port reaches itself, if not directly."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Who", {"Am": grpc.unary_unary_rpc_method_handler(say)}),)
    )
    swap = ServerSwap(store.served, verify_client=verify_client)
    number = server.add_secure_port(address, swap.grpc_credentials)
    own = where(number) if where else where_to_dial(address, number)
    await server.start()

    def on_swap(how: Swapped) -> None:
        running.on_swap(how)

    port = SecurePort(number, own, store, swap, on_swap, patience_s=patience_s)
    running = Server(number, store, swap, port)
    async with asyncio.TaskGroup() as group:
        following = group.create_task(port.follow())
        try:
            yield running
        finally:
            await server.stop(grace_s)
            following.cancel()
    assert not port._pins


@dataclass
class Gatekeeper:
    """Stands before a port, and lets through only whom *admits* does, told how many came before."""

    admits: Callable[[int], bool]
    came: int = 0
    target: int = 0
    door: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def before(self, number: int) -> Where:
        self.target = number
        name: tuple[str, int] = self.door.getsockname()
        return name

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:

            async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
                with suppress(ConnectionError):
                    while data := await source.read(4096):
                        to.write(data)
                to.close()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                self.came += 1
                if not self.admits(self.came - 1):
                    writer.close()
                    return
                there, onward = await asyncio.open_connection("127.0.0.1", self.target)
                await asyncio.gather(copy(reader, onward), copy(there, writer))

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                group.create_task(serve(reader, writer))

            server = await asyncio.start_server(accept, sock=self.door)
            async with server:
                yield


class TestFollow:
    async def test_new_handshakes_show_the_new_leaf_and_never_again_the_old_one(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        async with serving(store) as server:
            for _ in range(3):
                old, new = store.current.leaf, make()
                assert await server.shows() == old
                server.changed.clear()
                store.publish(new, now)
                seen = [old]
                async with asyncio.timeout(WITHIN_S):
                    while seen[-1] != new.leaf:
                        seen.append(await server.shows())
                assert set(seen) == {old, new.leaf}
                await server.change()
                assert [await server.shows() for _ in range(10)] == [new.leaf] * 10
                assert await server.lets_in(make(AGENT))
            assert server.swaps == [Swapped.PINNED] * 3

    async def test_a_change_that_is_announced_is_in_force(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        """Though nobody else has come to shake hands since."""
        async with serving(store) as server:
            for _ in range(5):
                new = make()
                await server.publish(new, now=now)
                assert server.swap.in_force.credentials is new
                assert await server.shows() == new.leaf

    async def test_an_open_connection_goes_on(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        async with serving(store) as server, server.channel(make(AGENT)) as channel:
            assert await ask(channel) == "you"
            await server.publish(make(), now=now)
            assert await server.lets_in(make(AGENT))
            assert await ask(channel) == "you"

    async def test_new_roots_count(
        self, store: CredentialStore, make: Make, bundle: TrustBundle, now: datetime
    ) -> None:
        other = CertificateAuthority.create(now=now)
        both = TrustBundle((*bundle.roots, *other.bundle.roots))
        stranger = make(AGENT, by=other)
        client = Credentials(stranger.chain, stranger.key, both)
        async with serving(store) as server:
            assert not await server.lets_in(client)
            new = make()
            await server.publish(Credentials(new.chain, new.key, both), now=now)
            assert await server.lets_in(client)
            await server.publish(make(), now=now)
            assert not await server.lets_in(client)

    async def test_of_several_the_newest_wins(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        async with serving(store) as server:
            *others, newest = (make() for _ in range(5))
            await server.publish(*others, newest, now=now)
            assert server.swap.in_force.credentials is newest
            assert await server.shows() == newest.leaf
            await server.publish(make(), now=now)
            assert server.swaps == [Swapped.PINNED] * 2

    async def test_what_is_published_before_it_follows_counts(self, make: Make, now: datetime) -> None:
        store = CredentialStore(SERVICE, make(), now)
        new = make()

        def where(number: int) -> Where:
            store.publish(new, now)  # the port has its first credentials by now
            return ("127.0.0.1", number)

        async with serving(store, where=where) as server:
            await server.change()
            assert await server.shows() == new.leaf

    @pytest.mark.parametrize("everywhere", ["localhost:{}", "0.0.0.0:{}", "[::]:{}"])
    async def test_wherever_it_listens(
        self, everywhere: str, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        # For several addresses gRPC takes a port that is free on the first, whoever has it on the next.
        async with serving(store, everywhere.format(free_port())) as server:
            await server.publish(make(), now=now)
            assert server.swaps == [Swapped.PINNED]
            assert await server.shows() == store.current.leaf

    async def test_a_server_that_asks_for_no_certificate_follows_too(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        async with serving(store, verify_client=False) as server:
            await server.publish(make(), now=now)
            assert server.swaps == [Swapped.PINNED]
            assert await server.shows() == store.current.leaf
            assert await server.lets_in(None)

    async def test_plaintext_has_nothing_to_follow(self) -> None:
        await ServerPort(1, ("127.0.0.1", 1)).follow()


class TestPins:
    async def test_the_old_context_is_held_for_a_while_and_then_let_go(
        self, store: CredentialStore, make: Make, now: datetime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(store) as server:
            monkeypatch.setattr(port_module, "HOLD_S", 3600.0)
            for count in (1, 2, 3):
                await server.publish(make(), now=now)
                assert len(server.port._pins) == count
            held = {*server.port._pins}
            monkeypatch.setattr(port_module, "HOLD_S", 0.1)
            await server.publish(make(), now=now)
            async with asyncio.timeout(WITHIN_S):
                while server.port._pins != held:
                    await asyncio.sleep(0.05)
            assert await server.lets_in(make(AGENT))

    async def test_they_do_not_keep_a_server_from_stopping(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        loop = asyncio.get_running_loop()
        async with serving(store, grace_s=25) as server:
            await server.publish(make(), now=now)
            began = loop.time()
        assert loop.time() - began < WITHIN_S  # less than the grace, which calls in flight would have

    async def test_nothing_changes_before_the_old_context_is_pinned(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        """Twice at least the port cannot be reached, and then it can."""
        old, new = store.current.leaf, make()
        refused: list[x509.Certificate] = []
        keeper = Gatekeeper(lambda _: False)
        async with keeper.standing(), serving(store, where=keeper.before) as server:
            store.publish(new, now)
            async with asyncio.timeout(WITHIN_S):
                while keeper.came < 2:
                    refused.append(await server.shows())
            keeper.admits, in_vain = lambda _: True, keeper.came
            await server.change()
            assert set(refused) == {old}
            assert server.swaps == [Swapped.PINNED]
            assert keeper.came == in_vain + 2
            assert await server.shows() == new.leaf

    async def test_nothing_changes_once_the_pin_is_given_up(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        """
        Pinned, and then the port cannot be reached again, so that nobody knows when it would change.

        Such a configuration must not lie about until the pin is gone.
        """
        old, new = store.current, make()
        keeper = Gatekeeper(lambda before: before == 0)
        async with keeper.standing(), serving(store, where=keeper.before) as server:
            store.publish(new, now)
            async with asyncio.timeout(WITHIN_S):
                while keeper.came < 2 or server.swap._armed:
                    await asyncio.sleep(0)
            assert server.swap.in_force.credentials is old
            assert await server.shows() == old.leaf
            keeper.admits = lambda _: True
            await server.change()
            assert server.swaps == [Swapped.PINNED]
            assert server.swap.in_force.credentials is new

    async def test_a_change_that_somebody_elses_handshake_made_counts(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        """Pinned, and not reached again; but meanwhile another has shaken hands."""
        old = store.current

        def admits(before: int) -> bool:
            if before == 1:
                with socket.create_connection(("127.0.0.1", keeper.target)):
                    deadline = time.monotonic() + WITHIN_S
                    while server.swap.in_force.credentials is old and time.monotonic() < deadline:
                        time.sleep(0.001)
            return before == 0

        keeper = Gatekeeper(admits)
        async with keeper.standing(), serving(store, where=keeper.before) as server:
            await server.publish(make(), now=now)
            assert server.swaps == [Swapped.PINNED]
            assert keeper.came == 2
            assert await server.shows() == store.current.leaf


class TestUnreachable:
    """The own port does not answer: an expired certificate would be worse than the risk."""

    async def test_in_the_end_it_changes_all_the_same_and_says_so(
        self, store: CredentialStore, make: Make, now: datetime, caplog: pytest.LogCaptureFixture
    ) -> None:
        old, new = store.current.leaf, make()
        keeper = Gatekeeper(lambda _: False)
        async with keeper.standing(), serving(store, where=keeper.before, patience_s=1.0) as server:
            store.publish(new, now)
            while not server.swaps:
                assert await server.shows() in {old, new.leaf}
            assert keeper.came > 1
            assert server.swaps == [Swapped.UNPINNED]
            assert await server.shows() == new.leaf
            warning = next(record for record in caplog.records if record.levelno == logging.WARNING)
            assert "unprotected" in warning.getMessage()
            assert warning.__dict__["serial"] == f"{new.leaf.serial_number:x}"
            assert warning.__dict__["cause"]

    async def test_afterwards_changes_are_protected_again(
        self, store: CredentialStore, make: Make, now: datetime
    ) -> None:
        keeper = Gatekeeper(lambda _: False)
        async with keeper.standing(), serving(store, where=keeper.before, patience_s=0.0) as server:
            await server.publish(make(), now=now)
            keeper.admits = lambda _: True
            await server.publish(make(), now=now)
            assert server.swaps == [Swapped.UNPINNED, Swapped.PINNED]
            assert await server.shows() == store.current.leaf
