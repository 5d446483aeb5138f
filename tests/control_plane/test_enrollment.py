"""Who gets a first certificate: one thing wrong each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from parallax.control_plane import enrollment as enrollment_module
from parallax.control_plane import pin_index, pins
from parallax.control_plane.approvals import MAX_OF_SOURCE, MAX_PENDING, Approvals, Pending
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.engine import Event
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.enrollment import Application, Enrollment
from parallax.control_plane.grants import Grants
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issued import CERTIFICATES, IssuedCertificate
from parallax.control_plane.ledger import KEPT, Ledger
from parallax.control_plane.pinned import Pinned
from parallax.control_plane.pins import Change, Pinning
from parallax.control_plane.tokens import Tokens
from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import (
    ConfigError,
    EnrollmentError,
    InvalidRequest,
    InvalidTransition,
    NoSuchAgent,
    NotAuthorized,
    ParallaxError,
    Revoked,
    Unavailable,
)
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind, control_plane
from parallax.security.issuance_policy import IssuancePolicy, IssuanceRule
from parallax.security.keys import PrivateKey, generate_key, key_id
from parallax.security.pinned import authenticate_pinned
from parallax.security.profiles import LeafProfile, self_signed_template
from parallax.security.request import MAX_REQUEST_BYTES, new_request
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.tokens import ALLOTTED, LONGEST, REFUSED, Grant, Token
from parallax.security.verification import CertificateId, Peer, Usage, authenticate
from tests.control_plane.clock import NOW, Clock

HOUR = timedelta(hours=1)
ADMIN = "spiffe://parallax.local/client/admin"
AGENT = Identity.parse_short("agent/agent-7")
OTHER = Identity.parse_short("agent/agent-8")


@dataclass
class Desk:
    """Where one enrolls, and what has become of it."""

    engine: SqliteEngine
    clock: Clock
    authority: CertificateAuthority
    revocations: Revocations = field(default_factory=Revocations)
    policy: IssuancePolicy = field(default_factory=IssuancePolicy)

    def __post_init__(self) -> None:
        audit = AuditLog(self.engine, self.clock)
        self.ledger = Ledger(self.engine, audit, self.clock)
        self.tokens = Tokens(self.engine, audit, self.clock)
        self.approvals = Approvals(self.engine, audit, HOUR, self.clock)
        self.grants = Grants(self.engine)
        key = generate_key()
        own = self.authority.issue(control_plane(), key.public_key(), LeafProfile(), NOW)
        self.store = CredentialStore(control_plane(), Credentials(own.chain, key, own.bundle), NOW)
        self.pinning = Pinning(
            self.engine,
            audit,
            self.ledger,
            self.store,
            HOUR,
            self.clock,
            self.revocations.check,
        )
        issuance = Issuance(
            self._current,
            lambda: self.authority.bundle,
            self.ledger.record,
            self.clock,
            policy=lambda: self.policy,
        )
        self.enrollment = Enrollment(
            self.tokens,
            self.approvals,
            issuance,
            self.ledger,
            self.grants,
            self.pinning,
            audit,
            self.revocations,
            self.clock,
        )
        self.has_ca = True

    def _current(self) -> CertificateAuthority:
        if not self.has_ca:
            raise ConfigError("there is no CA")
        return self.authority

    async def token(
        self, names: str = "agent-7", kind: Kind = Kind.AGENT, uses: int = 1, **labels: str
    ) -> str:
        token, _ = await self.tokens.create(
            Grant(DEFAULT_TRUST_DOMAIN, kind, names, labels, uses), HOUR, ADMIN
        )
        return token.text

    async def enroll(
        self,
        token: str,
        identity: Identity = AGENT,
        key: PrivateKey | None = None,
        request: bytes | None = None,
    ) -> Issued:
        request = request or new_request(identity, key or generate_key())
        return await self.enrollment.redeem(token, Application(identity, request, "192.0.2.7"))

    async def use(self, issued: Issued, identity: Identity = AGENT) -> None:
        """Have the certificate seen in use, as the gate tells of it."""
        peer = authenticate(issued.chain, issued.bundle, identity.trust_domain, self.clock.now, Usage.CLIENT)
        await self.see(peer, issued.chain[0])

    async def see(self, peer: Peer, leaf: x509.Certificate) -> None:
        """Have *leaf* entered as in use."""
        running = asyncio.create_task(self.ledger.run())
        assert self.ledger.note(peer, leaf)
        while len(self.ledger):
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


@pytest.fixture
def desk(engine: SqliteEngine, clock: Clock, authority: CertificateAuthority) -> Desk:
    return Desk(engine, clock, authority)


# What a good token gives.


async def test_a_token_gives_the_identity_that_it_grants_and_no_other_name(desk: Desk) -> None:
    key = generate_key()
    issued = await desk.enroll(await desk.token(zone="a"), key=key)
    leaf = issued.chain[0]
    assert leaf.public_key() == key.public_key()
    sans = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(str(name.value) for name in sans) == [AGENT.dns_name, str(AGENT)]
    assert desk.grants.labels_of(AGENT) == {"zone": "a"}
    (entry,) = await desk.ledger.held(AGENT)
    assert (entry.requested_by, entry.seen_at) == (str(AGENT), None)


async def test_everything_that_one_enrollment_writes_is_one_transaction(desk: Desk) -> None:
    token = await desk.token()
    before = await desk.engine.revision()
    await desk.enroll(token)
    written = [record for record in await desk.engine.scan("") if record.revision > before]
    areas = sorted(record.key.partition("/")[0] for record in written)
    assert areas == [
        "audit",
        "audit-head",
        "certificates",
        "grants",
        "holders",
        "keys",
        "lookups",
        "lookups",
        "tokens",
    ]
    assert {record.revision for record in written} == set(range(before + 1, before + 10))


async def test_without_a_ca_the_token_is_not_spent(desk: Desk) -> None:
    token = await desk.token()
    desk.has_ca = False
    with pytest.raises(ConfigError):
        await desk.enroll(token)
    desk.has_ca = True
    await desk.enroll(token)


async def test_labels_of_the_next_enrollment_replace_those_before(desk: Desk) -> None:
    await desk.enroll(await desk.token(zone="a"))
    await desk.enroll(await desk.token(site="b"))
    assert desk.grants.labels_of(AGENT) == {"site": "b"}


# One answer for whatever is wrong with the token.


async def test_the_answer_that_was_lost_is_given_again(desk: Desk) -> None:
    token, key = await desk.token(), generate_key()
    first = await desk.enroll(token, key=key)
    again = await desk.enroll(token, key=key)
    assert first.chain[0].public_key() == again.chain[0].public_key()
    assert first.chain != again.chain


@pytest.mark.parametrize("withdrawn", ["certificate", "identity, and reinstated"])
@pytest.mark.parametrize("by", ["token", "approval"])
async def test_what_was_revoked_is_no_answer_that_was_lost(desk: Desk, by: str, withdrawn: str) -> None:
    """Or whoever keeps the token and a key that was found out would have another certificate for it."""
    key, token = generate_key(), await desk.token()

    async def attempt() -> Issued | Pending:
        return await (desk.enroll(token, key=key) if by == "token" else ask(desk, key=key))

    if by == "approval":
        await attempt()
        await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    await attempt()
    if withdrawn == "certificate":
        (entry,) = await desk.ledger.held(AGENT)
        desk.revocations.revoke(CertificateId(bytes.fromhex(entry.issuer), int(entry.serial, 16)))
    else:
        desk.clock.now += timedelta(seconds=1)
        desk.revocations.cut(AGENT, desk.clock.now)
    with pytest.raises(EnrollmentError):
        await attempt()
    assert len(await desk.ledger.held(AGENT)) == 1


async def test_a_token_stays_spent_when_nobody_knows_any_more_what_it_gave(desk: Desk) -> None:
    grant = Grant(DEFAULT_TRUST_DOMAIN, Kind.AGENT, AGENT.name)
    token, _ = await desk.tokens.create(grant, LONGEST, ADMIN)
    desk.policy = IssuancePolicy((IssuanceRule("agent", lifetime=HOUR),))
    key = generate_key()
    await desk.use(await desk.enroll(token.text, key=key))
    desk.clock.now += KEPT + 2 * HOUR
    assert await desk.ledger.sweep() == 1
    with pytest.raises(EnrollmentError):
        await desk.enroll(token.text, key=key)


@pytest.mark.parametrize("wrong", ["malformed", "spent", "in use", "ended", "other name", "other kind"])
async def test_a_token_that_does_not_admit_does_not_say_why(desk: Desk, wrong: str) -> None:
    token, key, identity = await desk.token(), generate_key(), AGENT
    match wrong:
        case "malformed":
            token = token[:-1]
        case "spent":
            await desk.enroll(token)
        case "in use":
            await desk.use(await desk.enroll(token, key=key))
        case "ended":
            desk.clock.now += HOUR
        case "other name":
            identity = OTHER
        case "other kind":
            identity = Identity.parse_short("client/agent-7")
    held = len(await desk.engine.scan(CERTIFICATES))
    with pytest.raises(EnrollmentError) as refused:
        await desk.enroll(token, identity, key)
    assert str(refused.value) == REFUSED
    assert len(await desk.engine.scan(CERTIFICATES)) == held


async def test_a_spent_token_is_not_told_about_the_request(desk: Desk) -> None:
    token = await desk.token()
    await desk.enroll(token)
    with pytest.raises(EnrollmentError):
        await desk.enroll(token, request=b"nonsense")


async def test_of_many_who_redeem_one_token_at_once_one_does(desk: Desk) -> None:
    token = await desk.token()
    outcomes = await asyncio.gather(*(desk.enroll(token) for _ in range(10)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["EnrollmentError"] * 9 + ["Issued"]
    assert len(await desk.ledger.held(AGENT)) == 1


async def test_many_with_one_pattern_at_once_all_get_theirs(desk: Desk) -> None:
    token = await desk.token("edge-*", uses=3)
    names = [Identity.parse_short(f"agent/edge-{number}") for number in range(3)]
    outcomes = await asyncio.gather(*(desk.enroll(token, name) for name in names))
    assert all(isinstance(outcome, Issued) for outcome in outcomes)


# What is wrong with the request is said, to whoever has a good token, which is not spent by it.


def csr(
    identity: Identity = AGENT,
    *extensions: x509.ExtensionType,
    key: PrivateKey | None = None,
    common_name: str = "",
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name or identity.name)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key or generate_key(), hashes.SHA256()).public_bytes(Encoding.DER)


def forged() -> bytes:
    der = bytearray(csr())
    der[-1] ^= 1
    return bytes(der)


def san(*names: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.DNSName(name) for name in names])


def uri(name: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name)])


def weak_rsa() -> PrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - that is the point


LARGE = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), bytes(MAX_REQUEST_BYTES))
CA = x509.BasicConstraints(ca=True, path_length=None)
SERVER = "control-plane.parallax.local"
URI = "spiffe://parallax.local/service/control-plane"

# What is asked for, what that is, and what is said about it.
REQUESTS: dict[str, tuple[Callable[[], bytes], type[ParallaxError], str]] = {
    "other name": (lambda: csr(common_name="agent-8"), NotAuthorized, "subject 'agent-8'"),
    "control plane": (lambda: csr(AGENT, san(SERVER)), NotAuthorized, f"name '{SERVER}'"),
    "control plane's uri": (lambda: csr(AGENT, uri(URI)), NotAuthorized, f"name '{URI}'"),
    "localhost": (lambda: csr(AGENT, san("localhost")), NotAuthorized, "name 'localhost'"),
    "wildcard": (lambda: csr(AGENT, san("*.agents.parallax.local")), NotAuthorized, r"name '\*.agents"),
    "ca": (lambda: csr(AGENT, CA), InvalidRequest, "CA:TRUE"),
    "bad signature": (forged, InvalidRequest, "not signed"),
    "rsa-1024": (lambda: csr(key=weak_rsa()), InvalidRequest, "1024 bits"),
    "secp256k1": (
        lambda: csr(key=ec.generate_private_key(ec.SECP256K1())),
        InvalidRequest,
        "secp256k1",
    ),
    "large": (lambda: csr(AGENT, LARGE), InvalidRequest, "bytes, more than"),
    "nonsense": (lambda: b"nonsense", InvalidRequest, "not a certificate request"),
}


@pytest.mark.parametrize("wrong", REQUESTS)
async def test_a_request_that_cannot_be_granted_is_refused_with_its_reason(desk: Desk, wrong: str) -> None:
    make, error, text = REQUESTS[wrong]
    token = await desk.token()
    with pytest.raises(error, match=text):
        await desk.enroll(token, request=make())
    await desk.enroll(token)


@pytest.mark.parametrize("wrong", REQUESTS)
async def test_without_a_good_token_no_reason_is_given(desk: Desk, wrong: str) -> None:
    token = await desk.token()
    await desk.enroll(token)
    with pytest.raises(EnrollmentError) as refused:
        await desk.enroll(token, request=REQUESTS[wrong][0]())
    assert str(refused.value) == REFUSED


async def test_the_key_of_another_identity_is_refused(desk: Desk) -> None:
    key = generate_key()
    await desk.enroll(await desk.token(), key=key)
    with pytest.raises(InvalidRequest, match="another identity's"):
        await desk.enroll(await desk.token("agent-8"), OTHER, key)


async def test_a_key_that_has_a_certificate_is_not_used_on(desk: Desk) -> None:
    key = generate_key()
    await desk.enroll(await desk.token(), key=key)
    with pytest.raises(InvalidRequest, match="there is a certificate for that key"):
        await desk.enroll(await desk.token(), key=key)
    assert len(await desk.ledger.uses(key_id(key.public_key()).hex())) == 1


async def test_a_pattern_takes_nobodys_name(desk: Desk) -> None:
    await desk.enroll(await desk.token())
    token = await desk.token("agent-*", uses=2)
    with pytest.raises(NotAuthorized, match="has a certificate already"):
        await desk.enroll(token)
    await desk.enroll(token, OTHER)


async def test_a_pattern_makes_no_administrator(desk: Desk) -> None:
    admin = Identity.parse_short("client/admin")
    with pytest.raises(NotAuthorized, match="needs a token for this name alone"):
        await desk.enroll(await desk.token("adm*", Kind.CLIENT), admin)
    await desk.enroll(await desk.token("admin", Kind.CLIENT), admin)


async def test_who_is_not_admitted_is_not_enrolled(desk: Desk) -> None:
    desk.revocations.cut(AGENT, WITHDRAWN)
    token = await desk.token()
    with pytest.raises(Revoked):
        await desk.enroll(token)
    desk.revocations.cut(AGENT, NOW)
    await desk.enroll(token)


# Without a token.


async def ask(desk: Desk, identity: Identity = AGENT, key: PrivateKey | None = None) -> Issued | Pending:
    request = new_request(identity, key or generate_key())
    return await desk.enrollment.request(Application(identity, request, "192.0.2.7"))


async def test_who_was_approved_gets_that_name_for_that_key(desk: Desk) -> None:
    key = generate_key()
    waiting = await ask(desk, key=key)
    assert isinstance(waiting, Pending)
    assert waiting.fingerprint == key_id(key.public_key()).hex()
    assert await ask(desk, key=key) == waiting  # asked again
    await desk.approvals.approve(fingerprint_of(key), {"zone": "a"}, ADMIN)
    assert desk.approvals.pending() == []
    issued = await ask(desk, key=key)
    assert isinstance(issued, Issued)
    assert issued.chain[0].public_key() == key.public_key()
    assert desk.grants.labels_of(AGENT) == {"zone": "a"}
    assert isinstance(await ask(desk, key=key), Issued)  # the answer was lost
    await desk.use(issued)
    with pytest.raises(EnrollmentError, match="used or revoked already"):
        await ask(desk, key=key)


async def test_an_approval_is_for_no_other_key(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    assert isinstance(await ask(desk, key=generate_key()), Pending)


async def test_an_approval_is_for_no_other_name(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    assert isinstance(await ask(desk, OTHER, key), Pending)


async def test_what_was_shown_is_what_is_approved(desk: Desk) -> None:
    """Else a key could be given another name between the look and the word."""
    key = generate_key()
    await ask(desk, key=key)
    with pytest.raises(InvalidRequest, match="waits to be approved as"):
        await ask(desk, OTHER, key)


@pytest.mark.parametrize("waiting", [1, 2])
async def test_a_name_alone_approves_nobody(desk: Desk, waiting: int) -> None:
    """Nor where one alone waits under it: he may be another than the one who is meant."""
    asked = [await ask(desk) for _ in range(waiting)]
    with pytest.raises(InvalidRequest, match="is no fingerprint: compare that of the key with what the host"):
        await desk.approvals.approve("agent/agent-7", {}, ADMIN)
    assert desk.approvals.pending() == asked


async def test_of_two_who_wait_under_one_name_the_fingerprint_says_which(desk: Desk) -> None:
    first, second = await ask(desk), await ask(desk)
    assert isinstance(first, Pending)
    assert isinstance(second, Pending)
    with pytest.raises(InvalidRequest, match="2 with different keys wait as 'agent/agent-7'"):
        await desk.approvals.reject("agent/agent-7", ADMIN)
    assert await desk.approvals.approve(f"sha256:{second.fingerprint}", {}, ADMIN) == second
    assert await desk.approvals.approve(first.fingerprint[:16], {}, ADMIN) == first


@pytest.mark.parametrize("fingerprint", ["0" * 16, "0" * 64, f"sha256:{'0' * 64}"])
async def test_nobody_is_approved_by_a_key_that_does_not_wait(desk: Desk, fingerprint: str) -> None:
    await ask(desk)
    with pytest.raises(NoSuchAgent):
        await desk.approvals.approve(fingerprint, {}, ADMIN)


@pytest.mark.parametrize("which", ["agent-7", "", "sha256:", "sha256:agent-7", "0" * 15 + "g", "A" * 64])
async def test_what_is_no_fingerprint_approves_and_rejects_nobody(desk: Desk, which: str) -> None:
    pending = await ask(desk)
    for decide in (desk.approvals.approve(which, {}, ADMIN), desk.approvals.reject(which, ADMIN)):
        with pytest.raises(InvalidRequest, match="is no fingerprint"):
            await decide
    assert desk.approvals.pending() == [pending]


@pytest.mark.parametrize("digits", [1, 8, 15])
async def test_few_digits_of_a_fingerprint_say_nothing_even_where_nobody_else_has_them(
    desk: Desk, digits: int
) -> None:
    pending = await ask(desk)
    assert isinstance(pending, Pending)
    for which in (pending.fingerprint[:digits], f"sha256:{pending.fingerprint[:digits]}"):
        with pytest.raises(InvalidRequest, match="state 16 digits at least"):
            await desk.approvals.approve(which, {}, ADMIN)
    assert desk.approvals.pending() == [pending]


async def test_a_beginning_that_two_keys_share_is_neither(desk: Desk) -> None:
    approvals, same = desk.approvals, "0123456789abcdef"
    for tail, name in (("0", AGENT), ("1", OTHER)):
        approvals.ask(name, f"{same}{tail * 48}", "10.0.0.1")
    with pytest.raises(InvalidRequest, match="2 with different keys wait"):
        await approvals.approve(same, {}, ADMIN)
    assert (await approvals.approve(f"{same}1", {}, ADMIN)).identity == OTHER


async def test_who_was_rejected_is_told_and_waits_no_more(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    await desk.approvals.reject("agent/agent-7", ADMIN)
    with pytest.raises(EnrollmentError, match="has rejected"):
        await ask(desk, key=key)
    assert desk.approvals.pending() == []
    desk.clock.now += HOUR
    assert isinstance(await ask(desk, key=key), Pending)


async def test_an_approval_is_taken_back_until_a_certificate_was_issued_by_it(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    await desk.approvals.reject(AGENT.short, ADMIN)
    with pytest.raises(EnrollmentError, match="has rejected"):
        await ask(desk, key=key)
    other = generate_key()
    await ask(desk, key=other)
    await desk.approvals.approve(fingerprint_of(other), {}, ADMIN)
    assert isinstance(await ask(desk, key=other), Issued)
    with pytest.raises(InvalidTransition, match="parallax certs revoke agent/agent-7"):
        await desk.approvals.reject(AGENT.short, ADMIN)
    later = await ask(desk)
    assert await desk.approvals.reject(AGENT.short, ADMIN) == later


async def test_of_an_approval_and_a_rejection_at_once_the_rejection_stays(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    await asyncio.gather(
        desk.approvals.approve(fingerprint_of(key), {}, ADMIN), desk.approvals.reject(AGENT.short, ADMIN)
    )
    with pytest.raises(EnrollmentError, match="has rejected"):
        await ask(desk, key=key)


async def test_requests_and_approvals_end(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    desk.clock.now += HOUR
    assert desk.approvals.pending() == []
    await ask(desk, key=key)
    await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    desk.clock.now += HOUR
    assert isinstance(await ask(desk, key=key), Pending)
    assert await desk.approvals.sweep() == 1
    assert await desk.approvals.sweep() == 0


async def test_those_who_wait_fill_nobodys_memory(desk: Desk) -> None:
    for number in range(MAX_OF_SOURCE):
        desk.approvals.ask(AGENT, f"{number:064x}", "2001:db8::1")
    with pytest.raises(Unavailable):
        desk.approvals.ask(AGENT, "f" * 64, "2001:db8::2")  # one subscriber
    desk.approvals.ask(AGENT, "0" * 64, "2001:db8::2")  # waits already
    for number in range(MAX_OF_SOURCE, MAX_PENDING):
        desk.approvals.ask(AGENT, f"{number:064x}", f"192.0.2.{number // MAX_OF_SOURCE}")
    with pytest.raises(Unavailable):
        desk.approvals.ask(AGENT, "f" * 64, "198.51.100.1")


async def test_an_approval_outlives_the_process(desk: Desk) -> None:
    key = generate_key()
    await ask(desk, key=key)
    await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    assert isinstance(await ask(Desk(desk.engine, desk.clock, desk.authority), key=key), Issued)


@pytest.mark.parametrize("wrong", REQUESTS)
async def test_what_nobody_could_approve_does_not_wait(desk: Desk, wrong: str) -> None:
    make, error, text = REQUESTS[wrong]
    with pytest.raises(error, match=text):
        await desk.enrollment.request(Application(AGENT, make(), "192.0.2.7"))
    assert desk.approvals.pending() == []


async def test_no_service_waits(desk: Desk) -> None:
    with pytest.raises(NotAuthorized, match="a service is not enrolled"):
        await ask(desk, Identity.parse_short("service/control-plane"))


async def test_a_key_of_somebody_else_does_not_wait(desk: Desk) -> None:
    key = generate_key()
    await desk.enroll(await desk.token(), key=key)
    with pytest.raises(InvalidRequest, match="another identity's"):
        await ask(desk, OTHER, key)


async def test_who_is_not_admitted_does_not_wait(desk: Desk) -> None:
    desk.revocations.cut(AGENT, WITHDRAWN)
    with pytest.raises(Revoked):
        await ask(desk)


async def test_labels_are_not_granted_to_who_is_revoked_at_that_moment(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would be there still when he is reinstated."""
    record_with = desk.ledger.record_with

    async def late(*what: Any) -> IssuedCertificate:
        await desk.engine.commit(Event("test"), [desk.grants.end(AGENT)])
        desk.revocations.cut(AGENT, WITHDRAWN)
        return await record_with(*what)

    monkeypatch.setattr(desk.ledger, "record_with", late)
    with pytest.raises(Revoked):
        await desk.enroll(await desk.token(zone="a"))
    await desk.grants.load()
    assert desk.grants.labels_of(AGENT) == {}


