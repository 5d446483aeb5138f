"""Reading certificates whose parts are malformed: always an error of ours, never a crash."""

from __future__ import annotations

import base64
import warnings
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.certificate import find_extension, is_signed_by, subject_of
from parallax.security.errors import ConfigError, ParallaxError, UntrustedChain, VerificationError
from parallax.security.keys import generate_key
from parallax.security.verification import authenticate, identity_of

if TYPE_CHECKING:
    from tests.security.conftest import Forge, Made

SAN = x509.SubjectAlternativeName.oid


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",  # no DER
        b"\x30\x03\x86\x01\xff",  # a URI that is not ASCII
        b"\x30\x02\x86",  # cut short
        b"\x30\x04\xa3\x02\x30\x00",  # an X.400 address
        b"\x30\x05\x87\x03\x01\x02\x03",  # an IP address of three bytes
    ],
)
def test_malformed_san_is_refused(forge: Forge, bundle: TrustBundle, now: datetime, content: bytes) -> None:
    leaf = forge(uris=[], dns=[], extra=[(x509.UnrecognizedExtension(SAN, content), False)]).certificate
    with pytest.raises(UntrustedChain, match=r"^malformed extension: "):
        find_extension(leaf, x509.SubjectAlternativeName)
    with pytest.raises(UntrustedChain, match=r"^malformed extension: "):
        authenticate([leaf], bundle, "parallax.local", now)


def test_two_san_extensions_are_refused(forge: Forge) -> None:
    """RFC 5280 §4.2: never two of a kind; one reader would take the first, another the last."""
    extra = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), b"\x30\x00")
    der = forge(extra=[(extra, False)]).certificate.public_bytes(Encoding.DER)
    leaf = x509.load_der_x509_certificate(der.replace(b"\x06\x03\x55\x1d\x63", b"\x06\x03\x55\x1d\x11"))
    with pytest.raises(UntrustedChain, match=r"^malformed extension: 'Duplicate "):
        identity_of(leaf, "parallax.local")


def test_malformed_root_is_refused(forge: Forge) -> None:
    constraints = x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"\xff")
    root = forge.authority("Broken CA", ca=None, extra=[(constraints, True)]).certificate
    with pytest.raises(
        ConfigError, match=r"^'CN=Broken CA' cannot be a root of the trust bundle: malformed extension"
    ):
        TrustBundle((root,))


def test_x509_v2_is_refused_as_damaged(root: Made) -> None:
    der = root.certificate.public_bytes(Encoding.DER).replace(
        b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01", 1
    )
    pem = certificates_to_pem([root.certificate])
    broken = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(ConfigError, match=r"^not a certificate \(PEM\), or a damaged one$"):
        parse_certificates(pem + broken)


@settings(max_examples=300)
@given(data=st.data())
def test_a_certificate_with_any_byte_changed_proves_nothing_else(
    forge_leaf: bytes, bundle: TrustBundle, now: datetime, data: st.DataObject
) -> None:
    """
    Whatever a changed byte makes of it, the answer is an error of ours.

    Or the very same proof: the last bits of a BIT STRING and an ECDSA signature can be encoded in
    more than one way, outside of what is signed.
    """
    position = data.draw(st.integers(0, len(forge_leaf) - 1))
    change = data.draw(st.integers(1, 255))
    der = bytearray(forge_leaf)
    der[position] ^= change
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography warns of names and serials that it accepts
        try:
            leaf = x509.load_der_x509_certificate(bytes(der))
        except (ValueError, x509.InvalidVersion):
            return
        assert subject_of(leaf).isprintable()
        try:
            peer = authenticate([leaf], bundle, "parallax.local", now)
        except ParallaxError:
            return
    original = x509.load_der_x509_certificate(forge_leaf)
    assert leaf.tbs_certificate_bytes == original.tbs_certificate_bytes
    assert peer.serial == original.serial_number


def test_a_common_name_that_is_no_text(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    """A BIT STRING where a text is expected: cryptography raises a TypeError, and only at first use."""
    der = forge(common_names=["agent-1"]).certificate.public_bytes(Encoding.DER)
    text = b"\x0c\x07agent-1"
    leaf = x509.load_der_x509_certificate(der.replace(text, b"\x03" + text[1:]))
    assert subject_of(leaf) == "(malformed subject)"
    with pytest.raises(UntrustedChain, match=r"^malformed subject: "):
        identity_of(leaf, "parallax.local")
    with pytest.raises(UntrustedChain):
        authenticate([leaf], bundle, "parallax.local", now)


@pytest.fixture(scope="module")
def forge_leaf(forge: Forge) -> bytes:
    return forge().certificate.public_bytes(Encoding.DER)


@pytest.mark.parametrize("year", [b"0000", b"0001"])
def test_validity_in_a_year_that_python_does_not_have(
    forge: Forge, bundle: TrustBundle, now: datetime, year: bytes
) -> None:
    leaf = forge(not_after=timedelta(days=365 * 30)).certificate
    end = f"{leaf.not_valid_after_utc:%Y%m%d}".encode()
    der = leaf.public_bytes(Encoding.DER).replace(end, year + end[4:])
    with pytest.raises(VerificationError, match=r"^(malformed validity: |expired at )"):
        authenticate([x509.load_der_x509_certificate(der)], bundle, "parallax.local", now)


def test_a_naive_now_is_our_bug_and_no_verdict(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    with pytest.raises(TypeError, match="offset-naive"):
        authenticate([forge().certificate], bundle, "parallax.local", now.replace(tzinfo=None))


def test_signed_by_needs_name_and_key(forge: Forge, root: Made) -> None:
    leaf = forge().certificate
    assert is_signed_by(leaf, root.certificate)
    assert not is_signed_by(root.certificate, leaf)
    namesake = forge.authority("Parallax Root CA", key=root.key)  # without the organization
    assert not is_signed_by(leaf, namesake.certificate)
    assert not is_signed_by(leaf, forge.authority("Other", key=generate_key()).certificate)
