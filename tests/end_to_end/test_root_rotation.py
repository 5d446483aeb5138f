"""The root gives way to another under load: who is waited for, who signs when, and what a restart finds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography import x509
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc, root_pb2, root_pb2_grpc
from parallax.runtime.connection import Connection
from parallax.runtime.status import error_of
from parallax.runtime.trust import BundleFollower
from parallax.sdk import SecureAgent
from parallax.sdk.cli import INTERRUPTED
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials
from parallax.security.errors import ConfigError, InvalidRequest, InvalidTransition, NotAuthorized
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import load_authority
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.request import new_request

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve


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


@pytest.fixture
def own_pki(new_pki: type[Pki], tmp_path: Path) -> Pki:
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy", "agent/agent-1", "agent/agent-2", "client/cli")
    pki.save("client/admin")
    return pki


@asynccontextmanager
async def serving(serve: Serve, pki: Pki, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with serve(pki.tls(), data_dir=tmp_path / "data") as fleet:
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


# The command.


async def start(fleet: Fleet, *arguments: str) -> asyncio.subprocess.Process:
    """`parallax ca …` against *fleet*."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.sdk.cli", "ca", *arguments),
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
        process = await start(fleet, "rotate", "--identity", "client/admin")
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while b"active: waiting for client/admin" not in await process.stdout.readline():
                pass  # it has adopted the roots itself
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == INTERRUPTED
        code, out, _ = await run(fleet, "status")
        assert code == 0
        assert "active: the new CA signs" in out
        assert "client/admin" in out
        code, _, err = await run(fleet, "abort")
        assert code != 0
        assert "can be aborted while it is prepared only" in err
        async with Member(fleet, "client/admin").following():
            code, out, _ = await run(fleet, "rotate", "--json")
        assert code == 0
        assert json.loads(out.splitlines()[-1])["stage"] == "idle"


async def test_the_command_shows_json_and_takes_it_back(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, fleet.agent(Echo, "agent-1"):
        code, out, _ = await run(fleet, "rotate", "--no-wait", "--json")
        assert (code, json.loads(out)["stage"]) == (0, "prepared")
        code, _, err = await run(fleet, "rotate", "--no-wait", "--without", "agent/agent-1")
        assert code != 0
        assert "--force" in err
        code, out, _ = await run(fleet, "abort", "--json")
        assert (code, json.loads(out)["stage"]) == (0, "aborting")
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        code, out, _ = await run(fleet, "status", "--json")
        assert "agent/agent-1" in json.loads(out)["cannot_renew"]


async def test_the_command_is_for_the_administrator(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        code, out, err = await run(fleet, "rotate", who="client/cli")
        assert code != 0
        assert out == ""
        assert "act as --identity client/admin" in err