async def test_a_key_that_is_pinned_for_another_identity_gets_no_certificate_nor_waits_for_one(
    desk: Desk,
) -> None:
    key, own = generate_key(), generate_key()
    for pinned, who in ((key, OTHER), (own, AGENT)):
        write = await desk.ledger.pinning(pinned.public_key(), who, is_pinned=True)
        await desk.engine.commit(Event("test"), [write])
    token = await desk.token()
    with pytest.raises(InvalidRequest, match="the key is that of another identity's certificate"):
        await desk.enroll(token, key=key)
    with pytest.raises(InvalidRequest, match="the key is that of another identity's certificate"):
        await desk.enrollment.request(Application(AGENT, new_request(AGENT, key), "192.0.2.7"))
    assert not desk.approvals.pending()
    await desk.enroll(token, key=own)


# Devices, which have no name.


def fingerprint_of(key: PrivateKey) -> str:
    return key_id(key.public_key()).hex()


async def allot(desk: Desk, token: str | None, key: PrivateKey) -> Identity:
    return await desk.enrollment.allot(token, fingerprint_of(key), DEFAULT_TRUST_DOMAIN, "192.0.2.7")


async def test_a_device_is_allotted_a_name_and_the_same_again_for_the_same_key(desk: Desk) -> None:
    token, key = await desk.token(ALLOTTED, zone="a"), generate_key()
    named = await allot(desk, token, key)
    assert re.fullmatch("[0-9]{8}", named.name)
    assert await allot(desk, token, key) == named
    issued = await desk.enroll(token, named, key)
    assert await allot(desk, token, key) == named
    assert (await desk.enroll(token, named, key)).chain != issued.chain  # the answer may have been lost
    assert desk.grants.labels_of(named) == {"zone": "a"}


