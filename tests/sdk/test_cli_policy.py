"""`parallax policy`: what it says of files, and what it says that the control plane says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallax.runtime.methods import METHODS, short
from parallax.runtime.policy import NO_LABELS, Target
from parallax.runtime.policy_text import BUILT_IN, built_in_policy
from parallax.sdk import exits
from parallax.security.identity import Identity

CI = """\
[[rule]]
name = "ci"
who = ["client/ci"]
may = ["Execute"]
targets = ["agent-1", "label:env=prod"]

[[rule]]
name = "audit"
who = ["label:team=audit"]
may = ["Execute"]
targets = ["capability:audit"]
"""
BAD = """\
[[rule]]
name = "ci"
who = ["ci"]
may = ["Exekute"]
"""


@pytest.fixture
def write(empty_environment: Path) -> Callable[[str], Path]:
    """Writes a policy."""

    def put(text: str) -> Path:
        path = empty_environment / "policy.toml"
        path.write_text(text, encoding="utf-8")
        return Path("policy.toml")

    return put


class TestCheck:
    def test_of_a_good_file_says_so(self, parallax: Any, write: Any) -> None:
        ended = parallax("policy", "check", write(CI))
        assert (ended.code, ended.out) == (exits.OK, "policy.toml: OK, 2 rules\n")

    def test_of_a_bad_file_says_all_that_is_wrong_where_and_what_to_write(
        self, parallax: Any, write: Any
    ) -> None:
        ended = parallax("policy", "check", write(BAD))
        assert ended.code == exits.FAILED
        who, method = ended.out.splitlines()
        assert who.startswith("policy.toml: line 1: rule 'ci': 'ci' is nobody: write client/ci, client/*, ")
        assert method == "policy.toml: line 1: rule 'ci': 'Exekute' is no method: write Execute"

    def test_can_be_read_by_programs(self, parallax: Any, write: Any) -> None:
        told = json.loads(parallax("policy", "check", write(BAD), "--json").out)
        assert (told["file"], told["ok"]) == ("policy.toml", False)
        assert [(each["line"], each["rule"]) for each in told["problems"]] == [(1, "ci"), (1, "ci")]
        assert json.loads(parallax("policy", "check", write(CI), "--json").out)["problems"] == []

    def test_is_of_the_file_in_the_settings_unless_one_is_named(
        self, parallax: Any, write: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PARALLAX_POLICY_FILE", str(write(CI)))
        assert parallax("policy", "check").code == exits.OK
        monkeypatch.delenv("PARALLAX_POLICY_FILE")
        ended = parallax("policy", "check")
        assert ended.code == exits.CONFIG
        assert "name its file, or set PARALLAX_POLICY_FILE" in ended.err

    @pytest.mark.parametrize("name", ["missing.toml", "."])
    def test_of_what_cannot_be_read_is_no_verdict(self, parallax: Any, name: str) -> None:
        ended = parallax("policy", "check", name)
        assert ended.code == exits.CONFIG
        assert f"cannot read the policy {name}" in ended.err

    def test_of_what_is_no_text_is_no_verdict(self, parallax: Any, write: Any) -> None:
        write("").write_bytes(b"\xff\xfe")
        ended = parallax("policy", "check", "policy.toml")
        assert ended.code == exits.CONFIG
        assert "a policy is TOML in UTF-8" in ended.err


class TestExplain:
    @pytest.mark.parametrize(
        ("options", "rule"),
        [
            (("--as", "client/ci", "--target", "agent-1"), "ci"),
            (("--as", "client/ci", "--target", "agent-2"), None),
            (("--as", "client/ci", "--target", "agent-2", "--target-label", "env=prod"), "ci"),
            (("--as", "client/ci", "--target", "agent-2", "--target-label", "env=dev"), None),
            (("--as", "client/ci"), "ci"),
            (("--as", "client/cli", "--target", "agent-1"), None),
            (("--as", "client/cli", "--label", "team=audit", "--target", "capability:audit"), "audit"),
            (("--as", "client/cli", "--label", "team=audit", "--target", "agent-1"), None),
            (("--as", "anonymous", "--target", "agent-1"), None),
        ],
    )
    def test_names_the_rule_that_decides(
        self, parallax: Any, write: Any, options: tuple[str, ...], rule: str | None
    ) -> None:
        ended = parallax("policy", "explain", *options, "--call", "Execute", "--file", write(CI), "--json")
        told = json.loads(ended.out)
        assert (told["rule"], told["allowed"]) == (rule, rule is not None)
        assert ended.code == (exits.FAILED if rule is None else exits.OK)

    def test_says_why(self, parallax: Any, write: Any) -> None:
        asked = ("policy", "explain", "--as", "client/ci", "--call", "Execute", "--file", write(CI))
        assert parallax(*asked, "--target", "agent-1").out == (
            "allowed: rule 'ci' lets spiffe://parallax.local/client/ci call Execute of agent-1\n"
        )
        assert parallax(*asked, "--target", "agent-2").out == (
            "refused: spiffe://parallax.local/client/ci may not call Execute of 'agent-2', "
            "only of agent-1 or label:env=prod\n"
        )
        assert parallax(*asked).out == (
            "allowed: rule 'ci' lets spiffe://parallax.local/client/ci call Execute "
            "of agent-1 or label:env=prod\n"
        )
        assert (
            "as far as that is agent-1 or label:env=prod" in parallax(*asked, "--target", "capability:x").out
        )

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_agrees_with_what_is_decided(self, parallax: Any, method: str) -> None:
        for who in ("client/cli", "client/admin", "agent/agent-1", "service/agent-proxy"):
            asked = ("--as", who, "--call", short(method), "--target", "agent-1")
            told = json.loads(parallax("policy", "explain", *asked, "--json").out)
            decision = built_in_policy().decide(
                Identity.parse_short(who), NO_LABELS, method, Target("agent-1")
            )
            assert told == {
                "allowed": decision.allowed,
                "rule": decision.rule,
                "why": decision.why,
                "method": method,
            }

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--as", "ci", "--call", "Execute"), "not <kind>/<name>"),
            (("--as", "client/ci", "--call", "Link"), "is several methods"),
            (("--as", "client/ci", "--call", "Exekute"), "write Execute"),
            (("--as", "client/ci", "--call", "Execute", "--target", "a/b"), "not a name"),
            (("--as", "client/ci", "--call", "Execute", "--label", "team"), "is no label: write key=value"),
            (("--as", "client/ci", "--call", "Execute", "--in-force", "--label", "a=b"), "take --file and"),
            (
                ("--as", "client/ci", "--call", "Execute", "--file", "missing"),
                "cannot read the policy missing",
            ),
        ],
    )
    def test_of_no_question_says_what_is_wrong(
        self, parallax: Any, options: tuple[str, ...], says: str
    ) -> None:
        ended = parallax("policy", "explain", *options)
        assert (ended.code, ended.out) == (exits.CONFIG, "")
        assert says in ended.err


class TestShow:
    def test_without_a_file_writes_the_policy_that_is_built_in(self, parallax: Any) -> None:
        assert parallax("policy", "show").out == BUILT_IN

    def test_writes_the_file_in_the_settings(
        self, parallax: Any, write: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PARALLAX_POLICY_FILE", str(write(CI)))
        assert parallax("policy", "show").out == CI
