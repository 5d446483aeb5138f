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
from tests.control_plane.test_authorization import peer

AT = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_S = 15.0
A = AgentRef("agent-1")
B = AgentRef("agent-2")


@pytest.fixture
def registry() -> Registry:
    return Registry(timedelta(seconds=LEASE_S))


def enter(registry: Registry, ref: AgentRef = A, now: float = 0.0, endpoint: str = "") -> AgentRecord:
    """By a registration."""
    registry.register(ref, _identity(ref), AgentDescription(), endpoint=endpoint, now=now, at=AT)
    return registry.get(ref)


def connect(registry: Registry, ref: AgentRef = A, now: float = 0.0, name: str = "") -> AgentRecord:
    """By a session."""
    return registry.connect(ref, _identity(ref), AgentDescription(name), now=now, at=AT)


def _identity(ref: AgentRef) -> Identity | None:
    return Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, ref.name) if ref.verified else None


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
    assert record.endpoint == "host:1"
    assert len(registry) == 1


def test_an_unknown_agent_is_named_in_the_error(registry: Registry) -> None:
    with pytest.raises(NoSuchAgent, match="'anonymous/agent-1' is registered; see `parallax agents list`"):
        registry.get(AgentRef("agent-1", verified=False))
    assert registry.find(A) is None


def test_registering_again_replaces_the_record_under_a_higher_generation(registry: Registry) -> None:
    old, new = enter(registry), enter(registry)
    assert new.generation > old.generation
    assert registry.get(A) is new
    assert len(registry) == 1


def test_generations_rise_across_agents(registry: Registry) -> None:
    generations = [enter(registry, ref).generation for ref in (A, B, A, B)]
    assert generations == sorted(set(generations))


class TestOrder:
    def test_of_records_is_by_name(self, registry: Registry) -> None:
        for name in ("c", "a", "b"):
            enter(registry, AgentRef(name))
        assert [str(record.ref) for record in registry.records()] == ["a", "b", "c"]

    def test_goes_on_after_one_that_is_there_or_is_not(self, registry: Registry) -> None:
        for name in ("a", "c", "e"):
            enter(registry, AgentRef(name))
        assert [r.ref.name for r in registry.after(None, 2)] == ["a", "c"]
        assert [r.ref.name for r in registry.after(AgentRef("a"), 5)] == ["c", "e"]
        assert [r.ref.name for r in registry.after(AgentRef("b"), 1)] == ["c"]
        assert registry.after(AgentRef("e"), 5) == []

    @given(
        st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.sampled_from(("in", "on", "out"))))
    )
    def test_holds_however_agents_come_and_go(self, steps: list[tuple[str, bool, str]]) -> None:
        registry, there = Registry(timedelta(seconds=LEASE_S)), set[AgentRef]()
        for name, verified, step in steps:
            ref = AgentRef(name, verified=verified)
            match step:
                case "in":
                    enter(registry, ref)
                case "on":
                    connect(registry, ref)
                case "out":
                    registry.remove(ref)
            (there.discard if step == "out" else there.add)(ref)
            walked, last = [], None
            while page := registry.after(last, 2):
                walked += [record.ref for record in page]
                last = walked[-1]
            assert walked == sorted(there) == [record.ref for record in registry.records()]


