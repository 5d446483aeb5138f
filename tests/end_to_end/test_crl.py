"""CRLs of a running control plane, as openssl, nginx and whoever else asks for them see them."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.x509 import ReasonFlags

from parallax.protos import root_pb2, root_pb2_grpc
from parallax.security.bundle import parse_certificates
from parallax.security.crl import CRL, RevokedSerial, issue_crl
from parallax.security.keys import key_id
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Leaf, Pki, Serve, Until


def issuer_of(pki: Pki) -> str:
    return key_id(pki.authority.certificate.public_key()).hex()


async def fetch(fleet: Fleet, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """What the metrics listener answers."""

    def get() -> tuple[int, dict[str, str], bytes]:
        url = f"http://127.0.0.1:{fleet.metrics_port}{path}"
        request = urllib.request.Request(url, headers={k.replace("_", "-"): v for k, v in headers.items()})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - our own
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, dict(exc.headers), exc.read()

    return await asyncio.to_thread(get)


async def published(fleet: Fleet, path: str) -> bytes:
    """The list at *path*, as soon as there is one."""
    async with asyncio.timeout(10):
        while (answer := await fetch(fleet, path))[0] != 200:
            await asyncio.sleep(0.01)
    return answer[2]


def run(directory: Path, *command: str) -> str:
    """What a program says."""
    return subprocess.run(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=10,
        check=False,
    ).stdout


# A control plane.


async def test_a_control_plane_publishes_the_list_of_its_ca_and_openssl_believes_it(
    serve: Serve, pki: Pki, tmp_path: Path, require_tool: Callable[[str], str], until: Until
) -> None:
    openssl, name = require_tool("openssl"), issuer_of(pki)
    async with serve(data_dir=tmp_path / "data") as fleet:
        (tmp_path / "crl.der").write_bytes(await published(fleet, f"/crl/{name}.crl"))
        ca = str(pki.directory / "ca" / "cert.pem")
        said = await asyncio.to_thread(
            run,
            tmp_path,
            openssl,
            "crl",
            "-inform",
            "DER",
            "-in",
            "crl.der",
            "-CAfile",
            ca,
            "-noout",
            "-text",
        )
        assert "verify OK" in said
        assert "No Revoked Certificates" in said
        status, headers, pem = await fetch(fleet, f"/crl/{name}.pem")
        assert CRL.parse(pem).der == (tmp_path / "crl.der").read_bytes()
        assert 0 <= int(headers["cache-control"].removeprefix("max-age=")) <= 60
        status, _, body = await fetch(fleet, f"/crl/{name}.pem", If_None_Match=headers["etag"])
        assert (status, body) == (304, b"")
        _, _, index = await fetch(fleet, "/crl/")
        assert [each["issuer"] for each in json.loads(index)] == [name]
        status, ready = await fleet.http("/readyz")
        assert (status, json.loads(ready)["detail"]["crl"]) == (200, "current")
        metrics = await fleet.metrics()
        assert metrics[f'parallax_crl_entries{{issuer="{name[:8]}"}}'] == 0
        file = tmp_path / "data" / "crl" / f"{name}.pem"
        await until(file.exists)  # it is written after the list is shown
        assert file.read_bytes() == pem


@pytest.mark.parametrize(
    "path", ["/crl/../parallax.db", "/crl/%2e%2e/parallax.db", "/crl/..%2fparallax.db", "/crl/%00", "/crl"]
)
async def test_nothing_else_of_the_data_directory_can_be_had(fleet: Fleet, path: str) -> None:
    assert (await fetch(fleet, path))[0] == 404


async def test_where_nobody_is_authenticated_there_is_none(serve: Serve, pki: Pki) -> None:
    async with serve(tls=pki.tls(verify_client=False)) as fleet:
        assert (await fetch(fleet, "/crl/"))[0] == 404


@pytest.mark.timeout(90)
async def test_numbers_go_on_however_often_the_process_is_killed(
    pki: Pki, tmp_path: Path, children: Children
) -> None:
    path = f"/crl/{issuer_of(pki)}.crl"
    numbers = list[int]()
    for _ in range(3):
        child, fleet = await children.fleet(pki, PARALLAX_DATA_DIR=str(tmp_path / "data"))
        await child.said("crl published")
        numbers.append(CRL.parse(await published(fleet, path)).number)
        await child.stop(signal.SIGKILL)
    assert numbers == sorted(set(numbers))


async def test_while_the_root_is_rotated_there_is_one_of_each(
    new_pki: type[Pki], serve: Serve, tmp_path: Path
) -> None:
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "client/admin")
    async with serve(pki.tls(), data_dir=tmp_path / "data") as fleet:
        fleet.pki = pki
        async with fleet.channel("client/admin") as channel:
            await root_pb2_grpc.RootServiceStub(channel).RotateRoot(root_pb2.RotateRootRequest(), timeout=10)
        old, new = (
            parse_certificates((pki.directory / "ca" / name).read_bytes())[0]
            for name in ("cert.pem", "next/cert.pem")
        )
        for root in (old, new):
            name = key_id(root.public_key()).hex()
            CRL.parse(await published(fleet, f"/crl/{name}.pem")).check(root, datetime.now(UTC))


async def test_without_the_key_of_a_ca_it_serves_and_says_so(
    new_pki: type[Pki], tmp_path: Path, children: Children
) -> None:
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "client/cli")
    (pki.directory / "ca" / "key.pem").unlink()
    child, fleet = await children.fleet(pki)
    await child.said("a crl is not published", obstacle="unsigned")
    status, ready = await fleet.http("/readyz")
    assert (status, json.loads(ready)["detail"]["crl"]) == (200, "none, unsigned")
    assert (await fleet.metrics())['parallax_crl_obstacle{reason="unsigned"}'] == 1
    async with fleet.client() as client:
        assert await client.agents() == []


# nginx.

Nginx = Callable[["Pki", bytes], AbstractContextManager[int]]
CONFIGURATION = """
daemon off;
pid {here}/nginx.pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path {here}/a; proxy_temp_path {here}/b; fastcgi_temp_path {here}/c;
    uwsgi_temp_path {here}/d; scgi_temp_path {here}/e;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {here}/own.pem;
        ssl_certificate_key {here}/own.key;
        ssl_client_certificate {here}/ca.pem;
        ssl_crl {here}/crl.pem;
        ssl_verify_client on;
        return 200 "$ssl_client_s_dn";
    }}
}}
"""


def answer(directory: Path, leaf: Leaf, port: int) -> tuple[int, str]:
    """What nginx answers to the holder of *leaf*, once it is there."""
    for name, content in (("c.pem", leaf.chain_pem), ("c.key", leaf.key_pem), ("c.ca", leaf.bundle_pem)):
        (directory / name).write_bytes(content)
    context = ssl.create_default_context(cafile=directory / "c.ca")
    context.load_cert_chain(directory / "c.pem", directory / "c.key")
    deadline = time.monotonic() + 10
    while True:
        connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
        with closing(connection):
            try:
                connection.request("GET", "/")
                response = connection.getresponse()
                return response.status, response.read().decode()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "nginx does not listen"
                time.sleep(0.02)


@pytest.fixture
def nginx(tmp_path: Path, require_tool: Callable[[str], str]) -> Nginx:
    """A real nginx that trusts a PKI and a list, and its port."""

    @contextmanager
    def serving(pki: Pki, crl: bytes) -> Iterator[int]:
        port = free_port()
        own = pki.issue("service/control-plane")
        content = {
            "own.pem": own.chain_pem,
            "own.key": own.key_pem,
            "ca.pem": own.bundle_pem,
            "crl.pem": crl,
            "nginx.conf": CONFIGURATION.format(here=tmp_path, port=port).encode(),
        }
        for name, data in content.items():
            (tmp_path / name).write_bytes(data)
        configuration = tmp_path / "nginx.conf"
        command = (require_tool("nginx"), "-e", "stderr", "-p", str(tmp_path), "-c", str(configuration))
        with subprocess.Popen(command) as process:
            try:
                yield port
            finally:
                process.terminate()

    return serving


async def test_nginx_lets_in_whom_the_list_does_not_name_and_nobody_whom_it_does(
    pki: Pki, nginx: Nginx, tmp_path: Path
) -> None:
    good, bad = pki.issue("agent/agent-1"), pki.issue("agent/agent-2")
    now = datetime.now(UTC)
    revoked = [RevokedSerial(bad.certificate.serial_number, now, ReasonFlags.key_compromise)]
    with nginx(pki, issue_crl(pki.authority, 1, revoked, now).pem) as port:
        assert await asyncio.to_thread(answer, tmp_path, good, port) == (200, "CN=agent-1")
        status, body = await asyncio.to_thread(answer, tmp_path, bad, port)
    assert status == 400
    assert "The SSL certificate error" in body


async def test_nginx_lets_nobody_in_once_the_list_is_stale(pki: Pki, nginx: Nginx, tmp_path: Path) -> None:
    """So it is replaced long before."""
    stale = issue_crl(pki.authority, 1, [], datetime.now(UTC) - timedelta(hours=1), timedelta(minutes=1))
    with nginx(pki, stale.pem) as port:
        status, _ = await asyncio.to_thread(answer, tmp_path, pki.issue("agent/agent-1"), port)
    assert status == 400
