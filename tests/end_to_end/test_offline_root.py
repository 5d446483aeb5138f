"""The CA below a root whose key is elsewhere gives way to another: what may come next, who is waited for."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc, root_pb2
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import certificates_to_pem
from parallax.security.errors import (
    ConfigError,
)
from parallax.security.identity import Identity
from parallax.security.keys import generate_key, key_to_pem
from parallax.security.layouts import Layout, load_authority, save_authority
from parallax.security.profiles import LeafProfile
from tests.end_to_end.rotations import (
    Echo,
    Member,
    abort,
    only_missing,
    reached,
    roots_in,
    rotate,
    serving,
    signer,
    status,
    trusted_alone,
)

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Leaf, Pki, Serve


YEAR: Final = timedelta(days=365)


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
                    trusted = (below_pki.directory / name / "ca.pem" for name in names)
                    await trusted_alone(above.certificate, *trusted)
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