class TestLease:
    def test_lasts_its_time_and_no_longer(self, registry: Registry) -> None:
        record = enter(registry, now=100.0)
        assert registry.expire(100.0 + LEASE_S) == []
        assert registry.expire(100.0 + LEASE_S + 0.001) == [record]
        with pytest.raises(NoSuchAgent):
            registry.get(A)

    def test_is_renewed_by_the_agent_it_belongs_to_only(self, registry: Registry) -> None:
        first, second = enter(registry, A, now=0.0), enter(registry, B, now=1.0)
        registry.heartbeat(A, 10.0)
        assert registry.expire(LEASE_S + 2) == [second]
        assert registry.expire(LEASE_S + 11) == [first]

    def test_of_one_generation_is_not_renewed_in_the_name_of_an_older_one(self, registry: Registry) -> None:
        old, new = enter(registry, now=0.0), enter(registry, now=1.0)
        with pytest.raises(LeaseExpired, match="register again"):
            registry.heartbeat(A, 10.0, old.generation)
        assert registry.expire(LEASE_S + 2) == [new]

    def test_is_not_renewed_in_the_name_of_a_generation_yet_to_come(self, registry: Registry) -> None:
        record = enter(registry)
        with pytest.raises(LeaseExpired):
            registry.heartbeat(A, 10.0, record.generation + 1)

    def test_is_renewed_under_its_own_generation_or_none(self, registry: Registry) -> None:
        record = enter(registry, now=0.0)
        registry.heartbeat(A, 5.0, record.generation)
        registry.heartbeat(A, 10.0)
        assert registry.expire(LEASE_S + 10) == []

    def test_of_nobody_cannot_be_renewed(self, registry: Registry) -> None:
        with pytest.raises(NoSuchAgent):
            registry.heartbeat(A, 0.0)

    def test_is_not_renewed_by_reading(self, registry: Registry) -> None:
        record = enter(registry, now=0.0)
        registry.get(A)
        registry.records()
        registry.find(A)
        registry.after(None, 10)
        assert registry.expire(LEASE_S + 1) == [record]

    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 10)), max_size=40), st.floats(0, 40))
    def test_expiry_takes_exactly_those_who_were_silent_too_long(
        self, steps: list[tuple[str, float]], pause: float
    ) -> None:
        registry, now, heard = Registry(timedelta(seconds=LEASE_S)), 0.0, dict[str, float]()
        for name, step in steps:
            now += step
            if name in heard:
                registry.heartbeat(AgentRef(name), now)
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


class TestTwoWays:
    """Session and registration of one agent: one record, two generations, two leases."""

    def test_registering_beside_a_session_keeps_its_generation(self, registry: Registry) -> None:
        session = connect(registry)
        both = enter(registry, endpoint="h:1")
        assert both.generation == session.generation
        assert both.registration is not None
        assert both.registration.generation > session.generation
        assert (both.endpoint, len(registry)) == ("h:1", 1)

    def test_a_session_beside_a_registration_keeps_the_endpoint(self, registry: Registry) -> None:
        registered = enter(registry, endpoint="h:1")
        both = connect(registry, name="new")
        assert both.registration == registered.registration
        assert both.generation > registered.generation
        assert (both.endpoint, both.description.display_name) == ("h:1", "new")

    def test_an_ending_session_leaves_the_registration(self, registry: Registry) -> None:
        registered = enter(registry, endpoint="h:1")
        registry.disconnect(A, connect(registry).generation)
        left = registry.get(A)
        assert (left.generation, left.endpoint, left.session) == (registered.generation, "h:1", None)

    def test_the_late_end_of_an_older_session_has_no_effect(self, registry: Registry) -> None:
        old, new = connect(registry), connect(registry)
        registry.disconnect(A, old.generation)
        assert registry.get(A) is new
        registry.disconnect(A, new.generation)
        registry.disconnect(A, new.generation)
        assert registry.find(A) is None

    def test_a_session_does_not_end_by_the_registrations_generation(self, registry: Registry) -> None:
        connect(registry)
        both = enter(registry)
        assert both.registration is not None
        registry.disconnect(A, both.registration.generation)
        assert registry.get(A) is both

    def test_frames_do_not_keep_the_registration(self, registry: Registry) -> None:
        enter(registry, endpoint="h:1")
        session = connect(registry)
        registry.renew(A, LEASE_S)
        assert registry.expire(LEASE_S + 1) == [], "the session is as it was"
        left = registry.get(A)
        assert (left.generation, left.endpoint, left.registration) == (session.generation, "", None)
        with pytest.raises(LeaseExpired, match="no registration in force; register again"):
            registry.heartbeat(A, LEASE_S + 1)

    def test_heartbeats_do_not_keep_the_session(self, registry: Registry) -> None:
        connect(registry)
        both = enter(registry, endpoint="h:1")
        registry.heartbeat(A, LEASE_S)
        assert registry.expire(LEASE_S + 1) == [both], "which tells to end the session"
        left = registry.get(A)
        assert (left.session, left.endpoint) == (None, "h:1")
        with pytest.raises(NoSuchAgent):
            registry.renew(A, LEASE_S + 1)

    @pytest.mark.parametrize("session_first", [True, False])
    def test_both_leases_running_out_at_once_take_the_agent_out_once(
        self, registry: Registry, *, session_first: bool
    ) -> None:
        for way in (connect, enter) if session_first else (enter, connect):
            way(registry)
        assert [record.ref for record in registry.expire(LEASE_S + 1)] == [A]
        assert len(registry) == 0
        assert registry.expire(1e9) == []

    def test_an_agent_with_a_session_only_cannot_prolong_it_by_heartbeats(self, registry: Registry) -> None:
        connect(registry)
        with pytest.raises(LeaseExpired, match="register again"):
            registry.heartbeat(A, 1.0)
        with pytest.raises(LeaseExpired):
            registry.heartbeat(A, 1.0, registry.get(A).generation)

    def test_removal_by_the_records_generation_takes_both(self, registry: Registry) -> None:
        session = connect(registry)
        enter(registry, endpoint="h:1")
        assert registry.remove(A, session.generation) is not None
        assert len(registry) == 0
        assert registry.expire(1e9) == []

    def test_a_registration_beside_a_session_is_taken_back_alone(self, registry: Registry) -> None:
        session = connect(registry)
        registration = enter(registry, endpoint="h:1").registration
        assert registration is not None
        assert registry.remove(A, registration.generation) is None
        assert registry.retract(A, registration.generation)
        assert (registry.get(A).generation, registry.get(A).endpoint) == (session.generation, "")
        assert not registry.retract(A, registration.generation)

    @pytest.mark.parametrize("generation", [0, 99])
    def test_only_its_own_generation_takes_it_back(self, registry: Registry, generation: int) -> None:
        connect(registry)
        both = enter(registry, endpoint="h:1")
        assert not registry.retract(A, generation)
        assert registry.get(A) is both

    def test_a_registration_alone_is_removed_not_taken_back(self, registry: Registry) -> None:
        alone = enter(registry)
        assert not registry.retract(A, alone.generation)
        assert registry.remove(A, alone.generation) is alone