async def test_a_token_that_allots_a_name_admits_nobody_by_another(desk: Desk) -> None:
    token, key = await desk.token(ALLOTTED), generate_key()
    with pytest.raises(EnrollmentError, match=REFUSED):
        await desk.enroll(token, AGENT, key)
    named = await allot(desk, token, key)
    namesake = Identity(DEFAULT_TRUST_DOMAIN, Kind.CLIENT, named.name)
    for who, whose in ((AGENT, key), (namesake, key), (named, generate_key())):
        with pytest.raises(EnrollmentError, match=REFUSED):
            await desk.enroll(token, who, whose)
    await desk.enroll(token, named, key)


async def test_a_token_allots_as_many_names_as_it_has_uses_and_never_one_twice(desk: Desk) -> None:
    token = await desk.token(ALLOTTED, uses=20)
    names = await asyncio.gather(*(allot(desk, token, generate_key()) for _ in range(3)))
    names += [await allot(desk, token, generate_key()) for _ in range(17)]
    assert len(set(names)) == 20
    with pytest.raises(EnrollmentError, match=REFUSED):
        await allot(desk, token, generate_key())


async def test_an_allotted_name_is_not_for_whoever_may_choose_one_not_even_after_a_restart(
    desk: Desk,
) -> None:
    token, key = await desk.token(ALLOTTED), generate_key()
    named = await allot(desk, token, key)
    some = await desk.token(f"{named.name[:4]}*")
    for _ in range(2):
        with pytest.raises(NotAuthorized, match="is allotted already"):
            await desk.enroll(some, named)
        with pytest.raises(NotAuthorized, match="is allotted already"):
            await register(desk, some, self_signed(named, generate_key()), named)
        await desk.grants.load()
    await desk.enroll(token, named, key)
    with pytest.raises(NotAuthorized, match="has a certificate already"):
        await desk.enroll(some, named)


