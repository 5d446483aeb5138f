"""The CA and its root give way to others under load: who is waited for, who signs, what a restart finds."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from grpc import aio

from parallax.control_plane import survey
from parallax.protos import certificate_pb2, certificate_pb2_grpc, root_pb2, root_pb2_grpc
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.errors import (
    ConfigError,
    InvalidRequest,
    InvalidTransition,
    NotAuthorized,
    Unavailable,
)
from parallax.security.keys import key_id
from parallax.security.layouts import load_authority
from tests.end_to_end.rotations import (
    Echo,
    Member,
    abort,
    ask,
    only_missing,
    reached,
    roots_in,
    rotate,
    serving,
    signer,
    start,
    status,
)
from tests.end_to_end.test_revocation import list_agents, revoke

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Pki, Serve, Until

ELSEWHERE: Final = "the roots that the fleet is to trust cannot"


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


async def test_nobody_waits_for_one_that_is_revoked_by_name(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        stolen = own_pki.issue("agent/agent-1")
        async with fleet.agent(Echo, "agent-1"), Member(fleet, "client/admin").following():
            await revoke(fleet, identity="agent/agent-1")
            await rotate(fleet)
            with pytest.raises(aio.AioRpcError, match="is revoked"):
                await list_agents(fleet, stolen)  # nor does showing another one hold it up
            await reached(fleet, root_pb2.ROOT_STAGE_IDLE)


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


@pytest.mark.parametrize("how", ["acknowledge", "watch"])
async def test_an_acknowledgement_counts_for_the_caller_alone_and_must_be_a_hash(
    serve: Serve, own_pki: Pki, tmp_path: Path, how: str
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        await rotate(fleet)
        assert fleet.plane.provider.store is not None
        async with asyncio.timeout(10):
            while len(fleet.plane.provider.store.current.bundle.roots) < 2:
                await asyncio.sleep(0.05)
        async with Member(fleet, "agent/agent-1").dial() as channel:
            stub = certificate_pb2_grpc.CertificateServiceStub(channel)

            async def say(bundle_hash: bytes) -> None:
                if how == "acknowledge":
                    request = certificate_pb2.AcknowledgeTrustBundleRequest(hash=bundle_hash)
                    await stub.AcknowledgeTrustBundle(request, timeout=10)
                else:
                    watch = stub.WatchTrustBundle(certificate_pb2.WatchTrustBundleRequest(hash=bundle_hash))
                    async with asyncio.timeout(10):
                        await anext(aiter(watch))
                    watch.cancel()

            with pytest.raises(aio.AioRpcError, match="32 bytes"):
                await say(b"short")
            await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "agent/agent-1", "client/admin")
            await say(fleet.plane.provider.store.current.bundle.hash)
        await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "client/admin")


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


async def test_after_a_restart_nothing_goes_on_until_the_ledger_is_counted(
    serve: Serve, own_pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those who are counted, nobody is missing: the one that sleeps comes later."""
    admin = "client/admin"
    async with serving(serve, own_pki, tmp_path) as fleet:
        async with fleet.agent(Echo, "agent-1"):
            pass
        async with Member(fleet, admin).following():
            await rotate(fleet)
            await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "agent/agent-1")
    with monkeypatch.context() as patched:
        patched.setattr(survey, "PIECE", 1)
        patched.setattr(survey, "PAUSE", 1e6)
        async with serving(serve, own_pki, tmp_path) as fleet, Member(fleet, admin).following():
            for _ in range(3):
                now = await status(fleet)
                assert (now.stage, list(now.missing)) == (root_pb2.ROOT_STAGE_PREPARED, [])
                assert "still being counted" in now.problem
            with pytest.raises(Unavailable, match="still being counted"):
                await rotate(fleet, "agent/agent-1", force=True)
            metrics = await fleet.metrics()
            assert metrics["parallax_trust_bundle_adoption_ratio"] == 0
            assert not [name for name in metrics if name.startswith("parallax_fleet_certificate")]
    async with serving(serve, own_pki, tmp_path) as fleet, Member(fleet, admin).following():
        await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "agent/agent-1")


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
    serve: Serve, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, Member(fleet, "client/admin").following():
        await status(fleet)
        await until(lambda: not len(fleet.plane.ledger))  # which would wait for the disk, too
        is_fast, roots, disk = threading.Event(), fleet.plane.roots, fleet.plane._engine._thread
        assert roots is not None
        disk.submit(is_fast.wait)
        try:
            async with Member(fleet, "client/admin").dial() as channel:
                asking = root_pb2_grpc.RootServiceStub(channel).RotateRoot(root_pb2.RotateRootRequest())
                await until(lambda: roots._lock.locked() and disk._work_queue.qsize())  # it is under way
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
        finally:
            is_fast.set()
        async with asyncio.timeout(15):
            while (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE:
                await asyncio.sleep(0.05)
        await rotate(fleet)
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
    assert signer(own_pki) != own_pki.authority.certificate


async def test_whose_file_is_somebody_elses_is_waited_for_and_says_so_once(
    serve: Serve, own_pki: Pki, tmp_path: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[logging.LogRecord]:
        return [r for r in caplog.records if r.message.startswith(ELSEWHERE)]

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
            await until(said)
            assert len(roots_in(by_hand / "ca.pem")) == 1
            shutil.copy(own_pki.directory / "control-plane" / "ca.pem", by_hand / "ca.pem")
            await reached(fleet, root_pb2.ROOT_STAGE_ACTIVE)
    assert len(said()) == 1


async def test_roots_that_could_not_be_written_are_adopted_once_they_can(
    serve: Serve, own_pki: Pki, tmp_path: Path, until: Until, caplog: pytest.LogCaptureFixture
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
        await until(lambda: "the roots that the fleet is to trust cannot be adopted" in caplog.messages)
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
