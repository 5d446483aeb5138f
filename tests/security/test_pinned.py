"""A self-signed certificate counts if it is pinned itself: not its key, not its name, not what it signed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import Credentials, CredentialStore, Served, check_usable
from parallax.security.errors import (
    Expired,
    IdentityError,
    InvalidTransition,
    Revoked,
    UntrustedChain,
    VerificationError,
    WrongIdentity,
)
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.keys import MAX_RSA_BITS, generate_key, key_id
from parallax.security.pinned import (
    MAX_ON_PORT,
    NO_PINS,
    Pin,
    Pins,
    authenticate_pinned,
    check_fits,
    check_self_signed,
)
from parallax.security.profiles import LeafProfile, self_signed_template
from parallax.security.verification import Peer, authenticate

AGENT = Identity.parse_short("agent/agent-1")
OTHER = Identity.parse_short("agent/agent-2")
DAY = timedelta(days=1)

Device = Callable[..., Any]


@pytest.fixture(scope="session")
def device(forge: Any) -> Device:
    """A device's certificate and key, as `openssl req -x509` makes them; each argument changes one thing."""

    def make(**changes: Any) -> Any:
        key = changes.pop("key", None) or ec.generate_private_key(ec.SECP256R1())
        plain: dict[str, Any] = {"uris": (), "dns": (), "ca": True, "usages": None, "key_usage": None}
        if changes.pop("named", True):
            public = key.public_key()
            plain["extra"] = [
                (x509.SubjectKeyIdentifier.from_public_key(public), False),
                (x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False),
            ]
        return forge(self_signed=True, key=key, **(plain | changes))

    return make


def admit(leaf: x509.Certificate, now: datetime, *pins: Pin) -> Peer:
    return authenticate_pinned(leaf, Pins(pins), DEFAULT_TRUST_DOMAIN, now)


def test_it_counts_as_issued_when_it_was_pinned_unless_it_says_earlier(device: Device, now: datetime) -> None:
    leaf = device(uris=[str(AGENT)]).certificate
    said = admit(leaf, now, Pin(AGENT, leaf)).issued_at
    hour = timedelta(hours=1)
    assert admit(leaf, now, Pin(AGENT, leaf, said - hour)).issued_at == said - hour
    assert admit(leaf, now, Pin(AGENT, leaf, said + hour)).issued_at == said


def test_a_pinned_certificate_proves_its_identity_until_it_ends(device: Device, now: datetime) -> None:
    leaf = device().certificate
    pin = Pin(AGENT, leaf)
    peer = admit(leaf, now, Pin(OTHER, device(common_names=["agent-2"]).certificate), pin)
    assert (peer.identity, peer.serial, peer.fingerprint) == (AGENT, leaf.serial_number, pin.fingerprint)
    assert (peer.not_after, peer.issuer_key) == (leaf.not_valid_after_utc, key_id(leaf.public_key()))


def test_both_pins_of_an_identity_do(device: Device, now: datetime) -> None:
    leaves = [device().certificate for _ in range(2)]
    pins = [Pin(AGENT, leaf) for leaf in leaves]
    assert [admit(leaf, now, *pins).identity for leaf in leaves] == [AGENT, AGENT]


def test_one_of_version_1_is_as_good(device: Device, as_v1: Any, now: datetime) -> None:
    """As `openssl x509 -req -signkey` makes it (OpenSSL 3.0)."""
    made = device()
    leaf = as_v1(made, made.key).certificate
    assert leaf.version is x509.Version.v1
    assert admit(leaf, now, Pin(AGENT, leaf)).identity == AGENT