def test_every_change_is_told_and_renewals_are_not() -> None:
    told: list[AgentRef] = []
    registry = Registry(timedelta(seconds=LEASE_S), told.append)
    connect(registry)
    registry.renew(A, 1.0)
    presence = registry.register(A, None, AgentDescription(), endpoint="h:1", now=1.0, at=AT)
    registry.heartbeat(A, 2.0)
    assert told == [A, A]
    registry.retract(A, presence.generation)
    registry.disconnect(A, registry.get(A).generation)
    assert told == [A] * 4
    enter(registry, B)
    registry.remove(B)
    enter(registry, B)
    registry.expire(1e9)
    assert told[4:] == [B] * 4


# What proves it.


def test_a_registration_is_proved_by_its_last_sign_of_life(registry: Registry) -> None:
    first, second = peer("agent/agent-1"), peer("agent/agent-1")
    changes: list[AgentRef] = []
    before = enter(registry)
    registry.on_change = changes.append
    for proof in (first, second, second):
        registry.heartbeat(A, 1.0, proof=proof)
        registration = registry.get(A).registration
        assert registration is not None
        assert registration.proof is proof
        assert registration == before.registration
    assert changes == []


def test_a_registration_that_is_ended_takes_the_endpoint_and_leaves_the_session(registry: Registry) -> None:
    connect(registry)
    enter(registry, endpoint="localhost:1")
    registry.unregister(A)
    assert registry.get(A).endpoint == ""
    assert registry.get(A).registration is None
    assert registry.get(A).session is not None
    registry.unregister(A)
    assert registry.expire(100.0) != []


def test_an_agent_whose_only_registration_is_ended_is_gone_and_may_come_back(registry: Registry) -> None:
    enter(registry)
    registry.unregister(A)
    registry.unregister(B)
    assert registry.find(A) is None
    assert registry.expire(100.0) == []
    assert enter(registry).registration is not None
