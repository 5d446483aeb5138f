"""Pinned certificates exchanged over HTTPS: by whoever proves that the key is his, and nobody else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.control_plane.audit import Entry
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.edge.allowance import Limits
from parallax.control_plane.engines.engine import Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.exchange import REFUSED
from parallax.control_plane.nonces import Nonces
from parallax.control_plane.pinned import Pinned
from parallax.control_plane.pinned import encode as _encode
from parallax.control_plane.pinned import kept_at as _key
from parallax.control_plane.pins import Change
from parallax.control_plane.revoked import RevokedCertificate, RevokedIdentity
from parallax.protos import pin_pb2, pin_pb2_grpc
from parallax.sdk.cli.self_sign import sign_self
from parallax.security.credentials import Credentials
from parallax.security.errors import InvalidRequest, NotAuthorized, Unavailable
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import PrivateKey, generate_key, key_id
from parallax.security.pinned import MAX_ON_PORT, Pin
from parallax.security.possession import Wish
from parallax.security.profiles import CLOCK_SKEW
from parallax.security.request import new_request
from parallax.security.revocation import Reason
from parallax.security.verification import CertificateId
from tests.control_plane.test_enrollment import REQUESTS
from tests.end_to_end.test_enrollment import AGENT, Answer, enrolling, guess_a_thousand_times, refusals
from tests.end_to_end.test_enrollment import ask as ask_edge
from tests.end_to_end.test_pins import REFUSED as KEPT_OUT
from tests.end_to_end.test_pins import WITHIN_S, as_leaf, ask, let_in

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve

OTHER = Identity.parse_short("agent/agent-8")
BY = Change("spiffe://parallax.local/client/admin")
DAY = timedelta(days=1)


@pytest.fixture
async def fleet(serve: Serve) -> AsyncIterator[Fleet]:
    async with serve(http_listen="127.0.0.1:0", drain_seconds=0.0) as running:
        yield running


@dataclass(frozen=True)
class Device:
    """Somebody with a certificate of its own making, and what it sends; each change makes one thing wrong."""

    key: PrivateKey
    certificate: x509.Certificate
    who: Identity = AGENT

    @classmethod
    def issued(cls, pki: Pki) -> Device:
        leaf = pki.issue(AGENT.short)
        return cls(leaf.key, leaf.certificate)

    @classmethod
    def make(
        cls,
        who: Identity = AGENT,
        key: PrivateKey | None = None,
        lifetime: timedelta = DAY,
        ahead: timedelta = timedelta(0),
    ) -> Device:
        """What begins as ours do, or *ahead* of that: its holder writes what he likes."""
        key = key or generate_key()
        return cls(key, sign_self(who, key, lifetime, datetime.now(UTC) + ahead), who)

    def leaf(self, pki: Pki) -> Leaf:
        return as_leaf(pki, self.key, self.certificate)

    def wish(self, fleet: Fleet, key: PrivateKey | None = None) -> Wish:
        """For a certificate for *key*, or a new one."""
        return Wish(control_plane(), nonce(fleet), new_request(self.who, key or generate_key()))

    def send(self, fleet: Fleet, wish: Wish | None = None, proof: str = "") -> Answer:
        proof = proof or (wish or self.wish(fleet)).sign(self.certificate, self.key)
        body = json.dumps({"identity": self.who.short, "proof": proof}).encode()
        return ask_edge(fleet.http_port, body, path="/v1/exchanges")


def nonce(fleet: Fleet) -> str:
    return str(ask_edge(fleet.http_port, None, method="GET", path="/v1/nonce").body["nonce"])


async def pin(fleet: Fleet, device: Device) -> None:
    assert fleet.plane.pinning is not None
    der = device.certificate.public_bytes(Encoding.DER)
    await fleet.plane.pinning.pin(device.who, der, BY)


async def unpin(fleet: Fleet, who: Identity = AGENT) -> None:
    assert fleet.plane.pinning is not None
    await fleet.plane.pinning.unpin(who, "", BY)


async def gone(fleet: Fleet, who: Identity = AGENT) -> None:
    """Wait until nothing is pinned for *who*."""
    pinning = fleet.plane.pinning
    assert pinning is not None
    async with asyncio.timeout(WITHIN_S):
        while pinning.has(who):
            await asyncio.sleep(0.02)


async def pins(fleet: Fleet) -> list[pin_pb2.PinnedCertificate]:
    async with fleet.channel("client/admin") as channel:
        request = pin_pb2.ListPinsRequest(page_size=1_000)
        return list((await pin_pb2_grpc.PinServiceStub(channel).ListPins(request, timeout=10)).pins)


async def send(fleet: Fleet, device: Device, wish: Wish | None = None, proof: str = "") -> Answer:
    return await asyncio.to_thread(device.send, fleet, wish, proof)


async def exchange(fleet: Fleet, device: Device, key: PrivateKey | None = None) -> Leaf:
    """What the device is issued for *key*, asked for as our own command does."""
    key = key or generate_key()
    held = Credentials((device.certificate,), device.key, fleet.pki.authority.bundle)
    asking, csr = enrolling(fleet), new_request(device.who, key)
    issued = await asyncio.to_thread(asking.exchange, device.who, held, csr)
    return as_leaf(fleet.pki, key, *issued.chain)


# Exchanged.


async def keep(directory: Path, devices: Sequence[Device]) -> None:
    """Have *devices* pinned, one after the other, in what a control plane will find."""
    began = datetime.now(UTC) - DAY
    kept = [
        Pinned(Pin(each.who, each.certificate), began + timedelta(seconds=number), BY.by)
        for number, each in enumerate(devices)
    ]
    writes = [Write(_key(each.pin.identity), _encode([each])) for each in kept]
    async with SqliteEngine(directory) as engine:
        for at in range(0, len(writes), 100):
            await engine.commit(Event("test"), writes[at : at + 100])


async def test_beyond_what_the_port_bears_pins_are_exchanged_and_move_up(
    serve: Serve, tmp_path: Path
) -> None:
    key = generate_key()
    devices = [
        Device.make(Identity.parse_short(f"agent/{number:08}"), key) for number in range(MAX_ON_PORT + 2)
    ]
    oldest, last_on, first_off, last = devices[0], *devices[-3:]
    await keep(tmp_path / "data", devices)
    async with serve(http_listen="127.0.0.1:0", drain_seconds=0.0, data_dir=tmp_path / "data") as fleet:
        for on in (oldest, last_on):
            await let_in(fleet, on.leaf(fleet.pki))
        for off in (first_off, last):
            assert await ask(fleet, off.leaf(fleet.pki)) in KEPT_OUT
        listed = {each.identity: each.on_port for each in await pins(fleet)}
        assert [str(device.who) for device in devices if not listed[str(device.who)]] == [
            str(first_off.who),
            str(last.who),
        ]

        issued = await exchange(fleet, last)
        assert issued.certificate.issuer == fleet.pki.authority.certificate.subject
        await let_in(fleet, issued)

        await unpin(fleet, oldest.who)
        await let_in(fleet, first_off.leaf(fleet.pki))
        await gone(fleet, last.who)  # the other one was seen in use
        assert await ask(fleet, last.leaf(fleet.pki)) in KEPT_OUT
        assert all(each.on_port for each in await pins(fleet))


async def test_one_that_is_on_the_port_is_exchanged_there_or_here(fleet: Fleet) -> None:
    device = Device.make()
    await pin(fleet, device)
    await let_in(fleet, device.leaf(fleet.pki))
    issued = await exchange(fleet, device)
    assert await ask(fleet, device.leaf(fleet.pki)) not in KEPT_OUT  # still: the answer may be lost
    assert [each.exchanged for each in await pins(fleet)] == [True]
    await let_in(fleet, issued)
    await gone(fleet)


async def test_what_is_issued_names_the_identity_alone(fleet: Fleet) -> None:
    device = Device.make(lifetime=300 * DAY)
    await pin(fleet, device)
    leaf = (await exchange(fleet, device)).certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(AGENT)]
    assert names.get_values_for_type(x509.DNSName) == [AGENT.dns_name]


async def test_an_answer_that_was_lost_is_given_again_for_the_same_key(fleet: Fleet) -> None:
    device, key = Device.make(), generate_key()
    await pin(fleet, device)
    first, second = await exchange(fleet, device, key), await exchange(fleet, device, key)
    assert first.key is second.key
    await let_in(fleet, second)


async def test_it_is_audited_with_where_it_came_from(fleet: Fleet) -> None:
    device = Device.make()
    await pin(fleet, device)
    leaf = (await exchange(fleet, device)).certificate
    page = await AuditReader(fleet.plane._engine).page(0)
    deeds = {deed.action: deed for kept in page.kept for deed in [Entry.decode(*kept).deed]}
    fingerprint = device.certificate.fingerprint(hashes.SHA256()).hex()
    exchanged, renewed = deeds["pin/exchanged"], deeds["certificate/renewed"]
    assert (exchanged.by, exchanged.subject, exchanged.source) == (str(AGENT), str(AGENT), "127.0.0.1")
    assert exchanged.detail == {"fingerprint": fingerprint}
    assert renewed.detail["serial"] == f"{leaf.serial_number:x}"
    assert (await fleet.metrics())['parallax_enrollments_total{outcome="exchanged"}'] == 1


# Refused: the same device with one thing wrong. Of what is not its own, nothing is said.


def swapped(device: Device, wish: Wish) -> str:
    """What the device has signed, with the request of somebody else in it."""
    header, _, signature = wish.sign(device.certificate, device.key).split(".")
    other, stranger = replace(wish, request=new_request(AGENT, generate_key())), Device.make()
    return f"{header}.{other.sign(stranger.certificate, stranger.key).split('.')[1]}.{signature}"


SENT: dict[str, Callable[[Device, Wish, Pki], tuple[Device, Wish, str]]] = {
    "signed by another key": lambda device, wish, _: (replace(device, key=generate_key()), wish, ""),
    "another certificate of the same key": lambda device, wish, _: (Device.make(key=device.key), wish, ""),
    "another certificate": lambda _device, wish, _pki: (Device.make(), wish, ""),
    "one that the CA has issued": lambda _, wish, pki: (Device.issued(pki), wish, ""),
    "in the name of another identity": lambda device, wish, _: (replace(device, who=OTHER), wish, ""),
    "for another server": lambda device, wish, _: (
        device,
        replace(wish, server=control_plane("elsewhere.local")),
        "",
    ),
    "the request of somebody else": lambda device, wish, _: (device, wish, swapped(device, wish)),
}


def check_refused(answer: Answer) -> None:
    assert (answer.status, answer.body) == (403, {"error": "EnrollmentError", "message": REFUSED})


@pytest.mark.parametrize("wrong", SENT)
async def test_whatever_is_wrong_with_what_is_sent_the_answer_is_the_same(fleet: Fleet, wrong: str) -> None:
    device = Device.make()
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    check_refused(await send(fleet, *SENT[wrong](device, wish, fleet.pki)))
    assert not await fleet.plane.ledger.held(AGENT)
    (deed,) = await refusals(fleet)
    assert (deed.source, deed.subject) == ("127.0.0.1", "/v1/exchanges")
    assert deed.detail["reason"] == "enrollment_error"
    assert (await send(fleet, device, wish)).status == 200  # without it


@pytest.mark.parametrize(
    "happened",
    ["unpinned", "ended", "revoked", "revoked and reinstated", "the same, and it looks as if made since"],
)
async def test_whatever_became_of_the_pin_the_answer_is_the_same(fleet: Fleet, happened: str) -> None:
    device = Device.make(
        lifetime=timedelta(seconds=5) if happened == "ended" else DAY,  # it is pinned while it is good
        ahead=CLOCK_SKEW if "looks" in happened else timedelta(0),
    )
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    log, now = fleet.plane.revocations, datetime.now(UTC)
    if happened == "unpinned":
        await unpin(fleet)
    elif happened == "ended":
        await asyncio.sleep((device.certificate.not_valid_after_utc - now).total_seconds() + 1.1)
    else:
        await log.revoke(RevokedIdentity(AGENT, Reason.KEY_COMPROMISE, BY.by, now))
    if "reinstated" in happened or "looks" in happened:
        await log.reinstate(AGENT, BY.by)
    check_refused(await send(fleet, device, wish))
    assert not await fleet.plane.ledger.held(AGENT)


async def test_one_whose_serial_is_revoked_is_refused_likewise(fleet: Fleet) -> None:
    device, now = Device.make(), datetime.now(UTC)
    await pin(fleet, device)
    name = CertificateId(key_id(device.key.public_key()), device.certificate.serial_number)
    ends = device.certificate.not_valid_after_utc
    await fleet.plane.revocations.revoke(
        RevokedCertificate(name, AGENT, ends, Reason.KEY_COMPROMISE, BY.by, now)
    )
    check_refused(await send(fleet, device))


# The nonce.


async def test_a_proof_counts_once(fleet: Fleet) -> None:
    device = Device.make()
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    answers = await asyncio.gather(*(send(fleet, device, wish) for _ in range(4)))
    assert sorted(each.status for each in answers) == [200, 400, 400, 400]
    again = await send(fleet, device, replace(wish, request=new_request(AGENT, generate_key())))
    assert (again.status, again.body["error"]) == (400, "InvalidRequest")
    assert "ask for another" in again.body["message"]
    assert len(await fleet.plane.ledger.held(AGENT)) == 1


async def test_the_nonce_of_another_control_plane_is_refused(fleet: Fleet) -> None:
    device = Device.make()
    await pin(fleet, device)
    for other in (Nonces().new(), "", "guess"):
        answer = await send(fleet, device, Wish(control_plane(), other, new_request(AGENT, generate_key())))
        assert (answer.status, answer.body["error"]) == (400, "InvalidRequest")
    assert not await fleet.plane.ledger.held(AGENT)


async def test_who_has_no_pinned_key_learns_nothing_of_his_nonce_and_spends_none(fleet: Fleet) -> None:
    device, stranger = Device.make(), Device.make()
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    for each in (wish, replace(wish, nonce="guess")):
        check_refused(await send(fleet, stranger, each))
    assert (await send(fleet, device, wish)).status == 200


async def test_a_nonce_is_stored_by_nobody_on_the_way(fleet: Fleet) -> None:
    given = [
        await asyncio.to_thread(ask_edge, fleet.http_port, None, method="GET", path="/v1/nonce") for _ in "12"
    ]
    assert given[0].body != given[1].body
    assert given[0].headers["cache-control"] == "no-store"


# The request.


@pytest.mark.parametrize("wrong", REQUESTS)
async def test_a_holder_is_told_what_is_wrong_with_the_request_and_keeps_the_pin(
    fleet: Fleet, wrong: str
) -> None:
    make, error, text = REQUESTS[wrong]
    device = Device.make()
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    answer = await send(fleet, device, replace(wish, request=make()))
    assert answer.body["error"] == error.__name__
    assert re.search(text, answer.body["message"]) or wrong == "nonsense"
    await exchange(fleet, device)


async def test_a_key_that_is_in_use_already_is_refused(fleet: Fleet) -> None:
    device, other = Device.make(), Device.make(OTHER)
    await pin(fleet, device)
    await pin(fleet, other)
    taken = await exchange(fleet, other)
    with pytest.raises(InvalidRequest, match="make a new key"):
        await exchange(fleet, device, device.key)
    for key in (other.key, taken.key):
        with pytest.raises(InvalidRequest, match="another identity"):
            await exchange(fleet, device, key)
    await exchange(fleet, device)


async def test_nobody_asks_in_the_name_of_another(fleet: Fleet) -> None:
    device = Device.make()
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    answer = await send(fleet, device, replace(wish, request=new_request(OTHER, generate_key())))
    assert answer.body["error"] == NotAuthorized.__name__


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "field required"),
        (b'{"identity": "agent/agent-7"}', "proof: field required"),
        (b'{"identity": "agent/agent-7", "proof": 7}', "proof: input should be a valid string"),
        (b'{"identity": "agent/agent-7", "proof": "secret-7"}', "not a proof"),
        (b'{"identity": "agent", "proof": "secret-7"}', "not <kind>/<name>"),
        (b'{"identity": "agent/agent-7", "proof": "%b"}' % (b"x" * 50_000), "at most"),
        (b'{"identity": "agent/agent-7", "proof": "%b.e30.e30"}' % (b"W1tb" * 10_000), "not a proof"),
    ],
)
async def test_what_cannot_be_read_is_refused_and_not_repeated(fleet: Fleet, sent: bytes, said: str) -> None:
    answer = await asyncio.to_thread(ask_edge, fleet.http_port, sent, path="/v1/exchanges")
    assert answer.status == 400
    assert said in answer.body["message"]
    assert "secret-7" not in str(answer)


# Guesses.


@pytest.mark.timeout(90)
async def test_a_thousand_guesses_are_refused_and_keep_nobody_out(fleet: Fleet) -> None:
    device, stranger = Device.make(), Device.make()
    await pin(fleet, device)
    wish = await asyncio.to_thread(device.wish, fleet)
    proof = wish.sign(device.certificate, stranger.key)
    guess = json.dumps({"identity": AGENT.short, "proof": proof}).encode()
    exchanged = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        guesses = guess_a_thousand_times(fleet.http_port, "/v1/exchanges", guess, exchanged)
        guessing = group.create_task(guesses)
        await exchange(fleet, device)
        exchanged.set()
    statuses = guessing.result()
    assert len(statuses) >= 1_000
    assert set(statuses) == {b"403", b"503"}
    counted = await fleet.metrics()
    refused = counted['parallax_enrollments_total{outcome="refused"}']
    assert refused >= 10 * Limits().refusals.burst
    assert refused + counted['parallax_enrollments_total{outcome="deferred"}'] == len(statuses)


async def test_where_nobody_enrolls_nobody_exchanges(serve: Serve) -> None:
    async with serve(http_listen="none") as fleet:
        device = Device.make()
        await pin(fleet, device)
        held = Credentials((device.certificate,), device.key, fleet.pki.authority.bundle)
        asking = enrolling(fleet)
        with pytest.raises(Unavailable, match="PARALLAX_HTTP_LISTEN"):
            await asyncio.to_thread(asking.exchange, AGENT, held, new_request(AGENT, generate_key()))


async def test_what_cannot_be_recorded_is_not_handed_out(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    device, engine = Device.make(), fleet.plane._engine
    await pin(fleet, device)
    await engine._on_thread(lambda: engine._file._db.execute("PRAGMA query_only = ON"))
    answer = await send(fleet, device)
    assert (answer.status, answer.body["error"]) == (503, "StorageFailed")
    assert "nothing is recorded" in caplog.messages
    caplog.clear()
    await engine._on_thread(lambda: engine._file._db.execute("PRAGMA query_only = OFF"))
    assert not await fleet.plane.ledger.held(AGENT)
    await exchange(fleet, device)