class TestRefused:
    """The same certificate with one thing wrong."""

    def test_not_pinned(self, device: Device, now: datetime) -> None:
        with pytest.raises(Revoked, match="not pinned"):
            admit(device().certificate, now)

    def test_same_key_and_names_in_another_certificate(self, device: Device, now: datetime) -> None:
        made = device()
        with pytest.raises(Revoked):
            admit(device(key=made.key).certificate, now, Pin(AGENT, made.certificate))

    @pytest.mark.parametrize("moment", [-DAY, 31 * DAY])
    def test_outside_its_validity(self, device: Device, now: datetime, moment: timedelta) -> None:
        leaf = device().certificate
        with pytest.raises(Expired):
            admit(leaf, now + moment, Pin(AGENT, leaf))

    def test_pinned_for_somebody_else(self, device: Device, now: datetime) -> None:
        leaf = device().certificate
        with pytest.raises(WrongIdentity, match=r"it names .*agent-1, not .*agent-2: pin it"):
            admit(leaf, now, Pin(OTHER, leaf))

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"uris": ["spiffe://parallax.local/agent/a", "spiffe://parallax.local/agent/b"]}, IdentityError),
            ({"common_names": ["agent-1", "agent-1"]}, IdentityError),
            ({"common_names": ["Nobody In Particular"]}, IdentityError),
            ({"dns": ["agent-2.agents.parallax.local"]}, IdentityError),
            ({"uris": ["spiffe://elsewhere.local/agent/agent-1"]}, WrongIdentity),
            ({"common_names": [], "uris": ["spiffe://parallax.local/service/control-plane"]}, UntrustedChain),
            ({"common_names": ["control-plane.parallax.local"]}, UntrustedChain),
            ({"key_usage": ["key_cert_sign"]}, UntrustedChain),
            ({"usages": [ExtendedKeyUsageOID.SERVER_AUTH]}, UntrustedChain),
        ],
    )
    def test_whatever_would_be_refused_of_an_issued_one(
        self, device: Device, now: datetime, changes: dict[str, Any], error: type[Exception]
    ) -> None:
        leaf = device(**changes).certificate
        with pytest.raises(error):
            admit(leaf, now, Pin(AGENT, leaf))

    def test_one_of_version_1_with_extensions_behind_which_tls_reads_nothing(
        self, device: Device, as_v1: Any, now: datetime
    ) -> None:
        made = device()
        leaf = as_v1(made, made.key, keep_extensions=True).certificate
        with pytest.raises(UntrustedChain, match="of version 1"):
            admit(leaf, now, Pin(AGENT, leaf))

    @pytest.mark.parametrize("weak", ["rsa-1024", "ed25519", "secp521r1"])
    def test_a_weak_or_unknown_key(self, device: Device, now: datetime, weak: str) -> None:
        keys: dict[str, Callable[[], Any]] = {
            "rsa-1024": lambda: rsa.generate_private_key(65537, 1024),  # noqa: S505 - that is the point
            "ed25519": ed25519.Ed25519PrivateKey.generate,
            "secp521r1": lambda: ec.generate_private_key(ec.SECP521R1()),
        }
        leaf = device(key=keys[weak]()).certificate
        with pytest.raises(VerificationError):
            admit(leaf, now, Pin(AGENT, leaf))


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        (rsa.RSAPublicNumbers(65537, (1 << (MAX_RSA_BITS + 8)) - 1), "8192 are the most"),
        (rsa.RSAPublicNumbers((1 << 63) + 1, (1 << 2048) - 1), "an exponent that is not usual"),
    ],
    ids=["long", "exponent"],
)
def test_a_key_that_costs_too_much_is_refused_before_it_costs_us(
    numbers: rsa.RSAPublicNumbers, why: str, now: datetime
) -> None:
    """Nobody has to have it: only its public half is in the certificate."""
    template = self_signed_template(AGENT, numbers.public_key(), LeafProfile(sans=()), now, 7)
    with pytest.raises(VerificationError, match=why):
        check_self_signed(template.sign(generate_key(), hashes.SHA256()), DEFAULT_TRUST_DOMAIN, now)


@pytest.mark.parametrize("said", [{}, {"ca": False}, {"ca": None}])
@pytest.mark.parametrize("whom", ["agent-1", "agent-2", "control-plane.parallax.local"])
def test_what_a_pinned_certificate_signs_is_believed_by_nobody(
    device: Device, forge: Any, now: datetime, bundle: TrustBundle, said: dict[str, Any], whom: str
) -> None:
    """However the gate sorts it: as self-signed, or as issued."""
    made = device(**said)
    child = forge(issuer=made, common_names=[whom], uris=(), dns=()).certificate
    pins = Pins((Pin(AGENT, made.certificate),))
    with pytest.raises(Revoked):
        authenticate_pinned(child, pins, DEFAULT_TRUST_DOMAIN, now)
    for chain in ([child], [child, made.certificate]):
        with pytest.raises(UntrustedChain):
            authenticate(chain, bundle, DEFAULT_TRUST_DOMAIN, now)


def test_an_issued_certificate_needs_no_pin(forge: Any, now: datetime) -> None:
    with pytest.raises(UntrustedChain, match="not self-signed"):
        check_self_signed(forge().certificate, DEFAULT_TRUST_DOMAIN, now)


