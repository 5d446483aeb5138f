"""What a policy file says of certificates, and how one that cannot be used is refused as a whole."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.errors import ConfigError, IdentityError, NotAuthorized
from parallax.security.identity import Identity
from parallax.security.issuance_policy import (
    IssuancePolicy,
    IssuanceRule,
    KeySort,
    parse_issuance,
    spell,
)
from parallax.security.keys import KeyType
from parallax.security.profiles import LEAF_LIFETIME, LOCAL_SANS, LeafProfile

GPU_1: Final = Identity.parse_short("agent/gpu-1")
AGENT_1: Final = Identity.parse_short("agent/agent-1")
CLI: Final = Identity.parse_short("client/cli")
DAY: Final = timedelta(days=1)
P256: Final = ec.generate_private_key(ec.SECP256R1()).public_key()
P384: Final = ec.generate_private_key(ec.SECP384R1()).public_key()
RSA2048: Final = rsa.generate_private_key(65537, 2048).public_key()
RSA3072: Final = rsa.generate_private_key(65537, 3072).public_key()

POLICY: Final = """
[[issue]]
holder = "agent/gpu-*"
lifetime = "12h"
longest = "2d"
keys = ["p256"]
sans = ["localhost", "*.gpu.example", "127.0.0.1", "10.0.0.0/8", "::1"]

[[issue]]
holder = "agent"
shortest = "10m"

