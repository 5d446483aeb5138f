"""Proxies ask nobody who is revoked, and end what they asked him, as far as they were told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from parallax.protos import revocation_feed_pb2, revocation_feed_pb2_grpc
from parallax.sdk import SecureAgent, SecureGrpcAgentProxy
from parallax.sdk import keeper as keeper_module
from parallax.security.errors import Revoked
from parallax.security.verification import CertificateId
from tests.end_to_end.rotations import serving
from tests.end_to_end.test_proxy_following import is_followed, proxy_of, sockets
from tests.end_to_end.test_revocation import reinstate, revoke, revoke_leaf
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Listen, Pki, Serve, Until

WITHIN_S: Final = 1.0
AGENT: Final = "agent/agent-1"
TEXT: Final = "agent/agent-1 is revoked: 'parallax certs reinstate agent/agent-1'"

BOTH: Final = pytest.mark.parametrize("link", [True, False], ids=["link", "unary"])


class Echo(SecureAgent):
    """Echoes, or begins and never ends."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun = 0

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        if task == "wait":
            self.begun += 1
            await asyncio.Event().wait()
        return data, 1.0


class Direct:
    """An agent on its own, whom nobody tells that it is revoked, and those who ask it."""

    def __init__(self, fleet: Fleet, agent: Echo, proxy: SecureGrpcAgentProxy, until: Until) -> None:
        self.fleet = fleet
        self.agent = agent
        self.proxy = proxy
        self._until = until

    @property
    def sockets(self) -> int:
        return sockets(int(str(self.agent.endpoint).rpartition(":")[2]))

    @property
    def is_told(self) -> bool:
        """Whether the proxies are told what is revoked."""
        return any(each._revocations is not None for each in self.proxy._route._keeper._followed.values())

    async def refused(self, proxy: SecureGrpcAgentProxy | None = None) -> str:
        """What the next call is told, and that nothing is dialled for it."""
        with pytest.raises(Revoked) as refused:
            await (proxy or self.proxy).analyze("echo", 7)
        await self._until(lambda: not self.sockets)
        return str(refused.value)

    async def good(self) -> None:
        """Wait until calls are answered."""
        async with asyncio.timeout(15):
            while True:
                try:
                    assert await self.proxy.analyze("echo", 7) == (7, 1.0)
                except Revoked:
                    await asyncio.sleep(0.05)
                else:
                    return


async def last(proxy: SecureGrpcAgentProxy, task: str) -> Any:
    """The last part of the answer, if it ends."""
    parts = [part async for part in proxy.stream(task, 7)]
    return parts[-1]


@pytest.fixture(autouse=True)
def _follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "WATCH_AFTER_S", 0.0)


@asynccontextmanager
async def direct(
    serve: Serve, listen: Listen, pki: Pki, tmp_path: Path, until: Until, *, link: bool = True
) -> AsyncIterator[Direct]:
    async with (
        serving(serve, pki, tmp_path) as fleet,
        listen(Echo, tls=pki.tls()) as agent,
        proxy_of(agent, pki, fleet.address, link=link) as proxy,
    ):
        made = Direct(fleet, agent, proxy, until)
        await until(lambda: is_followed(fleet) and made.is_told)
        yield made


@BOTH
async def test_calls_and_streams_to_who_is_revoked_end_within_a_second_and_nobody_dials_him(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until, *, link: bool
) -> None:
    async with direct(serve, listen, own_pki, tmp_path, until, link=link) as made:
        took = []
        for _ in range(3):  # the fastest counts: on a busy machine one is
            await made.good()
            made.agent.begun = 0
            waiting = [
                asyncio.create_task(made.proxy.analyze("wait", 7)),
                asyncio.create_task(last(made.proxy, "wait")),
            ]
            await until(lambda: made.agent.begun == 2)
            assert made.sockets == 1
            await revoke(made.fleet, identity=AGENT)
            began = time.monotonic()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            took.append(time.monotonic() - began)
            assert [type(each) for each in ended] == [Revoked, Revoked]
            assert all(TEXT in str(each) for each in ended)
            await until(lambda: not made.sockets)
            if len(took) < 3:
                await reinstate(made.fleet, AGENT)
        assert min(took) < WITHIN_S
        for _ in range(3):
            assert TEXT in await made.refused()
        with pytest.raises(Revoked):
            await made.proxy.check_health()
        with pytest.raises(Revoked):
            await made.proxy.capabilities()


@BOTH
async def test_whoever_is_reinstated_is_asked_again(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until, *, link: bool
) -> None:
    async with direct(serve, listen, own_pki, tmp_path, until, link=link) as made:
        for _ in range(3):
            await made.good()
            assert made.sockets == 1
            await revoke(made.fleet, identity=AGENT)
            await until(lambda: not made.sockets)
            await made.refused()
            await reinstate(made.fleet, AGENT)
        await made.good()


