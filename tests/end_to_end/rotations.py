"""A rotation of the root over real mTLS: who asks for it, who takes part, and how far it is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc, root_pb2, root_pb2_grpc
from parallax.runtime.connection import Connection
from parallax.runtime.status import error_of
from parallax.runtime.trust import BundleFollower
from parallax.sdk import SecureAgent
from parallax.security.credentials import Credentials
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import load_authority
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.request import new_request

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Serve


POLL: Final = timedelta(seconds=30)


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


class Member:
    """Somebody who holds a certificate on the disk, follows the roots, and renews when told to."""

    def __init__(self, fleet: Fleet, short: str) -> None:
        self.identity = Identity.parse_short(short, "parallax.local")
        self.provider = MTLSCredentialsProvider(fleet.pki.tls(), identity=self.identity)
        self.fleet = fleet
        rotator = self.provider.rotator(POLL)
        assert rotator is not None
        self.rotator = rotator

    def dial(self) -> aio.Channel:
        return self.provider.channel(self.fleet.address, control_plane("parallax.local"))

    @asynccontextmanager
    async def following(self, *, renews: bool = True) -> AsyncIterator[None]:
        assert self.provider.store is not None
        keep = self.provider.keeper(self.rotator)
        follower = BundleFollower(self.provider.store, keep, self.renew if renews else None)
        connection = Connection(self.dial, self.provider.store, "the control plane")
        async with connection.following(), follower.following(connection):
            yield

    async def renew(self) -> None:
        """Have a new leaf put where the old one is, and be seen with it."""
        store, keep = self.provider.store, self.provider.keeper(self.rotator)
        assert store is not None
        assert keep is not None
        await self.rotator.look()
        key = generate_key()
        async with self.dial() as channel:
            stub = certificate_pb2_grpc.CertificateServiceStub(channel)
            request = certificate_pb2.RenewRequest(csr=new_request(self.identity, key))
            response = await stub.Renew(request, timeout=10)
        chain = tuple(map(x509.load_der_x509_certificate, response.chain))
        await keep(Credentials(chain, key, store.current.bundle), store.current)
        async with self.dial() as channel:
            stub = certificate_pb2_grpc.CertificateServiceStub(channel)
            await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=10)


async def ask(fleet: Fleet, method: str, request: Any, name: str = "client/admin") -> root_pb2.RootRotation:
    """What the administrator is answered, with the certificate that lies on the disk."""
    async with Member(fleet, name).dial() as channel:
        try:
            response = await getattr(root_pb2_grpc.RootServiceStub(channel), method)(request, timeout=10)
        except aio.AioRpcError as exc:
            raise error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())) from None
    rotation = response.rotation
    assert isinstance(rotation, root_pb2.RootRotation)
    return rotation


async def rotate(fleet: Fleet, *without: str, force: bool = False) -> root_pb2.RootRotation:
    return await ask(fleet, "RotateRoot", root_pb2.RotateRootRequest(without=without, force=force))


async def status(fleet: Fleet) -> root_pb2.RootRotation:
    return await ask(fleet, "GetRootRotation", root_pb2.GetRootRotationRequest())


async def abort(fleet: Fleet) -> root_pb2.RootRotation:
    return await ask(fleet, "AbortRootRotation", root_pb2.AbortRootRotationRequest())


async def reached(fleet: Fleet, stage: root_pb2.RootStage) -> root_pb2.RootRotation:
    async with asyncio.timeout(20):
        while (now := await status(fleet)).stage != stage:
            await asyncio.sleep(0.1)
    return now


def signer(pki: Pki) -> x509.Certificate:
    return load_authority(pki.directory).certificate


@asynccontextmanager
async def serving(serve: Serve, pki: Pki, tmp_path: Path, **settings: Any) -> AsyncIterator[Fleet]:
    async with serve(pki.tls(), data_dir=tmp_path / "data", **settings) as fleet:
        fleet.pki = pki
        yield fleet


def roots_in(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


async def trusted_alone(root: x509.Certificate, *files: Path) -> None:
    """Wait until *root* is all that these hold: it is told after the rotation has ended."""
    async with asyncio.timeout(20):
        while any(roots_in(path) != [root] for path in files):
            await asyncio.sleep(0.05)


async def only_missing(fleet: Fleet, stage: root_pb2.RootStage, *shorts: str) -> None:
    async with asyncio.timeout(20):
        while (now := await status(fleet)).stage != stage or now.missing != list(shorts):
            await asyncio.sleep(0.1)


async def start(fleet: Fleet, *arguments: str) -> asyncio.subprocess.Process:
    """`parallax …` against *fleet*."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.sdk.cli", *arguments),
        env=os.environ | fleet.pki.environment | {"PARALLAX_CONTROL_PLANE": fleet.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
