"""TLS sessions that openssl resumes: who is let in no longer does not get in by one from before."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes
from grpc import StatusCode

from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile, self_signed_template
from tests.end_to_end.http2 import grpc_call
from tests.end_to_end.test_direct_revocation import listening
from tests.end_to_end.test_pins import DEVICE, as_leaf, let_in, pin, unpin
from tests.end_to_end.test_revocation import revoke, revoke_leaf

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve

WITHIN_S = 15.0
BUNDLE = "/parallax.v1.CertificateService/GetTrustBundle"  # what everybody may ask who is somebody
CAPABILITIES = "/parallax.v1.AgentService/GetCapabilities"
VERSIONS = ("tls1_2", "tls1_3")

Withdraw = Callable[["Fleet", "Leaf"], Awaitable[None]]


@dataclass(frozen=True)
class Answer:
    """What came of one call over a connection of its own."""

    resumed: bool
    status: StatusCode | None  # None: it was not let in by TLS
    text: str


class Opener:
    """`openssl s_client` with *leaf*: each connection resumes the session of the first, if that may be."""

    def __init__(self, openssl: str, directory: Path, leaf: Leaf, port: int, version: str) -> None:
        self._session = directory / "session"
        self._command = [openssl, *f"s_client -connect 127.0.0.1:{port} -{version} -ign_eof".split()]
        for option, pem in (("cert", leaf.chain_pem), ("key", leaf.key_pem), ("CAfile", leaf.bundle_pem)):
            path = directory / f"{option}.pem"
            path.write_bytes(pem)
            self._command += [f"-{option}", str(path)]

    async def call(self, method: str) -> Answer:
        """Call *method* with an empty message."""
        said, status = await self.send(grpc_call(method), rb"grpc-status.(\d+)", "-alpn", "h2")
        return Answer(
            b"\nReused, TLS" in said, CODES[int(status)] if status else None, said.decode(errors="replace")
        )

    async def send(self, content: bytes, awaited: bytes, *options: str) -> tuple[bytes, bytes]:
        """All that openssl says until *awaited*, and what that captures: nothing if it never comes."""
        is_first = not self._session.exists()
        process = await asyncio.create_subprocess_exec(
            *(*self._command, "-sess_out" if is_first else "-sess_in", str(self._session), *options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        said, found = b"", None
        try:
            process.stdin.write(content)
            async with asyncio.timeout(WITHIN_S):
                while found is None and (more := await process.stdout.read(65_536)):
                    said += more
                    found = re.search(awaited, said, re.DOTALL)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        return said, found[1] if found else b""


CODES = {code.value[0]: code for code in StatusCode}
Open = Callable[..., Opener]


@pytest.fixture
def opener(require_tool: Callable[[str], str], tmp_path: Path) -> Open:
    def make(leaf: Leaf, port: int, version: str) -> Opener:
        return Opener(require_tool("openssl"), tmp_path, leaf, port, version)

    return make


async def open_session(opener: Opener, method: str) -> None:
    """Be let in, twice: the second connection resumes the session of the first, as all after it will."""
    first, second = [await opener.call(method) for _ in range(2)]
    assert (first.resumed, first.status) == (False, StatusCode.OK), first.text
    assert (second.resumed, second.status) == (True, StatusCode.OK), second.text


async def by_serial(fleet: Fleet, leaf: Leaf) -> None:
    await revoke_leaf(fleet, leaf)


async def by_name(fleet: Fleet, _: Leaf) -> None:
    await revoke(fleet, identity="client/cli")


@pytest.mark.parametrize("withdraw", [by_serial, by_name])
@pytest.mark.parametrize("version", VERSIONS)
async def test_after_a_revocation(
    fleet: Fleet, pki: Pki, opener: Open, version: str, withdraw: Withdraw
) -> None:
    leaf = pki.issue("client/cli")
    opened = opener(leaf, fleet.port, version)
    await open_session(opened, BUNDLE)
    await withdraw(fleet, leaf)
    answer = await opened.call(BUNDLE)
    assert (answer.resumed, answer.status) == (True, StatusCode.UNAUTHENTICATED)
    assert "is revoked" in answer.text


@pytest.mark.parametrize("withdraw", [by_serial, by_name])
@pytest.mark.parametrize("version", VERSIONS)
async def test_after_a_revocation_at_an_agents_own_port(
    fleet: Fleet, pki: Pki, opener: Open, version: str, withdraw: Withdraw
) -> None:
    leaf = pki.issue("client/cli")
    async with listening(fleet) as agent:
        opened = opener(leaf, int(str(agent.endpoint).rpartition(":")[2]), version)
        await open_session(opened, CAPABILITIES)
        await withdraw(fleet, leaf)
        async with asyncio.timeout(WITHIN_S):
            while (answer := await opened.call(CAPABILITIES)).status is StatusCode.OK:
                await asyncio.sleep(0.05)  # the agent is told by its control plane
    assert (answer.resumed, answer.status) == (True, StatusCode.UNAUTHENTICATED)
    assert "is revoked" in answer.text


@pytest.mark.parametrize("version", VERSIONS)
async def test_after_a_certificate_has_ended(fleet: Fleet, pki: Pki, opener: Open, version: str) -> None:
    leaf = pki.issue("client/cli", now=datetime.now(UTC), lifetime=timedelta(seconds=9))
    opened = opener(leaf, fleet.port, version)
    await open_session(opened, BUNDLE)
    await asyncio.sleep((leaf.certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds() + 1)
    answer = await opened.call(BUNDLE)
    assert answer.status is StatusCode.UNAUTHENTICATED
    assert "expired" in answer.text


@pytest.mark.parametrize("version", VERSIONS)
async def test_after_a_pin_was_taken_out(fleet: Fleet, pki: Pki, opener: Open, version: str) -> None:
    """The roots of the port are others then, and sessions from before are worth nothing to it."""
    who, key = Identity.parse_short(DEVICE), generate_key()
    template = self_signed_template(who, key.public_key(), LeafProfile(sans=()), datetime.now(UTC), 1)
    leaf = as_leaf(pki, key, template.sign(key, hashes.SHA256()))
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    opened = opener(leaf, fleet.port, version)
    await open_session(opened, BUNDLE)
    await unpin(fleet)
    answer = await opened.call(BUNDLE)
    assert answer.status in {None, StatusCode.UNAUTHENTICATED}, answer.text


async def test_where_one_enrolls_no_session_of_tls_1_3_is_resumed(
    serve: Serve, opener: Open, pki: Pki
) -> None:
    """Or whoever resumes it would not see the certificate that is in force by then."""
    async with serve(http_listen="127.0.0.1:0") as fleet:
        opened = opener(pki.issue("client/cli"), fleet.http_port, "tls1_3")
        for _ in range(2):
            said, status = await opened.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", rb"HTTP/1.1 (\d+)")
            assert status == b"404", said
            assert b"\nNew, TLS" in said
