"""Credentials are one value, usable or refused, and swapped whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import (
    Credentials,
    CredentialStore,
    check_usable,
    gives_way,
    has_another_leaf,
)
from parallax.security.errors import Expired, IdentityError, UntrustedChain, VerificationError, WrongIdentity
from parallax.security.identity import Identity
from parallax.security.keys import generate_key, parse_key
from parallax.security.profiles import LeafProfile

AGENT = Identity.parse_short("agent/agent-1")
SERVICE = Identity.parse_short("service/control-plane")
SERVICE_DNS = "control-plane.parallax.local"

Make = Callable[[Identity], Credentials]


@pytest.fixture(scope="module")
def make(authority: CertificateAuthority, now: datetime) -> Make:
    def make(identity: Identity = AGENT) -> Credentials:
        key = generate_key()
        issued = authority.issue(identity, key.public_key(), LeafProfile(), now)
        return Credentials(issued.chain, key, issued.bundle)

    return make


def test_credentials_hand_out_pem_that_reads_back(make: Make) -> None:
    credentials = make(AGENT)
    assert parse_certificates(credentials.chain_pem) == credentials.chain
    assert TrustBundle.parse(credentials.bundle_pem) == credentials.bundle
    assert parse_key(credentials.key_pem).public_key() == credentials.leaf.public_key()


def test_credentials_show_no_key(make: Make) -> None:
    credentials = make(AGENT)
    assert "key" not in repr(credentials).lower().replace("publickey", "")
    assert "PRIVATE" not in repr(credentials)


def test_credentials_cannot_be_changed(make: Make) -> None:
    with pytest.raises(AttributeError):
        make(AGENT).chain = ()  # type: ignore[misc]


def test_what_was_made_with_them_gives_way_to_another_leaf_or_fewer_roots_not_to_more(
    make: Make, now: datetime
) -> None:
    before, another = make(AGENT), CertificateAuthority.create(now=now).certificate
    more = Credentials(before.chain, before.key, TrustBundle((*before.bundle.roots, another)))
    renewed = make(AGENT)
    assert not gives_way(before, before)
    assert not gives_way(before, more)
    assert gives_way(more, before)
    assert not has_another_leaf(more, before)
    assert gives_way(before, renewed)
    assert has_another_leaf(before, renewed)
    assert not gives_way(None, None)  # plaintext


@pytest.mark.parametrize("identity", [AGENT, SERVICE, Identity.parse_short("client/cli")])
def test_what_the_authority_issues_is_usable(identity: Identity, make: Make, now: datetime) -> None:
    check_usable(make(identity), identity, now)


class TestUnusable:
    """The same leaf with one thing wrong."""

    def test_key_of_another_leaf(self, make: Make, now: datetime) -> None:
        good = make(AGENT)
        with pytest.raises(UntrustedChain, match="key does not fit"):
            check_usable(Credentials(good.chain, generate_key(), good.bundle), AGENT, now)

    def test_no_certificate(self, make: Make, now: datetime) -> None:
        good = make(AGENT)
        with pytest.raises(UntrustedChain, match="no certificate"):
            check_usable(Credentials((), good.key, good.bundle), AGENT, now)

    def test_bundle_of_another_ca(self, make: Make, now: datetime) -> None:
        good, other = make(AGENT), CertificateAuthority.create(now=now)
        with pytest.raises(UntrustedChain):
            check_usable(Credentials(good.chain, good.key, other.bundle), AGENT, now)

    def test_identity_of_somebody_else(self, make: Make, now: datetime) -> None:
        with pytest.raises(WrongIdentity, match=r"agent/agent-2, not to .*agent/agent-1"):
            check_usable(make(Identity.parse_short("agent/agent-2")), AGENT, now)

    def test_same_name_of_another_kind(self, make: Make, now: datetime) -> None:
        with pytest.raises(WrongIdentity):
            check_usable(make(Identity.parse_short("client/agent-1")), AGENT, now)

    def test_no_identity(self, forge: Any, bundle: TrustBundle, now: datetime) -> None:
        made = forge(common_names=("Somebody Else",), uris=(), dns=())
        with pytest.raises(IdentityError):
            check_usable(Credentials((made.certificate,), made.key, bundle), AGENT, now)

    @pytest.mark.parametrize("moment", [timedelta(days=-1), timedelta(days=366)])
    def test_outside_validity(self, moment: timedelta, make: Make, now: datetime) -> None:
        with pytest.raises(Expired):
            check_usable(make(AGENT), AGENT, now + moment)

    def test_agent_that_may_only_serve(self, forge: Any, bundle: TrustBundle, now: datetime) -> None:
        made = forge(usages=[ExtendedKeyUsageOID.SERVER_AUTH])
        with pytest.raises(UntrustedChain, match="clientAuth"):
            check_usable(Credentials((made.certificate,), made.key, bundle), AGENT, now)

    def test_service_for_neither_end(self, forge: Any, bundle: TrustBundle, now: datetime) -> None:
        made = forge(
            common_names=(), uris=[str(SERVICE)], dns=[SERVICE_DNS], usages=[ExtendedKeyUsageOID.CODE_SIGNING]
        )
        with pytest.raises(UntrustedChain):
            check_usable(Credentials((made.certificate,), made.key, bundle), SERVICE, now)


@pytest.mark.parametrize(
    "usages", [None, [ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CLIENT_AUTH]]
)
def test_a_service_is_usable_with_a_certificate_for_one_end_only(
    usages: Any, forge: Any, bundle: TrustBundle, now: datetime
) -> None:
    made = forge(common_names=(), uris=[str(SERVICE)], dns=[SERVICE_DNS], usages=usages)
    check_usable(Credentials((made.certificate,), made.key, bundle), SERVICE, now)


def test_a_store_begins_only_with_usable_credentials(make: Make, now: datetime) -> None:
    with pytest.raises(WrongIdentity):
        CredentialStore(SERVICE, make(AGENT), now)


async def test_publish_swaps_the_whole_value(make: Make, now: datetime) -> None:
    first, second = make(AGENT), make(AGENT)
    store = CredentialStore(AGENT, first, now)
    assert store.current is first
    store.publish(second, now)
    assert store.current is second


@pytest.mark.parametrize("identity", [SERVICE, Identity.parse_short("agent/agent-2")])
async def test_publish_keeps_the_old_credentials_when_the_new_are_for_someone_else(
    identity: Identity, make: Make, now: datetime
) -> None:
    store = CredentialStore(AGENT, make(AGENT), now)
    before = store.current
    waiting = asyncio.ensure_future(store.changed(before))
    await asyncio.sleep(0)
    with pytest.raises(VerificationError):
        store.publish(make(identity), now)
    await asyncio.sleep(0)
    assert store.current is before
    assert not waiting.done()
    waiting.cancel()


async def test_every_waiter_gets_the_new_credentials(make: Make, now: datetime) -> None:
    first, second = make(AGENT), make(AGENT)
    store = CredentialStore(AGENT, first, now)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waiters = [group.create_task(store.changed(first)) for _ in range(3)]
        await asyncio.sleep(0)
        store.publish(second, now)
    assert {waiter.result() for waiter in waiters} == {second}


async def test_a_change_before_the_wait_is_not_missed(make: Make, now: datetime) -> None:
    first, second = make(AGENT), make(AGENT)
    store = CredentialStore(AGENT, first, now)
    store.publish(second, now)
    async with asyncio.timeout(5):
        assert await store.changed(first) is second


async def test_a_waiter_sees_each_change_in_turn(make: Make, now: datetime) -> None:
    values = [make(AGENT) for _ in range(4)]
    store = CredentialStore(AGENT, values[0], now)
    seen: list[Credentials] = []

    async def follow() -> None:
        current = values[0]
        while current is not values[-1]:
            current = await store.changed(current)
            seen.append(current)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(follow())
        for value in values[1:]:
            await asyncio.sleep(0)
            store.publish(value, now)
            await asyncio.sleep(0)
    assert seen == values[1:]
