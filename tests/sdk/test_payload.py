from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parallax.runtime.outcome import BYTES, JSON, Payload, Value
from parallax.sdk.payload import MAX_DEPTH, check_result, decode, encode
from parallax.security.errors import InvalidRequest

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=30,
)


@given(value=VALUES)
@example(value=2**53 + 1)
@example(value=-(10**4299))
@example(value=-0.0)
@example(value={"": {"\x00": "\U0001f9ea\u2028"}})
def test_a_json_value_comes_back_as_it_was(value: object) -> None:
    payload = encode(value)
    assert payload.content_type == JSON
    back = decode(payload)
    assert repr(back) == repr(value)  # unlike ==, tells 1 from 1.0 and True, and 0.0 from -0.0


@given(data=st.binary(), kind=st.sampled_from([bytes, bytearray, memoryview]))
def test_bytes_come_back_as_they_were(data: bytes, kind: type) -> None:
    payload = encode(kind(data))
    assert payload == Payload(data, BYTES)
    back = decode(payload)
    assert type(back) is bytes
    assert back == data


@given(value=VALUES)
def test_the_json_is_what_any_reader_takes_for_the_same(value: object) -> None:
    assert json.loads(encode(value).data) == value


@given(data=st.binary() | TEXT.map(str.encode))
def test_garbage_is_refused_and_nothing_else_happens(data: bytes) -> None:
    try:
        decode(Payload(data, JSON))
    except InvalidRequest as refused:
        str(refused).encode()


def test_json_is_compact_and_not_escaped() -> None:
    assert encode({"a": [1, None], "é": "ü"}).data == '{"a":[1,null],"é":"ü"}'.encode()


def test_none_is_the_json_null() -> None:
    assert encode(None) == Payload(b"null", JSON)
    assert decode(Payload(b"null", JSON)) is None


def test_a_payload_that_nobody_filled_in_is_no_bytes() -> None:
    assert decode(Payload()) == b""
    assert decode(Payload(b"x", "")) == b"x"


class Mood(StrEnum):
    GOOD = "good"


class Level(IntEnum):
    HIGH = 3


Point = namedtuple("Point", ["x", "y"])  # noqa: PYI024 - as users have them


@pytest.mark.parametrize(
    ("value", "back"),
    [
        ((1, (2,)), [1, [2]]),
        (Point(1, 2), [1, 2]),
        (Mood.GOOD, "good"),
        ({Mood.GOOD: Level.HIGH}, {"good": 3}),
        (OrderedDict(a=1), {"a": 1}),
    ],
)
def test_subclasses_arrive_as_what_they_are_in_json(value: object, back: object) -> None:
    assert decode(encode(value)) == back


def circular_list() -> list[object]:
    loop: list[object] = [1]
    loop.append([loop, loop])
    return loop


def circular_dict() -> dict[str, object]:
    loop: dict[str, object] = {}
    loop["self"] = loop
    return loop


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no")


