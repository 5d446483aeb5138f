"""What is kept of pins: whole or not at all, two of an identity, and no longer than they are of use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from parallax.control_plane import pin_index
from parallax.control_plane import pins as pins_module
from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.engine import MAX_PAGE, Engine, Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import KEPT, Ledger
from parallax.control_plane.pinned import Pinned
from parallax.control_plane.pinned import encode as _encode
from parallax.control_plane.pinned import kept_at as _key
from parallax.control_plane.pins import Change, Pinning
from parallax.security.authority import CertificateAuthority
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import (
    InvalidRequest,
    InvalidTransition,
    Revoked,
    StorageFailed,
    Unavailable,
)
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import PrivateKey, generate_key
from parallax.security.pinned import MAX_ON_PORT, Pin
from parallax.security.profiles import LeafProfile, self_signed_template

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
DRAIN: Final = timedelta(seconds=30)
BY: Final = Change("spiffe://parallax.local/client/admin", "ipv4:127.0.0.1:1")
DEVICE: Final = Identity.parse_short("agent/07048933")


def device(who: Identity = DEVICE, key: PrivateKey | None = None, days: int = 30) -> x509.Certificate:
    key = key or generate_key()
    profile = LeafProfile(timedelta(days=days), sans=())
    serial = x509.random_serial_number()
    return self_signed_template(who, key.public_key(), profile, NOW, serial).sign(key, hashes.SHA256())


def der(leaf: x509.Certificate) -> bytes:
    return leaf.public_bytes(Encoding.DER)


class FullDisk(AuditLog):
    """Keeps nothing."""

    async def commit(self, deed: Deed, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        raise StorageFailed("the disk is full")


class SlowToSay(AuditLog):
    """Keeps everything, and says so when it may."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, lambda: NOW)
        self.kept = asyncio.Event()
        self.may_say = asyncio.Event()

    async def commit(self, deed: Deed, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        revisions = await super().commit(deed, writes)
        self.kept.set()
        await self.may_say.wait()
        return revisions


class World:
    """Pins in an engine, the store that they are published to, and a clock set by hand."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.now = NOW
        self.authority = CertificateAuthority.create(now=NOW)
        key = generate_key()
        issued = self.authority.issue(control_plane(), key.public_key(), LeafProfile(), NOW)
        self._own = Credentials(issued.chain, key, issued.bundle)
        self.pinning = self.start()

    def start(self, audit: AuditLog | None = None) -> Pinning:
        """The pins of a control plane that has just started."""
        self.store = CredentialStore(control_plane(), self._own, NOW)
        audit = audit or AuditLog(self.engine, lambda: self.now)
        self.ledger = Ledger(self.engine, audit, lambda: self.now)
        return Pinning(self.engine, audit, self.ledger, self.store, DRAIN, lambda: self.now)

    @property
    def let_in(self) -> list[str]:
        """Who, by name, in the order of pinning."""
        return [pin.identity.name for pin in self.store.pins.pinned]

    def issue(self, *, seen: bool = False) -> tuple[x509.Certificate, IssuedCertificate]:
        """A certificate of the device's by the CA, and what the ledger says of it."""
        leaf = self.authority.issue(DEVICE, generate_key().public_key(), LeafProfile(), NOW).chain[0]
        at = self.now if seen else None
        return leaf, IssuedCertificate.of(leaf, DEVICE, b"", recorded_at=NOW, seen_at=at)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with SqliteEngine(tmp_path / "data") as engine:
        yield World(engine)


async def test_what_is_kept_is_published_after_a_restart_however_much_it_is(world: World) -> None:
    pins = [
        Pinned(Pin(who, device(who)), NOW + timedelta(seconds=number), BY.by)
        for number in range(MAX_PAGE + 1)
        for who in [Identity.parse_short(f"agent/{MAX_PAGE - number:04}")]
    ]
    writes = [Write(_key(each.pin.identity), _encode([each])) for each in pins]
    for at in range(0, len(writes), 100):
        await world.engine.commit(Event("test"), writes[at : at + 100])
    await world.start().load()
    assert world.store.pins.pinned == tuple(each.pin for each in pins[:MAX_ON_PORT])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port with room for two, and as many again beside it."""
    monkeypatch.setattr(pin_index, "MAX_ON_PORT", 2)
    monkeypatch.setattr(pins_module, "MAX_PINS", 4)


WHO: Final = [Identity.parse_short(f"agent/{name}") for name in ("d", "c", "b", "a")]


async def test_the_oldest_are_on_the_port_and_each_that_goes_makes_room_for_the_next(
    world: World, small: None
) -> None:
    pinned = []
    for who in WHO:
        world.now += timedelta(seconds=1)
        pinned.append(await world.pinning.pin(who, der(device(who)), BY))
    assert world.let_in == ["d", "c"]
    assert [world.pinning.is_on_port(each) for each in pinned] == [True, True, False, False]
    pinning = world.start()
    await pinning.load()
    assert world.let_in == ["d", "c"]
    assert [pinning.is_on_port(each) for each in pinned] == [True, True, False, False]
    await pinning.unpin(WHO[1], "", BY)
    assert world.let_in == ["d", "b"]
    await pinning.unpin(WHO[3], "", BY)
    assert world.let_in == ["d", "b"]
    await pinning.unpin(WHO[0], "", BY)
    assert world.let_in == ["b"]


async def test_an_exchange_takes_nobodys_place(world: World, small: None) -> None:
    certificate = device(WHO[0])
    for who in WHO:
        await world.pinning.pin(who, der(certificate if who == WHO[0] else device(who)), BY)
        world.now += timedelta(seconds=1)
    issued = world.authority.issue(WHO[0], generate_key().public_key(), LeafProfile(), NOW).chain[0]
    await world.pinning.renewed(certificate, issued)
    assert world.let_in == ["d", "c"]


async def test_what_is_pinned_beside_the_port_changes_nothing_there(world: World, small: None) -> None:
    for who in WHO[:2]:
        await world.pinning.pin(who, der(device(who)), BY)
    served = world.store.served
    await world.pinning.pin(WHO[2], der(device(WHO[2])), BY)
    assert world.store.served.pins is served.pins


async def test_there_is_an_end_to_pins(world: World, small: None) -> None:
    for who in WHO:
        await world.pinning.pin(who, der(device(who)), BY)
    again = world.pinning.page("", 1)[0][0].pin
    with pytest.raises(Unavailable, match="4 certificates are pinned, which is as many as may be"):
        await world.pinning.pin(DEVICE, der(device()), BY)
    await world.pinning.pin(again.identity, der(again.certificate), BY)
    await world.pinning.unpin(WHO[0], "", BY)
    await world.pinning.pin(DEVICE, der(device()), BY)


async def test_a_clock_that_is_set_back_gives_nobody_the_place_of_another(world: World, small: None) -> None:
    for who in WHO:
        await world.pinning.pin(who, der(device(who)), BY)
        world.now -= timedelta(seconds=1)
    assert world.let_in == ["d", "c"]
    await world.start().load()
    assert world.let_in == ["d", "c"]


def like_openssl(key: PrivateKey) -> x509.Certificate:
    """Without key usages, so that TLS may take it for what has issued another of its name."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEVICE.name)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


async def test_what_hides_another_is_not_pinned_beside_the_port_either(world: World, small: None) -> None:
    """It may move up."""
    for who in WHO[:2]:
        await world.pinning.pin(who, der(device(who)), BY)
    await world.pinning.pin(DEVICE, der(like_openssl(generate_key())), BY)
    assert world.let_in == ["d", "c"]
    with pytest.raises(InvalidRequest, match="same subject"):
        await world.pinning.pin(DEVICE, der(like_openssl(generate_key())), BY)


async def test_of_three_at_one_time_two_are_pinned(world: World) -> None:
    outcomes = await asyncio.gather(
        *(world.pinning.pin(DEVICE, der(device()), BY) for _ in range(3)), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [Pinned, Pinned, InvalidTransition]
    assert world.let_in == [DEVICE.name] * 2


async def test_of_two_with_one_key_at_one_time_one_is_pinned(world: World) -> None:
    key, other = generate_key(), Identity.parse_short("agent/other")
    outcomes = await asyncio.gather(
        *(world.pinning.pin(who, der(device(who, key)), BY) for who in (DEVICE, other)),
        return_exceptions=True,
    )
    assert [type(each) for each in outcomes] == [Pinned, InvalidRequest]
    assert world.let_in == [DEVICE.name]


async def test_what_cannot_be_kept_lets_nobody_in_and_keeps_nobody_out(world: World) -> None:
    full = world.start(FullDisk(world.engine, lambda: NOW))
    with pytest.raises(StorageFailed):
        await full.pin(DEVICE, der(device()), BY)
    assert world.let_in == []
    await world.start().pin(DEVICE, der(device()), BY)
    full = world.start(FullDisk(world.engine, lambda: NOW))
    await full.load()
    with pytest.raises(StorageFailed):
        await full.unpin(DEVICE, "", BY)
    assert world.let_in == [DEVICE.name]


async def test_what_is_kept_is_in_force_though_whoever_asked_hangs_up(world: World) -> None:
    await world.pinning.pin(DEVICE, der(device()), BY)
    audit = SlowToSay(world.engine)
    pinning = world.start(audit)
    await pinning.load()
    asking = asyncio.create_task(pinning.unpin(DEVICE, "", BY))
    await audit.kept.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    audit.may_say.set()
    await pinning.pin(DEVICE, der(device()), BY)  # after what is under way, and in no conflict with it
    assert len(world.let_in) == 1


async def test_a_pin_goes_a_week_after_its_certificate(world: World) -> None:
    leaf = device(days=1)
    await world.pinning.pin(DEVICE, der(leaf), BY)
    await world.pinning.pin(DEVICE, der(device(days=60)), BY)
    world.now = leaf.not_valid_after_utc + KEPT
    await world.pinning.sweep()
    assert len(world.let_in) == 2
    world.now += timedelta(seconds=1)
    await world.pinning.sweep()
    assert len(world.let_in) == 1
    assert world.store.pins.holder_of(leaf.fingerprint(hashes.SHA256())) is None


@pytest.mark.parametrize("restart", [[], ["before it is seen"], ["after it is seen"]])
async def test_an_exchanged_pin_goes_the_drain_time_after_the_other_is_seen(
    world: World, restart: list[str]
) -> None:
    pinning, old, other = world.pinning, device(), device()
    for leaf in (old, other):
        await pinning.pin(DEVICE, der(leaf), BY)
    issued, entry = world.issue(seen=True)
    await pinning.renewed(old, issued)
    if restart == ["before it is seen"]:
        pinning = world.start()
        await pinning.load()
    if restart == ["after it is seen"]:
        await world.engine.commit(Event("test"), [Write(entry.key, entry.encode())])
        pinning = world.start()
        await pinning.load()
    else:
        pinning.note(entry)
    world.now += DRAIN - timedelta(seconds=1)
    await pinning.sweep()
    assert len(world.let_in) == 2
    world.now += timedelta(seconds=1)
    await pinning.sweep()
    (kept,) = world.store.pins.pinned
    assert kept.certificate == other


async def test_a_certificate_that_was_issued_for_no_pin_takes_none_out(world: World) -> None:
    """Of the same holder, who has been issued one before and uses it."""
    await world.pinning.pin(DEVICE, der(device()), BY)
    issued, entry = world.issue(seen=True)
    world.pinning.note(entry)
    await world.pinning.renewed(issued, world.issue()[0])
    world.now += 2 * DRAIN
    await world.pinning.sweep()
    assert world.let_in == [DEVICE.name]


async def test_one_that_was_taken_out_while_it_is_exchanged_is_exchanged_for_nothing(world: World) -> None:
    leaf = device()
    await world.pinning.pin(DEVICE, der(leaf), BY)
    _, exchanged = await asyncio.gather(
        world.pinning.unpin(DEVICE, "", BY),
        world.pinning.renewed(leaf, world.issue()[0]),
        return_exceptions=True,
    )
    assert isinstance(exchanged, Revoked)


async def test_one_that_was_pinned_again_after_it_was_taken_out_is_let_in(world: World) -> None:
    leaf = der(device())
    for _ in range(3):
        await world.pinning.pin(DEVICE, leaf, BY)
        await world.pinning.unpin(DEVICE, "", BY)
        assert world.let_in == []
    await world.pinning.pin(DEVICE, leaf, BY)
    await world.start().load()
    assert world.let_in == [DEVICE.name]


OTHER: Final = Identity.parse_short("agent/other")


async def certify(world: World, key: PrivateKey, who: Identity, days: int = 1) -> x509.Certificate:
    """Have a certificate of *who*'s for *key* recorded."""
    leaf = world.authority.issue(who, key.public_key(), LeafProfile(timedelta(days=days)), NOW).chain[0]
    await world.ledger.record(leaf, who, world.authority.certificate, "test")
    return leaf


async def test_a_key_that_another_identity_has_a_certificate_for_is_not_pinned(world: World) -> None:
    key = generate_key()
    await certify(world, key, OTHER)
    with pytest.raises(InvalidRequest, match="agent/other has the same key: make one for"):
        await world.pinning.pin(DEVICE, der(device(key=key)), BY)
    assert world.let_in == []
    await certify(world, own := generate_key(), DEVICE)
    await world.pinning.pin(DEVICE, der(device(key=own)), BY)
    assert world.let_in == [DEVICE.name]


async def test_no_certificate_is_issued_for_a_key_that_is_pinned_for_another_identity(world: World) -> None:
    key = generate_key()
    await world.pinning.pin(DEVICE, der(device(key=key)), BY)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="a key that another identity has a certificate for"):
            await certify(world, key, OTHER)
        await world.start().load()
    await certify(world, key, DEVICE)


async def test_a_key_is_pinned_or_certified_where_both_are_asked_for_at_one_time(world: World) -> None:
    for number in range(20):
        key, who = generate_key(), Identity.parse_short(f"agent/{number:08}")
        pinned, certified = await asyncio.gather(
            world.pinning.pin(who, der(device(who, key)), BY),
            certify(world, key, OTHER),
            return_exceptions=True,
        )
        assert isinstance(pinned, InvalidRequest) != isinstance(certified, InvalidRequest)


async def test_a_key_is_free_again_once_nothing_is_pinned_nor_certified_for_it(world: World) -> None:
    key = generate_key()
    first, second = device(key=key), device(key=key, days=60)
    for leaf in (first, second):
        await world.pinning.pin(DEVICE, der(leaf), BY)
    await world.pinning.unpin(DEVICE, first.fingerprint(hashes.SHA256()).hex(), BY)
    assert await world.ledger.user_of(key.public_key()) == DEVICE
    await world.pinning.unpin(DEVICE, "", BY)
    assert await world.ledger.user_of(key.public_key()) is None
    await certify(world, key, OTHER)


async def test_a_key_stays_its_holders_while_it_is_pinned_whatever_becomes_of_certificates(
    world: World,
) -> None:
    key = generate_key()
    issued = await certify(world, key, DEVICE, days=1)
    await world.pinning.pin(DEVICE, der(device(key=key, days=60)), BY)
    world.now = issued.not_valid_after_utc + KEPT + timedelta(seconds=1)
    assert await world.ledger.sweep() == 1
    assert await world.ledger.user_of(key.public_key()) == DEVICE
    await world.pinning.unpin(DEVICE, "", BY)
    assert await world.ledger.user_of(key.public_key()) is None


async def test_a_pin_that_the_ledger_knows_nothing_of_is_taken_out_whoever_uses_its_key(world: World) -> None:
    """As a version before this one has kept it."""
    for who in (None, OTHER):
        key = generate_key()
        kept = Pinned(Pin(DEVICE, device(key=key)), NOW, BY.by)
        await world.engine.commit(Event("test"), [Write(_key(DEVICE), _encode([kept]))])
        if who is not None:
            await certify(world, key, who)
        pinning = world.start()
        await pinning.load()
        await pinning.unpin(DEVICE, "", BY)
        assert world.let_in == []
        assert await world.ledger.user_of(key.public_key()) == who


async def test_a_certificate_keeps_its_key_when_the_pin_for_it_goes(world: World) -> None:
    key = generate_key()
    await world.pinning.pin(DEVICE, der(device(key=key)), BY)
    await certify(world, key, DEVICE)
    await world.pinning.unpin(DEVICE, "", BY)
    assert await world.ledger.user_of(key.public_key()) == DEVICE