@pytest.mark.parametrize("which", ["of a name", "unknown", "ended"])
async def test_a_token_that_allots_nothing_says_what_all_say(desk: Desk, which: str) -> None:
    token = await desk.token("agent-7" if which == "of a name" else ALLOTTED)
    if which == "unknown":
        token = Token.generate().text
    if which == "ended":
        desk.clock.now += HOUR
    with pytest.raises(EnrollmentError, match=REFUSED):
        await allot(desk, token, generate_key())


async def test_a_device_without_a_token_keeps_its_name_while_it_waits_and_once_it_is_approved(
    desk: Desk,
) -> None:
    key = generate_key()
    named = await allot(desk, None, key)
    application = Application(named, new_request(named, key), "192.0.2.7")
    assert isinstance(await desk.enrollment.request(application), Pending)
    assert await allot(desk, None, key) == named
    await desk.approvals.approve(fingerprint_of(key), {}, ADMIN)
    assert await allot(desk, None, key) == named
    assert isinstance(await desk.enrollment.request(application), Issued)


async def test_a_name_that_was_somebodys_is_not_allotted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [Identity.parse_short(f"agent/0000000{number}") for number in range(3)]
    await desk.enroll(await desk.token(taken[0].name), taken[0])
    desk.revocations.cut(taken[1], NOW)  # and reinstated since
    named = iter([*(each.name for each in taken), "00000007"])
    monkeypatch.setattr(enrollment_module, "new_name", lambda: next(named))
    waiting = Application(taken[2], new_request(taken[2], generate_key()), "192.0.2.7")
    await desk.enrollment.request(waiting)
    assert (await allot(desk, await desk.token(ALLOTTED), generate_key())).name == "00000007"