class OwnMapping(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise KeyError(key)

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass
class Record:
    x: Any = 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "$: NaN is not JSON"),
        (math.inf, "$: infinity is not JSON"),
        ({"scores": [0.1, 0.2, 0.3, math.nan]}, "$.scores[3]: NaN is not JSON"),
        ([{"a": (1, -math.inf)}], "$[0].a[1]: infinity is not JSON"),
        ({1, 2}, "$: set is not JSON"),
        (object(), "$: object is not JSON"),
        ({"when": datetime(2026, 1, 1, tzinfo=UTC)}, "$.when: datetime is not JSON"),
        (Decimal(1), "$: Decimal is not JSON"),
        (1j, "$: complex is not JSON"),
        (Record, "$: type is not JSON"),
        ({"a": Record(math.nan)}, "$.a.x: NaN is not JSON"),
        ([Record(), {1: 2}], "$[1]: the key 1 is int, and keys must be str"),
        ([Record(), {1}], "$[1]: set is not JSON"),
        ([Record([math.inf])], "$[0].x[0]: infinity is not JSON"),
        (Record(Record(math.nan)), "$.x.x: NaN is not JSON"),
        (OwnMapping(), "$: OwnMapping is not JSON"),
        (iter([1]), "$: list_iterator is not JSON"),
        (
            {"image": b"\x89PNG"},
            "$.image: bytes is not JSON; give bytes as the whole value, or as base64 text",
        ),
        ({1: "a"}, "$: the key 1 is int, and keys must be str"),
        ({"a": {True: 1}}, "$.a: the key True is bool, and keys must be str"),
        ({None: 1}, "$: the key None is None, and keys must be str"),
        ({1.5: 1}, "$: the key 1.5 is float, and keys must be str"),
        ({(1, 2): 1}, "$: the key (1, 2) is tuple, and keys must be str"),
        ({b"k": 1}, "$: the key b'k' is bytes, and keys must be str"),
        ({Unprintable(): 1}, "$: the key <Unprintable> is Unprintable, and keys must be str"),
        ({10**5000: 1}, "$: the key <int> is int, and keys must be str"),
        ({"a b": {"é": {"x" * 50: {1}}}}, f'$["a b"]["\\u00e9"]["{"x" * 39}…]: set is not JSON'),
        ("\udcff", "$: text with a lone surrogate is not JSON"),
        ({"name": ["ok", "\ud800"]}, "$.name[1]: text with a lone surrogate is not JSON"),
        ({"\ud800": 1}, '$: the key "\\ud800" has a lone surrogate, which is not JSON'),
        ([10**4300], "$[0]: an integer of more than 4,300 digits is too long"),
        (circular_list(), "$[1][0]: the value contains itself"),
        (circular_dict(), "$.self: the value contains itself"),
        (Unprintable(), "$: Unprintable is not JSON"),
    ],
    ids=lambda item: item if isinstance(item, str) and item.startswith("$") else "",
)
def test_what_json_cannot_carry_is_refused_with_its_place(value: object, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        encode(value)
    assert str(refused.value) == reason
    str(refused.value).encode()


def test_a_record_counts_as_the_object_that_it_becomes() -> None:
    assert decode(encode(Record())) == {"x": 1}
    assert decode(encode([{"a": (Record(2), 3)}, Record(None)])) == [{"a": [{"x": 2}, 3]}, {"x": None}]
    assert decode(encode(Record(nested(MAX_DEPTH - 1)))) == {"x": nested(MAX_DEPTH - 1)}
    with pytest.raises(InvalidRequest, match="nested more than 100 levels deep"):
        encode(Record(nested(MAX_DEPTH)))


def test_a_shared_part_is_no_circle() -> None:
    part = [1]
    assert decode(encode([part, part, {"again": part}])) == [[1], [1], {"again": [1]}]


def test_both_directions_agree_on_how_deep_a_value_may_be() -> None:
    deepest = nested(MAX_DEPTH)
    assert decode(encode(deepest)) == deepest
    assert decode(encode({"a": nested(MAX_DEPTH - 1)})) == {"a": nested(MAX_DEPTH - 1)}
    with pytest.raises(InvalidRequest, match=r"^\$\[0\].*: nested more than 100 levels deep$") as refused:
        encode(nested(MAX_DEPTH + 1))
    assert len(str(refused.value)) < 300
    with pytest.raises(InvalidRequest, match="the payload is nested more than 100 levels deep"):
        decode(Payload(b"[" * 101 + b"]" * 101, JSON))


@pytest.mark.parametrize("bomb", [b"[", b'{"a":', b'[{"a":'], ids=["lists", "objects", "both"])
@pytest.mark.parametrize("depth", [101, 5_000, 500_000])
def test_a_nesting_bomb_is_refused(bomb: bytes, depth: int) -> None:
    closing = bomb[::-1].translate(bytes.maketrans(b"[{", b"]}"), b'":a')
    with pytest.raises(InvalidRequest, match="nested more than 100 levels deep"):
        decode(Payload(bomb * depth + b"1" + closing * depth, JSON))


def test_many_shallow_containers_are_no_bomb() -> None:
    value = [{"a": [index]} for index in range(1000)]
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the payload is not JSON: Expecting value at character 0"),
        (b"{", "Expecting property name enclosed in double quotes at character 1"),
        (b"[1,]", "the payload is not JSON: "),
        (b"'a'", "the payload is not JSON: Expecting value at character 0"),
        (b"1 2", "the payload is not JSON: Extra data at character 2"),
        (b'"\n"', "the payload is not JSON: Invalid control character at"),
        (b"\xef\xbb\xbf1", "the payload is not JSON: "),
        (b"\xff", "the payload is not UTF-8: invalid start byte at byte 0"),
        (b'"\xed\xa0\x80"', "the payload is not UTF-8: invalid continuation byte at byte 1"),
        ('"é"'.encode("utf-16"), "the payload is not UTF-8: "),
        (b'["\\ud800"]', "the payload is not JSON: $[0]: text with a lone surrogate is not JSON"),
        (b'{"\\uDFff":1}', 'the payload is not JSON: $: the key "\\udfff" has a lone surrogate'),
        (b"NaN", "the payload is not JSON: NaN is not JSON"),
        (b'{"a":[-Infinity]}', "the payload is not JSON: -Infinity is not JSON"),
        (b"[Infinity]", "the payload is not JSON: Infinity is not JSON"),
        (b"1e999", "the payload is not JSON: the number 1e999 is too large for a float"),
        (b"-1e999", "the payload is not JSON: the number -1e999 is too large for a float"),
        (
            b'{"a":{"k":1,"b":2,"k":3}}',
            'the payload is not JSON: the key "k" occurs twice in one object',
        ),
        (b'{"\\ud800":1,"\\ud800":2}', 'the key "\\ud800" occurs twice in one object'),
        (b"1" * 5000, "the payload is not JSON: Exceeds the limit (4300 digits)"),
    ],
    ids=lambda item: "" if isinstance(item, str) or len(item) > 30 else repr(item),
)
def test_what_is_not_strict_json_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode(Payload(data, JSON))
    assert reason in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b' {"a" : 1.0}\n', {"a": 1.0}),
        (b'"\\ud83e\\uddea"', "\U0001f9ea"),
        (b'"\\\\ud800"', "\\ud800"),
        (b"1e308", 1e308),
        (b"1e-999", 0.0),
        (b"9007199254740993", 9007199254740993),
        (b'[{"k":1},{"k":1}]', [{"k": 1}, {"k": 1}]),
    ],
)
def test_what_other_writers_of_json_do_is_understood(data: bytes, value: object) -> None:
    assert decode(Payload(data, JSON)) == value


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON", " application/json "],
)
def test_json_is_known_by_its_type(content_type: str) -> None:
    assert decode(Payload(b"[1]", content_type)) == [1]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-protobuf", "json", "\U0001f9ea" * 500])