class TestPins:
    def test_an_identity_has_two_at_most(self, device: Device) -> None:
        with pytest.raises(InvalidTransition):
            Pins(tuple(Pin(AGENT, device().certificate) for _ in range(3)))

    def test_a_certificate_is_pinned_once(self, device: Device) -> None:
        leaf = device().certificate
        with pytest.raises(InvalidTransition):
            Pins((Pin(AGENT, leaf), Pin(OTHER, leaf)))

    def test_a_port_bears_500(self, device: Device) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        pinned = tuple(
            Pin(Identity.parse_short(f"agent/a{n}"), device(key=key, common_names=[f"a{n}"]).certificate)
            for n in range(MAX_ON_PORT + 1)
        )
        assert parse_certificates(Pins(pinned[:-1]).pem) == tuple(pin.certificate for pin in pinned[:-1])
        with pytest.raises(InvalidTransition):
            Pins(pinned)

    def test_whether_somebody_lost_one(self, device: Device) -> None:
        one, two = (Pin(AGENT, device().certificate) for _ in range(2))
        assert Pins((one, two)).keep_all_of(Pins((one,)))
        assert not Pins((one,)).keep_all_of(Pins((one, two)))
        assert not NO_PINS.keep_all_of(Pins((one,)))


class TestFitting:
    """What could be pinned alone, but not beside these."""

    def test_a_second_one_of_the_same_identity_does(self, device: Device, bundle: TrustBundle) -> None:
        check_fits(Pin(AGENT, device().certificate), [Pin(AGENT, device().certificate)], bundle.roots)

    def test_one_with_the_key_of_another_identity(self, device: Device, bundle: TrustBundle) -> None:
        made = device()
        other = device(key=made.key, common_names=["agent-2"])
        with pytest.raises(UntrustedChain, match=r"agent-1 has the same key"):
            check_fits(Pin(OTHER, other.certificate), [Pin(AGENT, made.certificate)], bundle.roots)

    @pytest.mark.parametrize("unnamed", [0, 1])
    def test_one_that_is_not_told_from_its_namesake(
        self, device: Device, bundle: TrustBundle, unnamed: int
    ) -> None:
        pins = [Pin(AGENT, device(named=number != unnamed).certificate) for number in range(2)]
        with pytest.raises(UntrustedChain, match="same subject"):
            check_fits(pins[0], pins[1:], bundle.roots)

    def test_unless_neither_can_be_taken_for_a_ca(self, device: Device, bundle: TrustBundle) -> None:
        pins = [Pin(AGENT, device(named=False, key_usage=["digital_signature"]).certificate) for _ in "12"]
        check_fits(pins[0], pins[1:], bundle.roots)

    def test_one_of_the_same_key_again(self, device: Device, bundle: TrustBundle) -> None:
        made = device()
        with pytest.raises(UntrustedChain, match="same subject"):
            check_fits(
                Pin(AGENT, device(key=made.key).certificate), [Pin(AGENT, made.certificate)], bundle.roots
            )

    def test_one_that_stands_in_the_way_of_a_ca(self, device: Device, root: Any, bundle: TrustBundle) -> None:
        uris = [str(AGENT)]
        for wrong in ({"subject": root.certificate.subject, "uris": uris}, {"key": root.key}):
            with pytest.raises(UntrustedChain, match="of a CA"):
                check_fits(Pin(AGENT, device(**wrong).certificate), [], bundle.roots)


class TestOwn:
    """A device's own certificate is as good as an issued one, to itself."""

    def test_is_usable(self, device: Device, bundle: TrustBundle, now: datetime) -> None:
        made = device()
        check_usable(Credentials((made.certificate,), made.key, bundle), AGENT, now)

    def test_is_not_for_somebody_else(self, device: Device, bundle: TrustBundle, now: datetime) -> None:
        made = device()
        with pytest.raises(WrongIdentity):
            check_usable(Credentials((made.certificate,), made.key, bundle), OTHER, now)

    def test_is_not_for_a_service(self, device: Device, bundle: TrustBundle, now: datetime) -> None:
        made = device(common_names=["control-plane.parallax.local"])
        service = Identity.parse_short("service/control-plane")
        with pytest.raises(UntrustedChain, match="is a service"):
            check_usable(Credentials((made.certificate,), made.key, bundle), service, now)

    def test_is_not_for_ever(self, device: Device, bundle: TrustBundle, now: datetime) -> None:
        made = device()
        with pytest.raises(Expired):
            check_usable(Credentials((made.certificate,), made.key, bundle), AGENT, now + 31 * DAY)


async def test_a_store_tells_servers_of_pins_and_nobody_else(
    device: Device, forge: Any, bundle: TrustBundle, now: datetime
) -> None:
    made = forge()
    store = CredentialStore(AGENT, Credentials((made.certificate,), made.key, bundle), now)
    before, pins = store.served, Pins((Pin(OTHER, device(common_names=["agent-2"]).certificate),))
    store.pin(pins)
    assert await store.served_other(before) == Served(before.credentials, pins)
    assert store.served.roots_pem == bundle.pem + pins.pem
    assert store.current is before.credentials
    assert pins.pem not in store.current.bundle_pem
