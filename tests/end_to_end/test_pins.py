"""Devices with certificates of their own: let in while these are pinned, and nobody else by them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from grpc import StatusCode, aio

from parallax.control_plane.pinned import Pinned
from parallax.control_plane.pins import Change
from parallax.control_plane.registry import AgentRef
from parallax.control_plane.revoked import RevokedIdentity
from parallax.protos import certificate_pb2, certificate_pb2_grpc, pin_pb2, pin_pb2_grpc
from parallax.sdk import SecureAgent
from parallax.sdk.enrolling import Edge, Enrolling
from parallax.security.bundle import certificates_to_pem, parse_certificates
from parallax.security.config import MTLSConfig
from parallax.security.errors import InvalidRequest, InvalidTransition, NotAuthorized, Revoked
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind
from parallax.security.keys import PrivateKey, generate_key, key_to_pem, parse_key
from parallax.security.layouts import Layout, save_leaf
from parallax.security.pinned import Pin, Pins, is_self_signed
from parallax.security.profiles import LeafProfile, self_signed_template
from parallax.security.request import new_request
from parallax.security.revocation import Reason
from parallax.security.root_pin import RootPin
from parallax.security.tokens import Grant
from tests.end_to_end.test_revocation import revoke

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Pki, Serve, Until

WITHIN_S = 15.0
DEVICE = "agent/07048933"
BY = Change("spiffe://parallax.local/client/admin")
DAY = timedelta(days=1)

Make = Callable[..., Any]


@pytest.fixture
def device(pki: Pki) -> Make:
    """A self-signed certificate as openssl makes it, or with an *issuer*; each argument changes one thing."""

    def make(
        name: str = "07048933",
        *,
        key: Any = None,
        issuer: Leaf | None = None,
        ca: bool | None = True,
        uris: Sequence[str] = (),
        dns: Sequence[str] = (),
        begins: timedelta = -timedelta(minutes=5),
        ends: timedelta = DAY,
    ) -> Any:
        key = key or generate_key()
        signer = issuer.key if issuer else key
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.certificate.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if uris or dns:
            names = x509.SubjectAlternativeName(
                [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
            )
            builder = builder.add_extension(names, critical=False)
        return as_leaf(pki, key, builder.sign(signer, hashes.SHA256()))

    return make


def as_leaf(pki: Pki, key: PrivateKey, certificate: x509.Certificate, *above: x509.Certificate) -> Leaf:
    kind = type(pki.issue("client/cli"))
    chain = certificates_to_pem((certificate, *above))
    return kind(key_to_pem(key), chain, pki.authority.bundle.pem, key, certificate)


async def pin(fleet: Fleet, leaf: Leaf, who: str = DEVICE) -> Pinned:
    assert fleet.plane.pinning is not None
    der = leaf.certificate.public_bytes(Encoding.DER)
    return await fleet.plane.pinning.pin(Identity.parse_short(who), der, BY)


async def listed(fleet: Fleet) -> list[pin_pb2.PinnedCertificate]:
    """What the administrator is shown."""
    async with fleet.channel("client/admin") as admin:
        stub = pin_pb2_grpc.PinServiceStub(admin)
        return list((await stub.ListPins(pin_pb2.ListPinsRequest(), timeout=WITHIN_S)).pins)


async def unpin(fleet: Fleet, who: str = DEVICE) -> None:
    assert fleet.plane.pinning is not None
    await fleet.plane.pinning.unpin(Identity.parse_short(who), "", BY)


async def ask(fleet: Fleet, leaf: Leaf) -> StatusCode:
    """How one call of *leaf*'s ends that everybody may make who is somebody."""
    async with fleet.channel(leaf) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        try:
            await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=WITHIN_S)
        except aio.AioRpcError as exc:
            return exc.code()
        return StatusCode.OK


async def let_in(fleet: Fleet, leaf: Leaf) -> None:
    """Wait until *leaf* is."""
    async with asyncio.timeout(WITHIN_S):
        while await ask(fleet, leaf) is not StatusCode.OK:
            await asyncio.sleep(0.05)


