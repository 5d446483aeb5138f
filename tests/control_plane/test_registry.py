"""Who is registered, under which generation, and until when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.control_plane.registry import AgentRecord, AgentRef, Registry
from parallax.runtime.description import AgentDescription
from parallax.security.errors import IdentityError, LeaseExpired, NoSuchAgent
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind

AT = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_S = 15.0
A = AgentRef("agent-1")
B = AgentRef("agent-2")


@pytest.fixture
def registry() -> Registry:
    return Registry(timedelta(seconds=LEASE_S))


def enter(registry: Registry, ref: AgentRef = A, now: float = 0.0, endpoint: str = "") -> AgentRecord:
    identity = Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, ref.name) if ref.verified else None
    return registry.register(ref, identity, AgentDescription(), endpoint=endpoint, now=now, at=AT)


class TestAgentRef:
    @pytest.mark.parametrize(
        ("text", "ref"),
        [
            ("agent-1", AgentRef("agent-1", verified=True)),
            ("anonymous/agent-1", AgentRef("agent-1", verified=False)),
            ("anonymous", AgentRef("anonymous", verified=True)),
        ],
    )
    def test_has_one_spelling(self, text: str, ref: AgentRef) -> None:
        assert AgentRef.parse(text) == ref
        assert str(ref) == text

    def test_verified_and_unverified_of_one_name_are_two_agents(self) -> None:
        assert AgentRef("agent-1", verified=True) != AgentRef("agent-1", verified=False)
        assert len({AgentRef("agent-1", verified=True), AgentRef("agent-1", verified=False)}) == 2

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "anonymous/",
            "anonymous/anonymous/a",
            "agent/agent-1",
            "../a",
            "a..b",
            "A",
            "a\x00",
            "a\n",
            "ä",
            "a" * 64,
            "anonymous/" + "a" * 300,
        ],
    )
    def test_what_is_no_name_is_refused(self, text: str) -> None:
        with pytest.raises(IdentityError, match="not a name"):
            AgentRef.parse(text)

    @given(st.from_regex(r"[a-z0-9]([a-z0-9_-]|\.(?![.])(?=[a-z0-9])){0,62}", fullmatch=True), st.booleans())
    def test_what_is_written_is_read_again(self, name: str, verified: bool) -> None:  # noqa: FBT001
        ref = AgentRef(name, verified=verified)
        assert AgentRef.parse(str(ref)) == ref


def test_a_registered_agent_is_found_by_its_reference(registry: Registry) -> None:
    record = enter(registry, endpoint="host:1")
    assert registry.get(A) is record
    assert registry.endpoint(A) == "host:1"
    assert len(registry) == 1


def test_an_unknown_agent_is_named_in_the_error(registry: Registry) -> None:
    with pytest.raises(NoSuchAgent, match="'anonymous/agent-1' is registered; see `parallax agents list`"):
        registry.get(AgentRef("agent-1", verified=False))
    assert registry.endpoint(A) == ""


def test_registering_again_replaces_the_record_under_a_higher_generation(registry: Registry) -> None:
    old, new = enter(registry), enter(registry)
    assert new.generation > old.generation
    assert registry.get(A) is new
    assert len(registry) == 1


def test_generations_rise_across_agents(registry: Registry) -> None:
    generations = [enter(registry, ref).generation for ref in (A, B, A, B)]
    assert generations == sorted(set(generations))


def test_records_are_ordered_by_name(registry: Registry) -> None:
    for name in ("c", "a", "b"):
        enter(registry, AgentRef(name))
    assert [str(record.ref) for record in registry.records()] == ["a", "b", "c"]


class TestLease:
    def test_lasts_its_time_and_no_longer(self, registry: Registry) -> None:
        record = enter(registry, now=100.0)
        assert registry.expire(100.0 + LEASE_S) == []
        assert registry.expire(100.0 + LEASE_S + 0.001) == [record]
        with pytest.raises(NoSuchAgent):
            registry.get(A)

    def test_is_renewed_by_the_agent_it_belongs_to_only(self, registry: Registry) -> None:
        first, second = enter(registry, A, now=0.0), enter(registry, B, now=1.0)
        registry.renew(A, 10.0)
        assert registry.expire(LEASE_S + 2) == [second]
        assert registry.expire(LEASE_S + 11) == [first]

    def test_of_one_generation_is_not_renewed_in_the_name_of_an_older_one(self, registry: Registry) -> None:
        old, new = enter(registry, now=0.0), enter(registry, now=1.0)
        with pytest.raises(LeaseExpired, match="register again"):
            registry.renew(A, 10.0, old.generation)
        assert registry.expire(LEASE_S + 2) == [new]

    def test_is_not_renewed_in_the_name_of_a_generation_yet_to_come(self, registry: Registry) -> None:
        record = enter(registry)
        with pytest.raises(LeaseExpired):
            registry.renew(A, 10.0, record.generation + 1)

    def test_is_renewed_under_its_own_generation_or_none(self, registry: Registry) -> None:
        record = enter(registry, now=0.0)
        registry.renew(A, 5.0, record.generation)
        registry.renew(A, 10.0)
        assert registry.expire(LEASE_S + 10) == []

    def test_of_nobody_cannot_be_renewed(self, registry: Registry) -> None:
        with pytest.raises(NoSuchAgent):
            registry.renew(A, 0.0)

    def test_is_not_renewed_by_reading(self, registry: Registry) -> None:
        record = enter(registry, now=0.0)
        registry.get(A)
        registry.records()
        registry.endpoint(A)
        assert registry.expire(LEASE_S + 1) == [record]

    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 10)), max_size=40), st.floats(0, 40))
    def test_expiry_takes_exactly_those_who_were_silent_too_long(
        self, steps: list[tuple[str, float]], pause: float
    ) -> None:
        registry, now, heard = Registry(timedelta(seconds=LEASE_S)), 0.0, dict[str, float]()
        for name, step in steps:
            now += step
            if name in heard:
                registry.renew(AgentRef(name), now)
            else:
                enter(registry, AgentRef(name), now)
            heard[name] = now
        now += pause
        silent = {name for name, last in heard.items() if last < now - LEASE_S}
        expired = registry.expire(now)
        assert {record.ref.name for record in expired} == silent
        assert [heard[r.ref.name] for r in expired] == sorted(heard[r.ref.name] for r in expired)
        assert {record.ref.name for record in registry.records()} == heard.keys() - silent


class TestRemoval:
    def test_takes_out_and_returns_the_record(self, registry: Registry) -> None:
        record = enter(registry)
        assert registry.remove(A) is record
        assert len(registry) == 0
        assert registry.expire(1e9) == []

    def test_by_its_own_generation_has_effect(self, registry: Registry) -> None:
        record = enter(registry)
        assert registry.remove(A, record.generation) is record

    def test_by_an_older_generation_has_none(self, registry: Registry) -> None:
        old, new = enter(registry), enter(registry)
        assert registry.remove(A, old.generation) is None
        assert registry.get(A) is new

    def test_of_nobody_is_none(self, registry: Registry) -> None:
        assert registry.remove(A) is None

    def test_does_not_touch_the_unverified_agent_of_the_same_name(self, registry: Registry) -> None:
        stranger = enter(registry, AgentRef("agent-1", verified=False))
        enter(registry, A)
        registry.remove(A)
        assert registry.records() == [stranger]
