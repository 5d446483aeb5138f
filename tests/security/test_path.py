"""The way from a leaf to a root: each link that can be wrong."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from parallax.security.bundle import TrustBundle
from parallax.security.errors import Expired, UntrustedChain
from parallax.security.path import MAX_CHAIN
from parallax.security.verification import Usage, authenticate

if TYPE_CHECKING:
    from parallax.security.authority import CertificateAuthority
    from tests.security.conftest import AsV1, Forge, Made

DOMAIN = "parallax.local"
ROOT = "'CN=Parallax Root CA,O=Parallax'"


@pytest.fixture(scope="module")
def intermediate(forge: Forge, root: Made) -> Made:
    return forge.authority("Issuing CA", issuer=root)


def refusal(chain: list[x509.Certificate], bundle: TrustBundle, now: datetime) -> str:
    with pytest.raises(UntrustedChain) as caught:
        authenticate(chain, bundle, DOMAIN, now)
    return str(caught.value)


# Roots.


def test_leaf_of_other_ca(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(issuer=forge.authority("Other CA")).certificate
    assert (
        refusal([leaf], bundle, now) == "not issued by a CA of the trust bundle: 'CN=Other CA' is not there"
    )


def test_leaf_of_a_ca_of_the_same_name_with_another_key(forge: Forge, now: datetime) -> None:
    ours, theirs = forge.authority("Same Name"), forge.authority("Same Name")
    leaf = forge(issuer=theirs).certificate
    assert refusal([leaf], TrustBundle((ours.certificate,)), now) == (
        "not issued by a CA of the trust bundle: 'CN=Same Name' has another key there"
    )
    authenticate([leaf], TrustBundle((ours.certificate, theirs.certificate)), DOMAIN, now)


def test_sending_ones_own_root_along_changes_nothing(
    forge: Forge, bundle: TrustBundle, now: datetime
) -> None:
    other = forge.authority("Other CA")
    leaf = forge(issuer=other).certificate
    assert refusal([leaf, other.certificate], bundle, now) == (
        "intermediate 'CN=Other CA': not issued by a CA of the trust bundle: 'CN=Other CA' is not there"
    )


def test_self_signed_leaf(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(self_signed=True).certificate
    assert refusal([leaf], bundle, now) == "not issued by a CA of the trust bundle: 'CN=agent-1' is not there"
    assert "is not there" in refusal([leaf, leaf], bundle, now)


def test_leaf_with_a_forged_signature(forge: Forge, root: Made, bundle: TrustBundle, now: datetime) -> None:
    """The names are right, the key is not the issuer's."""
    impostor = type(root)(root.certificate, forge().key)
    leaf = forge(issuer=impostor).certificate
    assert refusal([leaf], bundle, now) == (
        f"not issued by a CA of the trust bundle: {ROOT} has another key there"
    )


def test_any_root_of_the_bundle_vouches(forge: Forge, root: Made, bundle: TrustBundle, now: datetime) -> None:
    other = forge.authority("Other CA")
    both = TrustBundle((other.certificate, *bundle.roots))
    for issuer in (root, other):
        authenticate([forge(issuer=issuer).certificate], both, DOMAIN, now)


def test_expired_root(forge: Forge, now: datetime) -> None:
    old = forge.authority("Old CA", not_after=timedelta(days=1))
    leaf = forge(issuer=old).certificate
    later = now + timedelta(days=2)
    with pytest.raises(Expired) as caught:
        authenticate([leaf], TrustBundle((old.certificate,)), DOMAIN, later)
    assert str(caught.value) == f"issuer 'CN=Old CA': expired at {now + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"


@pytest.mark.parametrize("v1", [False, True])
def test_a_renewed_root_of_the_same_key_vouches_for_old_leaves(
    forge: Forge,
    now: datetime,
    as_v1: AsV1,
    v1: bool,  # noqa: FBT001
) -> None:
    old = forge.authority("Root", not_after=timedelta(days=1))
    new = forge.authority("Root", key=old.key)
    leaf = forge(issuer=old, uris=[], dns=[])
    leaf = as_v1(leaf, old.key) if v1 else leaf
    later = now + timedelta(days=2)
    for roots in ((old, new), (new, old)):
        bundle = TrustBundle(tuple(made.certificate for made in roots))
        authenticate([leaf.certificate], bundle, DOMAIN, later)


def test_root_with_a_weak_key(forge: Forge, now: datetime) -> None:
    weak = forge.authority("Weak CA", key=rsa.generate_private_key(65537, 1024))  # noqa: S505
    leaf = forge(issuer=weak).certificate
    assert refusal([leaf], TrustBundle((weak.certificate,)), now).startswith(
        "no valid path to the trust bundle: "
    )


