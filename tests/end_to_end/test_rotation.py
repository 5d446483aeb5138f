"""Processes that run follow their files: the next handshake is made with what lies there now."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from parallax.sdk import SecureAgent

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Fleet, Listen, Pki, Serve, Until


class Echo(SecureAgent):
    async def analyze(self, task: str, data: object) -> tuple[object, float]:
        return data, 1.0


@pytest.fixture
def site(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """A certificate directory that a test may change."""
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "client/cli", "client/admin")
    return pki


def served(port: int, directory: Path) -> int:
    """The serial that a TLS server shows in a new handshake."""
    context = ssl.create_default_context(cafile=str(directory / "cli" / "ca.pem"))
    context.load_cert_chain(directory / "cli" / "cert.pem", directory / "cli" / "key.pem")
    context.check_hostname = False  # gRPC's clients compare the identity; here the serial is all
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def serial(directory: Path, name: str) -> int:
    return x509.load_pem_x509_certificate((directory / name / "cert.pem").read_bytes()).serial_number


def generate(directory: Path) -> None:
    command = [sys.executable, "-m", "parallax.sdk.cli", "certs", "generate", "--days", "30"]
    command += ["--certs-dir", str(directory)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LOG_LEVEL": "info"})


async def detail(fleet: Fleet) -> dict[str, str]:
    status, body = await fleet.http("/readyz")
    assert status == 200
    found: dict[str, str] = json.loads(body)["detail"]
    return found


async def test_a_control_plane_in_its_process_shows_what_is_generated_again_and_keeps_it_when_a_file_is_bad(
    site: Pki, children: Children, until: Until
) -> None:
    child, fleet = await start(site, children)
    first = serial(site.directory, "control-plane")
    assert await asyncio.to_thread(served, fleet.port, site.directory) == first
    name = "certificate control-plane"
    assert (await detail(fleet))[name].startswith("in force, to be renewed at ")
    before = await fleet.metrics()

    async with fleet.client() as client:  # an old connection, which lives on
        await asyncio.to_thread(generate, site.directory)
        second = serial(site.directory, "control-plane")
        for identity in ("service/control-plane", "service/agent-proxy"):
            rotated = await child.said("certificate rotated", identity=f"spiffe://parallax.local/{identity}")
        assert rotated["serial"] == f"{serial(site.directory, 'agent-proxy'):x}"
        assert second != first
        await child.said("new certificate in force", serial=f"{second:x}")
        assert await asyncio.to_thread(served, fleet.port, site.directory) == second
        await client.agents()
        after = await fleet.metrics()
        for own in ("control-plane", "agent-proxy"):
            count = f'parallax_certificate_rotations_total{{name="{own}",result="success"}}'
            assert (before[count], after[count]) == (0, 1)
            moment = f'parallax_certificate_not_after_timestamp_seconds{{name="{own}"}}'
            assert after[moment] > before[moment]

        key = site.directory / "control-plane" / "key.pem"
        good = key.read_bytes()
        key.write_bytes(good[:80])
        unusable = "certificate files cannot be used, what was in force stays so"
        told = await child.said(unusable, reason="damaged")
        assert str(key) in told["cause"]
        assert (await detail(fleet))[name].startswith("the last good one is in force, files damaged since ")
        count = 'parallax_certificate_rotations_total{name="control-plane",result="damaged"}'
        assert (await fleet.metrics())[count] == 1
        assert await asyncio.to_thread(served, fleet.port, site.directory) == second
        async with fleet.client() as another:
            await another.agents()

        key.write_bytes(good)
        await child.said("certificate files are usable again")
        assert (await detail(fleet))[name].startswith("in force, to be renewed at ")
        await client.agents()
    assert await child.stop() == 0


async def start(site: Pki, children: Children) -> tuple[Child, Fleet]:
    return await children.fleet(site)


async def test_an_agent_that_listens_shows_its_new_certificate_and_goes_on(
    site: Pki, listen: Listen, until: Until
) -> None:
    async with listen(Echo, tls=site.tls()) as agent:
        port = int(agent.endpoint.rpartition(":")[2])
        first = await asyncio.to_thread(served, port, site.directory)
        site.save("agent/agent-1")
        second = serial(site.directory, "agent-1")
        assert second != first
        deadline = asyncio.get_running_loop().time() + 10
        while await asyncio.to_thread(served, port, site.directory) != second:
            assert asyncio.get_running_loop().time() < deadline


async def test_the_control_plane_dials_agents_with_its_new_certificate(
    site: Pki, serve: Serve, until: Until
) -> None:
    async with serve(tls=site.tls()) as fleet:
        (proxy,) = [each for each in fleet.plane.rotators if each.identity.name == "agent-proxy"]
        site.save("service/agent-proxy")
        await until(lambda: proxy.status.counts["success"] == 1)
        agent = fleet.agent(Echo, session=False, listen="127.0.0.1:0")
        async with agent, fleet.client() as client:
            assert (await client.analyze("agent-1", "echo", 7, wait_for_agent=15)).value == 7


async def test_an_agent_process_tells_how_it_stands_with_its_files(
    site: Pki, children: Children, serve: Serve
) -> None:
    async with serve(tls=site.tls()) as fleet:
        fleet.pki = site
        child = await children.agent(fleet, PARALLAX_METRICS_LISTEN="127.0.0.1:0")
        ready = await child.said("metrics ready")
        shown = type(fleet)(site, fleet.tls, 0, ready["metrics_port"])
        assert (await detail(shown))["certificate agent-1"].startswith("in force, to be renewed at ")
        (site.directory / "agent-1" / "cert.pem").unlink()
        await child.said("certificate files cannot be used, what was in force stays so", reason="missing")
        assert (await detail(shown))["certificate agent-1"].startswith("the last good one is in force")
        count = 'parallax_certificate_rotations_total{name="agent-1",result="missing"}'
        assert (await shown.metrics())[count] == 1
        async with fleet.client() as client:
            assert (await client.analyze("agent-1", "echo", 7)).value == 7


async def test_a_control_plane_follows_a_mounted_secret(
    site: Pki, children: Children, tmp_path: Path
) -> None:
    mounted = tmp_path / "mounted"

    def swap(version: str) -> int:
        """As the kubelet does."""
        inner = mounted / version
        inner.mkdir(parents=True)
        leaf = site.issue("service/control-plane")
        (inner / "tls.key").touch(0o600)
        for name, data in (
            ("tls.crt", leaf.chain_pem),
            ("tls.key", leaf.key_pem),
            ("ca.crt", leaf.bundle_pem),
        ):
            (inner / name).write_bytes(data)
            if not (mounted / name).is_symlink():
                (mounted / name).symlink_to(f"..data/{name}")
        (mounted / "..data_tmp").symlink_to(version)
        (mounted / "..data_tmp").rename(mounted / "..data")
        return leaf.certificate.serial_number

    first = swap("..1")
    child = children.start_control_plane(site.environment | {"PARALLAX_CERTS_DIR": str(mounted)})
    port = (await child.said("control plane ready"))["port"]
    assert await asyncio.to_thread(served, port, site.directory) == first
    second = swap("..2")
    await child.said("new certificate in force", serial=f"{second:x}")
    assert await asyncio.to_thread(served, port, site.directory) == second
