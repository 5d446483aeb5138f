"""The issuer: what it signs satisfies openssl, cryptography's own verifier and ourselves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.errors import ConfigError, Expired, IdentityError, UntrustedChain, VerificationError
from parallax.security.identity import Identity
from parallax.security.keys import KeyType, PrivateKey, generate_key
from parallax.security.profiles import LeafProfile
from parallax.security.verification import Usage, authenticate

if TYPE_CHECKING:
    from tests.security.conftest import Forge, Made

AGENT_1 = Identity.parse_short("agent/agent-1")
EVERY_KIND_OF_NAME = [
    "service/control-plane",
    "client/cli",
    "agent/agent-1",
    "agent/agente_py",
    "agent/a-",
    "agent/x.y",
    "agent/07048933",
    f"agent/{'z' * 63}",
]
KEY = generate_key()


def made_usable(made: Made) -> PrivateKey:
    assert not isinstance(made.key, ed25519.Ed25519PrivateKey)
    return made.key


@pytest.fixture(scope="module")
def issuing(forge: Forge, root: Made, bundle: TrustBundle) -> CertificateAuthority:
    """An intermediate below the root of `bundle`."""
    key = generate_key()
    identifiers: list[tuple[x509.ExtensionType, bool]] = [
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(made_usable(root).public_key()), False),
    ]
    made = forge.authority("Issuing CA", issuer=root, key=key, extra=identifiers)
    return CertificateAuthority(made.certificate, made_usable(made), bundle)


@pytest.fixture(params=["root", "intermediate"])
def issuer(
    request: pytest.FixtureRequest, authority: CertificateAuthority, issuing: CertificateAuthority
) -> CertificateAuthority:
    return authority if request.param == "root" else issuing


# What is issued.


@pytest.mark.parametrize("short", EVERY_KIND_OF_NAME)
def test_what_we_issue_passes_what_we_demand(issuer: CertificateAuthority, now: datetime, short: str) -> None:
    identity = Identity.parse_short(short)
    issued = issuer.issue(identity, KEY.public_key(), LeafProfile(), now)
    for usage in Usage:
        assert authenticate(issued.chain, issued.bundle, "parallax.local", now, usage).identity == identity


@pytest.mark.parametrize("short", EVERY_KIND_OF_NAME)
@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
def test_cryptographys_own_verifier_agrees(
    issuer: CertificateAuthority, now: datetime, short: str, key_type: KeyType
) -> None:
    """With its defaults, which are the web's: stricter than ours on every extension."""
    key = generate_key(key_type)
    issued = issuer.issue(Identity.parse_short(short), key.public_key(), LeafProfile(), now)
    leaf, *intermediates = issued.chain
    builder = verification.PolicyBuilder().store(verification.Store(list(issued.bundle.roots))).time(now)
    verified = builder.build_client_verifier().verify(leaf, intermediates)
    assert verified.subjects is not None
    assert x509.UniformResourceIdentifier(str(Identity.parse_short(short))) in verified.subjects
    for name in (x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))):
        assert builder.build_server_verifier(name).verify(leaf, intermediates)[0] == leaf
    for name in (x509.DNSName("example.org"), x509.IPAddress(ip_address("127.0.0.2"))):
        with pytest.raises(verification.VerificationError):
            builder.build_server_verifier(name).verify(leaf, intermediates)


