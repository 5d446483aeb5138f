"""Programs and certificates that are not ours: gRPC clients, openssl, hand-made PKIs, cert-manager."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.config import MTLSConfig

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Leaf, Pki, Serve

# Each runs several programs one after the other, which can take seconds each on a busy machine.
pytestmark = pytest.mark.timeout(90)
WITHIN_S = 40.0
FOREIGN_CLIENT = Path(__file__).with_name("foreign_client.py")

# The guide's commands, for three services; not with its CA key of 4,096 bits, which can take ten seconds.
GUIDE = """
mkdir ca control-plane agent-1 cli
openssl genrsa -out ca/key.pem 2048
openssl req -new -x509 -days 3650 -key ca/key.pem -out ca/cert.pem \
  -subj "/C=US/ST=CA/L=San Francisco/O=Parallax/CN=Parallax Root CA"
for service in control-plane:control-plane.parallax.local \
    agent-1:agent-1.agents.parallax.local cli:cli.clients.parallax.local; do
  directory=${service%:*} name=${service#*:}
  openssl genrsa -out $directory/key.pem 2048
  openssl req -new -key $directory/key.pem -out $directory/csr.pem \
    -subj "/C=US/ST=CA/L=San Francisco/O=Parallax/CN=$name"
  openssl x509 -req -in $directory/csr.pem -CA ca/cert.pem -CAkey ca/key.pem \
    -CAcreateserial -out $directory/cert.pem -days 365 \
    -extensions v3_req -extfile <(cat <<EOF
[v3_req]
subjectAltName = @alt_names
[alt_names]
DNS.1 = $name
DNS.2 = localhost
IP.1 = 127.0.0.1
EOF
)
  cp ca/cert.pem $directory/ca.pem
done
"""

# A CA with a passphrase and flat files; the certificates are X.509 v1, and the agent's says only its id.
FLAT = """
openssl genrsa -aes256 -passout pass:secret -out ca-key.pem 2048
openssl req -new -x509 -days 3650 -key ca-key.pem -passin pass:secret -out ca-cert.pem -subj "/CN=Fleet CA"
for service in control-plane:control-plane.parallax.local agente_py:agente_py \
    cli:cli.clients.parallax.local; do
  id=${service%:*} name=${service#*:}
  openssl genrsa -out $id-key.pem 2048
  openssl req -new -key $id-key.pem -out $id.csr -subj "/CN=$name"
  openssl x509 -req -in $id.csr -CA ca-cert.pem -CAkey ca-key.pem -passin pass:secret \
    -CAcreateserial -out $id-cert.pem -days 365
done
"""

# The same with our command.
OURS = """
export PARALLAX_CA_PASSPHRASE=secret
parallax ca init --layout flat
parallax certs issue control-plane --kind service
parallax certs issue agente_py --kind agent
parallax certs issue cli --kind client
"""


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, require_tool: Callable[[str], str]) -> Make:
    """Runs one of the scripts above in a directory of its own; the directory."""
    shell = require_tool("bash")
    require_tool("openssl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(script: str) -> Path:
        directory = tmp_path_factory.mktemp("made")
        environment = {**os.environ, "PATH": path, "PARALLAX_CERTS_DIR": str(directory)}
        argv = [shell, "-euc", script]
        done = subprocess.run(
            argv, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return directory

    return run


@pytest.fixture(scope="module")
def guide(make: Make) -> Path:
    """A certificate directory made by hand, as the guide says."""
    return make(GUIDE)


def by_directory(directory: Path) -> MTLSConfig:
    return MTLSConfig(enabled=True, certs_dir=directory, verify_client=True)


async def assert_works(serve: Serve, directory: Path, agent_id: str) -> None:
    """A control plane, an agent and a client with the certificates there do a task."""
    tls = by_directory(directory)
    async with serve(tls) as fleet, fleet.agent(Echo, agent_id), fleet.client() as client:
        assert (await client.analyze(agent_id, "echo", 1)).value == 1
        (agent,) = await client.agents()
    assert agent.identity == f"spiffe://parallax.local/agent/{agent_id}"


async def run(*argv: str | Path) -> subprocess.CompletedProcess[bytes]:
    """A command that has ended, in whatever way."""
    return await asyncio.to_thread(
        subprocess.run, argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=WITHIN_S, check=False
    )


async def test_a_foreign_grpc_client_needs_only_a_certificate(fleet: Fleet) -> None:
    files = [fleet.pki.directory / "cli" / name for name in ("key.pem", "cert.pem", "ca.pem")]
    async with fleet.agent(Echo):
        done = await run(
            sys.executable, FOREIGN_CLIENT, fleet.address, "control-plane.parallax.local", *files
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ours"] == []
    assert found["services"] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "parallax.v1.AuditService",
        "parallax.v1.CertificateService",
        "parallax.v1.DispatchService",
        "parallax.v1.EnrollmentService",
        "parallax.v1.IssuanceService",
        "parallax.v1.LedgerService",
        "parallax.v1.PinService",
        "parallax.v1.PolicyService",
        "parallax.v1.RegistryService",
        "parallax.v1.RevocationFeedService",
        "parallax.v1.RevocationService",
        "parallax.v1.RootService",
        "parallax.v1.SessionService",
    ]
    value = found["response"]["outcome"]["value"]
    assert json.loads(base64.b64decode(value["payload"]["data"])) == {"n": 1}
    assert (value["confidence"], found["response"]["agentId"]) == (1, "agent-1")
    assert set(found["health"].values()) == {1}  # SERVING


async def test_everything_runs_on_the_guides_hand_made_certificates(guide: Path, serve: Serve) -> None:
    await assert_works(serve, guide, "agent-1")


async def test_everything_runs_on_files_and_contents_named_in_the_environment(
    guide: Path, pki: Pki, children: Children
) -> None:
    """The control plane by `PARALLAX_TLS_*_FILE`, the agent by `PARALLAX_TLS_*_PEM`."""
    parts = ("CA", "CERT", "KEY")
    files = {f"PARALLAX_TLS_{p}_FILE": str(guide / "control-plane" / f"{p.lower()}.pem") for p in parts}
    contents = {f"PARALLAX_TLS_{p}_PEM": (guide / "agent-1" / f"{p.lower()}.pem").read_text() for p in parts}
    nowhere = {"PARALLAX_CERTS_DIR": ""}
    _, fleet = await children.fleet(pki, **files, **nowhere)
    await children.agent(fleet, **contents, **nowhere)
    async with ParallaxClient(fleet.address, by_directory(guide)) as client:
        assert (await client.analyze("agent-1", "echo", 1)).value == 1


@pytest.mark.parametrize("script", [FLAT, OURS], ids=["by hand", "by our command"])
async def test_everything_runs_on_flat_files_of_a_ca_with_a_passphrase(
    make: Make, serve: Serve, script: str
) -> None:
    directory = make(script)
    assert "ENCRYPTED" in (directory / "ca-key.pem").read_text()
    await assert_works(serve, directory, "agente_py")


async def test_everything_runs_on_certificates_like_those_of_cert_manager(
    pki: Pki, serve: Serve, tmp_path: Path
) -> None:
    """No URI SAN, several DNS SANs, the control plane's for servers only, files as in a Kubernetes secret."""
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH

    def mount(name: str, dns: str, *usages: Any) -> MTLSConfig:
        leaf: Leaf = pki.forge(dns, dns=[dns, name], usages=usages)
        directory = tmp_path / name
        directory.mkdir()
        (directory / "tls.key").touch(0o600)
        files = {"tls.crt": leaf.chain_pem, "tls.key": leaf.key_pem, "ca.crt": leaf.bundle_pem}
        for file, content in files.items():
            (directory / file).write_bytes(content)
        cert, key, ca = (directory / file for file in files)
        return MTLSConfig(enabled=True, ca_file=ca, cert_file=cert, key_file=key, verify_client=True)

    async with serve(mount("control-plane", "control-plane.parallax.local", server)) as fleet:
        agent_tls = mount("agent-1", "agent-1.agents.parallax.local", client)
        agent = Echo("agent-1", "Echo", [], tls=agent_tls, control_plane=fleet.address)
        client_tls = mount("cli", "cli.clients.parallax.local", client, server)
        async with agent, ParallaxClient(fleet.address, client_tls) as caller:
            assert (await caller.analyze("agent-1", "echo", 1)).value == 1


@pytest.mark.parametrize("whose", ["ours", "the guide's"])
async def test_openssl_connects_as_the_guide_says(
    guide: Path, pki: Pki, serve: Serve, require_tool: Callable[[str], str], whose: str
) -> None:
    directory = pki.directory if whose == "ours" else guide
    cli, ca = directory / "cli", directory / "ca" / "cert.pem"
    files: tuple[str | Path, ...] = ("-cert", cli / "cert.pem", "-key", cli / "key.pem", "-CAfile", ca)
    async with serve(by_directory(directory)) as fleet:
        command = (require_tool("openssl"), "s_client", "-connect", fleet.address, *files)
        checked = ("-verify_hostname", "localhost", "-verify_return_error")
        for more in ((), checked):  # gRPC hangs up on whoever does not ask for HTTP/2, after the handshake
            assert b"Verify return code: 0 (ok)" in (await run(*command, *more)).stdout
        assert (await run(*command, *checked, "-alpn", "h2")).returncode == 0
        async with fleet.client() as client:
            assert await client.agents() == []
