"""What rules allow, and what none allows: every decision beside a model of it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax import protos
from parallax.runtime.authorization import Authorization
from parallax.runtime.methods import (
    ADMINISTRATION,
    METHODS,
    OF_AGENTS,
    TARGETED,
    method_of,
    methods_of,
    short,
)
from parallax.runtime.policy import ANONYMOUS, NO_LABELS, Labels, Policy, Rule, Target
from parallax.security.errors import InvalidRequest
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind

EXECUTE: Final = method_of("Execute")
LIST: Final = method_of("ListAgents")
CERTIFICATES: Final = method_of("ListCertificates")


def who(short_name: str) -> Identity:
    return Identity.parse_short(short_name)


def rule(*, name: str = "rule", by: str = "client/ci", may: str = EXECUTE, of: str = "agent-1") -> Rule:
    return Rule(name, frozenset({by}), frozenset({may}), frozenset({of}))


def allows(policy: Policy, by: str, of: Target | None = None, labels: Labels = NO_LABELS) -> bool:
    return policy.decide(who(by), labels, EXECUTE, of).allowed


NAMES = st.sampled_from(["ci", "cli", "admin", "agent-1", "agent-2"])
LABELS = st.dictionaries(st.sampled_from(["team", "env"]), st.sampled_from(["a", "b"]))
CALLERS = st.none() | st.builds(
    lambda kind, name: Identity(DEFAULT_TRUST_DOMAIN, kind, name), st.sampled_from(Kind), NAMES
)
SUBJECTS = st.sampled_from(["client/ci", "client/*", "agent/*", "label:team=a", "label:env=b", ANONYMOUS])
OBJECTS = st.sampled_from(["agent-1", "agent-2", "capability:audit", "label:team=a", "*"])
METHOD = st.sampled_from(sorted(METHODS))
RULES = st.builds(
    Rule,
    st.text("abc", min_size=1, max_size=4),
    st.frozensets(SUBJECTS, min_size=1),
    st.frozensets(METHOD, min_size=1) | st.just(ADMINISTRATION),
    st.frozensets(OBJECTS),
)
POLICIES = st.builds(lambda rules: Policy(tuple(rules)), st.lists(RULES, max_size=5))
TARGETS = st.none() | st.builds(
    Target,
    st.sampled_from(["agent-1", "agent-2", "anonymous/agent-1", "capability:audit", "capability:x"]),
    LABELS,
)


class TestEveryPolicy:
    @given(POLICIES, RULES, CALLERS, LABELS, METHOD, TARGETS)
    def test_never_denies_for_a_rule_more(
        self,
        policy: Policy,
        more: Rule,
        caller: Identity | None,
        labels: Labels,
        method: str,
        target: Target | None,
    ) -> None:
        """But for administration, which is client/admin's until a rule gives it to somebody."""
        before = policy.decide(caller, labels, method, target)
        after = replace(policy, rules=(*policy.rules, more)).decide(caller, labels, method, target)
        if before.allowed and before.rule != "guaranteed: administration":
            assert after.allowed
            assert not after.only or after.only >= before.only

    @given(CALLERS, LABELS, METHOD, TARGETS)
    def test_without_rules_allows_what_is_guaranteed_alone(
        self, caller: Identity | None, labels: Labels, method: str, target: Target | None
    ) -> None:
        decision = Policy(()).decide(caller, labels, method, target)
        assert not decision.allowed or (decision.rule or "").startswith("guaranteed: ")

    @given(POLICIES, CALLERS, LABELS, METHOD, TARGETS)
    def test_names_the_rule_that_lets_a_caller_in(
        self, policy: Policy, caller: Identity | None, labels: Labels, method: str, target: Target | None
    ) -> None:
        """And that rule alone lets it in, too: what is explained is what is decided."""
        decision = policy.decide(caller, labels, method, target)
        assert decision.allowed == (decision.rule is not None)
        named = [each for each in policy.rules if each.name == decision.rule]
        if named:
            assert any(Policy((each,)).decide(caller, labels, method, target).allowed for each in named)
            assert repr(decision.rule) in decision.why

    @given(POLICIES, CALLERS, LABELS, METHOD, TARGETS)
    def test_decides_without_a_target_whether_there_is_one(
        self, policy: Policy, caller: Identity | None, labels: Labels, method: str, target: Target | None
    ) -> None:
        if policy.decide(caller, labels, method, target).allowed:
            assert policy.decide(caller, labels, method, None).allowed

    @given(POLICIES, CALLERS, LABELS, METHOD, st.sampled_from(["", "agent-1", "capability:audit"]))
    def test_is_remembered_as_it_was_decided(
        self, policy: Policy, caller: Identity | None, labels: Labels, method: str, target: str
    ) -> None:
        authorization = Authorization(policy, DEFAULT_TRUST_DOMAIN, lambda _: labels)
        first = authorization.decide(caller, method, target)
        assert authorization.decide(caller, method, target) is first
        of = Target(target, NO_LABELS if target.startswith("capability:") else labels) if target else None
        assert first == policy.decide(caller, labels if caller else NO_LABELS, method, of)
        authorization.replace(Policy(()))
        assert authorization.decide(caller, method, target) == Policy(()).decide(
            caller, labels if caller else NO_LABELS, method, of
        )


