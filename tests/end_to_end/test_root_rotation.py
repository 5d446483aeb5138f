"""The CA and its root give way to others under load: who is waited for, who signs, what a restart finds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc, root_pb2, root_pb2_grpc
from parallax.runtime.connection import Connection
from parallax.runtime.status import error_of
from parallax.runtime.trust import BundleFollower
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.sdk.cli import INTERRUPTED
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials
from parallax.security.errors import (
    ConfigError,
    InvalidRequest,
    InvalidTransition,
    NotAuthorized,
    Unavailable,
)
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import generate_key, key_id, key_to_pem
from parallax.security.layouts import Layout, load_authority, save_authority
from parallax.security.profiles import LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.request import new_request

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Leaf, Pki, Serve


POLL: Final = timedelta(seconds=30)
YEAR: Final = timedelta(days=365)


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


@pytest.fixture
def own_pki(new_pki: type[Pki], tmp_path: Path) -> Pki:
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "agent/agent-2", "client/cli")
    pki.save("client/admin")
    return pki


@asynccontextmanager
async def serving(serve: Serve, pki: Pki, tmp_path: Path, **settings: Any) -> AsyncIterator[Fleet]:
    async with serve(pki.tls(), data_dir=tmp_path / "data", **settings) as fleet:
        fleet.pki = pki
        yield fleet


@pytest.mark.timeout(120)
async def test_the_root_is_rotated_twice_under_load_and_no_task_fails(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    first = signer(own_pki)
    async with serving(serve, own_pki, tmp_path) as fleet:
        agents = [fleet.agent(Echo, "agent-1"), fleet.agent(Echo, "agent-2")]
        async with agents[0], agents[1], fleet.client() as client:
            done, stop = 0, asyncio.Event()

            async def load() -> None:
                nonlocal done
                while not stop.is_set():
                    result = await client.analyze("capability:echo", "echo", {"n": done})
                    assert result.value == {"n": done}
                    done += 1

            members = [Member(fleet, n) for n in ("client/cli", "client/admin")]
            everybody = [*members, *(Member(fleet, f"agent/agent-{n}") for n in (1, 2))]
            async with asyncio.TaskGroup() as group:
                group.create_task(load())
                for turn in (1, 2):
                    old = signer(own_pki)
                    async with members[0].following():
                        begun = await rotate(fleet)
                        assert begun.stage == root_pb2.ROOT_STAGE_PREPARED
                        async with asyncio.timeout(20):
                            while list((await status(fleet)).missing) != ["client/admin"]:
                                await asyncio.sleep(0.1)
                        assert signer(own_pki) == old
                        async with members[1].following():
                            await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
                            assert signer(own_pki) != old
                            for member in everybody[2:]:
                                await member.renew()
                            await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
                    assert (tmp_path / "certs" / "ca").is_dir()
                    assert len(list((tmp_path / "certs" / "ca").glob("retired-*"))) == turn
                before = done
                while done < before + 10:
                    await asyncio.sleep(0.05)
                stop.set()
        assert done > 20
        assert fleet.plane.provider.store is not None
        assert first not in fleet.plane.provider.store.current.bundle.roots
        leaf = own_pki.issue("agent/agent-1")  # of the first root, which the directory's fixture still has
        with pytest.raises(aio.AioRpcError):
            async with fleet.channel(
                replace(leaf, bundle_pem=fleet.plane.provider.store.current.bundle.pem)
            ) as channel:
                stub = certificate_pb2_grpc.CertificateServiceStub(channel)
                await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=10)


DIALLED: Final = {"session": False, "listen": "127.0.0.1:0"}


class Slow(SecureAgent):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        self.has_begun.set()
        await self.may_end.wait()
        return data, 1.0

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        self.has_begun.set()
        yield "first", 1.0
        await self.may_end.wait()
        yield data, 1.0


async def whole(client: ParallaxClient) -> Any:
    return (await client.analyze("agent-1", "slow", "last")).value


async def in_parts(client: ParallaxClient) -> Any:
    return [part.value async for part in client.stream("agent-1", "slow", "last")][-1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("ways", "ask_for"), [({}, in_parts), (DIALLED, whole), (DIALLED, in_parts)])
async def test_a_task_that_takes_longer_than_the_rotation_and_the_drain_time_is_not_lost(
    serve: Serve,
    own_pki: Pki,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ways: dict[str, Any],
    ask_for: Callable[[ParallaxClient], Coroutine[Any, Any, Any]],
) -> None:
    monkeypatch.setenv("PARALLAX_DRAIN_SECONDS", "0.5")
    async with (
        serving(serve, own_pki, tmp_path, drain_seconds=0.5) as fleet,
        fleet.agent(Slow, "agent-1", **ways) as agent,
        fleet.client() as client,
        Member(fleet, "client/admin").following(),
        asyncio.TaskGroup() as group,
    ):
        assert isinstance(agent, Slow)
        asking = group.create_task(ask_for(client))
        await agent.has_begun.wait()
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        await asyncio.sleep(2)  # four times the drain time
        agent.may_end.set()
        assert await asking == "last"


async def test_one_that_sleeps_is_waited_for_until_it_is_left_out_by_name(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        async with fleet.agent(Echo, "agent-1"):
            pass  # it was here, and holds a certificate that lasts
        async with Member(fleet, "client/admin").following():
            await rotate(fleet)
            async with asyncio.timeout(15):
                while list((await status(fleet)).missing) != ["agent/agent-1"]:
                    await asyncio.sleep(0.1)
            with pytest.raises(InvalidRequest, match="--force"):
                await rotate(fleet, "agent/agent-1")
            with pytest.raises(InvalidRequest, match="nobody waits for agent/agent-9"):
                await rotate(fleet, "agent/agent-9", force=True)
            assert (await fleet.metrics())["parallax_trust_bundle_adoption_ratio"] < 1
            assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_PREPARED
            await rotate(fleet, "agent/agent-1", force=True)
            now = await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
            assert not now.without
            assert "agent/agent-1" in now.missing  # for its leaf is of the old root


async def test_one_that_sleeps_takes_part_by_a_renewal_from_time_to_time(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        async with fleet.agent(Echo, "agent-1"):
            pass
        async with Member(fleet, "client/admin").following():
            await rotate(fleet)
            for stage in (root_pb2.ROOT_STAGE_PREPARED, root_pb2.ROOT_STAGE_ACTIVE):
                await only_missing(fleet, stage, "agent/agent-1")
                renewal = await start(fleet, "certs", "renew", "agent-1")
                _, err = await renewal.communicate()
                assert (renewal.returncode, err) == (0, b"")
            await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        trusted = roots_in(own_pki.directory / "agent-1" / "ca.pem")
        assert signer(own_pki) in trusted


async def test_an_abort_leaves_everything_as_it_was(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    old = signer(own_pki)
    async with serving(serve, own_pki, tmp_path) as fleet:
        with pytest.raises(InvalidTransition, match="no rotation"):
            await abort(fleet)
        agent = fleet.agent(Echo, "agent-1")
        async with agent:
            await rotate(fleet)
            trusted = own_pki.directory / "agent-1" / "ca.pem"
            await until_count(trusted, 2)
            await abort(fleet)
            await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
            await until_count(trusted, 1)
        assert roots_in(trusted) == [old]
        assert load_authority(own_pki.directory).bundle.roots == (old,)
        assert (own_pki.directory / "ca" / "next" / "key.pem").exists()  # the next rotation takes it


def roots_in(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


async def until_count(path: Path, roots: int) -> None:
    async with asyncio.timeout(15):
        while len(roots_in(path)) != roots:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", ["client/cli", "agent/agent-1", "service/agent-proxy"])
async def test_only_the_administrator_rotates(serve: Serve, own_pki: Pki, tmp_path: Path, name: str) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        for method, request in (
            ("RotateRoot", root_pb2.RotateRootRequest()),
            ("GetRootRotation", root_pb2.GetRootRotationRequest()),
            ("AbortRootRotation", root_pb2.AbortRootRotationRequest()),
        ):
            with pytest.raises(NotAuthorized, match="--identity client/admin"):
                await ask(fleet, method, request, name)
        assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE


async def test_an_acknowledgement_counts_for_the_caller_alone_and_must_be_a_hash(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        await rotate(fleet)
        assert fleet.plane.provider.store is not None
        async with asyncio.timeout(10):
            while len(fleet.plane.provider.store.current.bundle.roots) < 2:
                await asyncio.sleep(0.05)
        async with Member(fleet, "agent/agent-1").dial() as channel:
            stub = certificate_pb2_grpc.CertificateServiceStub(channel)
            acknowledge = certificate_pb2.AcknowledgeTrustBundleRequest
            with pytest.raises(aio.AioRpcError, match="32 bytes"):
                await stub.AcknowledgeTrustBundle(acknowledge(hash=b"short"), timeout=10)
            both = fleet.plane.provider.store.current.bundle.hash
            await stub.AcknowledgeTrustBundle(acknowledge(hash=both), timeout=10)
        async with asyncio.timeout(15):
            while list((await status(fleet)).missing) != ["client/admin"]:
                await asyncio.sleep(0.1)


async def test_more_roots_than_can_be_recorded_begin_nothing(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    others = [CertificateAuthority.create(now=own_pki.now).certificate for _ in range(600)]
    for name in ("control-plane", "agent-proxy"):
        ca = own_pki.directory / name / "ca.pem"
        ca.write_bytes(ca.read_bytes() + certificates_to_pem(others))
    async with serving(serve, own_pki, tmp_path) as fleet:
        with pytest.raises(ConfigError, match="trust fewer roots"):
            await rotate(fleet)
        assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE


async def test_a_control_plane_whose_ca_is_elsewhere_begins_nothing(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    (own_pki.directory / "ca" / "key.pem").unlink()
    async with serving(serve, own_pki, tmp_path) as fleet:
        with pytest.raises(ConfigError, match=r"there is no .*key\.pem"):
            await rotate(fleet)
        assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE


@pytest.mark.timeout(150)
async def test_kill_9_at_any_moment_loses_neither_the_stage_nor_the_ca(
    children: Children, own_pki: Pki
) -> None:
    first = signer(own_pki)
    plane, fleet = await children.fleet(own_pki)
    again = {"PARALLAX_LISTEN": f"127.0.0.1:{fleet.port}"}
    admin = Member(fleet, "client/admin")

    async def killed(after_s: float) -> None:
        """Killed so much later, and started once more."""
        nonlocal plane
        await asyncio.sleep(after_s)
        await plane.stop(signal.SIGKILL)
        load_authority(own_pki.directory)  # whole, whichever it is
        plane, _ = await children.fleet(own_pki, **again)

    await rotate(fleet)
    for after_s in (0.0, 0.02):
        await killed(after_s)
        assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_PREPARED
        assert signer(own_pki) == first
    async with admin.following(renews=False):
        for after_s in (0.1, 0.3, 0.6):
            await killed(after_s)
        await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
        await killed(0.0)
        await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
        assert signer(own_pki) != first
    async with admin.following():
        for after_s in (0.0, 0.5, 2.0):
            await killed(after_s)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    assert load_authority(own_pki.directory).bundle.roots == (signer(own_pki),)


async def test_who_watches_from_the_first_moment_is_told_who_signs(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    """As whoever was connected to a control plane that was killed comes back to the next one at once."""
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        Member(fleet, "client/admin").following(renews=False),
    ):
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
    async with serving(serve, own_pki, tmp_path) as fleet:
        assert fleet.plane.roots is not None
        assert fleet.plane.roots.successor == key_id(signer(own_pki).public_key())


async def test_an_administrator_who_does_not_wait_for_a_slow_disk_leaves_nothing_unnoticed(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, Member(fleet, "client/admin").following():
        await status(fleet)
        is_fast = threading.Event()
        fleet.plane._engine._thread.submit(is_fast.wait)
        async with Member(fleet, "client/admin").dial() as channel:
            with pytest.raises(aio.AioRpcError, match="Deadline"):
                await root_pb2_grpc.RootServiceStub(channel).RotateRoot(
                    root_pb2.RotateRootRequest(), timeout=0.5
                )
        is_fast.set()
        async with asyncio.timeout(15):
            while (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE:
                await asyncio.sleep(0.05)
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    assert signer(own_pki) != own_pki.authority.certificate


async def test_whose_file_is_somebody_elses_is_waited_for_and_says_so_once(
    serve: Serve, own_pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = own_pki.directory / "agent-1"
    by_hand = shutil.copytree(own, tmp_path / "by-hand", symlinks=False)
    files = MTLSConfig(
        enabled=True,
        verify_client=True,
        cert_file=by_hand / "cert.pem",
        key_file=by_hand / "key.pem",
        ca_file=by_hand / "ca.pem",
    )
    async with serving(serve, own_pki, tmp_path) as fleet, Member(fleet, "client/admin").following():
        agent = Echo("agent-1", "By hand", ["echo"], tls=files, control_plane=fleet.address)
        async with agent:
            await rotate(fleet)
            async with asyncio.timeout(20):
                while list((await status(fleet)).missing) != ["agent/agent-1"]:
                    await asyncio.sleep(0.1)
            assert len(roots_in(by_hand / "ca.pem")) == 1
            shutil.copy(own_pki.directory / "control-plane" / "ca.pem", by_hand / "ca.pem")
            await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
    said = [r for r in caplog.records if r.message.startswith("the roots that the fleet is to trust cannot")]
    assert len(said) == 1


async def test_roots_that_could_not_be_written_are_adopted_once_they_can(
    serve: Serve, own_pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = own_pki.directory / "agent-1"
    elsewhere = own.rename(tmp_path / "elsewhere")
    own.symlink_to(elsewhere)  # by which files are read, and never written
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        fleet.agent(Echo, "agent-1"),
        Member(fleet, "client/admin").following(),
    ):
        await rotate(fleet)
        await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "agent/agent-1")
        assert "the roots that the fleet is to trust cannot be adopted" in caplog.messages
        own.unlink()
        elsewhere.rename(own)
        await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)


async def test_a_client_of_two_control_planes_follows_the_one_that_is_there(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    one_that_is_away = ParallaxClient("localhost:1", own_pki.tls())
    with pytest.raises(Unavailable):
        await one_that_is_away.agents()
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        fleet.client() as client,
        Member(fleet, "client/admin").following(),
    ):
        await client.agents()
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    await one_that_is_away.close()


async def test_who_goes_back_to_the_old_root_alone_counts_no_more(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        old = own_pki.authority.bundle.hash
        async with Member(fleet, "agent/agent-1").following():
            await rotate(fleet)
            async with asyncio.timeout(20):
                while list((await status(fleet)).missing) != ["client/admin"]:
                    await asyncio.sleep(0.1)
        async with Member(fleet, "agent/agent-1").dial() as channel:
            stub = certificate_pb2_grpc.CertificateServiceStub(channel)
            for _ in range(100):
                await stub.AcknowledgeTrustBundle(
                    certificate_pb2.AcknowledgeTrustBundleRequest(hash=old), timeout=10
                )
        assert "agent/agent-1" in (await status(fleet)).missing


# A CA below a root whose key is elsewhere.


def root(name: str) -> CertificateAuthority:
    return CertificateAuthority.create(now=datetime.now(UTC), name=name)


def below(
    above: CertificateAuthority,
    name: str,
    *,
    age: timedelta = timedelta(0),
    lifetime: timedelta = YEAR,
    only: str = "parallax.local",
) -> CertificateAuthority:
    """Another CA that *above* has certified, so long ago, for DNS names that end so and local addresses."""
    key, now = generate_key(), datetime.now(UTC) - age
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(above.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.NameConstraints([x509.DNSName(only), x509.DNSName("localhost")], None), critical=True
        )
        .sign(above.key, hashes.SHA256())
    )
    return CertificateAuthority(certificate, key, above.bundle)


def lay_next(pki: Pki, authority: CertificateAuthority) -> Path:
    """Put it where `ca rotate` takes it from, with the key of no root."""
    place = pki.directory / "ca" / "next"
    place.mkdir(mode=0o700, exist_ok=True)
    (place / "cert.pem").write_bytes(
        certificates_to_pem([authority.certificate, *authority.intermediates, *authority.bundle.roots])
    )
    (place / "key.pem").touch(0o600)
    (place / "key.pem").write_bytes(key_to_pem(authority.key))
    return place


FIRST_ROOT: Final = root("First Root")
OTHER_ROOT: Final = root("Other Root")


@pytest.fixture
def below_pki(new_pki: type[Pki], tmp_path: Path) -> Pki:
    """A fleet whose CA is below `FIRST_ROOT`."""
    pki = new_pki(tmp_path / "below")
    shutil.rmtree(pki.directory / "ca")
    pki.authority = pki.throwaway.authority = below(FIRST_ROOT, "First CA")
    save_authority(pki.directory, Layout.PARALLAX, pki.authority)
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "agent/agent-2", "client/cli")
    pki.save("client/admin")
    return pki


def issuer_on_disk(pki: Pki, name: str) -> x509.Certificate:
    """Whom the chain of *name* presents above its leaf."""
    leaf, issuer = roots_in(pki.directory / name / "cert.pem")
    leaf.verify_directly_issued_by(issuer)
    return issuer


@pytest.mark.timeout(120)
async def test_a_ca_below_an_offline_root_gives_way_under_load_and_no_task_fails(
    serve: Serve, below_pki: Pki, tmp_path: Path
) -> None:
    names = ("control-plane", "agent-proxy", "agent-1", "agent-2", "cli", "admin")
    first = below_pki.issue("agent/agent-2")
    async with serving(serve, below_pki, tmp_path) as fleet:
        async with (
            fleet.agent(Echo, "agent-1"),
            fleet.agent(Echo, "agent-2"),
            fleet.client() as client,
            Member(fleet, "client/admin").following(),
        ):
            done, stop = 0, asyncio.Event()

            async def load() -> None:
                nonlocal done
                while not stop.is_set():
                    result = await client.analyze("capability:echo", "echo", {"n": done})
                    assert result.value == {"n": done}
                    done += 1

            async with asyncio.TaskGroup() as group:
                group.create_task(load())
                for above, called in ((FIRST_ROOT, "Second CA"), (OTHER_ROOT, "Third CA")):
                    new = below(above, called)
                    lay_next(below_pki, new)
                    await rotate(fleet)
                    await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
                    before = done
                    while done < before + 10:
                        await asyncio.sleep(0.05)
                    assert {issuer_on_disk(below_pki, name) for name in names} == {new.certificate}
                    assert {tuple(roots_in(below_pki.directory / name / "ca.pem")) for name in names} == {
                        (above.certificate,)
                    }
                    in_force = load_authority(below_pki.directory)
                    assert (in_force.certificate, in_force.bundle.roots) == (
                        new.certificate,
                        (above.certificate,),
                    )
                    assert not (below_pki.directory / "ca" / "next").exists()
                    is_trusted = above is FIRST_ROOT  # below the same root the leaves of the old CA live on
                    assert await is_let_in(fleet, first, above) is is_trusted
                stop.set()
        assert done > 20


async def is_let_in(fleet: Fleet, leaf: Leaf, trusts: CertificateAuthority) -> bool:
    async with fleet.channel(replace(leaf, bundle_pem=trusts.bundle.pem)) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        try:
            await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=10)
        except aio.AioRpcError:
            return False
        return True


@pytest.mark.timeout(150)
@pytest.mark.parametrize("above", [FIRST_ROOT, OTHER_ROOT], ids=["same-root", "another-root"])
async def test_kill_9_at_any_moment_loses_no_ca_below_an_offline_root(
    children: Children, below_pki: Pki, above: CertificateAuthority
) -> None:
    first, new = signer(below_pki), below(above, "Second CA")
    plane, fleet = await children.fleet(below_pki)
    again = {"PARALLAX_LISTEN": f"127.0.0.1:{fleet.port}"}
    admin = Member(fleet, "client/admin")

    async def killed(after_s: float) -> None:
        nonlocal plane
        await asyncio.sleep(after_s)
        await plane.stop(signal.SIGKILL)
        assert signer(below_pki) in {first, new.certificate}  # whole, whichever it is
        plane, _ = await children.fleet(below_pki, **again)

    lay_next(below_pki, new)
    await rotate(fleet)
    for after_s in (0.0, 0.02):
        await killed(after_s)
        if above is OTHER_ROOT:
            assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_PREPARED
            assert signer(below_pki) == first
    async with admin.following(renews=False):
        for after_s in (0.1, 0.3, 0.6):
            await killed(after_s)
        await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
        await killed(0.0)
        await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
        assert signer(below_pki) == new.certificate
    async with admin.following():
        for after_s in (0.0, 0.5, 2.0):
            await killed(after_s)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    in_force = load_authority(below_pki.directory)
    assert (in_force.certificate, in_force.bundle.roots) == (new.certificate, (above.certificate,))


def damage_key(pki: Pki) -> None:
    (lay_next(pki, below(FIRST_ROOT, "Next")) / "key.pem").write_bytes(key_to_pem(generate_key()))


def expired(pki: Pki) -> None:
    lay_next(pki, below(FIRST_ROOT, "Next", age=timedelta(days=2), lifetime=timedelta(days=1)))


def open_to_others(pki: Pki) -> None:
    (lay_next(pki, below(FIRST_ROOT, "Next")) / "key.pem").chmod(0o644)


def without_root(pki: Pki) -> None:
    new = below(FIRST_ROOT, "Next")
    (lay_next(pki, new) / "cert.pem").write_bytes(certificates_to_pem([new.certificate]))


def with_another_root(pki: Pki) -> None:
    new = below(FIRST_ROOT, "Next")
    pem = certificates_to_pem([new.certificate, OTHER_ROOT.certificate])
    (lay_next(pki, new) / "cert.pem").write_bytes(pem)


def with_root_first(pki: Pki) -> None:
    new = below(FIRST_ROOT, "Next")
    pem = certificates_to_pem([FIRST_ROOT.certificate, new.certificate])
    (lay_next(pki, new) / "cert.pem").write_bytes(pem)


def without_key(pki: Pki) -> None:
    (lay_next(pki, below(FIRST_ROOT, "Next")) / "key.pem").unlink()


def without_certificate(pki: Pki) -> None:
    (lay_next(pki, below(FIRST_ROOT, "Next")) / "cert.pem").unlink()


def too_deep(pki: Pki) -> None:
    middle = below(FIRST_ROOT, "Middle")  # whose path length allows no other CA
    deep = below(middle, "Next")
    lay_next(pki, CertificateAuthority(deep.certificate, deep.key, FIRST_ROOT.bundle, (middle.certificate,)))


def no_ca(pki: Pki) -> None:
    leaf = pki.issue("agent/agent-1")
    place = lay_next(pki, below(FIRST_ROOT, "Next"))
    (place / "cert.pem").write_bytes(certificates_to_pem([leaf.certificate, FIRST_ROOT.certificate]))
    (place / "key.pem").write_bytes(leaf.key_pem)


def for_agents_alone(pki: Pki) -> None:
    lay_next(pki, below(FIRST_ROOT, "Next", only="agents.parallax.local"))


def encrypted(pki: Pki) -> None:
    new = below(FIRST_ROOT, "Next")
    (lay_next(pki, new) / "key.pem").write_bytes(key_to_pem(new.key, b"secret"))


WRONG: Final[Mapping[str, tuple[Callable[[Pki], object], str]]] = {
    "nothing": (lambda _: None, r"root that is elsewhere.*ca/next/cert\.pem .*ca/next/key\.pem"),
    "key that does not fit": (damage_key, r"next/key\.pem does not fit .*next/cert\.pem"),
    "expired": (expired, r"next/cert\.pem cannot take over: .*expired at"),
    "the CA in force": (lambda pki: lay_next(pki, pki.authority), "has the key of the CA in force"),
    "key open to others": (open_to_others, r"next/key\.pem is open to others .*chmod 600"),
    "no root": (without_root, r"next/cert\.pem: the trust bundle holds no certificate: put .* its root"),
    "root of another": (with_another_root, r"next/cert\.pem cannot take over: .*not issued by a CA"),
    "root first": (with_root_first, r"next/key\.pem does not fit .*this order"),
    "no key": (without_key, r"next/key\.pem is missing: put .* or take both away"),
    "no certificate": (without_certificate, r"next/cert\.pem is missing: put .* or take both away"),
    "path too long": (too_deep, r"next/cert\.pem cannot take over: .*path length"),
    "not for us": (for_agents_alone, r"next/cert\.pem cannot take over: "),
    "passphrase unknown": (encrypted, r"next/key\.pem needs a passphrase: set PARALLAX_CA_PASSPHRASE_FILE"),
    "no CA": (no_ca, r"next/cert\.pem: .* cannot issue: not a CA"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_next_ca_that_could_not_sign_begins_nothing(
    serve: Serve, below_pki: Pki, tmp_path: Path, what: str
) -> None:
    lay, message = WRONG[what]
    lay(below_pki)
    before = contents(below_pki.directory)
    async with serving(serve, below_pki, tmp_path) as fleet:
        with pytest.raises(ConfigError, match=message):
            await rotate(fleet)
        assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE
    assert contents(below_pki.directory) == before


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def test_an_abort_leaves_what_an_operator_prepared_where_it_lies(
    serve: Serve, below_pki: Pki, tmp_path: Path
) -> None:
    new = below(OTHER_ROOT, "Next")
    lay_next(below_pki, new)
    async with serving(serve, below_pki, tmp_path) as fleet:
        before = contents(below_pki.directory / "ca" / "next")
        assert (await rotate(fleet)).stage == root_pb2.ROOT_STAGE_PREPARED
        await abort(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        assert contents(below_pki.directory / "ca" / "next") == before
        assert load_authority(below_pki.directory).bundle.roots == (FIRST_ROOT.certificate,)
        again = await rotate(fleet)
        assert again.new_issuer == new.certificate.fingerprint(hashes.SHA256()).hex()


async def test_a_root_can_give_way_to_a_ca_below_it_so_that_its_key_can_be_taken_away(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    new = below(own_pki.authority, "Next")
    lay_next(own_pki, new)
    async with serving(serve, own_pki, tmp_path) as fleet, Member(fleet, "client/admin").following():
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    in_force = load_authority(own_pki.directory)
    assert in_force.certificate == new.certificate
    assert in_force.bundle.roots == own_pki.authority.bundle.roots


async def test_what_was_exchanged_meanwhile_does_not_sign(
    serve: Serve, below_pki: Pki, tmp_path: Path
) -> None:
    new = below(OTHER_ROOT, "Next")
    lay_next(below_pki, new)
    async with serving(serve, below_pki, tmp_path) as fleet:
        await rotate(fleet)
        lay_next(below_pki, below(OTHER_ROOT, "Changeling"))
        async with Member(fleet, "client/admin").following():
            async with asyncio.timeout(15):
                while "no more the CA that the fleet was told" not in (await status(fleet)).problem:
                    await asyncio.sleep(0.1)
            assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_PREPARED
            assert signer(below_pki) == below_pki.authority.certificate
            lay_next(below_pki, new)
            await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        assert signer(below_pki) == new.certificate


# Leaves that another CA than the old one signed.


@pytest.mark.parametrize("above", [FIRST_ROOT, OTHER_ROOT], ids=["same-root", "another-root"])
async def test_with_a_root_everybody_is_waited_for_who_may_be_below_it(
    serve: Serve, below_pki: Pki, tmp_path: Path, above: CertificateAuthority
) -> None:
    """As gRPC would refuse a leaf of an intermediate that we never heard of, once its root is gone."""
    async with serving(serve, below_pki, tmp_path) as fleet, Member(fleet, "client/admin").following():
        assert await is_let_in(fleet, by_hand(fleet, below(FIRST_ROOT, "Somebody's CA")), FIRST_ROOT)
        await entered(fleet, "agent/by-hand")
        lay_next(below_pki, below(above, "Next"))
        await rotate(fleet)
        if above is OTHER_ROOT:
            await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "agent/by-hand")
            await rotate(fleet, "agent/by-hand", force=True)
            await only_missing(fleet, root_pb2.ROOT_STAGE_ACTIVE, "agent/by-hand")
            await rotate(fleet, "agent/by-hand", force=True)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)


async def test_leaves_of_a_root_that_stays_are_not_waited_for(
    serve: Serve, below_pki: Pki, tmp_path: Path
) -> None:
    stays = root("Root that stays")
    for name in ("control-plane", "agent-proxy", "admin"):
        ca = below_pki.directory / name / "ca.pem"
        ca.write_bytes(ca.read_bytes() + stays.bundle.pem)
    async with serving(serve, below_pki, tmp_path) as fleet, Member(fleet, "client/admin").following():
        assert await is_let_in(fleet, by_hand(fleet, stays), FIRST_ROOT)
        await entered(fleet, "agent/by-hand")
        lay_next(below_pki, below(OTHER_ROOT, "Next"))
        await rotate(fleet)
        await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "agent/by-hand")
        await rotate(fleet, "agent/by-hand", force=True)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    assert set(load_authority(below_pki.directory).bundle.roots) == {
        stays.certificate,
        OTHER_ROOT.certificate,
    }


async def test_a_root_that_everybody_trusts_already_is_not_waited_for_again(
    serve: Serve, below_pki: Pki, tmp_path: Path
) -> None:
    for name in ("control-plane", "agent-proxy", "agent-1", "admin"):
        ca = below_pki.directory / name / "ca.pem"
        ca.write_bytes(ca.read_bytes() + OTHER_ROOT.bundle.pem)
    async with (
        serving(serve, below_pki, tmp_path) as fleet,
        fleet.agent(Echo, "agent-1"),
        Member(fleet, "client/admin").following(),
    ):
        await status(fleet)
        lay_next(below_pki, below(OTHER_ROOT, "Next"))
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    assert load_authority(below_pki.directory).bundle.roots == (OTHER_ROOT.certificate,)


def by_hand(fleet: Fleet, authority: CertificateAuthority) -> Leaf:
    """A leaf of agent/by-hand by another CA than the fleet's."""
    key = generate_key()
    who = Identity.parse_short("agent/by-hand", "parallax.local")
    issued = authority.issue(who, key.public_key(), LeafProfile(), datetime.now(UTC))
    return replace(
        fleet.pki.issue("agent/by-hand"),
        key_pem=key_to_pem(key),
        chain_pem=certificates_to_pem(issued.chain),
        key=key,
        certificate=issued.chain[0],
    )