[[allow]]
who = "somebody else's"
"""


def rule(short: str, text: str = POLICY) -> IssuanceRule:
    return parse_issuance(text).rule_for(Identity.parse_short(short))


# Which rule decides.


def test_without_a_rule_it_is_as_ever() -> None:
    found = IssuancePolicy().rule_for(AGENT_1)
    assert (found.shortest, found.lifetime, found.longest) == (timedelta(minutes=1), *[LEAF_LIFETIME] * 2)
    assert found.profile(LOCAL_SANS).sans == LOCAL_SANS
    for key in (P256, P384, RSA2048, RSA3072):
        found.check_key(key)


@pytest.mark.parametrize("text", ["", "\n", "# [[issue]]\n"], ids=["nothing", "a line", "a comment"])
def test_a_policy_that_is_empty_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="it is empty, as when not written to its end"):
        parse_issuance(text)


@pytest.mark.parametrize(
    ("short", "holder"),
    [
        ("agent/gpu-1", "agent/gpu-*"),
        ("agent/gpu-", "agent/gpu-*"),
        ("agent/my-gpu-1", "agent"),
        ("agent/agent-1", "agent"),
        ("client/gpu-1", ""),
        ("service/control-plane", ""),
    ],
)
def test_the_first_rule_that_covers_an_identity_decides(short: str, holder: str) -> None:
    assert rule(short).holder == holder


def test_a_rule_adds_nothing_to_one_before_it() -> None:
    assert rule("agent/gpu-1").shortest == timedelta(minutes=1)
    assert rule("agent/agent-1").sans is None


# What it says.


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, DAY / 2), (DAY, DAY), (3 * DAY, 2 * DAY), (timedelta(seconds=1), timedelta(minutes=1))],
)
def test_a_lifetime_is_the_nearest_that_is_admitted(asked: timedelta | None, given: timedelta) -> None:
    assert rule("agent/gpu-1").profile(lifetime=asked).lifetime == given


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (LeafProfile(3 * DAY, sans=()), "admits 1m to 2d for agent/gpu-\\*, not 3d"),
        (LeafProfile(timedelta(seconds=59), sans=()), "not 59s"),
        (LeafProfile(DAY, KeyType.RSA2048, ()), "admits no key of the sort rsa-2048 .* make one of p256"),
        (LeafProfile(DAY, sans=("elsewhere.example",)), "admits no 'elsewhere.example' for agent/gpu-"),
    ],
)
def test_a_leaf_asked_for_outright_is_refused_for_whatever_is_not_admitted(
    wrong: LeafProfile, why: str
) -> None:
    rule("agent/gpu-1").check_profile(LeafProfile(2 * DAY, sans=LOCAL_SANS))
    with pytest.raises(NotAuthorized, match=why):
        rule("agent/gpu-1").check_profile(wrong)


@pytest.mark.parametrize(
    "san",
    [
        "localhost",
        "a.gpu.example",
        "a.b.gpu.example",
        "127.0.0.1",
        "10.1.2.3",
        "::1",
        "LOCALHOST",
        "A.gpu.example.",
    ],
)
def test_a_name_that_a_pattern_covers_is_admitted(san: str) -> None:
    rule("agent/gpu-1").check_sans([san])
    assert rule("agent/gpu-1").profile([san]).sans == (san,)


@pytest.mark.parametrize(
    "san",
    [
        "gpu.example",
        "evil-gpu.example",
        "a.gpu.example.com",
        "127.0.0.2",
        "11.0.0.1",
        "::ffff:10.1.2.3",
        "::2",
    ],
)
def test_any_other_is_refused_where_it_is_asked_for_and_dropped_where_it_was_there(san: str) -> None:
    with pytest.raises(NotAuthorized, match=r"admits no .* for agent/gpu-"):
        rule("agent/gpu-1").check_sans(["localhost", san])
    assert rule("agent/gpu-1").profile(["localhost", san]).sans == ("localhost",)


def test_what_is_no_name_is_never_admitted() -> None:
    for short in ("agent/gpu-1", "agent/agent-1"):
        with pytest.raises(IdentityError):
            rule(short).check_sans(["*.gpu.example"])


def test_no_names_are_admitted_by_an_empty_list_and_all_by_a_star() -> None:
    none, every = (rule("agent/a", f'[[issue]]\nholder = "agent"\nsans = {sans}') for sans in ("[]", '["*"]'))
    assert none.profile(LOCAL_SANS).sans == ()
    assert every.profile(LOCAL_SANS).sans == ("localhost",)


@pytest.mark.parametrize(
    ("keys", "admitted"),
    [
        ('["p256"]', [P256]),
        ('["p384"]', [P384]),
        ('["rsa-2048"]', [RSA2048, RSA3072]),
        ('["rsa-3072"]', [RSA3072]),
        ('["rsa-4096"]', []),
        ('["p384", "rsa-3072"]', [P384, RSA3072]),
    ],
)
def test_only_keys_of_the_sorts_named_are_admitted(keys: str, admitted: list[object]) -> None:
    found = rule("agent/a", f'[[issue]]\nholder = "agent"\nkeys = {keys}')
    for key in (P256, P384, RSA2048, RSA3072):
        if key in admitted:
            found.check_key(key)
        else:
            with pytest.raises(NotAuthorized, match=r"admits no .* for agent: make one of"):
                found.check_key(key)


@pytest.mark.parametrize(
    ("lines", "lives"),
    [
        ('lifetime = "1h"', ("1m", "1h", "365d")),
        ('longest = "30d"', ("1m", "30d", "30d")),
        ('longest = "30s"', ("30s", "30s", "30s")),
        ('lifetime = "800d"', ("1m", "800d", "800d")),
        ('lifetime = "10s"', ("10s", "10s", "365d")),
        ('shortest = "500d"\nlongest = "900d"', ("500d", "500d", "900d")),
    ],
)
def test_a_lifetime_that_is_left_out_follows_those_that_are_there(
    lines: str, lives: tuple[str, str, str]
) -> None:
    found = rule("agent/a", f'[[issue]]\nholder = "agent"\n{lines}')
    assert tuple(map(spell, (found.shortest, found.lifetime, found.longest))) == lives


# What cannot be used.


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", "holder is missing"),
        ('holder = "robot"', "holder = 'robot' is none"),
        ('holder = "agent/GPU"', "holder = 'agent/GPU' is none"),
        ('holder = "agent/"', "holder = 'agent/' is none"),
        ('holder = "agent/[a-z]"', "is none"),
        ("holder = 1", "holder = '1' is none"),
        ('holder = "agent"\nlifetme = "1d"', "'lifetme' is nothing that a rule has: use holder, lifetime"),
        ('holder = "agent"\nlifetime = 3600', "lifetime = '3600' is no duration"),
        ('holder = "agent"\nlifetime = "1 day"', "lifetime = '1 day' is no duration"),
        ('holder = "agent"\nlifetime = "-1d"', "is no duration"),
        ('holder = "agent"\nlifetime = "999999999d"', "are not in this order"),
        ('holder = "agent"\nlifetime = "0s"', "are not in this order, from 1s"),
        ('holder = "agent"\nlifetime = "2d"\nlongest = "1d"', "lifetime = 2d, longest = 1d are not in this"),
        ('holder = "agent"\nshortest = "2d"\nlongest = "1d"', "are not in this order"),
        ('holder = "agent"\nkeys = []', "keys is empty"),
        ('holder = "agent"\nkeys = "p256"', "keys is no list"),
        (
            'holder = "agent"\nkeys = ["ed25519"]',
            "keys has 'ed25519', which is none: use p256, p384, rsa",
        ),
        ('holder = "agent"\nsans = [1]', "sans is no list of texts"),
        ('holder = "agent"\nsans = ["a.*.b"]', "sans has 'a.\\*.b', which is none"),
        ('holder = "agent"\nsans = ["*a"]', "which is none"),
        ('holder = "agent"\nsans = ["10.0.0.1/8"]', "which is none"),
        ('holder = "agent"\nsans = ["*.10.0.0.1"]', "a network is written"),
        ('holder = "agent"\nsans = [""]', "which is none"),
    ],
)
def test_a_rule_that_cannot_be_used_says_which_it_is_and_in_which_line(lines: str, why: str) -> None:
    text = f'\n[[issue]]\nholder = "client"\n\n[[issue]]\n{lines}\n'
    with pytest.raises(ConfigError, match=f"rule 2, line 5: .*{why}"):
        parse_issuance(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[issue]]\nholder = agent\n", r"not TOML: .*line 2"),
        ("[issue]\nholder = 'agent'", "issue is no list of tables"),
        ("issue = [1]", "issue is no list of tables"),
        ("[[isue]]\nholder = 'agent'", "'isue' is nothing that a policy has"),
        ("issue = [{holder = 'robot'}]", "rule 1: holder"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_to_write(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_issuance(text)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("agent", "agent"),
        ("agent", "agent/gpu-*"),
        ("agent/*", "agent"),
        ("agent/gpu-*", "agent/gpu-1"),
        ("agent/gpu-*", "agent/gpu-1*"),
        ("agent/gpu-1", "agent/gpu-1"),
    ],
)
def test_a_rule_that_never_decides_is_refused_and_the_other_way_round_it_is_not(
    first: str, second: str
) -> None:
    both = [f'[[issue]]\nholder = "{holder}"\n' for holder in (first, second)]
    with pytest.raises(ConfigError, match=r"rule 2, line 3: .* never decides"):
        parse_issuance("".join(both))
    if first.replace("/*", "") != second:
        parse_issuance("".join(reversed(both)))


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_an_error_of_ours(text: str) -> None:
    for content in (text, f"[[issue]]\n{text}", f'[[issue]]\nholder = "agent"\nsans = ["{text}"]'):
        try:
            policy = parse_issuance(content)
        except ConfigError:
            continue
        policy.rule_for(AGENT_1).profile(LOCAL_SANS)


@given(st.integers(0, 10**6), st.sampled_from("smhd"))
def test_a_duration_that_is_shown_reads_the_same(number: int, unit: str) -> None:
    text = f'[[issue]]\nholder = "agent"\nlifetime = "{number}{unit}"'
    try:
        lifetime = parse_issuance(text).rules[0].lifetime
    except ConfigError:
        return
    again = f'[[issue]]\nholder = "agent"\nlifetime = "{spell(lifetime)}"'
    assert parse_issuance(again).rules[0].lifetime == lifetime


@pytest.mark.parametrize("sort", KeySort)
def test_a_sort_covers_itself_and_longer_keys_of_rsa(sort: KeySort) -> None:
    covered = {each for each in KeySort if sort.covers(each)}
    longer = {each for each in KeySort if sort > "rsa" and each >= sort}
    assert covered == {sort} | longer


def test_a_curve_is_no_rsa_key_however_the_sorts_are_spelled() -> None:
    assert not any(sort.admits(P256) for sort in KeySort if sort is not KeySort.P256)
    assert not any(sort.admits(RSA2048) for sort in (KeySort.P256, KeySort.P384, KeySort.RSA3072))