async def on_port(fleet: Fleet, leaf: Leaf) -> None:
    """Wait until TLS lets *leaf* in, whatever the gate says then."""
    async with asyncio.timeout(WITHIN_S):
        while await ask(fleet, leaf) is StatusCode.UNAVAILABLE:
            await asyncio.sleep(0.05)


async def run(command: list[str]) -> bytes:
    """What *command* says, which ends well."""
    nothing, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=nothing, stdout=pipe, stderr=nothing)
    said, _ = await process.communicate()
    assert process.returncode == 0
    return said


REFUSED = {StatusCode.UNAVAILABLE, StatusCode.UNAUTHENTICATED}  # by the handshake, or by the gate


# Let in.


@pytest.mark.parametrize("said", [{}, {"ca": False}, {"ca": None}])
async def test_a_device_is_let_in_while_it_is_pinned(
    fleet: Fleet, device: Make, said: dict[str, Any]
) -> None:
    leaf = device(**said)
    assert await ask(fleet, leaf) in REFUSED
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    await unpin(fleet)
    assert await ask(fleet, leaf) in REFUSED


async def test_one_that_plain_openssl_made_is(
    fleet: Fleet, pki: Pki, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    """`openssl req -x509` writes CA:TRUE."""
    cert, key = tmp_path / "client.crt", tmp_path / "client.key"
    made = [require_tool("openssl"), "req", "-x509", "-newkey", "rsa:4096", "-nodes", "-subj", "/CN=07048933"]
    await run([*made, "-keyout", str(key), "-out", str(cert), "-days", "2"])
    leaf = as_leaf(pki, parse_key(key.read_bytes()), parse_certificates(cert.read_bytes())[0])
    constraints = leaf.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert constraints.ca
    await pin(fleet, leaf)
    await let_in(fleet, leaf)


async def test_both_pins_of_an_identity_are_let_in_and_a_third_is_refused(fleet: Fleet, device: Make) -> None:
    old, new, third = (device() for _ in range(3))
    pinned = [await pin(fleet, leaf) for leaf in (old, new)]
    for leaf in (old, new):
        await let_in(fleet, leaf)
    with pytest.raises(InvalidTransition) as refused:
        await pin(fleet, third)
    assert all(each.pin.fingerprint.hex() in str(refused.value) for each in pinned)
    assert await ask(fleet, third) in REFUSED


async def test_a_token_for_any_free_name_does_not_take_that_of_a_device(serve: Serve, device: Make) -> None:
    """Whether or not the device was ever seen."""
    grant = Grant(DEFAULT_TRUST_DOMAIN, Kind.AGENT, "0704*", uses=2)
    async with serve(http_listen="127.0.0.1:0") as fleet:
        assert fleet.plane.enrollment is not None
        token, _ = await fleet.plane.enrollment.tokens.create(grant, DAY, BY.by)
        asking = Enrolling(
            Edge("127.0.0.1", fleet.http_port),
            {RootPin.of(fleet.pki.authority.certificate)},
            DEFAULT_TRUST_DOMAIN,
        )
        await pin(fleet, device())
        with pytest.raises(NotAuthorized, match="has a certificate already"):
            await asyncio.to_thread(asking.redeem, token.text, Identity.parse_short(DEVICE), generate_key())
        free = Identity.parse_short("agent/07048934")
        await asyncio.to_thread(asking.redeem, token.text, free, generate_key())


async def test_pins_survive_a_restart(serve: Serve, device: Make, tmp_path: Path) -> None:
    kept, gone = device(), device("other")
    async with serve(data_dir=tmp_path / "data") as fleet:
        for leaf, who in ((kept, DEVICE), (gone, "agent/other")):
            await pin(fleet, leaf, who)
        await unpin(fleet, "agent/other")
    async with serve(data_dir=tmp_path / "data") as fleet:
        assert await ask(fleet, kept) is StatusCode.OK
        assert await ask(fleet, gone) in REFUSED
        await unpin(fleet)


async def test_with_hundreds_of_pins_the_port_goes_on_and_tells_nobody_of_them(
    fleet: Fleet, pki: Pki, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    """Each is in the way of a handshake, were it looked for by going through all."""
    assert fleet.plane.provider.store is not None
    key, now, pinned = generate_key(), datetime.now(UTC), []
    for number in range(300):
        who = Identity.parse_short(f"agent/{number:08}")
        template = self_signed_template(who, key.public_key(), LeafProfile(sans=()), now, number + 1)
        pinned.append(Pin(who, template.sign(key, hashes.SHA256())))
    fleet.plane.provider.store.pin(Pins(tuple(pinned)))
    leaves = [as_leaf(pki, key, pinned[number].certificate) for number in (0, 299)]
    for leaf in leaves:
        await let_in(fleet, leaf)
    (tmp_path / "cert.pem").write_bytes(leaves[-1].chain_pem)
    (tmp_path / "key.pem").write_bytes(leaves[-1].key_pem)
    (tmp_path / "ca.pem").write_bytes(pki.authority.bundle.pem)
    command = [require_tool("openssl"), "s_client", "-connect", fleet.address, "-alpn", "h2"]
    for option, name in (("-cert", "cert"), ("-key", "key"), ("-CAfile", "ca")):
        command += [option, str(tmp_path / f"{name}.pem")]
    said = (await run(command)).decode(errors="replace")
    assert "Verification: OK" in said
    assert "No client certificate CA names sent" in said


# Refused: the same device with one thing wrong.


async def test_whatever_a_pinned_key_signs_is_refused(fleet: Fleet, pki: Pki, device: Make) -> None:
    """The handshake lets these in: to TLS a pinned certificate is a CA, whatever it says (measured)."""
    for ca in (True, False, None):
        signer = device(f"signer-{ca}".lower(), ca=ca)
        await pin(fleet, signer, f"agent/signer-{ca}".lower())
        await let_in(fleet, signer)
        reached = 0
        for name in (f"signer-{ca}".lower(), "agent-1", "control-plane.parallax.local"):
            child = device(name, issuer=signer, ca=None)
            for leaf in (child, as_leaf(pki, child.key, child.certificate, signer.certificate)):
                outcome = await ask(fleet, leaf)
                assert outcome in REFUSED
                reached += outcome is StatusCode.UNAUTHENTICATED
        assert reached, "the gate was not tried: TLS has refused them all"


async def test_the_same_key_in_another_certificate_is_refused(fleet: Fleet, device: Make) -> None:
    leaf = device()
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    for other in (device(key=leaf.key), device("agent-1", key=leaf.key), device(key=leaf.key, ca=False)):
        assert await ask(fleet, other) in REFUSED


async def test_one_that_has_expired_since_is_refused(fleet: Fleet, device: Make) -> None:
    leaf = device(ends=timedelta(seconds=8))  # a busy machine has to pin it and let it in before
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    await asyncio.sleep((leaf.certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds() + 1)
    assert await ask(fleet, leaf) in REFUSED


@pytest.mark.parametrize(
    ("changes", "who", "why"),
    [
        ({"ends": -timedelta(seconds=1)}, DEVICE, "expired"),
        ({"begins": timedelta(hours=1)}, DEVICE, "not valid before"),
        ({}, "agent/agent-1", r"it names .*07048933, not"),
        ({"name": "agent-1"}, DEVICE, r"it names .*agent-1, not"),
        (
            {"uris": ["spiffe://parallax.local/agent/07048933", "spiffe://parallax.local/agent/b"]},
            DEVICE,
            "2 U",
        ),
        ({"uris": ["spiffe://elsewhere.local/agent/07048933"]}, DEVICE, "not of the trust domain"),
        ({"name": "control-plane.parallax.local"}, "service/control-plane", "is a service"),
        ({"name": "Nobody In Particular"}, DEVICE, "names no identity"),
        ({"key": "weak"}, DEVICE, "RSA key of 1024 bits"),
    ],
)
async def test_what_cannot_be_pinned_says_why(
    fleet: Fleet, device: Make, changes: dict[str, Any], who: str, why: str
) -> None:
    if "key" in changes:
        changes = {"key": rsa.generate_private_key(65537, 1024)}  # noqa: S505 - that is the point
    leaf = device(**changes)
    with pytest.raises(InvalidRequest, match=why):
        await pin(fleet, leaf, who)
    assert await ask(fleet, leaf) in REFUSED


@pytest.mark.parametrize(
    ("changes", "who", "error"),
    [
        ({}, "agent/agent-1", "WrongIdentity"),
        (
            {"uris": ["spiffe://parallax.local/agent/a", "spiffe://parallax.local/agent/b"]},
            "agent/a",
            "VerificationError",
        ),
        ({"name": "control-plane.parallax.local"}, "service/control-plane", "UntrustedChain"),
        ({"key": "weak"}, DEVICE, "VerificationError"),
    ],
)
async def test_the_gate_does_not_rely_on_what_was_refused_to_be_pinned(
    fleet: Fleet, device: Make, changes: dict[str, Any], who: str, error: str
) -> None:
    """These are on the port, as if somebody had written them into the database: TLS lets them in."""
    if "key" in changes:
        changes = {"key": rsa.generate_private_key(65537, 1024)}  # noqa: S505 - that is the point
    leaf = device(**changes)
    assert fleet.plane.provider.store is not None
    fleet.plane.provider.store.pin(Pins((Pin(Identity.parse_short(who), leaf.certificate),)))
    await on_port(fleet, leaf)
    async with fleet.channel(leaf) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as refused:
            await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=WITHIN_S)
        assert dict(refused.value.trailing_metadata() or ())["parallax-error"] == error


async def test_a_key_that_another_identity_has_pinned_is_refused(fleet: Fleet, device: Make) -> None:
    leaf = device()
    await pin(fleet, leaf)
    with pytest.raises(InvalidRequest, match="has the same key"):
        await pin(fleet, device("other", key=leaf.key), "agent/other")


async def test_a_key_that_another_identity_was_seen_with_is_not_pinned(
    fleet: Fleet, pki: Pki, device: Make
) -> None:
    issued = pki.issue("client/cli")
    await let_in(fleet, issued)
    async with asyncio.timeout(WITHIN_S):
        while await fleet.plane.ledger.user_of(issued.key.public_key()) is None:
            await asyncio.sleep(0.01)
    stolen = device(key=issued.key)
    with pytest.raises(InvalidRequest, match="client/cli has the same key"):
        await pin(fleet, stolen)
    assert await ask(fleet, stolen) is StatusCode.UNAVAILABLE
    await let_in(fleet, issued)


async def test_who_is_revoked_is_not_pinned_and_no_pin_lets_him_in(fleet: Fleet, device: Make) -> None:
    before, after, who = device(), device(), Identity.parse_short(DEVICE)
    await pin(fleet, before)
    await let_in(fleet, before)
    assert not (await revoke(fleet, identity=DEVICE)).unknown
    assert await ask(fleet, before) is StatusCode.UNAUTHENTICATED
    with pytest.raises(Revoked, match="is revoked"):
        await pin(fleet, after)
    await fleet.plane.revocations.reinstate(who, BY.by)
    await pin(fleet, device(begins=timedelta(0)))
    assert await ask(fleet, before) is StatusCode.UNAUTHENTICATED


async def test_nobody_renews_with_a_key_that_another_identity_has_pinned(
    fleet: Fleet, pki: Pki, device: Make
) -> None:
    leaf, cli = device(), Identity.parse_short("client/cli")
    await pin(fleet, leaf)
    request = certificate_pb2.RenewRequest(csr=new_request(cli, leaf.key))
    async with fleet.channel("client/cli") as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        with pytest.raises(aio.AioRpcError, match="a key that another identity has a certificate for"):
            await stub.Renew(request, timeout=WITHIN_S)


async def test_the_key_of_another_identitys_certificate_is_not_pinned(fleet: Fleet, device: Make) -> None:
    key = generate_key()
    async with fleet.channel("client/cli") as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        request = new_request(Identity.parse_short("client/cli"), key)
        await stub.Renew(certificate_pb2.RenewRequest(csr=request), timeout=WITHIN_S)
    with pytest.raises(InvalidRequest, match="client/cli has the same key"):
        await pin(fleet, device(key=key))


@pytest.mark.parametrize("begins", [timedelta(0), -timedelta(minutes=4)], ids=["now", "four minutes ago"])
async def test_a_pin_from_before_a_reinstatement_stays_revoked_whatever_its_certificate_says(
    fleet: Fleet, device: Make, begins: timedelta
) -> None:
    """One that begins when it is made looks as if made five minutes later: ours begin earlier than that."""
    old, who = device(begins=begins, uris=[f"spiffe://parallax.local/{DEVICE}"]), Identity.parse_short(DEVICE)
    await pin(fleet, old)
    log = fleet.plane.revocations
    await log.revoke(RevokedIdentity(who, Reason.KEY_COMPROMISE, BY.by, datetime.now(UTC)))
    await log.reinstate(who, BY.by)
    await on_port(fleet, old)
    assert await ask(fleet, old) is StatusCode.UNAUTHENTICATED
    with pytest.raises(Revoked, match="from before"):
        await pin(fleet, old)
    assert [(each.on_port, each.revoked) for each in await listed(fleet)] == [(True, True)]
    new = device(begins=begins, uris=[f"spiffe://parallax.local/{DEVICE}"])
    await pin(fleet, new)
    await let_in(fleet, new)
    assert await ask(fleet, old) is StatusCode.UNAUTHENTICATED
    assert [each.revoked for each in await listed(fleet)] == [True, False]


async def test_an_issued_certificate_is_not_pinned(fleet: Fleet, pki: Pki) -> None:
    with pytest.raises(InvalidRequest, match="not self-signed"):
        await pin(fleet, pki.issue("agent/agent-1"), "agent/agent-1")


# An agent whose certificate is its own.


class Slow(SecureAgent):
    """Answers `wait` when it may, and everything else at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun, self.release = asyncio.Event(), asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        if task == "wait":
            self.begun.set()
            await self.release.wait()
        return data, 1.0


def lay(pki: Pki, leaf: Leaf, directory: Path) -> MTLSConfig:
    """The settings of the device, whose files lie in *directory*."""
    who = Identity.parse_short(DEVICE)
    save_leaf(directory, Layout.PARALLAX, who, (leaf.certificate,), leaf.key, pki.authority.bundle)
    return MTLSConfig(enabled=True, certs_dir=directory, verify_client=True)


def leaf_in(directory: Path) -> x509.Certificate:
    return parse_certificates((directory / "07048933" / "cert.pem").read_bytes())[0]


async def test_an_agent_works_with_it_and_exchanges_it_for_an_issued_one(
    serve: Serve, pki: Pki, device: Make, tmp_path: Path, until: Until
) -> None:
    """Valid for longer than anybody issues; a task that was begun before ends after."""
    leaf = device(ends=3650 * DAY)
    tls = lay(pki, leaf, tmp_path)
    async with serve(drain_seconds=6.0) as fleet, fleet.client() as client:
        plane = fleet.plane
        assert plane.pinning is not None
        assert plane.provider.store is not None
        store = plane.provider.store
        pinned = await pin(fleet, leaf)
        async with Slow("07048933", "A device", ["slow"], tls=tls, control_plane=fleet.address) as agent:
            assert (await client.analyze("07048933", "echo", 1)).value == 1
            asked = asyncio.create_task(client.analyze("07048933", "wait", 2))
            await agent.begun.wait()
            await agent.rotate_certificates()
            issued = leaf_in(tmp_path)
            assert issued.issuer == pki.authority.certificate.subject
            assert not is_self_signed(issued)
            await asyncio.sleep(0.5)  # it is in use by now, and the task of before goes on
            assert store.pins.holder_of(pinned.pin.fingerprint) is not None
            agent.release.set()
            assert (await asked).value == 2
            await until(lambda: store.pins.holder_of(pinned.pin.fingerprint) is None)
            assert (await client.analyze("07048933", "echo", 3)).value == 3
        assert await ask(fleet, leaf) in REFUSED


async def test_an_exchange_that_nobody_saw_in_use_keeps_the_pin(
    serve: Serve, pki: Pki, device: Make, tmp_path: Path
) -> None:
    """The answer was lost: the device has nothing but what is pinned, now and after a restart."""
    leaf = device()
    async with serve(drain_seconds=0.0, data_dir=tmp_path / "data") as fleet:
        await pin(fleet, leaf)
        await let_in(fleet, leaf)
        csr = new_request(Identity.parse_short(DEVICE), generate_key())
        async with fleet.channel(leaf) as channel:
            stub = certificate_pb2_grpc.CertificateServiceStub(channel)
            await stub.Renew(certificate_pb2.RenewRequest(csr=csr), timeout=WITHIN_S)
    async with serve(drain_seconds=0.0, data_dir=tmp_path / "data") as fleet:
        assert fleet.plane.pinning is not None
        await fleet.plane.pinning.sweep()
        assert await ask(fleet, leaf) is StatusCode.OK
        assert [each.exchanged for each in await listed(fleet)] == [True]


async def test_an_exchange_grants_no_name_that_the_device_gave_itself(fleet: Fleet, device: Make) -> None:
    """An administrator has looked at whose it is; the CA must not vouch for what else is in it."""
    leaf = device(dns=["www.example.com", "localhost"])
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    who = Identity.parse_short(DEVICE)
    async with fleet.channel(leaf) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        asked = certificate_pb2.RenewRequest(csr=new_request(who, generate_key()))
        issued = x509.load_der_x509_certificate((await stub.Renew(asked, timeout=WITHIN_S)).chain[0])
        names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(name.value) for name in names] == [str(who), who.dns_name]
        greedy = certificate_pb2.RenewRequest(csr=new_request(who, generate_key(), ["www.example.com"]))
        with pytest.raises(aio.AioRpcError, match="may not ask for the name") as refused:
            await stub.Renew(greedy, timeout=WITHIN_S)
        assert refused.value.code() is StatusCode.PERMISSION_DENIED


def session_of(fleet: Fleet) -> bytes | None:
    """By which certificate the session was opened that the agent is given tasks on."""
    instance = fleet.plane.sessions.instance(AgentRef("07048933"))
    receiver: Any = instance.active.link.receiver if instance is not None and instance.active else None
    return receiver.caller.fingerprint if receiver is not None else None


async def test_an_agent_changes_from_one_pin_to_the_other_and_loses_no_task(
    fleet: Fleet, pki: Pki, device: Make, tmp_path: Path, until: Until
) -> None:
    assert fleet.plane.pinning is not None
    old, new = device(), device()
    tls, first = lay(pki, old, tmp_path), await pin(fleet, old)
    async with (
        Slow("07048933", "A device", ["slow"], tls=tls, control_plane=fleet.address) as agent,
        fleet.client() as client,
    ):
        asked = asyncio.create_task(client.analyze("07048933", "wait", 1))
        await agent.begun.wait()
        second = await pin(fleet, new)
        lay(pki, new, tmp_path)
        await until(lambda: session_of(fleet) == second.pin.fingerprint)
        agent.release.set()
        assert (await asked).value == 1
        await fleet.plane.pinning.unpin(first.pin.identity, first.pin.fingerprint.hex(), BY)
        assert [(await client.analyze("07048933", "echo", n)).value for n in range(3)] == [0, 1, 2]
        assert await ask(fleet, old) in REFUSED
        assert await ask(fleet, new) is StatusCode.OK


async def test_an_agent_that_nobody_pinned_is_not_let_in(
    fleet: Fleet, pki: Pki, device: Make, tmp_path: Path
) -> None:
    tls = lay(pki, device(), tmp_path)
    agent = Slow("07048933", "A device", ["slow"], tls=tls, control_plane=fleet.address)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2), agent:
            pass


# Taken out.


async def test_what_is_open_ends_when_its_pin_is_taken_out_and_nothing_else(
    fleet: Fleet, pki: Pki, device: Make
) -> None:
    leaf = device()
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    request = certificate_pb2.WatchTrustBundleRequest()
    async with fleet.channel(leaf) as pinned, fleet.channel("agent/agent-1") as issued:
        withdrawn, kept = (
            certificate_pb2_grpc.CertificateServiceStub(each).WatchTrustBundle(request)
            for each in (pinned, issued)
        )
        await asyncio.gather(withdrawn.read(), kept.read())
        await unpin(fleet)
        with pytest.raises(aio.AioRpcError, match="not pinned") as ended:
            async with asyncio.timeout(WITHIN_S):
                while await withdrawn.read() is not aio.EOF:
                    pass
        assert ended.value.code() is StatusCode.UNAUTHENTICATED
        assert dict(ended.value.trailing_metadata() or ())["parallax-error"] == "Revoked"
        assert not kept.done()
        kept.cancel()


async def test_a_connection_that_stays_is_no_use_once_its_pin_is_taken_out(
    fleet: Fleet, device: Make
) -> None:
    leaf = device()
    await pin(fleet, leaf)
    await let_in(fleet, leaf)
    async with fleet.channel(leaf) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=WITHIN_S)
        await unpin(fleet)
        with pytest.raises(aio.AioRpcError) as refused:
            await stub.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(), timeout=WITHIN_S)
        assert refused.value.code() is StatusCode.UNAUTHENTICATED


# The service.


@pytest.mark.parametrize("who", ["client/cli", "agent/agent-1", "service/agent-proxy"])
async def test_nobody_but_the_administrator_may_pin(fleet: Fleet, device: Make, who: str) -> None:
    der = device().certificate.public_bytes(Encoding.DER)
    async with fleet.channel(who) as channel:
        stub = pin_pb2_grpc.PinServiceStub(channel)
        for call in (
            stub.Pin(pin_pb2.PinRequest(holder=DEVICE, certificate=der), timeout=WITHIN_S),
            stub.Unpin(pin_pb2.UnpinRequest(holder=DEVICE), timeout=WITHIN_S),
            stub.ListPins(pin_pb2.ListPinsRequest(), timeout=WITHIN_S),
        ):
            with pytest.raises(aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is StatusCode.PERMISSION_DENIED


async def test_pins_are_listed_page_by_page_and_pinned_again_changes_nothing(
    fleet: Fleet, device: Make
) -> None:
    leaves = {f"agent/d{number}": device(f"d{number}") for number in range(5)}
    async with fleet.channel("client/admin") as channel:
        stub = pin_pb2_grpc.PinServiceStub(channel)
        for _ in range(2):
            for holder, leaf in leaves.items():
                der = leaf.certificate.public_bytes(Encoding.DER)
                await stub.Pin(pin_pb2.PinRequest(holder=holder, certificate=der), timeout=WITHIN_S)
        listed: list[pin_pb2.PinnedCertificate] = []
        request = pin_pb2.ListPinsRequest(page_size=2)
        while True:
            page = await stub.ListPins(request, timeout=WITHIN_S)
            listed += page.pins
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        mine = [each for each in listed if each.identity.rpartition("/")[2] in {"d0", "d1", "d2", "d3", "d4"}]
        assert [each.identity.rpartition("/")[2] for each in mine] == [f"d{number}" for number in range(5)]
        assert {each.pinned_by for each in mine} == {BY.by}
        assert all(each.on_port and not each.exchanged for each in mine)
        for holder in leaves:
            gone = await stub.Unpin(pin_pb2.UnpinRequest(holder=holder), timeout=WITHIN_S)
            assert len(gone.pins) == 1
        with pytest.raises(aio.AioRpcError, match="has no such pin"):
            await stub.Unpin(pin_pb2.UnpinRequest(holder="agent/d0"), timeout=WITHIN_S)


@pytest.mark.parametrize("der", [b"", b"\x30\x00", secrets.token_bytes(512)])
async def test_what_is_no_certificate_is_refused(fleet: Fleet, der: bytes) -> None:
    async with fleet.channel("client/admin") as channel:
        with pytest.raises(aio.AioRpcError, match="not a certificate") as refused:
            await pin_pb2_grpc.PinServiceStub(channel).Pin(
                pin_pb2.PinRequest(holder=DEVICE, certificate=der), timeout=5
            )
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT
