"""Which deadlines are noticed when, beside a model that looks at each of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.deadlines import GRAIN_S, MANY_SLOTS, Deadlines

times = st.floats(0, 1000, allow_nan=False)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 20), times),
        st.tuples(st.just("discard"), st.integers(0, 20), times),
        st.tuples(st.just("expire"), st.integers(0, 20), times),
    ),
    max_size=60,
)


@given(operations, st.sampled_from([GRAIN_S, 0.25, 1.0]))
def test_does_what_a_look_at_each_would_do(steps: list[tuple[str, int, float]], grain: float) -> None:
    deadlines: Deadlines[int] = Deadlines(grain)
    model: dict[int, tuple[float, int]] = {}  # thing -> when, and where it is kept
    now = 0.0
    for step, thing, amount in steps:
        match step:
            case "add":
                if thing in model:
                    deadlines.discard(thing, model.pop(thing)[1])
                at = now + amount
                model[thing] = at, deadlines.add(thing, at)
            case "discard":
                if thing in model:
                    deadlines.discard(thing, model.pop(thing)[1])
            case "expire":
                now += amount / 10
                expired = deadlines.expire(now)
                assert len(expired) == len(set(expired))
                for late in expired:
                    assert model.pop(late)[0] <= now, "never early"
                assert all(at > now - grain for at, _ in model.values()), "late by one grain at most"
        assert len(deadlines) == len(model)
    assert set(deadlines.expire(now + 2_000)) == model.keys()
    assert not deadlines
    assert not deadlines._slots
    assert not deadlines._order


def test_discarding_what_is_not_there_has_no_effect() -> None:
    deadlines: Deadlines[str] = Deadlines()
    slot = deadlines.add("kept", 5.0)
    deadlines.discard("other", slot)
    deadlines.discard("kept", slot + 1)
    assert deadlines.expire(6.0) == ["kept"]
    deadlines.discard("kept", slot)
    assert not deadlines


def test_all_that_are_there_can_be_looked_through() -> None:
    deadlines: Deadlines[str] = Deadlines()
    slots = {name: deadlines.add(name, at) for name, at in (("a", 1.0), ("b", 1.0), ("c", 9.0), ("d", 9.0))}
    deadlines.discard("d", slots["d"])
    assert sorted(deadlines) == ["a", "b", "c"]
    deadlines.expire(2.0)
    assert [*deadlines] == ["c"]


def test_added_in_the_past_is_noticed_at_the_next_look() -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.expire(100.0)
    deadlines.add("late", 1.0)
    assert deadlines.expire(100.0) == ["late"]


def test_those_taken_back_are_not_kept_until_their_time() -> None:
    """A caller that withdraws tasks of every length up to a day must not leave a million slots for a day."""
    deadlines: Deadlines[int] = Deadlines()
    for number in range(10 * MANY_SLOTS):
        slot = deadlines.add(number, 3600 + number)
        if number % 100:
            deadlines.discard(number, slot)
        if number % 1000 == 0:
            deadlines.expire(1.0)
            assert len(deadlines._slots) <= MANY_SLOTS + 1000
            assert len(deadlines._order) == len(deadlines._slots)
    assert sorted(deadlines.expire(1e6)) == list(range(0, 10 * MANY_SLOTS, 100))