def test_an_unknown_content_type_is_refused_by_name(content_type: str) -> None:
    with pytest.raises(InvalidRequest, match="is not understood; send application/json or") as refused:
        decode(Payload(b"1", content_type))
    assert json.dumps(content_type)[:10] in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_result_is_a_value_with_a_confidence() -> None:
    assert check_result(({"mood": "good"}, 1)) == Value(Payload(b'{"mood":"good"}', JSON), 1.0)
    assert check_result((b"raw", 0)) == Value(Payload(b"raw", BYTES), 0.0)
    assert check_result(Point(None, 0.5)) == Value(Payload(b"null", JSON), 0.5)


async def forgotten() -> tuple[int, float]:
    return 1, 1.0


async def several() -> Any:
    yield 1, 1.0


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "analyze() must return (value, confidence), not None"),
        ({"mood": "good"}, "analyze() must return (value, confidence), not dict"),
        ("ok", "analyze() must return (value, confidence), not str"),
        ([1, 0.5], "analyze() must return (value, confidence), not list"),
        (several(), "analyze() must return (value, confidence), not async_generator"),
        ((), "analyze() must return (value, confidence), not a tuple of 0"),
        ((1,), "analyze() must return (value, confidence), not a tuple of 1"),
        ((1, 0.5, "x"), "analyze() must return (value, confidence), not a tuple of 3"),
        ((1, math.nan), "confidence must be from 0 to 1, not nan"),
        ((1, math.inf), "confidence must be from 0 to 1, not inf"),
        ((1, 1.5), "confidence must be from 0 to 1, not 1.5"),
        ((1, -1), "confidence must be from 0 to 1, not -1.0"),
        ((1, "high"), "confidence must be a number from 0 to 1, not str"),
        ((1, True), "confidence must be a number from 0 to 1, not bool"),
        ((1, None), "confidence must be a number from 0 to 1, not NoneType"),
        ((1, Decimal("0.5")), "confidence must be a number from 0 to 1, not Decimal"),
        ((0.5, {"swapped": 1}), "confidence must be a number from 0 to 1, not dict"),
        (({"a": [math.nan]}, 0.5), "$.a[0]: NaN is not JSON"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_any_other_result_is_refused(result: object, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_result(result)
    assert str(refused.value) == reason


async def test_a_coroutine_that_nobody_awaited_is_named_and_closed() -> None:
    result = forgotten()
    with pytest.raises(InvalidRequest, match="returned a coroutine instead of awaiting it"):
        check_result(result)
    with pytest.raises(RuntimeError, match="already awaited"):
        await result


def test_a_result_may_be_as_large_as_the_limit_and_no_larger() -> None:
    assert check_result((b"x" * 10, 1), 10).confidence == 1.0
    with pytest.raises(InvalidRequest, match="has 11 bytes, more than the 10 allowed"):
        check_result((b"x" * 11, 1), 10)


def test_the_limit_of_digits_is_the_interpreters() -> None:
    assert sys.get_int_max_str_digits() == 4300  # what the tests above count on
