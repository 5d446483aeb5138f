"""Lists of what an issuer has withdrawn: what is in one, who believes it, and when an entry may leave."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ReasonFlags
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.crl import CRL, LIFETIME, RevokedSerial, issue_crl, next_number, still_listed
from parallax.security.errors import ConfigError, Expired, InvalidRequest, ParallaxError, UntrustedChain
from parallax.security.identity import Identity, Kind
from parallax.security.keys import KeyType, generate_key
from parallax.security.profiles import CLOCK_SKEW, LeafProfile
from tests.security.conftest import Forge, Made

SECOND = timedelta(seconds=1)
MOMENT = datetime(2026, 6, 1, 12, tzinfo=UTC)

CA = CertificateAuthority.create(now=MOMENT)
LISTED = RevokedSerial(5, MOMENT, ReasonFlags.key_compromise)
DER = issue_crl(CA, 1, [LISTED], MOMENT).der
OF_USERS_ALONE = x509.IssuingDistributionPoint(
    full_name=None,
    relative_name=None,
    only_contains_user_certs=True,
    only_contains_ca_certs=False,
    only_some_reasons=None,
    indirect_crl=False,
    only_contains_attribute_certs=False,
)

moments = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)).map(  # noqa: DTZ001
    lambda moment: moment.replace(microsecond=0, tzinfo=UTC)
)
REASONS = [reason for reason in ReasonFlags if reason is not ReasonFlags.remove_from_crl]
reasons = st.sampled_from(REASONS)
revoked_serials = st.builds(RevokedSerial, st.integers(0, 2**160 - 1), moments, reasons)


def entries(crl: CRL) -> dict[int, tuple[datetime, ReasonFlags | None]]:
    """Serial → when and why, as it is written."""
    found: dict[int, tuple[datetime, ReasonFlags | None]] = {}
    for entry in crl.signed:
        reasons = [each.value for each in entry.extensions if isinstance(each.value, x509.CRLReason)]
        assert len(entry.extensions) == len(reasons) <= 1
        found[entry.serial_number] = (entry.revocation_date_utc, reasons[0].reason if reasons else None)
    return found


# What is in it.


def test_it_says_whose_it_is_its_number_and_when_the_next_one_comes(
    authority: CertificateAuthority, now: datetime
) -> None:
    crl = issue_crl(authority, 2**159 - 1, [], now)
    assert crl.signed.issuer == authority.certificate.subject
    assert crl.number == 2**159 - 1
    assert (crl.this_update, crl.next_update) == (now - CLOCK_SKEW, now + LIFETIME)
    key = crl.signed.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert key.key_identifier == own.key_identifier
    assert not any(each.critical for each in crl.signed.extensions)


@given(st.lists(revoked_serials, max_size=20))
def test_it_lists_what_is_revoked_and_nothing_else(revoked: list[RevokedSerial]) -> None:
    """RFC 5280 §5.3.1: a reason that is unspecified is left out."""
    crl = issue_crl(CA, 1, revoked, MOMENT)
    wanted = {
        each.serial: (each.revoked_at, each.reason if each.reason is not ReasonFlags.unspecified else None)
        for each in revoked
    }
    assert entries(crl) == wanted
    assert len(crl) == len(wanted)
    assert all(serial in crl for serial in wanted)


@given(st.integers(0, 2**160 - 1))
def test_what_is_not_revoked_is_not_in_it(serial: int) -> None:
    assert serial not in issue_crl(CA, 1, [], MOMENT)


@given(st.lists(revoked_serials, max_size=5))
def test_it_reads_the_same_as_der_and_as_text(revoked: list[RevokedSerial]) -> None:
    crl = issue_crl(CA, 7, revoked, MOMENT)
    assert CRL.parse(crl.der) == CRL.parse(crl.pem) == crl
    assert crl.pem == crl.signed.public_bytes(Encoding.PEM)


def test_the_order_in_which_they_were_revoked_does_not_show() -> None:
    several = [RevokedSerial(serial, MOMENT) for serial in (5, 2**158, 1, 77)]
    lists = [issue_crl(CA, 1, revoked, MOMENT) for revoked in (several, several[::-1])]
    assert lists[0].signed.tbs_certlist_bytes == lists[1].signed.tbs_certlist_bytes


def test_a_short_lived_one_is_backdated_by_a_tenth_of_its_life() -> None:
    crl = issue_crl(CA, 1, [], MOMENT, timedelta(minutes=1))
    assert (crl.this_update, crl.next_update) == (MOMENT - 6 * SECOND, MOMENT + timedelta(minutes=1))


@pytest.mark.parametrize("serial", [-1, 2**160])
def test_what_no_certificate_has_as_a_serial_number_is_refused(serial: int) -> None:
    with pytest.raises(InvalidRequest, match="20 octets"):
        RevokedSerial(serial, MOMENT)


def test_ten_thousand_are_listed_once_each() -> None:
    crl = issue_crl(CA, 1, [RevokedSerial(serial, MOMENT) for serial in range(10_000)], MOMENT)
    assert len(crl) == 10_000
    assert 9_999 in crl
    assert 10_000 not in crl


@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
@pytest.mark.parametrize("count", [0, 1, 3, 300])
def test_it_is_what_cryptography_makes_of_the_same(key_type: KeyType, count: int) -> None:
    """Octet for octet, but for the signature, which with ECDSA is another each time."""
    ca = CertificateAuthority.create(now=MOMENT, key_type=key_type)
    revoked = [
        RevokedSerial((1 << 8 * (n % 20)) + n, MOMENT + n * timedelta(days=97), each)
        for n, each in zip(range(1, count + 1), itertools.cycle(REASONS), strict=False)
    ]
    crl = issue_crl(ca, 7, revoked, MOMENT)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(crl.issuer)
        .last_update(crl.this_update)
        .next_update(crl.next_update)
    )
    for extension in crl.signed.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    for each in sorted(revoked, key=lambda each: each.serial):
        entry = x509.RevokedCertificateBuilder(each.serial, each.revoked_at.replace(tzinfo=None))
        if each.reason is not ReasonFlags.unspecified:
            entry = entry.add_extension(x509.CRLReason(each.reason), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign(ca.key, hashes.SHA256())
    assert crl.signed.tbs_certlist_bytes == signed.tbs_certlist_bytes
    assert crl.signed.signature_algorithm_oid == signed.signature_algorithm_oid
    assert crl.der == crl.signed.public_bytes(Encoding.DER)
    crl.check(ca.certificate, MOMENT)


# Who may sign one.


def test_a_ca_that_has_expired_signs_none() -> None:
    with pytest.raises(Expired, match="cannot issue"):
        issue_crl(CA, 1, [], CA.certificate.not_valid_after_utc + SECOND)


def test_a_ca_that_is_not_for_it_signs_none_and_nobody_believes_one(forge: Forge, now: datetime) -> None:
    """RFC 5280 §4.2.1.3."""
    not_for_it = forge.authority("Issuing CA", key_usage=("key_cert_sign",))
    with pytest.raises(UntrustedChain, match="lacks cRLSign"):
        issue_crl(ca_of(not_for_it), 1, [], now)
    anyway = issue_crl(ca_of(forge.authority("Issuing CA", key=not_for_it.key)), 1, [], now)
    with pytest.raises(UntrustedChain, match="lacks cRLSign"):
        anyway.check(not_for_it.certificate, now)


def test_a_ca_whose_usage_is_not_restricted_may(forge: Forge, now: datetime) -> None:
    """As `openssl req -x509` makes it."""
    made = forge.authority("Issuing CA", key_usage=None)
    issue_crl(ca_of(made), 1, [], now).check(made.certificate, now)


# Who believes it.


def test_the_list_of_the_issuer_passes_as_long_as_it_is_fresh() -> None:
    """RFC 5280 §5.1.2.5: a CRL past nextUpdate is not fresh."""
    crl = issue_crl(CA, 1, [], MOMENT)
    for good in (crl.this_update, MOMENT, crl.next_update):
        crl.check(CA.certificate, good)
    with pytest.raises(Expired, match="stale since 2026-06-02T12:00:00Z"):
        crl.check(CA.certificate, crl.next_update + SECOND)
    with pytest.raises(Expired, match="not valid before"):
        crl.check(CA.certificate, crl.this_update - SECOND)


def test_the_list_of_another_issuer_is_refused(forge: Forge, now: datetime) -> None:
    crl = issue_crl(ca_of(forge.authority("One CA")), 1, [], now)
    with pytest.raises(UntrustedChain, match=r"not signed by .*Another CA"):
        crl.check(forge.authority("Another CA").certificate, now)


@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
def test_the_list_of_a_namesake_with_another_key_is_refused(
    key_type: KeyType, forge: Forge, now: datetime
) -> None:
    crl = issue_crl(ca_of(forge.authority("One CA", key=generate_key(key_type))), 1, [], now)
    with pytest.raises(UntrustedChain, match="not signed by"):
        crl.check(forge.authority("One CA").certificate, now)


@pytest.mark.parametrize("extension", [x509.DeltaCRLIndicator(1), OF_USERS_ALONE])
def test_a_list_that_may_be_but_a_part_is_refused(
    extension: x509.ExtensionType, authority: CertificateAuthority, now: datetime
) -> None:
    """RFC 5280 §5.2.4 and §5.2.5: both are critical."""
    crl = by_hand(authority, now, extension)
    with pytest.raises(UntrustedChain, match="critical extension"):
        crl.check(authority.certificate, now)


def test_a_list_that_is_signed_with_a_weak_hash_is_refused(forge: Forge, now: datetime) -> None:
    made = forge.authority("Issuing CA", key=generate_key(KeyType.RSA2048))
    strong, weak = (by_hand(ca_of(made), now, algorithm=each) for each in (hashes.SHA256(), hashes.SHA224()))
    strong.check(made.certificate, now)
    with pytest.raises(UntrustedChain, match="not signed by"):
        weak.check(made.certificate, now)


@given(st.binary(max_size=200))
def test_whatever_is_no_list_is_refused_in_words(content: bytes) -> None:
    with pytest.raises(ConfigError, match="not a CRL"):
        CRL.parse(content)


@given(st.integers(0, len(DER) - 1), st.integers(1, 255))
def test_no_change_of_one_byte_is_believed(place: int, change: int) -> None:
    changed = bytearray(DER)
    changed[place] ^= change
    with pytest.raises(ParallaxError):
        CRL.parse(bytes(changed)).check(CA.certificate, MOMENT)


@pytest.mark.parametrize("cut", [2, 50, 200])
def test_half_a_list_is_refused(cut: int) -> None:
    crl = issue_crl(CA, 1, [], MOMENT)
    for half in (crl.der[:-cut], crl.pem[:-cut], crl.der + crl.der[:cut]):
        with pytest.raises(ConfigError, match="not a CRL"):
            CRL.parse(half)


# When an entry may leave, and what the next one is numbered.


def test_a_certificate_that_is_over_leaves_when_everybody_has_seen_it_listed_since() -> None:
    """RFC 5280 §3.3."""
    over = RevokedSerial(1, MOMENT, ends_at=MOMENT)
    seen_by_all = MOMENT + LIFETIME
    assert still_listed([over], None) == (over,)
    assert still_listed([over], MOMENT) == (over,)
    assert still_listed([over], seen_by_all) == (over,)
    assert still_listed([over], seen_by_all + SECOND) == ()


def test_one_of_which_nobody_knows_the_end_stays() -> None:
    unknown = RevokedSerial(1, MOMENT)
    assert still_listed([unknown], MOMENT + timedelta(days=36500)) == (unknown,)


@given(st.integers(0, 2**158), moments)
def test_a_number_is_higher_than_the_one_before_and_of_at_most_20_octets(last: int, now: datetime) -> None:
    assert last < next_number(last, now) < 2**159


def test_a_number_goes_on_after_an_old_backup_was_restored() -> None:
    lost = [next_number(0, MOMENT)]
    for _ in range(50):
        lost.append(next_number(lost[-1], MOMENT + timedelta(hours=len(lost))))
    assert next_number(lost[3], MOMENT + timedelta(hours=100)) > lost[-1]


# What openssl makes of it.


def test_openssl_reads_it_and_refuses_who_is_in_it_and_nobody_else(
    authority: CertificateAuthority, now: datetime, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    openssl = require_tool("openssl")
    good, bad = (leaf(authority, name, now) for name in ("good", "bad"))
    revoked = [RevokedSerial(bad.serial_number, now, ReasonFlags.key_compromise)]
    write(tmp_path, ca=[authority.certificate], good=[good], bad=[bad])
    crl = issue_crl(authority, 4711, revoked, now)
    (tmp_path / "crl.der").write_bytes(crl.der)
    (tmp_path / "crl.pem").write_bytes(crl.pem)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [openssl, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=10
        )

    text = run("crl", "-inform", "DER", "-in", "crl.der", "-noout", "-text").stdout
    for words in ("Version 2 (0x1)", "X509v3 CRL Number", "4711", "Authority Key Id", "Key Compromise"):
        assert words in text
    assert f"Serial Number: {bad.serial_number:X}" in text.replace("Number: 0", "Number: ")
    assert "verify OK" in run("crl", "-in", "crl.pem", "-CAfile", "ca.pem", "-noout").stderr
    check = ("verify", "-crl_check", "-CAfile", "ca.pem", "-CRLfile", "crl.pem")
    assert run(*check, "good.pem").returncode == 0
    refused = run(*check, "bad.pem")
    assert refused.returncode != 0
    assert "certificate revoked" in refused.stderr
    late = str(int((crl.next_update + SECOND).timestamp()))
    assert "CRL has expired" in run(*check, "-attime", late, "good.pem").stderr


def test_openssl_checks_a_whole_chain_with_one_list_from_each_issuer(
    forge: Forge, root: Made, now: datetime, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    openssl = require_tool("openssl")
    made = forge.authority("Issuing CA", issuer=root)
    below = ca_of(made, root.certificate)
    good, bad = (leaf(below, name, now) for name in ("good", "bad"))
    write(tmp_path, root=[root.certificate], below=[made.certificate], good=[good], bad=[bad])
    own = issue_crl(below, 1, [RevokedSerial(bad.serial_number, now)], now).pem
    of_root = issue_crl(ca_of(root), 1, [], now).pem
    withdrawn = issue_crl(ca_of(root), 2, [RevokedSerial(made.certificate.serial_number, now)], now).pem

    def verdict(which: str, *lists: bytes) -> str:
        (tmp_path / "crls.pem").write_bytes(b"".join(lists))
        command = (openssl, "verify", "-crl_check_all", "-CAfile", "root.pem", "-untrusted", "below.pem")
        done = subprocess.run(
            [*command, "-CRLfile", "crls.pem", f"{which}.pem"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        return done.stdout + done.stderr

    assert "good.pem: OK" in verdict("good", own, of_root)
    assert "certificate revoked" in verdict("bad", own, of_root)
    assert "certificate revoked" in verdict("good", own, withdrawn)
    assert "unable to get certificate CRL" in verdict("good", own)


def ca_of(made: Made, root: x509.Certificate | None = None) -> CertificateAuthority:
    assert not isinstance(made.key, Ed25519PrivateKey)
    return CertificateAuthority(made.certificate, made.key, TrustBundle((root or made.certificate,)))


def leaf(authority: CertificateAuthority, name: str, now: datetime) -> x509.Certificate:
    who = Identity("parallax.local", Kind.AGENT, name)
    return authority.issue(who, generate_key().public_key(), LeafProfile(), now).chain[0]


def by_hand(
    authority: CertificateAuthority,
    now: datetime,
    extension: x509.ExtensionType | None = None,
    algorithm: hashes.SHA224 | hashes.SHA256 | None = None,
) -> CRL:
    """A list that our own code would not have made."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now)
        .next_update(now + LIFETIME)
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    signed = builder.sign(authority.key, algorithm or hashes.SHA256())
    return CRL.parse(signed.public_bytes(Encoding.DER))


def write(directory: Path, **certificates: list[x509.Certificate]) -> None:
    for name, chain in certificates.items():
        (directory / f"{name}.pem").write_bytes(certificates_to_pem(chain))
