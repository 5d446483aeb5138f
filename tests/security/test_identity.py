"""Identity: a value with three spellings, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.errors import IdentityError
from parallax.security.identity import (
    Identity,
    Kind,
    check_name,
    check_trust_domain,
    clip,
    control_plane,
    fold_dns,
)

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True).filter(
    lambda name: ".." not in name and not name.endswith(".") and name != "ca"
)
SERVICE_NAMES = NAMES.filter(lambda name: "." not in name)
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
TRUST_DOMAINS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
IDENTITIES = st.one_of(
    st.builds(Identity, TRUST_DOMAINS, st.just(Kind.SERVICE), SERVICE_NAMES),
    st.builds(Identity, TRUST_DOMAINS, st.sampled_from([Kind.AGENT, Kind.CLIENT]), NAMES),
)
# Names made of the words that tell the kinds apart in DNS names.
CONFUSABLE = st.builds(
    lambda kind, words: (kind, "".join(words[:1]) if kind is Kind.SERVICE else ".".join(words)),
    st.sampled_from(list(Kind)),
    st.lists(st.sampled_from(["a", "agents", "clients"]), min_size=1, max_size=3),
)

HOSTILE = [
    "",
    ".",
    "..",
    "a..b",
    "../ca",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "agent-1\0",
    "\0",
    "agent-1\n",
    "agent 1",
    "AGENT-1",
    "Agent-1",
    "agent-1.",
    ".agent-1",
    "-agent",
    "_agent",
    "a" * 64,
    "a" * 300,
    "agënt",
    "агент-1",
    "tas\u212a",  # the Kelvin sign, which str.lower() makes a k
    "agent\u200b",
    "١٢٣",  # digits to str.isdigit()
    "*",
    "a*",
    "%2e%2e",
    "a@b",
    "a:b",
    "a?b",
    "a#b",
]


@given(IDENTITIES)
def test_parse_reads_what_str_writes(identity: Identity) -> None:
    assert Identity.parse(str(identity)) == identity


@given(IDENTITIES)
def test_parse_short_reads_what_short_writes(identity: Identity) -> None:
    assert Identity.parse_short(identity.short, identity.trust_domain) == identity


@given(IDENTITIES)
def test_from_dns_reads_what_dns_name_writes(identity: Identity) -> None:
    assert Identity.from_dns(identity.dns_name, identity.trust_domain) == identity


@given(IDENTITIES)
def test_dns_name_fits_into_a_certificate_and_a_handshake(identity: Identity) -> None:
    """RFC 1035 §2.3.4: a name of at most 253 characters, labels of at most 63."""
    assert len(identity.dns_name) <= 253
    assert max(map(len, identity.dns_name.split("."))) <= 63


@given(CONFUSABLE, CONFUSABLE)
def test_two_identities_of_a_trust_domain_never_share_a_spelling(
    first: tuple[Kind, str], second: tuple[Kind, str]
) -> None:
    one, other = Identity("parallax.local", *first), Identity("parallax.local", *second)
    assert Identity.from_dns(one.dns_name, "parallax.local") == one
    assert (one == other) == (one.dns_name == other.dns_name) == (str(one) == str(other))


@given(st.text(max_size=100))
def test_parse_of_any_text_gives_its_canonical_identity_or_identity_error(text: str) -> None:
    try:
        identity = Identity.parse(text)
    except IdentityError:
        return
    assert str(identity) == text


@given(st.text(max_size=100), TRUST_DOMAINS)
def test_from_dns_of_any_text_gives_an_identity_that_spells_it_or_none(text: str, trust_domain: str) -> None:
    identity = Identity.from_dns(f"{text}.{trust_domain}", trust_domain)
    assert identity is None or identity.dns_name == fold_dns(f"{text}.{trust_domain}")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", list(Kind))
def test_hostile_name_makes_no_identity(kind: Kind, name: str) -> None:
    with pytest.raises(IdentityError, match="not "):
        Identity("parallax.local", kind, name)
    with pytest.raises(IdentityError, match="not "):
        Identity.parse(f"spiffe://parallax.local/{kind}/{name}")
    with pytest.raises(IdentityError, match="not "):
        Identity.parse_short(f"{kind}/{name}")


@pytest.mark.parametrize("kind", list(Kind))
def test_the_name_of_the_issuers_directory_is_reserved(kind: Kind) -> None:
    with pytest.raises(IdentityError, match="the name 'ca' is reserved"):
        Identity("parallax.local", kind, "ca")


def test_a_services_name_has_no_dot() -> None:
    """Else service `x.agents` would have the DNS name of agent `x`."""
    with pytest.raises(IdentityError, match=r"a service's name has no dot: 'x.agents'"):
        Identity("parallax.local", Kind.SERVICE, "x.agents")


@pytest.mark.parametrize("name", ["agente_py", "a-", "a.b", "x.agents", "07048933", "a", "a" * 63])
def test_names_from_the_field_are_accepted(name: str) -> None:
    assert check_name(name) == name
    assert Identity.from_dns(f"{name}.agents.parallax.local", "parallax.local") == Identity(
        "parallax.local", Kind.AGENT, name
    )


def test_a_kind_given_as_text_is_the_kind_and_nothing_else_passes() -> None:
    assert Identity("parallax.local", "agent", "a").kind is Kind.AGENT  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match="a service's name has no dot"):
        Identity("parallax.local", "service", "x.agents")  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match="not a kind: 'root'"):
        Identity("parallax.local", "root", "a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "uri",
    [
        "https://parallax.local/agent/agent-1",
        "SPIFFE://parallax.local/agent/agent-1",
        "spiffe:parallax.local/agent/agent-1",
        "spiffe://PARALLAX.local/agent/agent-1",
        "spiffe://parallax.local/agent",
        "spiffe://parallax.local/agent/",
        "spiffe://parallax.local/agent/agent-1/",
        "spiffe://parallax.local/agent/agent-1/more",
        "spiffe://parallax.local//agent-1",
        "spiffe://parallax.local/Agent/agent-1",
        "spiffe:///agent/agent-1",
        "spiffe://parallax.local:443/agent/agent-1",
        "spiffe://user@parallax.local/agent/agent-1",
        "spiffe://parallax.local/agent/agent-1?x",
        "spiffe://parallax.local/agent/agent-1#x",
        "spiffe://parallax.local/agent/%61gent-1",
        "spiffe://parallax.local/agent/spiffe://parallax.local/service/x",
        " spiffe://parallax.local/agent/agent-1",
        "",
    ],
)
def test_parse_takes_only_the_canonical_form(uri: str) -> None:
    with pytest.raises(IdentityError, match="not "):
        Identity.parse(uri)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        ".a",
        "a.",
        "-a",
        "a-",
        "a.-b",
        "a-.b",
        "A.b",
        "a_b",
        "a/b",
        "a b",
        "é.b",
        "a" * 64,
        "a\n",
    ],
)
def test_a_trust_domain_is_a_lower_case_dns_name(name: str) -> None:
    with pytest.raises(IdentityError, match="not a trust domain: "):
        check_trust_domain(name)


def test_short_spelling_needs_a_kind() -> None:
    with pytest.raises(IdentityError, match="not <kind>/<name>, such as client/cli: 'cli'"):
        Identity.parse_short("cli")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("control-plane.parallax.local", "service/control-plane"),
        ("agent-1.agents.parallax.local", "agent/agent-1"),
        ("cli.clients.parallax.local", "client/cli"),
        ("x.agents.agents.parallax.local", "agent/x.agents"),
        ("x.agents.clients.parallax.local", "client/x.agents"),
        ("agents.parallax.local", "service/agents"),
        ("Control-Plane.PARALLAX.Local.", "service/control-plane"),
    ],
)
def test_dns_names_that_spell_an_identity(name: str, short: str) -> None:
    identity = Identity.from_dns(name, "parallax.local")
    assert identity is not None
    assert identity.short == short


@pytest.mark.parametrize(
    "name",
    [
        "",
        "parallax.local",
        ".parallax.local",
        "control-plane",
        "localhost",
        "a.b.parallax.local",
        "control-plane.parallax.local.evil.example",
        "control-planeparallax.local",
        "control-plane.parallax.local..",
        "*.parallax.local",
        "ca.parallax.local",
        "tas\u212a.parallax.local",
        "control-plane\0.parallax.local",
    ],
)
def test_dns_names_that_spell_nobody(name: str) -> None:
    assert Identity.from_dns(name, "parallax.local") is None


def test_hostile_text_is_quoted_and_cut_in_messages() -> None:
    assert clip("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(clip("a" * 10_000)) < 100
    with pytest.raises(IdentityError) as caught:
        check_name("x\nERROR forged line" + "y" * 10_000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_the_control_plane_is_a_service() -> None:
    assert str(control_plane()) == "spiffe://parallax.local/service/control-plane"
    assert control_plane("example.org").dns_name == "control-plane.example.org"