# Certificates that their holders sign themselves.


def self_signed(
    who: Identity, key: PrivateKey, days: int = 30, signer: PrivateKey | None = None
) -> x509.Certificate:
    profile, serial = LeafProfile(timedelta(days=days), sans=()), x509.random_serial_number()
    template = self_signed_template(who, key.public_key(), profile, NOW, serial)
    return template.sign(signer or key, hashes.SHA256())


async def register(
    desk: Desk, token: str | None, certificate: x509.Certificate, who: Identity = AGENT
) -> Pinned | Pending:
    return await desk.enrollment.register(token, who, certificate, "192.0.2.7")


async def test_a_token_pins_one_certificate_and_again_it_changes_nothing(desk: Desk) -> None:
    token, certificate = await desk.token(zone="a"), self_signed(AGENT, generate_key())
    pinned = await register(desk, token, certificate)
    assert isinstance(pinned, Pinned)
    assert pinned.by == f"token {token.split('_')[1]}"
    assert await register(desk, token, certificate) == pinned
    assert desk.grants.labels_of(AGENT) == {"zone": "a"}
    with pytest.raises(EnrollmentError, match=REFUSED):
        await register(desk, token, self_signed(AGENT, generate_key()))
    with pytest.raises(EnrollmentError, match=REFUSED):
        await desk.enroll(token, key=generate_key())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("the name in it", InvalidRequest),
        ("the name asked for", EnrollmentError),
        ("signed by a CA", InvalidRequest),
        ("longer than anybody issues", NotAuthorized),
        ("expired", InvalidRequest),
        ("revoked", Revoked),
        ("from before it was reinstated", Revoked),
        ("not signed by its key", InvalidRequest),
        ("no token", EnrollmentError),
        ("the key is another's", InvalidRequest),
    ],
)
async def test_a_certificate_that_cannot_be_pinned_spends_no_token(
    desk: Desk, wrong: str, error: type[ParallaxError]
) -> None:
    token, key = await desk.token(), generate_key()
    certificate, who = self_signed(AGENT, key), AGENT
    match wrong:
        case "the name in it":
            certificate = self_signed(OTHER, key)
        case "the name asked for":
            certificate, who = self_signed(OTHER, key), OTHER
        case "signed by a CA":
            (certificate,) = desk.authority.issue(AGENT, key.public_key(), LeafProfile(), NOW).chain
        case "longer than anybody issues":
            certificate = self_signed(AGENT, key, days=3650)
        case "expired":
            certificate = self_signed(AGENT, key, days=1)
            grant = Grant(DEFAULT_TRUST_DOMAIN, Kind.AGENT, "agent-7")
            token = (await desk.tokens.create(grant, 48 * HOUR, ADMIN))[0].text
            desk.clock.now = NOW + 25 * HOUR
        case "from before it was reinstated":
            desk.revocations.cut(AGENT, NOW + HOUR / 2)
        case "not signed by its key":
            certificate = self_signed(AGENT, key, signer=generate_key())
        case "revoked":
            desk.revocations.cut(AGENT, WITHDRAWN)
        case "the key is another's":
            await desk.enroll(await desk.token("agent-8"), OTHER, key)
    with pytest.raises(error):
        await register(desk, Token.generate().text if wrong == "no token" else token, certificate, who)
    assert not desk.pinning.has(who)
    desk.revocations.cut(AGENT, NOW - HOUR)
    fresh = self_signed(AGENT, generate_key(), days=60)
    assert isinstance(await register(desk, token, fresh), Pinned)


