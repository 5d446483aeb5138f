"""
Who is at the other end: what a leaf must be and whom it names.

Every rule has its negative twin: a good leaf of agent-1 with one thing wrong.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parallax.security.bundle import TrustBundle
from parallax.security.errors import (
    Expired,
    IdentityError,
    ParallaxError,
    UntrustedChain,
    VerificationError,
    WrongIdentity,
)
from parallax.security.identity import Identity
from parallax.security.profiles import issued_at
from parallax.security.verification import Peer, Usage, authenticate, identity_of

if TYPE_CHECKING:
    from tests.security.conftest import Forge, Made

DOMAIN = "parallax.local"
SECOND = timedelta(seconds=1)
AGENT_1 = Identity.parse("spiffe://parallax.local/agent/agent-1")


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


# The leaf.


@pytest.mark.parametrize("usage", list(Usage))
def test_a_good_leaf_proves_its_identity(
    forge: Forge, bundle: TrustBundle, now: datetime, usage: Usage
) -> None:
    leaf = forge().certificate
    [root] = bundle.roots
    spki = root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert authenticate([leaf], bundle, DOMAIN, now, usage) == Peer(
        identity=AGENT_1,
        serial=leaf.serial_number,
        fingerprint=hashlib.sha256(leaf.public_bytes(Encoding.DER)).digest(),
        not_after=leaf.not_valid_after_utc,
        issuer_key=hashlib.sha256(spki).digest(),
        issued_at=issued_at(leaf),
        above=(),
    )


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        rsa.generate_private_key(65537, 4096),
        ec.generate_private_key(ec.SECP384R1()),
    ],
    ids=["rsa-2048", "rsa-4096", "p384"],
)
def test_leaf_of_any_key_that_grpc_peers_accept(
    forge: Forge, bundle: TrustBundle, now: datetime, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
) -> None:
    assert authenticate([forge(key=key).certificate], bundle, DOMAIN, now).identity == AGENT_1


def test_nothing_presented(bundle: TrustBundle, now: datetime) -> None:
    with pytest.raises(UntrustedChain, match=r"^no certificate was presented$"):
        authenticate([], bundle, DOMAIN, now)


def test_expired_leaf(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(not_after=-SECOND).certificate
    with pytest.raises(Expired) as caught:
        authenticate([leaf], bundle, DOMAIN, now)
    assert str(caught.value) == f"expired at {stamp(now - SECOND)}"


def test_leaf_not_yet_valid(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(not_before=SECOND).certificate
    with pytest.raises(Expired) as caught:
        authenticate([leaf], bundle, DOMAIN, now)
    assert str(caught.value) == f"not valid before {stamp(now + SECOND)}"


def test_validity_includes_both_its_ends_and_nothing_beyond(
    forge: Forge, bundle: TrustBundle, now: datetime
) -> None:
    """RFC 5280 §4.1.2.5: "through notAfter, inclusive"."""
    leaf = forge(not_before=timedelta(0), not_after=timedelta(hours=1)).certificate
    for moment in (leaf.not_valid_before_utc, leaf.not_valid_after_utc):
        authenticate([leaf], bundle, DOMAIN, moment)
    for moment in (leaf.not_valid_before_utc - SECOND / 1000, leaf.not_valid_after_utc + SECOND / 1000):
        with pytest.raises(Expired):
            authenticate([leaf], bundle, DOMAIN, moment)


def test_the_zone_of_now_does_not_matter(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(not_after=timedelta(minutes=1)).certificate
    tokyo = timezone(timedelta(hours=9))
    authenticate([leaf], bundle, DOMAIN, now.astimezone(tokyo))
    with pytest.raises(Expired):
        authenticate([leaf], bundle, DOMAIN, (now + timedelta(minutes=2)).astimezone(tokyo))


@pytest.mark.parametrize(
    ("usage", "usages", "lacking"),
    [
        (Usage.CLIENT, [ExtendedKeyUsageOID.SERVER_AUTH], "clientAuth"),
        (Usage.SERVER, [ExtendedKeyUsageOID.CLIENT_AUTH], "serverAuth"),
        (Usage.CLIENT, [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], "clientAuth"),
        (Usage.SERVER, [ExtendedKeyUsageOID.CODE_SIGNING], "serverAuth"),
    ],
)
def test_leaf_whose_extended_key_usage_excludes_this_end(
    forge: Forge,
    bundle: TrustBundle,
    now: datetime,
    usage: Usage,
    usages: list[x509.ObjectIdentifier],
    lacking: str,
) -> None:
    leaf = forge(usages=usages).certificate
    with pytest.raises(UntrustedChain, match=rf"^extended key usage lacks {lacking}$"):
        authenticate([leaf], bundle, DOMAIN, now, usage)
    with pytest.raises(UntrustedChain, match=r"^extended key usage lacks "):
        authenticate([leaf], bundle, DOMAIN, now, *Usage)


@pytest.mark.parametrize("usage", list(Usage))
def test_absent_extensions_restrict_nothing(
    forge: Forge, bundle: TrustBundle, now: datetime, usage: Usage
) -> None:
    leaf = forge(usages=None, key_usage=None, ca=None).certificate
    assert authenticate([leaf], bundle, DOMAIN, now, usage).identity == AGENT_1


def test_leaf_whose_key_usage_excludes_signing(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(key_usage=["key_encipherment"]).certificate
    with pytest.raises(UntrustedChain, match=r"^key usage lacks digitalSignature$"):
        authenticate([leaf], bundle, DOMAIN, now)


def test_leaf_that_claims_to_be_a_ca(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(ca=True).certificate
    with pytest.raises(UntrustedChain, match=r"^a CA certificate \(CA:TRUE\) where a leaf is expected$"):
        authenticate([leaf], bundle, DOMAIN, now)


def test_the_root_itself_is_no_leaf(root: Made, bundle: TrustBundle, now: datetime) -> None:
    with pytest.raises(UntrustedChain, match=r"^a CA certificate"):
        authenticate([root.certificate], bundle, DOMAIN, now)


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        (rsa.generate_private_key(65537, 1024), "RSA key of 1024 bits"),  # noqa: S505
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519 key, which gRPC peers cannot use"),
        (ec.generate_private_key(ec.SECP256K1()), "EC key on curve secp256k1"),
    ],
    ids=["rsa-1024", "ed25519", "secp256k1"],
)
def test_leaf_with_a_weak_or_useless_key(
    forge: Forge,
    bundle: TrustBundle,
    now: datetime,
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    cause: str,
) -> None:
    """TLS itself lets a client with RSA-1024 in (measured)."""
    with pytest.raises(
        VerificationError, match=rf"^{cause}: P-256, P-384 or RSA of at least 2048 bits is needed$"
    ):
        authenticate([forge(key=key).certificate], bundle, DOMAIN, now)


def test_leaf_with_an_unknown_critical_extension(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    """RFC 5280 §4.2: a critical extension that is not understood refuses the certificate."""
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
    with pytest.raises(
        UntrustedChain, match=r"^no valid path to the trust bundle: .*1\.3\.6\.1\.4\.1\.99999\.1"
    ):
        authenticate([forge(extra=[(unknown, True)]).certificate], bundle, DOMAIN, now)
    authenticate([forge(extra=[(unknown, False)]).certificate], bundle, DOMAIN, now)


# Whom it names.


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://parallax.local/service/control-plane",
        "spiffe://parallax.local/client/admin",
        "spiffe://parallax.local/agent/agente_py",
        "spiffe://parallax.local/agent/a-",
        "spiffe://parallax.local/agent/x.agents",
    ],
)
def test_the_uri_san_decides(forge: Forge, uri: str) -> None:
    expected = Identity.parse(uri)
    assert (
        identity_of(forge(uris=[uri], dns=[expected.dns_name, "localhost"]).certificate, DOMAIN) == expected
    )
    assert (
        identity_of(forge(uris=[uri], dns=[], common_names=["anything else"]).certificate, DOMAIN) == expected
    )


@pytest.mark.parametrize(
    ("uris", "cause"),
    [
        ([str(AGENT_1), str(AGENT_1)], "2 URI SANs, where exactly one is allowed"),
        ([str(AGENT_1), "https://example.org"], "2 URI SANs, where exactly one is allowed"),
        (["https://parallax.local/agent/agent-1"], "not spiffe://<trust domain>/<kind>/<name>"),
        (["spiffe://parallax.local/agent"], "not spiffe://<trust domain>/<kind>/<name>"),
        (["spiffe://parallax.local/root/agent-1"], "not a kind: 'root'"),
        (["spiffe://parallax.local/agent/Agent-1"], "not a name: 'Agent-1'"),
        (["spiffe://parallax.local/agent/ca"], "the name 'ca' is reserved"),
        (["spiffe://parallax.local/agent/.."], "not a name: '..'"),
        (["spiffe://parallax.local/service/x.agents"], "a service's name has no dot"),
    ],
)
def test_uri_san_that_is_no_single_identity(
    forge: Forge, bundle: TrustBundle, now: datetime, uris: list[str], cause: str
) -> None:
    """X509-SVID §2: exactly one URI SAN. DNS SAN and CN are no way out."""
    with pytest.raises(IdentityError) as caught:
        authenticate([forge(uris=uris).certificate], bundle, DOMAIN, now)
    assert str(caught.value).startswith(cause)


def test_identity_of_another_trust_domain(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(uris=["spiffe://elsewhere.example/agent/agent-1"]).certificate
    with pytest.raises(WrongIdentity) as caught:
        authenticate([leaf], bundle, DOMAIN, now)
    assert (
        str(caught.value)
        == "spiffe://elsewhere.example/agent/agent-1 is not of the trust domain parallax.local"
    )


@pytest.mark.parametrize(
    ("dns", "other"),
    [
        ("control-plane.parallax.local", "service/control-plane"),
        ("agent-2.agents.parallax.local", "agent/agent-2"),
        ("agent-1.clients.parallax.local", "client/agent-1"),
        ("agent-1.parallax.local", "service/agent-1"),
        ("CONTROL-Plane.parallax.LOCAL", "service/control-plane"),  # TLS compares without case
        ("control-plane.parallax.local.", "service/control-plane"),  # and gRPC without the last dot
    ],
)
def test_dns_san_of_somebody_else(
    forge: Forge, bundle: TrustBundle, now: datetime, dns: str, other: str
) -> None:
    """Whoever dials the other would be content with this leaf."""
    leaf = forge(dns=["agent-1.agents.parallax.local", dns]).certificate
    with pytest.raises(IdentityError) as caught:
        authenticate([leaf], bundle, DOMAIN, now)
    assert str(caught.value) == f"names {AGENT_1} and also spiffe://parallax.local/{other}"


def test_cn_that_spells_somebody_else(forge: Forge) -> None:
    """A CN counts as host name to those who find no DNS SAN."""
    leaf = forge(common_names=["control-plane.parallax.local"], dns=[]).certificate
    with pytest.raises(IdentityError, match=r" and also spiffe://parallax.local/service/control-plane$"):
        identity_of(leaf, DOMAIN)


@pytest.mark.parametrize("dns", ["*.parallax.local", "*.agents.parallax.local", "control-*.parallax.LOCAL."])
def test_wildcard_over_the_trust_domain(forge: Forge, dns: str) -> None:
    with pytest.raises(IdentityError, match=r"^the wildcard '.*' would match many identities$"):
        identity_of(forge(dns=[dns]).certificate, DOMAIN)


def test_names_outside_the_trust_domain_say_nothing(forge: Forge) -> None:
    dns = ["localhost", "*.example.org", "control-plane.other.local", "a.b.parallax.local", "parallax.local"]
    assert identity_of(forge(dns=dns).certificate, DOMAIN) == AGENT_1


def test_two_common_names(forge: Forge) -> None:
    with pytest.raises(IdentityError, match=r"^2 common names, where at most one is allowed$"):
        identity_of(forge(common_names=["agent-1", "agent-1"]).certificate, DOMAIN)


def test_two_common_names_in_one_part_of_the_subject(forge: Forge) -> None:
    """A multi-valued RDN, which some tools show as one name."""
    both = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("agent-1", "agent-2")]
    leaf = forge(uris=[], dns=[], subject=x509.Name([x509.RelativeDistinguishedName(both)])).certificate
    with pytest.raises(IdentityError, match=r"^2 common names, where at most one is allowed$"):
        identity_of(leaf, DOMAIN)


def test_common_name_of_the_issuer_or_of_another_attribute_says_nothing(forge: Forge, root: Made) -> None:
    names = [x509.NameAttribute(oid, "agent-2") for oid in (NameOID.ORGANIZATION_NAME, NameOID.USER_ID)]
    leaf = forge(uris=[], dns=[], subject=x509.Name(names)).certificate
    with pytest.raises(IdentityError, match=r"^names no identity of parallax\.local"):
        identity_of(leaf, DOMAIN)


# Certificates that others made: no URI SAN.


@pytest.mark.parametrize(
    ("common_name", "dns", "short"),
    [
        ("control-plane.parallax.local", [], "service/control-plane"),
        (
            "control-plane.parallax.local",
            ["control-plane.parallax.local", "localhost"],
            "service/control-plane",
        ),
        (
            "control-plane.parallax.local",
            ["control-plane.parallax.local", "control-plane"],
            "service/control-plane",
        ),
        ("agent-1.agents.parallax.local", [], "agent/agent-1"),
        ("Some Device", ["cli.clients.parallax.local"], "client/cli"),
        ("", ["cli.clients.parallax.local"], "client/cli"),
        ("cli", ["cli.clients.parallax.local"], "client/cli"),
        ("07048933", [], "agent/07048933"),
        ("07048933", ["localhost", "device.example.org"], "agent/07048933"),
        ("agente_py", [], "agent/agente_py"),
        ("a-", [], "agent/a-"),
        ("control-plane", [], "agent/control-plane"),
        ("x.y.agents.parallax.local", [], "agent/x.y"),
    ],
)
def test_foreign_leaf_is_whom_its_names_spell(
    forge: Forge, common_name: str, dns: list[str], short: str
) -> None:
    names = [common_name] if common_name else []
    assert identity_of(forge(uris=[], common_names=names, dns=dns).certificate, DOMAIN).short == short


@pytest.mark.parametrize(
    ("common_name", "dns", "cause"),
    [
        ("", [], "names no identity of parallax.local, neither as SAN nor as CN ''"),
        ("", ["agent-1", "localhost"], "names no identity of parallax.local"),
        ("Agent-1", [], "names no identity of parallax.local, neither as SAN nor as CN 'Agent-1'"),
        ("a.b", [], "names no identity of parallax.local"),
        ("agent 1", [], "names no identity of parallax.local"),
        ("agent-1\0", [], "names no identity of parallax.local"),
        ("control-plane.parallax.local\0.example.org", [], "names no identity of parallax.local"),
        ("../../ca", [], "names no identity of parallax.local"),
        ("spiffe://parallax.local/client/admin", [], "names no identity of parallax.local"),
        ("tas\u212a", [], "names no identity of parallax.local"),
        ("admin.clients.other.local", [], "names no identity of parallax.local"),
        ("*.parallax.local", [], "the wildcard '*.parallax.local' would match many identities"),
        ("ca", [], "the name 'ca' is reserved"),
        ("Device", ["a.agents.parallax.local", "b.agents.parallax.local"], "names 2 identities"),
        ("a.agents.parallax.local", ["b.agents.parallax.local"], "names 2 identities"),
        ("agent-2", ["agent-1.agents.parallax.local"], "CN 'agent-2' contradicts the DNS SAN of"),
    ],
)
def test_foreign_leaf_that_names_nobody_or_several(
    forge: Forge, common_name: str, dns: list[str], cause: str
) -> None:
    names = [common_name] if common_name else []
    with pytest.raises(IdentityError) as caught:
        identity_of(forge(uris=[], common_names=names, dns=dns).certificate, DOMAIN)
    assert str(caught.value).startswith(cause)
    assert "\0" not in str(caught.value)


def test_every_refusal_is_one_line(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    hostile = "x\n2026 ERROR forged\x1b[31m"
    for leaf in (
        forge(uris=[], dns=[], common_names=[hostile]),
        forge(issuer=forge.authority(hostile)),
        forge(uris=[f"spiffe://parallax.local/agent/{'a' * 300}"]),
        forge(uris=["https://a\n", "https://b"]),
    ):
        with pytest.raises(ParallaxError) as caught:
            authenticate([leaf.certificate], bundle, DOMAIN, now)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300