def test_the_proof_ends_with_the_first_certificate_of_the_path(
    forge: Forge, root: Made, now: datetime
) -> None:
    short = forge.authority("Short CA", issuer=root, not_after=timedelta(days=3))
    leaf = forge(issuer=short, not_after=timedelta(days=30)).certificate
    peer = authenticate([leaf, short.certificate], TrustBundle((root.certificate,)), DOMAIN, now)
    assert peer.not_after == now + timedelta(days=3)


# Intermediates.


def test_leaf_below_an_intermediate(
    forge: Forge, intermediate: Made, bundle: TrustBundle, now: datetime
) -> None:
    leaf = forge(issuer=intermediate).certificate
    authenticate([leaf, intermediate.certificate], bundle, DOMAIN, now)
    authenticate([leaf, *bundle.roots, intermediate.certificate], bundle, DOMAIN, now)


def test_missing_intermediate(forge: Forge, intermediate: Made, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge(issuer=intermediate).certificate
    assert refusal([leaf], bundle, now) == (
        "not issued by a CA of the trust bundle: 'CN=Issuing CA' is not there"
    )


def test_intermediate_of_another_root(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    other = forge.authority("Other CA")
    below = forge.authority("Issuing CA", issuer=other)
    leaf = forge(issuer=below).certificate
    assert refusal([leaf, below.certificate], bundle, now) == (
        "intermediate 'CN=Issuing CA': not issued by a CA of the trust bundle: 'CN=Other CA' is not there"
    )


def test_expired_intermediate(forge: Forge, root: Made, bundle: TrustBundle, now: datetime) -> None:
    old = forge.authority("Old CA", issuer=root, not_after=timedelta(seconds=-1))
    leaf = forge(issuer=old).certificate
    with pytest.raises(Expired, match=r"^issuer 'CN=Old CA': expired at "):
        authenticate([leaf, old.certificate], bundle, DOMAIN, now)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"ca": False}, "not a CA (basicConstraints lacks CA:TRUE)"),
        ({"ca": None}, "not a CA (basicConstraints lacks CA:TRUE)"),
        ({"key_usage": ("crl_sign",)}, "not a CA (keyUsage lacks keyCertSign)"),
        ({"usages": (ExtendedKeyUsageOID.EMAIL_PROTECTION,)}, "extended key usage lacks clientAuth"),
        ({"usages": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "extended key usage lacks clientAuth"),
    ],
    ids=["CA:FALSE", "no basicConstraints", "no keyCertSign", "EKU for mail", "EKU for servers"],
)
def test_intermediate_that_may_not_issue_clients(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime, wrong: dict[str, object], cause: str
) -> None:
    below = forge.authority("Issuing CA", issuer=root, **wrong)  # type: ignore[arg-type]
    leaf = forge(issuer=below).certificate
    assert refusal([leaf, below.certificate], bundle, now) == f"issuer 'CN=Issuing CA': {cause}"


def test_intermediate_for_servers_vouches_for_servers(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime
) -> None:
    below = forge.authority("Issuing CA", issuer=root, usages=[ExtendedKeyUsageOID.SERVER_AUTH])
    chain = [forge(issuer=below).certificate, below.certificate]
    authenticate(chain, bundle, DOMAIN, now, Usage.SERVER)


def test_who_stands_for_both_ends_needs_one_path_for_both(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime
) -> None:
    for_clients = forge.authority("Issuing CA", issuer=root, usages=[ExtendedKeyUsageOID.CLIENT_AUTH])
    for_servers = forge.authority(
        "Issuing CA", issuer=root, key=for_clients.key, usages=[ExtendedKeyUsageOID.SERVER_AUTH]
    )
    for_both = forge.authority("Issuing CA", issuer=root, key=for_clients.key)
    chain = [forge(issuer=for_clients).certificate, for_clients.certificate, for_servers.certificate]
    for usage in Usage:
        authenticate(chain, bundle, DOMAIN, now, usage)
    with pytest.raises(UntrustedChain, match="extended key usage lacks serverAuth"):
        authenticate(chain, bundle, DOMAIN, now, *Usage)
    authenticate([*chain, for_both.certificate], bundle, DOMAIN, now, *Usage)


