"""Agents renew their certificates themselves, over real mTLS, while they work."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from cryptography import x509
from grpc import aio

from parallax.protos import certificate_pb2
from parallax.runtime.certificates import asker, renew
from parallax.sdk import SecureAgent
from parallax.security.errors import ConfigError, Unavailable, UntrustedChain
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.request import new_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from parallax.security.authority import Issued
    from tests.end_to_end.conftest import Children, Listen, Pki, Serve, Until

AGENT: Final = Identity.parse_short("agent/agent-1")
MINUTE: Final = timedelta(minutes=1)


class Echo(SecureAgent):
    async def analyze(self, task: str, data: object) -> tuple[object, float]:
        if task == "slow":
            await asyncio.sleep(1)
        return data, 1.0


@pytest.fixture
def site(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """A certificate directory with its CA, that a test may change."""
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "client/cli", "client/admin")
    return pki


def leaf_of(site: Pki, name: str = "agent-1") -> x509.Certificate:
    return x509.load_pem_x509_certificate((site.directory / name / "cert.pem").read_bytes())


def age(site: Pki, seconds: float, holder: str = "agent/agent-1") -> x509.Certificate:
    """Give *holder* a certificate of a minute that is *seconds* old; the certificate."""
    site.save(holder, lifetime=MINUTE, now=datetime.now(UTC) - timedelta(seconds=seconds))
    return leaf_of(site, holder.partition("/")[2])


async def test_a_certificate_of_a_minute_is_renewed_while_tasks_run_and_nothing_is_lost(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet:
        before = age(site, 50)
        async with fleet.agent(Echo), fleet.client() as client:
            answers, number = [], 0
            while datetime.now(UTC) < before.not_valid_after_utc + timedelta(seconds=2):
                number += 1
                result = await client.analyze("agent-1", "echo", number, wait_for_agent=5)
                answers.append(result.value)
                await asyncio.sleep(0.02)
            assert answers == list(range(1, number + 1))
            after = leaf_of(site)
            assert after.not_valid_after_utc > before.not_valid_after_utc
            assert after.public_key() != before.public_key()


async def test_an_agent_that_is_dialled_renews_too_and_shows_the_new_certificate(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet:
        before = age(site, 45)
        async with fleet.agent(Echo, session=False, listen="127.0.0.1:0") as agent, fleet.client() as client:
            await until(lambda: leaf_of(site) != before)
            await agent.rotate_certificates()
            assert (await client.analyze("agent-1", "echo", 1, wait_for_agent=5)).value == 1


async def test_a_client_that_stays_renews_and_goes_on_with_the_new_certificate(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet:
        before = age(site, 50, "client/cli")
        async with fleet.agent(Echo), fleet.client() as client:
            number = 0
            while datetime.now(UTC) < before.not_valid_after_utc + timedelta(seconds=2):
                number += 1
                assert (await client.analyze("agent-1", "echo", number)).value == number
                await asyncio.sleep(0.02)
            assert leaf_of(site, "cli").serial_number != before.serial_number
            assert len(await client.agents()) == 1


async def served_by(port: int) -> x509.Certificate:
    """What a new connection is shown."""
    pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode())


async def test_the_control_plane_renews_its_own_certificates(site: Pki, serve: Serve, until: Until) -> None:
    services = ("control-plane", "agent-proxy")
    before = {name: age(site, 45, f"service/{name}") for name in services}
    async with serve(tls=site.tls()) as fleet:
        await until(lambda: all(leaf_of(site, name) != before[name] for name in services))
        new = leaf_of(site, "control-plane")
        assert new.not_valid_after_utc > before["control-plane"].not_valid_after_utc
        async with asyncio.timeout(10):
            while await served_by(fleet.port) != new:
                await asyncio.sleep(0.05)
        _, body = await fleet.http("/readyz")
        assert "in force" in json.loads(body)["detail"]["certificate control-plane"]
        series = [f'parallax_certificate_renewals_total{{name="{n}",result="success"}}' for n in services]
        async with asyncio.timeout(10):  # counted once all of it is done, the files come before
            while {(await fleet.metrics())[one] for one in series} != {1}:
                await asyncio.sleep(0.05)


class TestNow:
    async def test_it_is_in_force_when_the_call_returns(self, site: Pki, serve: Serve) -> None:
        async with serve(tls=site.tls()) as fleet:
            agent = fleet.agent(Echo)
            with pytest.raises(Unavailable, match="agent-1 is not online"):
                await agent.rotate_certificates()
            async with agent, fleet.client() as client:
                before = leaf_of(site)
                slow = asyncio.create_task(client.analyze("agent-1", "slow", 7))
                await asyncio.gather(*(agent.rotate_certificates() for _ in range(3)))
                second = leaf_of(site)
                assert second.serial_number != before.serial_number
                await agent.rotate_certificates()
                assert leaf_of(site).serial_number != second.serial_number
                assert (await slow).value == 7
            with pytest.raises(Unavailable, match="agent-1 is not online"):
                await agent.rotate_certificates()

    async def test_a_control_plane_without_a_ca_is_named(self, site: Pki, serve: Serve) -> None:
        (site.directory / "ca" / "key.pem").unlink()
        async with serve(tls=site.tls()) as fleet, fleet.agent(Echo) as agent:
            with pytest.raises(ConfigError, match=r"there is no .*key\.pem"):
                await agent.rotate_certificates()

    async def test_without_a_control_plane_there_is_nobody_to_ask(self, site: Pki, listen: Listen) -> None:
        async with listen(Echo, tls=site.tls()) as agent:
            with pytest.raises(ConfigError, match="by whoever put it there"):
                await agent.rotate_certificates()

    async def test_without_tls_there_is_nothing_to_renew(self, listen: Listen, pki: Pki) -> None:
        plain = pki.tls().model_copy(update={"enabled": False})
        async with listen(Echo, tls=plain) as agent:
            with pytest.raises(ConfigError, match="PARALLAX_TLS_ENABLED"):
                await agent.rotate_certificates()


async def test_the_control_plane_is_away_and_comes_back(site: Pki, children: Children, until: Until) -> None:
    plane, fleet = await children.fleet(site)
    listens = {"PARALLAX_LISTEN": f"127.0.0.1:{fleet.port}"}
    agent = await children.agent(fleet, PARALLAX_METRICS_LISTEN="127.0.0.1:0")
    await plane.stop()
    site.save("agent/agent-1", lifetime=5 * MINUTE, now=datetime.now(UTC) - 3.5 * MINUTE)
    before = leaf_of(site)
    told = await agent.said("certificate not renewed, what was in force stays so", reason="unreachable")
    assert "Connection refused" in told["cause"]
    assert leaf_of(site) == before
    await children.start_control_plane(site.environment | listens).said("control plane ready")
    await agent.said("certificate renewed")
    assert leaf_of(site) != before
    assert await agent.stop() == 0


async def test_expired_while_away_it_comes_back_with_a_new_file_and_no_restart(
    site: Pki, children: Children, until: Until
) -> None:
    plane, fleet = await children.fleet(site)
    listens = {"PARALLAX_LISTEN": f"127.0.0.1:{fleet.port}"}
    agent = await children.agent(fleet, PARALLAX_METRICS_LISTEN="127.0.0.1:0")
    shown = type(fleet)(site, fleet.tls, 0, (await agent.said("metrics ready"))["metrics_port"])
    await plane.stop()
    age(site, 50)
    told = await agent.said("certificate expired")
    assert "parallax certs issue agent-1 --kind agent" in told["cause"]
    status, body = await shown.http("/readyz")
    assert status == 503
    assert "but expired" in json.loads(body)["detail"]["certificate agent-1"]
    await children.start_control_plane(site.environment | listens).said("control plane ready")
    command = (sys.executable, "-m", "parallax.sdk.cli", "certs", "issue", "agent-1", "--kind", "agent")
    subprocess.run([*command, "--certs-dir", str(site.directory)], check=True, capture_output=True)  # noqa: ASYNC221

    async def ready() -> bool:
        return (await shown.http("/readyz"))[0] == 200

    deadline = time.monotonic() + 15
    while not await ready():
        assert time.monotonic() < deadline, agent.lines[-5:]
        await asyncio.sleep(0.05)
    assert await agent.stop() == 0


async def test_a_control_plane_that_hangs_keeps_no_agent_from_stopping(site: Pki, children: Children) -> None:
    plane, fleet = await children.fleet(site)
    agent = await children.agent(fleet, PARALLAX_DRAIN_SECONDS="1")
    plane.process.send_signal(signal.SIGSTOP)
    age(site, 45)
    await agent.said("certificate rotated")
    await asyncio.sleep(0.5)  # it asks now, and is not answered
    assert await agent.stop() == 0
    assert not agent.records("certificate not renewed, what was in force stays so")  # nor waited for that
    plane.process.send_signal(signal.SIGCONT)


async def test_an_agent_process_tells_what_becomes_of_its_renewals(
    site: Pki, children: Children, serve: Serve
) -> None:
    async with serve(tls=site.tls()) as fleet:
        fleet.pki = site
        child = await children.agent(fleet, PARALLAX_METRICS_LISTEN="127.0.0.1:0")
        ready = await child.said("metrics ready")
        shown = type(fleet)(site, fleet.tls, 0, ready["metrics_port"])
        planned = 'parallax_certificate_renewal_timestamp_seconds{name="agent-1"}'
        renewed = 'parallax_certificate_renewals_total{name="agent-1",result="success"}'
        before = await shown.metrics()
        assert 0.5 < (before[planned] - time.time()) / 86400 < 0.7
        assert before[renewed] == 0
        detail = json.loads((await shown.http("/readyz"))[1])["detail"]
        assert detail["certificate agent-1"].startswith("in force, to be renewed at 2")
        age(site, 45)
        await child.said("certificate renewed")
        after = await shown.metrics()
        assert after[renewed] == 1
        assert 0 < after[planned] - time.time() < 60


class TestEdge:
    @pytest.fixture
    async def ask(self) -> AsyncIterator[Callable[..., Awaitable[Issued]]]:
        """Asks a server that gives a given answer."""
        servers = []

        async def ask(answer: Callable[[], Awaitable[bytes]] | None, timeout_s: float = 10) -> Issued:
            async def handle(request: bytes, context: Any) -> bytes:
                assert answer is not None
                return await answer()

            handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(handle)
            service = "parallax.v1.CertificateService"
            server = aio.server()
            if answer is not None:
                server.add_registered_method_handlers(service, {"Renew": handler})
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            servers.append(server)
            csr = new_request(AGENT, generate_key())
            async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await renew(channel, csr, timeout_s=timeout_s)

        yield ask
        for server in servers:
            await server.stop(5)  # whoever gave up has been noticed by then

    async def test_a_control_plane_that_hangs_is_not_waited_for(self, ask: Any) -> None:
        async def hang() -> None:
            await asyncio.sleep(60)

        with pytest.raises(Unavailable):
            await ask(hang, timeout_s=0.5)

    @pytest.mark.parametrize(
        "answer",
        [
            certificate_pb2.RenewResponse(),
            certificate_pb2.RenewResponse(chain=[b"nonsense"]),
            certificate_pb2.RenewResponse(bundle=certificate_pb2.TrustBundle(roots=[b"\x30\x80"])),
        ],
    )
    async def test_an_answer_that_cannot_be_read_says_so(self, ask: Any, answer: Any) -> None:
        async def nonsense() -> bytes:
            return bytes(answer.SerializeToString())

        with pytest.raises(UntrustedChain, match="answer cannot be read"):
            await ask(nonsense)

    async def test_an_older_control_plane_is_one_without_a_ca(self, ask: Any) -> None:
        with pytest.raises(ConfigError):
            await ask(None)

    async def test_nobody_there_is_told_as_that(self) -> None:
        ask = asker(lambda: aio.insecure_channel("127.0.0.1:1"))
        with pytest.raises(Unavailable, match="refused"):
            await ask(new_request(AGENT, generate_key()))
