"""What is revoked over gRPC is on the CRL within moments, and openssl refuses it by that."""

from __future__ import annotations

import asyncio
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes
from grpc import aio

from parallax.protos import registry_pb2, registry_pb2_grpc, revocation_pb2, revocation_pb2_grpc
from parallax.security.crl import CRL
from parallax.security.keys import key_id

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve

WITHIN_S = 10.0

Serial = revocation_pb2.CertificateSerial


async def seen(fleet: Fleet, leaf: Leaf) -> None:
    """Have the ledger know *leaf*."""
    async with fleet.channel(leaf) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.ListAgents(registry_pb2.ListAgentsRequest(), timeout=WITHIN_S)


async def revoke(fleet: Fleet, **target: object) -> None:
    async with fleet.channel("client/admin") as channel:
        request = revocation_pb2.RevokeRequest(
            reason=revocation_pb2.REVOCATION_REASON_KEY_COMPROMISE,
            **target,  # type: ignore[arg-type]  # one of its fields
        )
        await revocation_pb2_grpc.RevocationServiceStub(channel).Revoke(request, timeout=WITHIN_S)


async def listing(fleet: Fleet, pki: Pki, *leaves: Leaf) -> CRL:
    """The list, once it names these."""
    name = key_id(pki.authority.certificate.public_key()).hex()
    url = f"http://127.0.0.1:{fleet.metrics_port}/crl/{name}.crl"

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=WITHIN_S) as response:
            content: bytes = response.read()
        return content

    async with asyncio.timeout(WITHIN_S):
        while True:
            crl = CRL.parse(await asyncio.to_thread(get))
            if all(leaf.certificate.serial_number in crl for leaf in leaves):
                return crl
            await asyncio.sleep(0.05)


async def test_openssl_refuses_what_was_revoked_by_serial_and_by_name_and_nothing_else(
    serve: Serve, pki: Pki, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    openssl = require_tool("openssl")
    by_serial, kept = pki.issue("client/cli"), pki.issue("client/cli")
    by_name, again = pki.issue("client/ci"), pki.issue("client/ci")
    async with serve(data_dir=tmp_path / "data") as fleet:
        for leaf in (by_serial, kept, by_name, again):
            await seen(fleet, leaf)
        async with asyncio.timeout(WITHIN_S):
            while len(fleet.plane.ledger):
                await asyncio.sleep(0.01)
        serial = revocation_pb2.CertificateSerial(serial=f"{by_serial.certificate.serial_number:x}")
        await revoke(fleet, certificate=serial)
        await revoke(fleet, identity="client/ci")
        crl = await listing(fleet, pki, by_serial, by_name, again)
        assert len(crl) == 3
    (tmp_path / "crl.pem").write_bytes(crl.pem)
    ca = str(pki.directory / "ca" / "cert.pem")
    for leaf, said in ((kept, "OK"), (by_serial, "revoked"), (by_name, "revoked"), (again, "revoked")):
        (tmp_path / "leaf.pem").write_bytes(leaf.chain_pem)
        command = [openssl, "verify", "-crl_check", "-CAfile", ca, "-CRLfile", "crl.pem", "leaf.pem"]
        done = await asyncio.to_thread(
            subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert said in done.stdout + done.stderr
        assert (done.returncode == 0) is (said == "OK")


async def test_a_certificate_that_is_seen_after_its_identity_was_revoked_is_listed_from_then_on(
    fleet: Fleet, pki: Pki
) -> None:
    leaf = pki.issue("client/cli")
    await revoke(fleet, identity="client/cli")
    with pytest.raises(aio.AioRpcError, match="is revoked"):
        await seen(fleet, leaf)
    await listing(fleet, pki, leaf)


async def test_a_serial_that_no_list_could_name_is_refused_and_lists_go_on(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.issue("client/cli")
    issuer = key_id(pki.authority.certificate.public_key()).hex()
    fingerprint = leaf.certificate.fingerprint(hashes.SHA256()).hex()  # what is easily taken for a serial
    with pytest.raises(aio.AioRpcError, match="of 20 octets at most"):
        await revoke(fleet, certificate=Serial(serial=fingerprint, issuer=issuer))
    await revoke(fleet, certificate=Serial(serial=f"{leaf.certificate.serial_number:x}", issuer=issuer))
    await listing(fleet, pki, leaf)
