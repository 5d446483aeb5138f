"""What is written can be read again, and what is read cannot be worse than what could be written."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.protos import registry_pb2, task_pb2
from parallax.runtime import wire
from parallax.runtime.description import MAX_CONCURRENCY, AgentDescription
from parallax.runtime.outcome import BYTES, Failure, OutcomeCode, Payload, Value
from parallax.security.errors import InvalidRequest

DAY_MS = 86_400_000

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)  # protobuf strings are valid UTF-8
payloads = st.builds(Payload, st.binary(max_size=200), texts.filter(bool))
failures = st.builds(
    Failure,
    st.sampled_from(OutcomeCode),
    texts,
    texts,
    st.integers(0, DAY_MS).map(lambda ms: timedelta(milliseconds=ms)),
)
outcomes = st.one_of(st.builds(Value, payloads, st.floats(0, 1)), failures)
shown = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20)
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
descriptions = st.builds(
    AgentDescription,
    display_name=shown,
    capabilities=st.lists(names, unique=True, max_size=8).map(tuple),
    labels=st.dictionaries(shown, shown, max_size=5),
    metadata=st.dictionaries(shown, shown, max_size=5),
    max_concurrency=st.integers(1, MAX_CONCURRENCY),
)


class TestRoundTrip:
    @given(payloads)
    def test_of_a_payload(self, payload: Payload) -> None:
        message = task_pb2.Payload.FromString(wire.payload_to_proto(payload).SerializeToString())
        assert wire.payload_from_proto(message) == payload

    @given(outcomes)
    def test_of_an_outcome(self, outcome: Value | Failure) -> None:
        message = task_pb2.Outcome.FromString(wire.outcome_to_proto(outcome).SerializeToString())
        assert wire.outcome_from_proto(message) == outcome

    @given(descriptions, names)
    def test_of_a_description(self, description: AgentDescription, agent_id: str) -> None:
        written = wire.description_to_proto(description, agent_id).SerializeToString()
        message = registry_pb2.AgentDescription.FromString(written)
        assert message.agent_id == agent_id
        assert wire.description_from_proto(message) == description

    @given(st.integers(0, DAY_MS))
    def test_of_a_duration(self, milliseconds: int) -> None:
        assert wire.milliseconds(wire.duration(milliseconds)) == milliseconds


class TestOutcome:
    @pytest.mark.parametrize("code", OutcomeCode)
    def test_codes_have_the_same_names_in_the_schema(self, code: OutcomeCode) -> None:
        message = wire.outcome_to_proto(Failure(code, ""))
        assert task_pb2.OutcomeCode.Name(message.failure.code) == f"OUTCOME_CODE_{code}"

    def test_schema_has_no_other_codes(self) -> None:
        assert {
            name.removeprefix("OUTCOME_CODE_") for name in task_pb2.OutcomeCode.DESCRIPTOR.values_by_name
        } == set(OutcomeCode)

    def test_a_code_younger_than_this_program_is_unspecified(self) -> None:
        message = task_pb2.Outcome.FromString(
            task_pb2.Outcome(failure=task_pb2.Failure(message="m")).SerializeToString()
        )
        message.failure.code = 999  # type: ignore[assignment]  # proto3 enums are open
        assert wire.outcome_from_proto(message) == Failure(OutcomeCode.UNSPECIFIED, "m")

    def test_confidence_zero_is_a_value(self) -> None:
        value = Value(Payload(b""), 0.0)
        assert wire.outcome_from_proto(wire.outcome_to_proto(value)) == value

    @pytest.mark.parametrize("confidence", [math.nan, math.inf, -math.inf, -1.0, 1.5, -5e-324, 1 + 1e-15])
    def test_what_is_no_confidence_is_refused(self, confidence: float) -> None:
        message = task_pb2.Outcome(value=task_pb2.Value(confidence=confidence))
        with pytest.raises(InvalidRequest, match="confidence must be from 0 to 1"):
            wire.outcome_from_proto(message)

    def test_neither_value_nor_failure_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="neither a value nor a failure"):
            wire.outcome_from_proto(task_pb2.Outcome())

    @given(st.binary(max_size=60))
    def test_garbage_is_an_outcome_or_refused(self, data: bytes) -> None:
        message = task_pb2.Outcome()
        try:
            message.MergeFromString(data)
        except Exception:  # noqa: BLE001 - protobuf's own refusal; there is nothing of ours to test then
            return
        try:
            outcome = wire.outcome_from_proto(message)
        except InvalidRequest:
            return
        assert not isinstance(outcome, Value) or 0 <= outcome.confidence <= 1

    def test_a_retry_later_than_tomorrow_is_cut_to_a_day(self) -> None:
        message = task_pb2.Outcome(failure=task_pb2.Failure(retry_after_ms=2**64 - 1))
        outcome = wire.outcome_from_proto(message)
        assert isinstance(outcome, Failure)
        assert outcome.retry_after == timedelta(days=1)


class TestDefaults:
    def test_no_content_type_means_bytes(self) -> None:
        assert wire.payload_from_proto(task_pb2.Payload(data=b"x")) == Payload(b"x", BYTES)

    def test_no_payload_is_an_empty_one(self) -> None:
        assert wire.outcome_from_proto(task_pb2.Outcome(value=task_pb2.Value())) == Value(Payload(), 0.0)

    def test_an_empty_description_is_the_default_one(self) -> None:
        assert wire.description_from_proto(registry_pb2.AgentDescription()) == AgentDescription()

    def test_a_capability_stated_twice_counts_once(self) -> None:
        message = registry_pb2.AgentDescription(capabilities=["b", "a", "b"])
        assert wire.description_from_proto(message).capabilities == ("b", "a")


class TestDescription:
    @pytest.mark.parametrize(
        "message",
        [
            registry_pb2.AgentDescription(max_concurrency=MAX_CONCURRENCY + 1),
            registry_pb2.AgentDescription(capabilities=["Nope"]),
            registry_pb2.AgentDescription(labels={"a": "x" * 1_000}),
            registry_pb2.AgentDescription(display_name="a\nb"),
        ],
        ids=["max_concurrency", "capability", "label", "display_name"],
    )
    def test_of_a_peer_keeps_the_same_bounds(self, message: registry_pb2.AgentDescription) -> None:
        with pytest.raises(InvalidRequest):
            wire.description_from_proto(message)


class TestMilliseconds:
    @pytest.mark.parametrize(
        ("duration", "milliseconds"),
        [
            (timedelta(0), 0),
            (timedelta(seconds=-1), 0),
            (timedelta(microseconds=1), 1),  # zero would mean "no limit"
            (timedelta(microseconds=1_499), 1),
            (timedelta(milliseconds=1_500), 1_500),
            (timedelta(days=365), 31_536_000_000),
            (timedelta.max, round(timedelta.max / timedelta(milliseconds=1))),
        ],
    )
    def test_are_whole_and_never_zero_for_something(self, duration: timedelta, milliseconds: int) -> None:
        assert wire.milliseconds(duration) == milliseconds
