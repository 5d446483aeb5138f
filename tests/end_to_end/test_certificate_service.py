"""Certificates over real mTLS: who renews what, who does not, and who is told of the roots."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography import x509
from grpc import aio

from parallax.control_plane.issuance import MAX_RENEWALS
from parallax.control_plane.ledger import Wanted
from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.runtime.status import error_of
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.credentials import Credentials
from parallax.security.errors import ConfigError, NotAuthorized, Unavailable
from parallax.security.keys import PrivateKey, generate_key, key_to_pem
from parallax.security.request import new_request
from parallax.security.verification import identity_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve


def stub_of(channel: aio.Channel) -> certificate_pb2_grpc.CertificateServiceAsyncStub:
    return certificate_pb2_grpc.CertificateServiceStub(channel)


async def renew(fleet: Fleet, leaf: Leaf, csr: bytes) -> certificate_pb2.RenewResponse:
    async with fleet.channel(leaf) as channel:
        try:
            return await stub_of(channel).Renew(certificate_pb2.RenewRequest(csr=csr), timeout=10)
        except aio.AioRpcError as exc:
            raise error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())) from None


def request_of(leaf: Leaf, key: PrivateKey | None = None) -> bytes:
    return new_request(identity_of(leaf.certificate, "parallax.local"), key or generate_key())


def renewed(leaf: Leaf, key: PrivateKey, response: certificate_pb2.RenewResponse) -> Leaf:
    """What the holder of *leaf* has then."""
    new = x509.load_der_x509_certificate(response.chain[0])
    return replace(
        leaf, key_pem=key_to_pem(key), chain_pem=certificates_to_pem((new,)), key=key, certificate=new
    )


@pytest.mark.parametrize(
    "name", ["agent/agent-1", "client/cli", "client/admin", "service/agent-proxy", "service/control-plane"]
)
async def test_each_renews_itself_and_calls_with_what_it_got(fleet: Fleet, pki: Pki, name: str) -> None:
    leaf, key = pki.issue(name), generate_key()
    mine = identity_of(leaf.certificate, "parallax.local")
    response = await renew(fleet, leaf, new_request(mine, key))
    new = x509.load_der_x509_certificate(response.chain[0])
    assert identity_of(new, "parallax.local") == mine
    assert new.serial_number != leaf.certificate.serial_number
    assert new.public_key() == key.public_key()
    roots = tuple(map(x509.load_der_x509_certificate, response.bundle.roots))
    assert TrustBundle(roots) == pki.authority.bundle
    assert response.bundle.hash == pki.authority.bundle.hash
    again = renewed(leaf, key, response)
    await renew(fleet, again, request_of(again))


@pytest.mark.parametrize("other", ["agent/agent-2", "client/admin", "service/control-plane"])
async def test_nobody_gets_a_certificate_of_somebody_else(fleet: Fleet, pki: Pki, other: str) -> None:
    request = request_of(pki.issue(other))
    with pytest.raises(NotAuthorized, match="agent-1 may not ask for"):
        await renew(fleet, pki.issue("agent/agent-1"), request)


async def test_where_nobody_is_authenticated_nobody_renews_and_is_told_why(serve: Serve, pki: Pki) -> None:
    leaf = pki.issue("agent/agent-1")
    async with serve(pki.tls(verify_client=False)) as fleet:
        with pytest.raises(ConfigError, match="PARALLAX_TLS_VERIFY_CLIENT=true"):
            await renew(fleet, leaf, request_of(leaf))


async def test_a_host_without_the_key_of_the_ca_says_so(
    serve: Serve, new_pki: type[Pki], tmp_path: Path
) -> None:
    pki = new_pki(tmp_path / "certs")
    pki.save("service/control-plane", "service/agent-proxy")
    (tmp_path / "certs" / "ca" / "key.pem").unlink()
    leaf = pki.issue("agent/agent-1")
    async with serve(pki.tls()) as fleet:
        fleet.pki = pki
        with pytest.raises(ConfigError, match=r"there is no .*key\.pem to renew certificates with"):
            await renew(fleet, leaf, request_of(leaf))


async def test_who_renews_too_often_is_told_for_how_long_to_stay_away(fleet: Fleet, pki: Pki) -> None:
    leaf, minute = pki.issue("agent/agent-1"), timedelta(minutes=1)
    for _ in range(MAX_RENEWALS):
        await renew(fleet, leaf, request_of(leaf))
    with pytest.raises(Unavailable, match="renew less often") as refused:
        await renew(fleet, leaf, request_of(leaf))
    assert minute / 2 < refused.value.retry_after < minute


async def test_two_copies_are_counted(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.issue("agent/agent-1")

    async def next_of(holder: Leaf) -> Leaf:
        key = generate_key()
        return renewed(holder, key, await renew(fleet, holder, request_of(holder, key)))

    ours, theirs = await next_of(leaf), await next_of(leaf)
    await asyncio.sleep(1.1)  # a certificate's times are in whole seconds
    await next_of(ours)
    assert (await fleet.metrics())["parallax_certificate_duplicates_total"] == 0
    await next_of(theirs)
    assert (await fleet.metrics())["parallax_certificate_duplicates_total"] == 1


async def heard(watch: aio.UnaryStreamCall[Any, Any]) -> certificate_pb2.WatchTrustBundleResponse:
    message = await asyncio.wait_for(watch.read(), 10)
    assert isinstance(message, certificate_pb2.WatchTrustBundleResponse)
    return message


async def test_the_roots_are_told_at_once_and_when_they_are_others(fleet: Fleet, pki: Pki) -> None:
    store = fleet.plane.provider.store
    assert store is not None
    async with fleet.channel("agent/agent-1") as channel:
        stub = stub_of(channel)
        once = await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest())
        watch = stub.WatchTrustBundle(certificate_pb2.WatchTrustBundleRequest())
        first = await heard(watch)
        assert first.bundle == once.bundle
        before = store.current
        store.publish(Credentials(before.chain, before.key, before.bundle), datetime.now(UTC))
        new = CertificateAuthority.create(now=pki.now, name="Next Root")
        both = TrustBundle((*before.bundle.roots, *new.bundle.roots))
        store.publish(Credentials(before.chain, before.key, both), datetime.now(UTC))
        second = await heard(watch)
        assert second.bundle.hash == both.hash != first.bundle.hash
        watch.cancel()


async def test_a_watch_ends_when_the_control_plane_does(serve: Serve) -> None:
    async with serve() as fleet, fleet.channel("client/cli") as channel:
        watch = stub_of(channel).WatchTrustBundle(certificate_pb2.WatchTrustBundleRequest())
        await asyncio.wait_for(watch.read(), 10)
        fleet.plane._certificates.close()
        with pytest.raises(aio.AioRpcError) as ended:
            await asyncio.wait_for(watch.read(), 10)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (ended.value.details() or "")


async def test_what_was_renewed_is_in_the_ledger_before_it_is_handed_out(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.issue("agent/agent-1")
    response = await renew(fleet, leaf, request_of(leaf))
    new = x509.load_der_x509_certificate(response.chain[0])
    found, _ = await fleet.plane.ledger.page(Wanted("parallax.local/agent/agent-1"))
    (entry,) = [each for each in found if each.serial == f"{new.serial_number:x}"]
    assert entry.requested_by == "spiffe://parallax.local/agent/agent-1"
    assert entry.seen_at is None