@pytest.mark.parametrize("short", EVERY_KIND_OF_NAME)
def test_openssl_agrees(
    issuer: CertificateAuthority, short: str, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    openssl = require_tool("openssl")
    identity = Identity.parse_short(short)
    issued = issuer.issue(identity, KEY.public_key(), LeafProfile(), datetime.now(UTC))
    (tmp_path / "ca.pem").write_bytes(issued.bundle.pem)
    (tmp_path / "cert.pem").write_bytes(certificates_to_pem(issued.chain))

    def verify(*arguments: str) -> tuple[int, str]:
        options = ("-x509_strict", "-CAfile", "ca.pem", "-untrusted", "cert.pem")
        command = [openssl, "verify", *options, *arguments, "cert.pem"]
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    for arguments in (
        (),
        ("-purpose", "sslserver"),
        ("-purpose", "sslclient"),
        ("-verify_hostname", "localhost"),
        ("-verify_hostname", identity.dns_name),
        ("-verify_ip", "127.0.0.1"),
        ("-verify_ip", "::1"),
        ("-x509_strict",),  # what Python's own clients ask for from 3.13 on
    ):
        assert verify(*arguments) == (0, "cert.pem: OK\n"), arguments
    code, output = verify("-verify_hostname", "somebody-else.parallax.local")
    assert code != 0
    assert "hostname mismatch" in output.lower()


def test_openssl_shows_what_we_mean(
    authority: CertificateAuthority, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    issued = authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), datetime.now(UTC))
    (tmp_path / "cert.pem").write_bytes(certificates_to_pem(issued.chain))
    text = subprocess.run(
        [require_tool("openssl"), "x509", "-in", "cert.pem", "-noout", "-text"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for line in (
        "Version: 3 (0x2)",
        "Issuer: O = Parallax, CN = Parallax Root CA",
        "Subject: CN = agent-1",
        "X509v3 Basic Constraints: critical",
        "CA:FALSE",
        "X509v3 Key Usage: critical",
        "X509v3 Extended Key Usage: \n",
        "TLS Web Client Authentication, TLS Web Server Authentication",
        "URI:spiffe://parallax.local/agent/agent-1, DNS:agent-1.agents.parallax.local, DNS:localhost",
        "IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1",
        "X509v3 Subject Key Identifier",
        "X509v3 Authority Key Identifier",
    ):
        assert line in text.replace(" = ", "=").replace("=", " = ")


def test_serials_are_random_positive_and_at_most_20_octets(
    authority: CertificateAuthority, now: datetime
) -> None:
    """RFC 5280 §4.1.2.2."""
    leaves = [authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now).chain[0] for _ in range(20)]
    serials = {leaf.serial_number for leaf in (*leaves, authority.certificate)}
    assert len(serials) == 21
    for serial in serials:
        assert 2**64 < serial < 2**159


def test_a_root_hands_out_the_leaf_alone(authority: CertificateAuthority, now: datetime) -> None:
    """Peers have the root (RFC 8446 §4.4.2)."""
    issued = authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)
    assert len(issued.chain) == 1
    assert issued.bundle == authority.bundle


def test_an_intermediate_hands_out_itself_too(issuing: CertificateAuthority, now: datetime) -> None:
    issued = issuing.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)
    assert issued.chain[1:] == (issuing.certificate,)
    with pytest.raises(UntrustedChain, match=r"is not there$"):
        authenticate(issued.chain[:1], issued.bundle, "parallax.local", now)


def test_intermediates_above_the_issuer_are_handed_out_in_order(forge: Forge, now: datetime) -> None:
    top = forge.authority("Top")
    middle = forge.authority("Middle", issuer=top)
    low = forge.authority("Low", issuer=middle)
    authority = CertificateAuthority(
        low.certificate, made_usable(low), TrustBundle((top.certificate,)), (middle.certificate,)
    )
    issued = authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)
    assert issued.chain[1:] == (low.certificate, middle.certificate)


@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
def test_a_new_authority_issues_at_once(now: datetime, key_type: KeyType) -> None:
    authority = CertificateAuthority.create(
        now=now, key_type=key_type, name="Test CA", lifetime=timedelta(days=1)
    )
    leaf = authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now).chain[0]
    assert authority.certificate.subject.rfc4514_string() == "CN=Test CA,O=Parallax"
    assert authority.certificate.not_valid_before_utc <= leaf.not_valid_before_utc <= now
    assert leaf.not_valid_after_utc == now + timedelta(days=1)


def test_two_authorities_of_the_same_name_do_not_vouch_for_each_other(
    authority: CertificateAuthority, now: datetime
) -> None:
    other = CertificateAuthority.create(now=now)
    issued: Issued = other.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)
    with pytest.raises(UntrustedChain, match=r"has another key there$"):
        authenticate(issued.chain, authority.bundle, "parallax.local", now)


def test_issuing_for_another_trust_domain_is_checked_in_that_one(
    authority: CertificateAuthority, now: datetime
) -> None:
    identity = Identity.parse("spiffe://example.org/service/control-plane")
    issued = authority.issue(identity, KEY.public_key(), LeafProfile(), now)
    assert authenticate(issued.chain, issued.bundle, "example.org", now).identity == identity


# What is not.


@pytest.mark.parametrize(
    ("days", "cause"), [(3651, "cannot issue: expired at "), (-1, "cannot issue: not valid before ")]
)
def test_nothing_is_issued_outside_the_cas_own_validity(
    authority: CertificateAuthority, now: datetime, days: int, cause: str
) -> None:
    moment = now + timedelta(days=days)
    with pytest.raises(Expired) as caught:
        authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), moment)
    assert str(caught.value).startswith(f"the CA certificate 'CN=Parallax Root CA,O=Parallax' {cause}")
    with pytest.raises(Expired, match=cause):
        authority.check_usable(moment)