class TestCaller:
    def test_is_found_by_name_kind_or_granted_label(self) -> None:
        agent = Target("agent-1")
        assert allows(Policy((rule(),)), "client/ci", agent)
        assert allows(Policy((rule(by="client/*"),)), "client/ci", agent)
        assert allows(Policy((rule(by="label:team=a"),)), "client/ci", agent, {"team": "a"})

    @pytest.mark.parametrize("by", ["client/cli", "client/ci2", "agent/ci", "service/ci", "client/c"])
    def test_with_another_name_is_another(self, by: str) -> None:
        assert not allows(Policy((rule(),)), by, Target("agent-1"))

    def test_whose_label_has_a_strange_key_has_not_another_one(self) -> None:
        policy = Policy((rule(by="label:team=a=b"),))
        assert allows(policy, "client/ci", Target("agent-1"), {"team": "a=b"})
        assert not allows(policy, "client/ci", Target("agent-1"), {"team=a": "b"})

    @pytest.mark.parametrize("labels", [{}, {"team": "b"}, {"Team": "a"}, {"team": "a "}, {"team=a": ""}])
    def test_without_the_very_label_is_another(self, labels: Labels) -> None:
        assert not allows(Policy((rule(by="label:team=a"),)), "client/ci", Target("agent-1"), labels)

    def test_without_a_certificate_is_nobody_of_any_kind(self) -> None:
        policy = Policy(tuple(rule(by=f"{kind}/*") for kind in Kind))
        assert not policy.decide(None, {"team": "a"}, EXECUTE, Target("agent-1")).allowed

    def test_that_a_method_is_closed_to_is_told_who_it_is_open_to(self) -> None:
        decision = Policy(()).decide(who("client/ci"), NO_LABELS, CERTIFICATES, None)
        assert decision.why.endswith("; act as --identity client/admin")

    def test_that_is_nobody_is_not_told_who_may(self) -> None:
        decision = Policy(()).decide(None, NO_LABELS, CERTIFICATES, None)
        assert decision.why.endswith("; act as another --identity")


class TestTarget:
    def test_is_found_by_name_granted_label_or_any(self) -> None:
        for of in ("agent-1", "label:env=prod", "*"):
            assert allows(Policy((rule(of=of),)), "client/ci", Target("agent-1", {"env": "prod"}))

    @pytest.mark.parametrize("name", ["agent-2", "agent-11", "anonymous/agent-1", "capability:agent-1"])
    def test_with_another_name_is_another(self, name: str) -> None:
        decision = Policy((rule(of="agent-1"),)).decide(who("client/ci"), NO_LABELS, EXECUTE, Target(name))
        assert not decision.allowed or decision.only == {"agent-1"}

    def test_by_capability_does_not_open_the_agent_that_offers_it(self) -> None:
        """Agents state themselves what they can do: else each could have itself asked for anything."""
        assert not allows(Policy((rule(of="capability:audit"),)), "client/ci", Target("agent-1"))
        assert allows(Policy((rule(of="capability:audit"),)), "client/ci", Target("capability:audit"))
        assert not allows(Policy((rule(of="capability:audit"),)), "client/ci", Target("capability:other"))

    def test_by_capability_is_whoever_may_be_asked_of_those_who_offer_it(self) -> None:
        policy = Policy((rule(of="agent-1"), rule(of="label:env=prod")))
        decision = policy.decide(who("client/ci"), NO_LABELS, EXECUTE, Target("capability:audit"))
        assert decision.allowed
        assert decision.only == {"agent-1", "label:env=prod"}

    def test_that_may_not_be_asked_is_refused_with_those_that_may(self) -> None:
        decision = Policy((rule(),)).decide(who("client/ci"), NO_LABELS, EXECUTE, Target("agent-2"))
        assert "may not call Execute of 'agent-2', only of agent-1" in decision.why

    def test_does_not_count_where_nothing_is_asked_of_an_agent(self) -> None:
        assert Policy((rule(may=LIST),)).decide(who("client/ci"), NO_LABELS, LIST, Target("agent-2")).allowed


