"""What a real Prometheus sees of certificates that change: every series, and that their values move."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallax.protos import root_pb2, root_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.end_to_end.conftest import Child, Children, Fleet, Pki, Until

SCRAPE_MS: Final = 1_000  # also the limit for one, which a busy machine must keep to
# Of the control plane, whose certificate and those of its issuer and roots it shows.
MOVING: Final = (
    'parallax_certificate_not_before_timestamp_seconds{name="control-plane"}',
    'parallax_certificate_not_after_timestamp_seconds{name="control-plane"}',
    'parallax_certificate_renewal_timestamp_seconds{name="control-plane"}',
    'parallax_certificate_rotations_total{name="control-plane",result="success"}',
    'parallax_certificate_rotations_total{name="control-plane",result="damaged"}',
    'parallax_certificate_rotation_last_success_timestamp_seconds{name="control-plane"}',
    'parallax_certificate_rotation_last_failure_timestamp_seconds{name="control-plane"}',
    'parallax_certificate_renewals_total{name="control-plane",result="success"}',
    'parallax_server_credential_swaps_total{result="pinned"}',
    'parallax_authentication_failures_total{reason="no_certificate"}',
    'parallax_tls_handshakes_total{result="SUCCESS",job="control-plane"}',
    'parallax_tls_handshakes_total{result="CERTIFICATE_VERIFICATION_FAILED"}',
    # It dials the agent, and does so with each certificate that it has for that.
    'parallax_tls_handshakes_total{result="SUCCESS",job="agent"}',
    'parallax_tls_handshake_duration_seconds_count{side="peer",job="control-plane"}',
    'parallax_connections_moved_total{result="tried",job="control-plane"}',
    # The agent's registration goes over a connection that follows its certificate.
    'parallax_tls_handshake_duration_seconds_count{side="peer",job="agent"}',
    'parallax_connections_moved_total{result="tried",job="agent"}',
    # While the root rotates: whoever has been here holds a certificate, and not everybody has taken it over.
    "parallax_trust_bundle_adoption_ratio",
    "sum(parallax_fleet_certificates)",
    'count(parallax_certificate_not_after_timestamp_seconds{name=~"root:.*",job="control-plane"})',
)
SHOWN: Final = (
    "parallax_crl_next_update_timestamp_seconds > time()",
    "parallax_crl_number > 0",
    "parallax_crl_entries == 0",
    'parallax_crl_obstacle{reason="unsigned"} == 0',
    'parallax_certificate_not_after_timestamp_seconds{name=~"root:.*"}',
    'parallax_tls_handshake_duration_seconds_bucket{side="own_port"}',
    'parallax_tls_handshake_duration_seconds_count{side="own_port",job="control-plane"} > 0',
    'parallax_tls_handshake_duration_seconds_count{side="own_port",job="agent"} > 0',
    "parallax_fleet_certificate_not_after_timestamp_seconds",
    "parallax_certificate_observer_restarts_total",
    "parallax_certificate_duplicates_total",
    "parallax_ledger_waiting",
)


class Prometheus:
    """A running server that scrapes our processes, and what it knows."""

    def __init__(self, log: Path) -> None:
        self._log = log

    async def ask(self, query: str) -> list[float]:
        """The values of the series that *query* selects."""
        return await asyncio.to_thread(self._ask, query)

    @property
    def address(self) -> str | None:
        """Where it listens, once it does."""
        found = re.search(r"address=(127\.0\.0\.1:[1-9]\d*)", self._log.read_text())
        return found and found[1]

    @property
    def is_ready(self) -> bool:
        """Whether it answers: it listens a while before."""
        return "Server is ready to receive web requests" in self._log.read_text()

    def _ask(self, query: str) -> list[float]:
        url = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=10) as response:
            rows = json.load(response)["data"]["result"]
        return [float(row["value"][1]) for row in rows]


@pytest.fixture
def watch(tmp_path: Path, require_tool: Callable[[str], str]) -> Iterator[Callable[..., Prometheus]]:
    """Start a Prometheus that scrapes ports of this host, by the names of its jobs."""
    processes = []

    def start(**ports: int) -> Prometheus:
        config, log = tmp_path / "prometheus.yml", tmp_path / "prometheus.log"
        every = f"{SCRAPE_MS}ms"
        config.write_text(
            f"global: {{scrape_interval: {every}, scrape_timeout: {every}}}\n"
            "scrape_configs:\n"
            + "".join(
                f"- {{job_name: {job}, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}\n"
                for job, port in ports.items()
            )
        )
        with log.open("wb") as stream:
            command = [require_tool("prometheus"), f"--config.file={config}"]
            command += [f"--storage.tsdb.path={tmp_path / 'tsdb'}", "--web.listen-address=127.0.0.1:0"]
            processes.append(subprocess.Popen(command, stdout=stream, stderr=stream, cwd=tmp_path))
        return Prometheus(log)

    yield start
    for process in processes:
        process.terminate()
        process.wait()


async def refuse_one(fleet: Fleet) -> None:
    """A handshake that fails: a client without a certificate."""
    options = [("grpc.ssl_target_name_override", "control-plane.parallax.local")]
    credentials = grpc.ssl_channel_credentials(fleet.pki.authority.bundle.pem)
    async with aio.secure_channel(fleet.address, credentials, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are made at run time
        with pytest.raises(aio.AioRpcError):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)


async def rotate(plane: Child, fleet: Fleet) -> None:
    """A torn certificate, then a good one, which the control plane then renews itself."""
    pki, own = fleet.pki, fleet.pki.directory / "control-plane"
    whole = (own / "cert.pem").read_bytes()
    (own / "cert.pem").write_bytes(whole[:100])
    await plane.said("certificate files cannot be used, what was in force stays so", reason="damaged")
    (own / "cert.pem").write_bytes(whole)
    await plane.said("certificate files are usable again")
    pki.age("service/control-plane", seconds=50)
    await plane.said("certificate renewed", identity="spiffe://parallax.local/service/control-plane")


@pytest.mark.timeout(90)  # a third of that, on a machine that is not busy
async def test_every_metric_of_certificates_is_scraped_and_moves(
    new_pki: type[Pki],
    tmp_path: Path,
    children: Children,
    watch: Callable[..., Prometheus],
    until: Until,
) -> None:
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "client/cli")
    plane, fleet = await children.fleet(pki)
    places = {"PARALLAX_CONTROL_PLANE": fleet.address, "PARALLAX_LISTEN": "127.0.0.1:0", "SESSION": "no"}
    agent = children.start_agent(pki.environment | places | {"PARALLAX_METRICS_LISTEN": "127.0.0.1:0"})
    ready = await agent.said("metrics ready")
    prometheus = watch(**{"control-plane": fleet.metrics_port, "agent": ready["metrics_port"]})
    await until(lambda: prometheus.is_ready)
    async with asyncio.timeout(75):
        before: dict[str, list[float]] = {}
        while not all(before.values()) or not before:
            before = {series: await prometheus.ask(series) for series in MOVING}
        await refuse_one(fleet)
        async with fleet.client() as client:
            await client.agents()
        await rotate(plane, fleet)
        pki.save("service/agent-proxy", "agent/agent-1")
        async with fleet.channel("client/admin") as channel:
            await root_pb2_grpc.RootServiceStub(channel).RotateRoot(root_pb2.RotateRootRequest(), timeout=10)
        missing = set(MOVING)
        while missing:
            # Nothing is shown where the last scrape came too late.
            missing = {each for each in missing if await prometheus.ask(each) in ([], before[each])}
        hidden = set(SHOWN)
        while hidden:
            hidden = {series for series in hidden if not await prometheus.ask(series)}