def test_nothing_is_issued_for_a_weak_key(authority: CertificateAuthority, now: datetime) -> None:
    weak = rsa.generate_private_key(65537, 1024).public_key()  # noqa: S505
    with pytest.raises(VerificationError, match=r"^RSA key of 1024 bits: "):
        authority.issue(AGENT_1, weak, LeafProfile(), now)
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    with pytest.raises(VerificationError, match=r"^Ed25519 key, which gRPC peers cannot use: "):
        authority.issue(AGENT_1, edwards, LeafProfile(), now)  # type: ignore[arg-type]


@pytest.mark.parametrize("san", ["", "*.parallax.local", "host_1", "control-plane.parallax.local"])
def test_nothing_is_issued_with_a_wrong_san(authority: CertificateAuthority, now: datetime, san: str) -> None:
    with pytest.raises(IdentityError):
        authority.issue(AGENT_1, KEY.public_key(), LeafProfile(sans=(san,)), now)


def test_nothing_is_issued_that_peers_would_refuse(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    """What was signed is checked before it is handed out."""
    stray = forge.authority("Stray CA")
    authority = CertificateAuthority(stray.certificate, made_usable(stray), bundle)
    with pytest.raises(UntrustedChain, match=r"'CN=Stray CA' is not there$"):
        authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)


@pytest.mark.parametrize("narrow", ["Top", "Middle", "Low"])
@pytest.mark.parametrize(
    ("usages", "lacking"),
    [
        ([ExtendedKeyUsageOID.CLIENT_AUTH], "serverAuth"),
        ([ExtendedKeyUsageOID.SERVER_AUTH], "clientAuth"),
        ([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH], None),
    ],
)
def test_nothing_is_issued_that_is_good_for_one_end_alone(
    forge: Forge, now: datetime, narrow: str, usages: Sequence[x509.ObjectIdentifier], lacking: str | None
) -> None:
    made: list[Made] = []
    for name in ("Top", "Middle", "Low"):
        issuer = made[-1] if made else None
        made.append(forge.authority(name, issuer=issuer, usages=usages if name == narrow else None))
    top, middle, low = made
    authority = CertificateAuthority(
        low.certificate, made_usable(low), TrustBundle((top.certificate,)), (middle.certificate,)
    )
    if lacking is None:
        authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)
    else:
        with pytest.raises(UntrustedChain, match=f"'CN={narrow}': extended key usage lacks {lacking}$"):
            authority.issue(AGENT_1, KEY.public_key(), LeafProfile(), now)


def test_a_constrained_intermediate_issues_only_within_its_names(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime
) -> None:
    constraints = x509.NameConstraints([x509.DNSName("agents.parallax.local")], None)
    made = forge.authority("Agents CA", issuer=root, extra=[(constraints, True)])
    authority = CertificateAuthority(made.certificate, made_usable(made), bundle)
    authority.issue(AGENT_1, KEY.public_key(), LeafProfile(sans=()), now)
    with pytest.raises(UntrustedChain):
        authority.issue(Identity.parse_short("client/admin"), KEY.public_key(), LeafProfile(sans=()), now)


# What cannot be an issuer.


def test_a_key_that_does_not_fit(authority: CertificateAuthority) -> None:
    with pytest.raises(ConfigError) as caught:
        CertificateAuthority(authority.certificate, generate_key(), authority.bundle)
    assert str(caught.value) == "the key is not that of the CA certificate 'CN=Parallax Root CA,O=Parallax'"


def test_a_leaf_cannot_issue(forge: Forge, bundle: TrustBundle) -> None:
    leaf = forge()
    with pytest.raises(ConfigError) as caught:
        CertificateAuthority(leaf.certificate, made_usable(leaf), bundle)
    assert str(caught.value) == "'CN=agent-1' cannot issue: not a CA (basicConstraints lacks CA:TRUE)"


def test_a_ca_that_may_not_sign_cannot_issue(forge: Forge, root: Made, bundle: TrustBundle) -> None:
    made = forge.authority("CRL signer", issuer=root, key_usage=["crl_sign"])
    with pytest.raises(
        ConfigError, match=r"^'CN=CRL signer' cannot issue: not a CA \(keyUsage lacks keyCertSign\)$"
    ):
        CertificateAuthority(made.certificate, made_usable(made), bundle)


def test_a_ca_with_a_weak_key_cannot_issue(forge: Forge, root: Made, bundle: TrustBundle) -> None:
    made = forge.authority("Weak CA", issuer=root, key=rsa.generate_private_key(65537, 1024))  # noqa: S505
    with pytest.raises(ConfigError, match=r"^'CN=Weak CA' cannot issue: RSA key of 1024 bits: "):
        CertificateAuthority(made.certificate, made_usable(made), bundle)


def test_the_key_is_not_in_the_repr(authority: CertificateAuthority) -> None:
    assert "key" not in repr(authority)