class TestGuarantees:
    @pytest.mark.parametrize("caller", ["agent/a", "client/c", "service/s"])
    @pytest.mark.parametrize("method", ["Renew", "GetTrustBundle", "WatchTrustBundle", "Check"])
    def test_hold_without_a_rule(self, caller: str, method: str) -> None:
        assert Policy(()).decide(who(caller), NO_LABELS, method_of(method), None).allowed

    def test_leave_administration_to_the_administrator(self) -> None:
        assert Policy(()).decide(who("client/admin"), NO_LABELS, CERTIFICATES, None).allowed
        assert not Policy(()).decide(who("client/ci"), NO_LABELS, CERTIFICATES, None).allowed

    def test_leave_it_where_another_may_do_a_part_of_it(self) -> None:
        policy = Policy((rule(by="client/auditor", may=CERTIFICATES),))
        assert policy.decide(who("client/auditor"), NO_LABELS, CERTIFICATES, None).allowed
        assert policy.decide(who("client/admin"), NO_LABELS, CERTIFICATES, None).allowed

    def test_end_where_a_rule_gives_it_to_another(self) -> None:
        policy = Policy((Rule("ops", frozenset({"client/ops"}), ADMINISTRATION),))
        assert policy.decide(who("client/ops"), NO_LABELS, CERTIFICATES, None).allowed
        assert not policy.decide(who("client/admin"), NO_LABELS, CERTIFICATES, None).allowed

    def test_know_who_administers_by_name_be_it_a_part(self) -> None:
        policy = Policy((rule(by="client/auditor", may=CERTIFICATES), rule(by="client/ci")))
        names = ("client/auditor", "client/admin", "client/ci", "agent/auditor")
        assert [each for each in names if policy.names_administrator(who(each))] == [
            "client/auditor",
            "client/admin",
        ]

    def test_name_nobody_where_all_of_a_kind_administer(self) -> None:
        assert not Policy((Rule("ops", frozenset({"client/*"}), ADMINISTRATION),)).names_administrator(
            who("client/ci")
        )

    def test_let_the_agent_proxy_alone_ask_agents(self) -> None:
        link = method_of("AgentService/Link")
        assert Policy(()).decide(who("service/agent-proxy"), NO_LABELS, link, Target("agent-1")).allowed
        for other in ("service/agent-proxy-2", "client/agent-proxy", "agent/agent-proxy"):
            assert not Policy(()).decide(who(other), NO_LABELS, link, Target("agent-1")).allowed


class TestMethods:
    def test_are_those_of_every_schema(self) -> None:
        """A service that is new: say in methods.py whose it is."""
        schemas = (each.name for each in iter_modules(protos.__path__) if each.name.endswith("_pb2"))
        files = [import_module(f"{protos.__name__}.{name}").DESCRIPTOR for name in schemas]
        services = [service for file in files for service in file.services_by_name.values()]
        assert {f"/{each.full_name}/{method.name}" for each in services for method in each.methods} <= METHODS

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_are_spelled_so_that_one_is_meant(self, method: str) -> None:
        assert method_of(short(method)) == method

    def test_may_be_meant_several_at_once(self) -> None:
        assert methods_of("DispatchService/*") == {EXECUTE, method_of("DispatchService/Link")}
        assert methods_of("Link") == {method_of("AgentService/Link"), method_of("DispatchService/Link")}
        assert methods_of("administration") == ADMINISTRATION
        with pytest.raises(InvalidRequest, match="is several methods: say which, such as AgentService/Link"):
            method_of("Link")

    @pytest.mark.parametrize(
        "text", ["", "/", "execute", "*", "*/Execute", "Exec*", "Execute\n", "parallax.v1.*"]
    )
    def test_that_do_not_exist_are_refused(self, text: str) -> None:
        with pytest.raises(InvalidRequest, match="is no method"):
            methods_of(text)

    def test_that_ask_an_agent_are_not_administration(self) -> None:
        assert not TARGETED & ADMINISTRATION


class TestLabelsThatLetCallersIn:
    """At an agent's own port; nobody else's are told there."""

    ANALYZE: Final = method_of("AgentService/Analyze")

    def test_are_those_of_rules_for_that_agent(self) -> None:
        policy = Policy(
            (
                rule(name="a", by="label:team=a", may=self.ANALYZE, of="agent-1"),
                rule(name="b", by="label:team=b", may=self.ANALYZE, of="label:env=prod"),
                rule(name="c", by="label:team=c", may=self.ANALYZE, of="*"),
                rule(name="d", by="label:team=d", may=self.ANALYZE, of="agent-2"),
                rule(name="e", by="client/ci", may=self.ANALYZE, of="agent-1"),
            )
        )
        prod = MappingProxyType({"env": "prod"})
        assert policy.callers_of(Target("agent-1")) == {"label:team=a", "label:team=c"}
        assert policy.callers_of(Target("agent-3", prod)) == {"label:team=b", "label:team=c"}
        assert policy.labels == {f"label:team={each}" for each in "abcd"} | {"label:env=prod"}

    def test_are_none_where_the_rule_is_for_other_methods_or_for_a_capability(self) -> None:
        """A capability is asked for at the control plane alone."""
        policy = Policy(
            (
                rule(name="a", by="label:team=a", may=EXECUTE),
                rule(name="b", by="label:team=b", may=self.ANALYZE, of="capability:audit"),
            )
        )
        assert not policy.callers_of(Target("agent-1"))

    @given(POLICIES, CALLERS, LABELS, LABELS)
    def test_are_all_that_decide_there(
        self, policy: Policy, caller: Identity | None, labels: Labels, own: Labels
    ) -> None:
        """An agent that knows these alone decides as the control plane does, which knows all."""
        agent = Target("agent-1", own)
        told = policy.callers_of(agent)
        known = {key: value for key, value in labels.items() if f"label:{key}={value}" in told}
        there = Policy(policy.for_agents)
        for method in OF_AGENTS:
            everything = policy.decide(caller, labels, method, agent)
            assert there.decide(caller, known, method, agent).allowed == everything.allowed