async def test_another_identity_or_a_serial_that_is_revoked_ends_nothing(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with direct(serve, listen, own_pki, tmp_path, until) as made:
        waiting = asyncio.create_task(made.proxy.analyze("wait", 7))
        await until(lambda: made.agent.begun)
        await revoke(made.fleet, identity="agent/agent-2")
        await revoke_leaf(made.fleet, own_pki.issue(AGENT))
        await asyncio.sleep(WITHIN_S)
        assert not waiting.done()
        assert await made.proxy.analyze("echo", 7) == (7, 1.0)
        waiting.cancel()


async def test_a_certificate_that_changes_meanwhile_has_nobody_dialled_who_is_revoked(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with direct(serve, listen, own_pki, tmp_path, until) as made:
        await revoke(made.fleet, identity=AGENT)
        await until(lambda: not made.sockets)
        await asyncio.to_thread(own_pki.save, "client/cli")
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert not made.sockets
        await reinstate(made.fleet, AGENT)
        await made.good()


async def test_what_was_known_last_stays_while_the_control_plane_is_away_and_is_read_again_after(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with listen(Echo, tls=own_pki.tls()) as agent, AsyncExitStack() as stack:
        async with serving(serve, own_pki, tmp_path, listen=address) as fleet:
            proxy = await stack.enter_async_context(proxy_of(agent, own_pki, f"localhost:{fleet.port}"))
            made = Direct(fleet, agent, proxy, until)
            await until(lambda: is_followed(fleet) and made.is_told)
            await revoke(fleet, identity=AGENT)
            await until(lambda: not made.sockets)
        await made.refused()
        with pytest.raises(Revoked):  # one that is made now knows what the others know
            await stack.enter_async_context(proxy_of(agent, own_pki, f"localhost:{fleet.port}"))
        assert not made.sockets
        async with serving(serve, own_pki, tmp_path, listen=address) as again:
            await reinstate(again, AGENT)
            await made.good()


async def test_who_could_ask_nobody_refuses_nothing(listen: Listen, own_pki: Pki) -> None:
    async with (
        listen(Echo, tls=own_pki.tls()) as agent,
        proxy_of(agent, own_pki, "localhost:1") as away,
        proxy_of(agent, own_pki, "none") as alone,
    ):
        await asyncio.sleep(0.5)
        for proxy in (away, alone):
            assert await proxy.analyze("echo", 7) == (7, 1.0)


async def test_many_proxies_share_one_account_of_it_with_a_client_of_the_control_plane(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with direct(serve, listen, own_pki, tmp_path, until) as made, AsyncExitStack() as stack:
        more = [
            await stack.enter_async_context(proxy_of(made.agent, own_pki, made.fleet.address))
            for _ in range(10)
        ]
        async with made.fleet.client() as client:
            assert not await client.agents()
            await until(lambda: is_followed(made.fleet) and sockets(made.fleet.port) == 1)
            await revoke(made.fleet, identity=AGENT)
            await until(lambda: not made.sockets)
            for proxy in more:
                await made.refused(proxy)
            await until(lambda: sockets(made.fleet.port) == 1)


async def test_a_proxy_that_joins_a_client_is_told_on_its_connection(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        listen(Echo, tls=own_pki.tls()) as agent,
        fleet.client() as client,
    ):
        assert not await client.agents()
        await until(lambda: is_followed(fleet))
        followed = list(client._route._keeper._followed.values()) if client._route else []
        assert [each._revocations for each in followed] == [None]  # nobody wants to know
        async with proxy_of(agent, own_pki, fleet.address) as proxy:
            made = Direct(fleet, agent, proxy, until)
            await until(lambda: is_followed(fleet) and made.is_told)
            await revoke(fleet, identity=AGENT)
            await until(lambda: not made.sockets)
            await made.refused()
            await until(lambda: sockets(fleet.port) == 1)


async def test_who_asks_for_identities_is_told_no_serial(fleet: Fleet) -> None:
    for serial in range(1, 5_000):
        fleet.plane.revocations.current.revoke(CertificateId(bytes(32), serial))
    await revoke(fleet, identity="agent/agent-7")
    async with fleet.channel("client/cli") as channel:
        watch = revocation_feed_pb2_grpc.RevocationFeedServiceStub(channel).WatchRevocations(
            revocation_feed_pb2.WatchRevocationsRequest(identities_only=True)
        )

        async def told() -> list[Any]:
            heard: list[Any] = []
            while not heard or not heard[-1].complete:
                heard.append(await watch.read())
            return heard

        everything = await told()
        await revoke_leaf(fleet, fleet.pki.issue("client/ci"))
        await revoke(fleet, identity="agent/agent-8")
        changes: list[Any] = []
        while not any(each.identities for each in changes):
            changes += await told()
        watch.cancel()
    assert not any(each.certificates for each in everything + changes)
    named = [each.identity.rpartition("/")[2] for told_ in everything + changes for each in told_.identities]
    assert named == ["agent-7", "agent-8"]