async def entered(fleet: Fleet, short: str) -> None:
    """*short* is in the ledger."""
    async with asyncio.timeout(15):
        while short not in (await status(fleet)).cannot_renew:
            await asyncio.sleep(0.1)


async def only_missing(fleet: Fleet, stage: root_pb2.RootStage, short: str) -> None:
    async with asyncio.timeout(20):
        while (now := await status(fleet)).stage != stage or list(now.missing) != [short]:
            await asyncio.sleep(0.1)


# The command.


async def start(fleet: Fleet, *arguments: str) -> asyncio.subprocess.Process:
    """`parallax …` against *fleet*."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.sdk.cli", *arguments),
        env=os.environ | fleet.pki.environment | {"PARALLAX_CONTROL_PLANE": fleet.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def run(fleet: Fleet, *arguments: str, who: str = "client/admin") -> tuple[int | None, str, str]:
    process = await start(fleet, *arguments, "--identity", who)
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.timeout(90)
async def test_the_command_waits_and_can_be_interrupted_and_taken_up_again(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        process = await start(fleet, "ca", "rotate", "--identity", "client/admin")
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while b"active: waiting for client/admin" not in await process.stdout.readline():
                pass  # it has adopted the roots itself
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == INTERRUPTED
        code, out, _ = await run(fleet, "ca", "status")
        assert code == 0
        assert "active: the new CA signs" in out
        assert "client/admin" in out
        code, _, err = await run(fleet, "ca", "abort")
        assert code != 0
        assert "can be aborted while it is prepared only" in err
        async with Member(fleet, "client/admin").following():
            code, out, _ = await run(fleet, "ca", "rotate", "--json")
        assert code == 0
        assert json.loads(out.splitlines()[-1])["stage"] == "idle"


async def test_the_command_shows_json_and_takes_it_back(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, fleet.agent(Echo, "agent-1"):
        code, out, _ = await run(fleet, "ca", "rotate", "--no-wait", "--json")
        assert (code, json.loads(out)["stage"]) == (0, "prepared")
        code, _, err = await run(fleet, "ca", "rotate", "--no-wait", "--without", "agent/agent-1")
        assert code != 0
        assert "--force" in err
        code, out, _ = await run(fleet, "ca", "abort", "--json")
        assert (code, json.loads(out)["stage"]) == (0, "aborting")
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        code, out, _ = await run(fleet, "ca", "status", "--json")
        assert "agent/agent-1" in json.loads(out)["cannot_renew"]


async def test_the_command_is_for_the_administrator(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        code, out, err = await run(fleet, "ca", "rotate", who="client/cli")
        assert code != 0
        assert out == ""
        assert "act as --identity client/admin" in err
