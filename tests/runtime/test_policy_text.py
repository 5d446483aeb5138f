"""Policies as text: what is read, and what is refused with the line, the rule and the remedy."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.methods import METHODS, method_of, methods_of
from parallax.runtime.policy import GUARANTEED, Policy
from parallax.runtime.policy_text import BUILT_IN, MAX_BYTES, built_in_policy, parse_policy, read_policy
from parallax.security.errors import ConfigError

GOOD = """\
[[rule]]
name = "ci asks"
who = ["client/ci"]
may = ["Execute"]
targets = ["agent-1", "capability:audit", "label:env=prod", "anonymous/agent-1"]
"""
OPS = """
[[rule]]
name = "ops"
who = ["client/ops"]
may = ["administration"]
"""


def problems(text: str) -> list[str]:
    """What is wrong with *text*, which is no policy."""
    found = read_policy(text)
    assert not isinstance(found, Policy)
    return list(map(str, found))


def test_a_rule_is_read_as_it_is_written() -> None:
    [rule] = parse_policy(GOOD, "policy.toml").rules
    assert rule.name == "ci asks"
    assert rule.who == {"client/ci"}
    assert rule.methods == {method_of("Execute")}
    assert rule.targets == {"agent-1", "capability:audit", "label:env=prod", "anonymous/agent-1"}


def test_the_policy_that_is_built_in_is_written_in_the_same_form() -> None:
    assert built_in_policy() == read_policy(BUILT_IN)
    given_away = frozenset().union(*(rule.methods for rule in (*built_in_policy().rules, *GUARANTEED)))
    assert given_away == METHODS


@pytest.mark.parametrize(
    "text", ["", "\n", "# who may call what\n", "rule = []\n", BUILT_IN.partition("[[")[0]]
)
def test_a_file_without_a_rule_is_refused_with_what_to_write_instead(text: str) -> None:
    [problem] = problems(text)
    assert problem.startswith("it has no rule")
    instead = problem.partition("says so in one, ")[2].replace(", who", "\nwho").replace(", may", "\nmay")
    [rule] = parse_policy(f"[[rule]]\n{instead}\n", "policy.toml").rules
    assert rule.who == {"client/admin"}
    assert rule.methods == methods_of("administration")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('["Execute"]', '["Exekute"]'), "line 1: rule 'ci asks': 'Exekute' is no method: write Execute"),
        (('["Execute"]', '["Execute", "Execute"]'), "'Execute' stands twice in one list: take one out"),
        (('["Execute"]', "[]"), "may: list should have at least 1 item"),
        (('["Execute"]', '"Execute"'), 'write a list, such as ["Execute"]'),
        (('["Execute"]', '["ListAgents"]'), "none of its methods is asked of an agent: take targets out"),
        (('["Execute"]', '["Execute", 3]'), "input should be a valid string"),
        (('"client/ci"', '"ci"'), "'ci' is nobody: write client/ci, client/*, label:team=audit or anonymous"),
        (('"client/ci"', '"*"'), "'*' is nobody"),
        (('"client/ci"', '"*/*"'), "'*/*' is nobody"),
        (('"client/ci"', '"user/*"'), "'user/*' is nobody"),
        (('"client/ci"', '"client/CI"'), "'client/CI' is nobody"),
        (('"client/ci"', '"client/c*"'), "'client/c*' is nobody"),
        (('"client/ci"', '"label:team"'), "'label:team' is no label: write label:key=value"),
        (('"client/ci"', '"spiffe://parallax.local/client/ci"'), "is nobody"),
        (
            ('"agent-1"', '"agent/1"'),
            "'agent/1' is no target: write agent-1, label:env=prod, capability:audit",
        ),
        (('"agent-1"', '"capability:"'), "'capability:' is no target"),
        (('"agent-1"', '"capability:*"'), "'capability:*' is no target"),
        (('"agent-1"', '"label:=x"'), "'label:=x' is no label"),
        (('"agent-1"', '""'), "'' is no target"),
        (("name =", "nmae ="), "'nmae' is no key: use name, who, may, targets"),
        (('name = "ci asks"\n', ""), "rule 'number 1': name is missing: add it"),
        (('"ci asks"', '"guaranteed: x"'), "begins the names of what is in no file"),
        (('"ci asks"', '""'), "name: string should have at least 1 character"),
        (('"ci asks"', r'"a\u001b[31m"'), "its name has characters that cannot be shown"),
        (("targets = [", "#"), 'Execute is asked of agents: say of which, as targets = ["*"]'),
        (("[[rule]]", "[[rules]]"), "'rules' is no key: use rule"),
        (("[[rule]]", "[rule]"), "write [[rule]] above each rule"),
        (("[[rule]]", "[[rule]"), "line 1: it is not TOML"),
        (("who =", "who"), "line 3: it is not TOML"),
        (('"client/ci"', '"anonymous"'), None),
    ],
)
def test_a_mistake_is_named_with_its_remedy(change: tuple[str, str], says: str | None) -> None:
    text = GOOD.replace(*change, 1)
    assert text != GOOD
    if says is None:
        parse_policy(text, "policy.toml")
        return
    assert any(says in problem for problem in problems(text)), problems(text)
    with pytest.raises(ConfigError, match=r"^policy\.toml: "):
        parse_policy(text, "policy.toml")


def test_all_mistakes_are_named_each_with_its_line() -> None:
    text = GOOD.replace("Execute", "Exekute") + "\n# between\n" + OPS.replace("client/ops", "ops")
    assert [problem.partition(": ")[0] for problem in problems(text)] == ["line 1", "line 9", "line 9"]
    with pytest.raises(ConfigError, match=r"\(and 2 more: see 'parallax policy check'\)$"):
        parse_policy(text, "policy.toml")


def test_a_key_that_is_none_hides_no_mistake_in_another_rule() -> None:
    text = GOOD.replace("Execute", "Exekute") + "\n# between\n" + OPS + 'when = "always"\n'
    assert {problem.partition(": ")[0] for problem in problems(text)} == {"line 1", "line 9"}
    assert any("'when' is no key" in problem for problem in problems(text))
    assert any("Exekute" in problem for problem in problems(text))


def test_a_second_rule_of_the_same_name_is_refused() -> None:
    text = GOOD + GOOD.replace("client/ci", "client/cd")
    assert problems(text) == ["line 6: rule 'ci asks': another rule has its name: give it one of its own"]


def test_a_rule_that_says_the_same_again_is_refused_whatever_its_order() -> None:
    again = GOOD.replace("ci asks", "again").replace(
        '"agent-1", "capability:audit"', '"capability:audit", "agent-1"'
    )
    assert problems(GOOD + again) == [
        "line 6: rule 'again': it says the same as rule 'ci asks': take one out"
    ]


@pytest.mark.parametrize(
    "may", ["administration", "Renew", "ListCertificates", "RootService/*", "WatchPolicy"]
)
def test_nobody_without_a_certificate_is_given_more_than_to_ask_and_look(may: str) -> None:
    text = f'[[rule]]\nname = "open"\nwho = ["anonymous"]\nmay = ["{may}"]\n'
    assert any("is not for anonymous callers" in problem for problem in problems(text))


def test_a_policy_that_lets_nobody_for_sure_administer_is_refused() -> None:
    """A label can be taken back, and only who administers could grant it again."""
    assert "nobody could be sure to administer" in problems(OPS.replace("client/ops", "label:team=ops"))[0]
    assert "nobody could be sure to administer" in problems(OPS.replace("client/ops", "agent/ops"))[0]
    both = OPS.replace('"client/ops"', '"label:team=ops", "client/ops"')
    assert parse_policy(OPS, "").rules
    assert parse_policy(both, "").rules
    assert parse_policy(OPS.replace("client/ops", "client/*"), "").rules


def test_a_file_that_is_too_large_is_not_read() -> None:
    assert "more than" in problems("#" * (MAX_BYTES + 1))[0]


@given(st.text())
def test_whatever_is_written_is_a_policy_or_told_why_not(text: str) -> None:
    found = read_policy(text)
    if not isinstance(found, Policy):
        assert all(problem.text for problem in found)


SCRAPS: st.SearchStrategy[object] = st.sampled_from(
    ["client/ci", "Execute", "agent-1", "*", "", 1, True, None, [], {}, ["Execute"], ["*"]]
)


@given(st.lists(st.dictionaries(st.sampled_from(["name", "who", "may", "targets", "x"]), SCRAPS), max_size=3))
def test_whatever_a_rule_holds_is_a_policy_or_told_why_not(rules: list[dict[str, object]]) -> None:
    text = "".join(
        "[[rule]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in rule.items()) for rule in rules
    )
    tomllib.loads(text)
    found = read_policy(text)
    if not isinstance(found, Policy):
        assert all(problem.text and "\n" not in str(problem) for problem in found)


def _toml(value: object) -> str:
    match value:
        case None:
            return "1979-05-27"
        case bool():
            return str(value).lower()
        case dict():
            return "{}"
    return repr(value).replace("'", '"')


def test_every_method_can_be_given_by_its_short_name() -> None:
    for method in METHODS:
        assert method in methods_of(method)