async def test_what_is_pinned_is_somebodys_name(desk: Desk) -> None:
    certificate = self_signed(AGENT, generate_key())
    await desk.pinning.pin(AGENT, certificate.public_bytes(Encoding.DER), Change(ADMIN))
    token = await desk.token("agent-*")
    with pytest.raises(NotAuthorized, match="has a certificate already"):
        await desk.enroll(token)
    with pytest.raises(NotAuthorized, match="has a certificate already"):
        await register(desk, token, self_signed(AGENT, generate_key()))


@pytest.mark.parametrize("used", [True, False])
async def test_a_token_does_not_bring_back_a_pin_that_was_taken_out(desk: Desk, used: bool) -> None:  # noqa: FBT001
    token, certificate = await desk.token(), self_signed(AGENT, generate_key())
    await register(desk, token, certificate)
    peer = authenticate_pinned(certificate, desk.store.pins, DEFAULT_TRUST_DOMAIN, NOW)
    if used:
        await desk.see(peer, certificate)
    await desk.pinning.unpin(AGENT, "", Change(ADMIN))
    with pytest.raises(EnrollmentError, match=REFUSED):
        await register(desk, token, certificate)
    assert not desk.pinning.has(AGENT)


async def test_where_the_port_has_no_room_it_is_pinned_to_be_exchanged(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pin_index, "MAX_ON_PORT", 1)
    first = await register(desk, await desk.token("agent-8"), self_signed(OTHER, generate_key()), OTHER)
    second = await register(desk, await desk.token(), self_signed(AGENT, generate_key()))
    assert isinstance(first, Pinned)
    assert isinstance(second, Pinned)
    assert [desk.enrollment.is_on_port(each) for each in (first, second)] == [True, False]


async def test_where_as_many_are_pinned_as_may_be_no_token_is_spent(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "MAX_PINS", 1)
    await register(desk, await desk.token("agent-8"), self_signed(OTHER, generate_key()), OTHER)
    token = await desk.token()
    with pytest.raises(Unavailable, match="as many as may be: have one issued"):
        await register(desk, token, self_signed(AGENT, generate_key()))
    assert not desk.pinning.has(AGENT)
    await desk.enroll(token)


async def test_what_is_approved_is_pinned_for_that_key_alone(desk: Desk) -> None:
    key = generate_key()
    certificate = self_signed(AGENT, key)
    assert isinstance(await register(desk, None, certificate), Pending)
    await desk.approvals.approve(fingerprint_of(key), {"zone": "a"}, ADMIN)
    assert isinstance(await register(desk, None, self_signed(AGENT, generate_key())), Pending)
    assert isinstance(await register(desk, None, certificate), Pinned)
    assert desk.grants.labels_of(AGENT) == {"zone": "a"}