def test_leaf_signed_by_another_leaf(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    """An agent's key makes no agents."""
    agent = forge()
    victim = forge(
        issuer=agent,
        uris=["spiffe://parallax.local/client/admin"],
        dns=["admin.clients.parallax.local"],
        common_names=["admin"],
    )
    assert refusal([victim.certificate, agent.certificate], bundle, now) == (
        "issuer 'CN=agent-1': not a CA (basicConstraints lacks CA:TRUE)"
    )
    assert "is not there" in refusal([victim.certificate], bundle, now)


def test_path_length_exceeded(forge: Forge, now: datetime) -> None:
    root = forge.authority("Root", path_length=0)
    below = forge.authority("Issuing CA", issuer=root)
    bundle = TrustBundle((root.certificate,))
    leaf = forge(issuer=below).certificate
    assert refusal([leaf, below.certificate], bundle, now) == "issuer 'CN=Root': path length 0 exceeded"
    authenticate([forge(issuer=root).certificate], bundle, DOMAIN, now)


def test_our_roots_leave_room_for_one_intermediate(
    forge: Forge, intermediate: Made, bundle: TrustBundle, now: datetime
) -> None:
    second = forge.authority("Second CA", issuer=intermediate)
    leaf = forge(issuer=second).certificate
    assert refusal([leaf, second.certificate, intermediate.certificate], bundle, now) == (
        f"issuer {ROOT}: path length 1 exceeded"
    )


def test_a_chain_is_not_endless(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    leaf = forge().certificate
    authenticate([leaf] * MAX_CHAIN, bundle, DOMAIN, now)
    assert refusal([leaf] * (MAX_CHAIN + 1), bundle, now) == "a chain of 9 certificates: 8 at most"


def test_cas_that_sign_each_other_lead_nowhere(forge: Forge, bundle: TrustBundle, now: datetime) -> None:
    one = forge.authority("One")
    two = forge.authority("Two", issuer=one)
    one_again = forge.authority("One", issuer=two, key=one.key)
    leaf = forge(issuer=one).certificate
    assert refusal([leaf, one_again.certificate, two.certificate], bundle, now).startswith(
        "no valid path to the trust bundle: "
    )


# Name constraints.


@pytest.fixture(scope="module")
def for_agents(forge: Forge, root: Made) -> Made:
    """A CA for agents only."""
    constraints = x509.NameConstraints([x509.DNSName("agents.parallax.local")], None)
    return forge.authority("Agents CA", issuer=root, extra=[(constraints, True)])


def test_a_ca_for_agents_vouches_for_an_agent(
    forge: Forge, for_agents: Made, bundle: TrustBundle, now: datetime
) -> None:
    chain = [forge(issuer=for_agents).certificate, for_agents.certificate]
    assert authenticate(chain, bundle, DOMAIN, now).identity.short == "agent/agent-1"


@pytest.mark.parametrize(
    ("uris", "dns", "common_name", "cause"),
    [
        (
            ["spiffe://parallax.local/client/admin"],
            ["admin.clients.parallax.local"],
            "admin",
            "no valid path to the trust bundle: ",
        ),
        (
            ["spiffe://parallax.local/client/admin"],
            ["ADMIN.clients.parallax.local"],
            "admin",
            "no valid path to the trust bundle: ",
        ),
        (
            ["spiffe://parallax.local/client/admin"],
            [],
            "admin",
            "issued under name constraints without the DNS SAN admin.clients.parallax.local",
        ),
        (
            [],
            [],
            "control-plane.parallax.local",
            "issued under name constraints without the DNS SAN control-plane.parallax.local",
        ),
    ],
    ids=["DNS", "URI and another case", "URI alone", "CN alone"],
)
def test_a_ca_for_agents_vouches_for_nobody_else(
    forge: Forge,
    for_agents: Made,
    bundle: TrustBundle,
    now: datetime,
    uris: list[str],
    dns: list[str],
    common_name: str,
    cause: str,
) -> None:
    """RFC 5280 §4.2.1.10 alone would hold only the first against it."""
    leaf = forge(issuer=for_agents, uris=uris, dns=dns, common_names=[common_name]).certificate
    assert refusal([leaf, for_agents.certificate], bundle, now).startswith(cause)


# X.509 v1, which has no extensions.


def test_v1_leaf_of_a_root(forge: Forge, root: Made, bundle: TrustBundle, now: datetime, as_v1: AsV1) -> None:
    leaf = as_v1(forge(common_names=["agente_py"]), root.key).certificate
    assert leaf.version is x509.Version.v1
    for usages in (*((usage,) for usage in Usage), tuple(Usage)):
        assert authenticate([leaf], bundle, DOMAIN, now, *usages).identity.short == "agent/agente_py"


def test_v1_leaf_with_a_serial_of_21_octets(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime, as_v1: AsV1
) -> None:
    """RFC 5280 §4.1.2.2; who stores and lists serials relies on it."""
    leaf = as_v1(forge(), root.key, serial=b"\x01" + bytes(19)).certificate
    assert authenticate([leaf], bundle, DOMAIN, now).serial == 1 << 152
    leaf = as_v1(forge(), root.key, serial=b"\x01" + bytes(20)).certificate
    assert refusal([leaf], bundle, now).endswith("'a serial number of more than 20 octets'")


def test_v1_leaf_of_other_ca(forge: Forge, bundle: TrustBundle, now: datetime, as_v1: AsV1) -> None:
    other = forge.authority("Other CA")
    leaf = as_v1(forge(issuer=other), other.key).certificate
    assert refusal([leaf], bundle, now).endswith("'CN=Other CA' is not there")


def test_v1_leaf_with_a_forged_signature(
    forge: Forge, bundle: TrustBundle, now: datetime, as_v1: AsV1
) -> None:
    leaf = as_v1(forge(), forge().key).certificate
    assert refusal([leaf], bundle, now).endswith(f"{ROOT} has another key there")


def test_v1_leaf_below_an_intermediate(
    forge: Forge, intermediate: Made, bundle: TrustBundle, now: datetime, as_v1: AsV1
) -> None:
    leaf = as_v1(forge(issuer=intermediate), intermediate.key).certificate
    assert refusal([leaf, intermediate.certificate], bundle, now) == (
        "no valid path to the trust bundle: "
        "'an X.509 v1 certificate that no root of the trust bundle issued itself'"
    )


def test_v1_certificate_cannot_be_an_intermediate(
    forge: Forge, intermediate: Made, root: Made, bundle: TrustBundle, now: datetime, as_v1: AsV1
) -> None:  # fmt: skip
    """It cannot say CA:FALSE: so a v1 agent would otherwise be a CA."""
    agent = as_v1(forge(), root.key)
    leaf = forge(issuer=agent).certificate
    assert refusal([leaf, agent.certificate], bundle, now) == (
        "issuer 'CN=agent-1': not a CA (basicConstraints lacks CA:TRUE)"
    )


def test_v1_leaf_with_extensions(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime, as_v1: AsV1
) -> None:
    leaf = as_v1(forge(), root.key, keep_extensions=True).certificate
    assert refusal([leaf], bundle, now) == (
        "no valid path to the trust bundle: 'an X.509 v1 certificate with extensions'"
    )


def test_leaf_signed_with_a_weak_hash(
    forge: Forge, root: Made, bundle: TrustBundle, now: datetime, as_v1: AsV1
) -> None:
    leaf = as_v1(forge(), root.key, sha1=True).certificate
    assert refusal([leaf], bundle, now) == "signed with sha1: SHA-256, 384 or 512 is needed"


def test_leaf_of_a_ca_with_an_ed25519_key(forge: Forge, now: datetime) -> None:
    edwards = forge.authority("Ed CA", key=ed25519.Ed25519PrivateKey.generate())
    leaf = forge(issuer=edwards).certificate
    assert refusal([leaf], TrustBundle((edwards.certificate,)), now) == (
        "signed with no hash: SHA-256, 384 or 512 is needed"
    )


def test_v1_leaf_of_a_constrained_root(forge: Forge, now: datetime, as_v1: AsV1) -> None:
    """It has no DNS SAN that the constraint could be held against."""
    constraints = x509.NameConstraints([x509.DNSName("agents.parallax.local")], None)
    held = forge.authority("Agents CA", extra=[(constraints, True)])
    leaf = as_v1(forge(issuer=held, common_names=["admin.clients.parallax.local"]), held.key).certificate
    assert refusal([leaf], TrustBundle((held.certificate,)), now).startswith("issued under name constraints")


def test_v1_leaf_of_a_root_that_may_not_issue(
    forge: Forge, now: datetime, as_v1: AsV1, authority: CertificateAuthority
) -> None:
    mail = forge.authority("Mail CA", usages=[ExtendedKeyUsageOID.EMAIL_PROTECTION])
    leaf = as_v1(forge(issuer=mail), mail.key).certificate
    bundle = TrustBundle((authority.certificate, mail.certificate))
    assert refusal([leaf], bundle, now) == "issuer 'CN=Mail CA': extended key usage lacks clientAuth"


def test_v1_leaf_of_a_root_with_a_weak_key(forge: Forge, now: datetime, as_v1: AsV1) -> None:
    weak = forge.authority("Weak CA", key=ec.generate_private_key(ec.SECP256K1()))
    leaf = as_v1(forge(issuer=weak), weak.key).certificate
    assert refusal([leaf], TrustBundle((weak.certificate,)), now).startswith(
        "no valid path to the trust bundle: "
    )
