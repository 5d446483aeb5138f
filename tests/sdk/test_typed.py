"""What an annotation asks for is what comes, in both directions; a value is never quoted back."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator
from pydantic_core import core_schema
from typing_extensions import TypedDict

from parallax.runtime.outcome import BYTES, JSON, Payload
from parallax.sdk.payload import decode, encode, reader, writer
from parallax.sdk.typed import INNER
from parallax.security.errors import InvalidRequest

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FINITE = st.floats(allow_nan=False, allow_infinity=False)
EXTRAS = ",".join(f'"{number}":0' for number in range(20_000))


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.0
    next: Point | None = None


@dataclass
class Loose:
    x: Any = None


class Text(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    text: str
    language: str = Field(default="en", alias="lang")
    moods: list[Mood] = []
    at: datetime | None = None
    points: dict[str, Point] = {}
    number: int | float = 0
    whole: tuple[int, ...] = ()

    @field_validator("text")
    @classmethod
    def _is_short(cls, text: str) -> str:
        if len(text) > 100:
            raise ValueError(f"too long: {text}")
        return text


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    n: int = 0


class Options(TypedDict):
    limit: int


class Many(TypedDict):
    a: int
    b: int
    c: int
    d: int
    e: int


class Tree(BaseModel):
    type: str = "items_schema"  # as pydantic-core says, too
    leaves: list[int] = []
    more: list[Tree] = []


class Anything(BaseModel):
    a: Any = None
    f: float = 0.0


Pet: TypeAlias = Annotated[Cat | Dog, Field(discriminator="kind")]


def json(text: str) -> Payload:
    return Payload(text.encode(), JSON)


def refusal(do: Callable[..., object], *args: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        do(*args)
    message = str(refused.value)
    message.encode()
    assert len(message) < 1000
    assert "\n" not in message
    # A traceback would show what pydantic quotes.
    context = refused.value.__context__
    assert not isinstance(context, ValidationError)
    assert not type(context).__module__.startswith("pydantic")
    return message


POINTS = st.recursive(
    st.builds(Point, st.integers(), FINITE), lambda inner: st.builds(Point, st.integers(), FINITE, inner)
)
TEXTS = st.builds(
    Text,
    text=TEXT.filter(lambda text: len(text) <= 100),
    lang=TEXT,
    moods=st.lists(st.sampled_from(Mood)),
    at=st.none() | st.datetimes(timezones=st.just(UTC)),
    points=st.dictionaries(TEXT, POINTS, max_size=3),
    number=st.integers() | FINITE,
    whole=st.lists(st.integers()).map(tuple),
)


@given(point=POINTS)
def test_a_dataclass_comes_back_as_it_was(point: Point) -> None:
    back = reader(Point)(encode(point))
    assert type(back) is Point
    assert repr(back) == repr(point)
    assert writer(Point)(point) == encode(point)


@given(text=TEXTS)
def test_a_model_comes_back_as_it_was(text: Text) -> None:
    assert reader(Text)(encode(text)) == text
    assert writer(Text)(text) == encode(text)


@given(texts=st.lists(TEXTS, max_size=3))
def test_a_list_of_models_comes_back_as_it_was(texts: list[Text]) -> None:
    assert reader(list[Text])(encode(texts)) == texts


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | FINITE | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
        max_leaves=20,
    )
)
def test_pydantic_reads_in_json_what_we_do(value: object) -> None:
    payload = encode(value)
    assert repr(reader(list[Any])(encode([value]))) == repr([decode(payload)])


@pytest.mark.parametrize("annotation", [Any, object, dict])
def test_an_annotation_that_says_nothing_changes_nothing(annotation: Any) -> None:
    assert reader(annotation) is decode
    assert writer(annotation) is encode


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (Point, '{"x":1,"y":2,"more":true}', Point(1, 2.0)),
        (Point | None, "null", None),
        (list[Point], '[{"x":1}]', [Point(1)]),
        (Options, '{"limit":3}', {"limit": 3}),
        (Pet, '{"kind":"cat","lives":9}', Cat(kind="cat", lives=9)),
        (Text, '{"text":"a","lang":"de"}', Text(text="a", lang="de")),
        (datetime, '"2026-01-01T00:00:00Z"', datetime(2026, 1, 1, tzinfo=UTC)),
        (date, '"2026-01-01"', date(2026, 1, 1)),
        (UUID, f'"{UUID(int=7)}"', UUID(int=7)),
        (Decimal, '"1.10"', Decimal("1.10")),
        (Mood, '"good"', Mood.GOOD),
        (int, str(2**53 + 1), 2**53 + 1),
        (int, "9" * 400, int("9" * 400)),
        (float, "1", 1.0),
        (tuple[int, str], '[1,"a"]', (1, "a")),
        (frozenset[int], "[1,1]", frozenset({1})),
        (None, "null", None),
        (bytes | Point, '{"x":1}', Point(1)),
        (RootModel[list[int]], "[1]", RootModel[list[int]]([1])),
    ],
    ids=str,
)
def test_what_fits_arrives_as_the_type(annotation: Any, text: str, value: object) -> None:
    back = reader(annotation)(json(text))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "reason"),
    [
        (Point, "[]", "Point: $: input should be an object"),
        (Point, "{}", "Point: $.x: field required"),
        (Point, '{"x":"1"}', "Point: $.x: input should be a valid integer"),
        (Point, '{"x":1.0}', "Point: $.x: input should be a valid integer"),
        (Point, '{"x":true}', "Point: $.x: input should be a valid integer"),
        (Point, '{"x":1,"y":"NaN"}', "Point: $.y: input should be a valid number"),
        (Point, '{"x":1,"next":{"x":2,"next":{}}}', "Point: $.next.next.x: field required"),
        (list[Point], '[{"x":1},{"x":null}]', "list[Point]: $[1].x: input should be a valid integer"),
        (Text, '{"text":"","points":{"a b":{"x":"s"}}}', '$.points["a b"].x: input should be'),
        (Text, '{"text":"","at":"yesterday"}', "$.at: input should be a valid datetime"),
        (Options, '{"limit":"3"}', "Options: $.limit: input should be a valid integer"),
        (Strict, '{"n":1,"m":2}', "$.m: extra inputs are not permitted"),
        (
            Point | Options,
            '{"limit":1.5}',
            "Point | Options: $.x (as Point): field required; $.limit (as Options): ",
        ),
        (Pet, '{"kind":"cow"}', "the tag 'kind' must be one of 'cat', 'dog'"),
        (Pet, '{"kind":"cat","lives":"9"}', "Cat | Dog: $.lives (as cat): input should be a valid integer"),
        (dict[str, int], '{"a":"b"}', "dict[str, int]: $.a: input should be a valid integer"),
        (Many, "{}", "$.c: field required; and 2 more"),
        (Strict, f'{{"n":1,{EXTRAS}}}', "Strict: 20,000 things in it are wrong"),
        (Point, f'{{"x":1,"y":{"9" * 400}}}', "an integer in it is too large for a float"),
        (Anything, f'{{"f":-{"9" * 309}}}', "an integer in it is too large for a float"),
        (bytes, '"text"', "the payload is JSON, and bytes are expected"),
    ],
    ids=lambda item: item[:30] if isinstance(item, str) else "",
)
def test_what_does_not_fit_is_refused_with_its_place(annotation: Any, text: str, reason: str) -> None:
    message = refusal(reader(annotation), json(text))
    assert reason in message, message


@pytest.mark.parametrize(
    ("annotation", "text", "reason"),
    [
        (list[str], '["a",1,2]', "$[1]: input should be a valid string"),
        (tuple[str, ...], "[1,2]", "$[0]: input should be a valid string"),
        (tuple[str, str], "[1,2]", "$[0]: input should be a valid string"),
        (set[int], '["a","b"]', "$[0]: input should be a valid integer"),
        (frozenset[int], '["a","b"]', "$[0]: input should be a valid integer"),
        (deque[int], '["a","b"]', "$[0]: input should be a valid integer"),
        (dict[str, int], '{"a":"x","b":"y"}', "$.a: input should be a valid integer"),
        (Mapping[str, list[int]], '{"a":["x","y"],"b":["z"]}', "$.a[0]: input should be a valid integer"),
        (Text, '{"text":"","moods":["x","y"]}', "$.moods[0]: input should be 'good' or 'bad'"),
        (list[Text], '[{"text":"","moods":["x","y"]},{}]', "$[0].moods[0]: input should be 'good' or 'bad'"),
        (Tree, '{"leaves":["a","b"]}', "$.leaves[0]: input should be a valid integer"),
        (Tree, '{"more":[{"leaves":["a","b"]},1]}', "$.more[0].leaves[0]: input should be a valid integer"),
    ],
    ids=str,
)
def test_one_wrong_thing_in_a_container_is_enough(annotation: Any, text: str, reason: str) -> None:
    """Also inside models, which have validators of their own."""
    assert refusal(reader(annotation), json(text)).endswith(f": {reason}")


def test_every_schema_within_a_schema_is_reached() -> None:
    """Where pydantic-core puts schemas, other than those that say what is written, or described."""
    kinds = [kind for kind in vars(core_schema).values() if hasattr(kind, "__required_keys__")]
    holding = {
        key
        for kind in kinds
        for key, hint in kind.__annotations__.items()
        if re.search(r"CoreSchema|Field\b|Parameter\b", hint.__forward_arg__)
    }
    assert "items_schema" in holding
    assert holding - {"return_schema", "json_schema_input_schema", "computed_fields"} <= INNER


MEASURE = """
import sys
from pydantic import BaseModel
from parallax.runtime.outcome import JSON, Payload
from parallax.sdk.payload import decode, reader
from parallax.security.errors import InvalidRequest

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

class Three(BaseModel):
    a: str
    b: str
    c: str

read, item = reader(eval(sys.argv[1])), sys.argv[2].encode()
payload = Payload(b"[" + (item + b",") * (2**22 // (len(item) + 1) - 2) + item + b"]", JSON)
decode(payload)  # what any payload of that size may cost
before = peak()
try:
    read(payload)
except InvalidRequest:
    print((peak() - before) / len(payload.data))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell the peak")
@pytest.mark.parametrize(
    ("annotation", "item"),
    [("list[str]", "1"), ("list[Three]", "{}"), ("list[list[int] | dict[str, int]]", "1"), ("set[str]", "1")],
)
def test_a_payload_that_does_not_fit_costs_no_more_than_one_that_does(annotation: str, item: str) -> None:
    """Noting all that is wrong took 140 to 390 times the size of the payload."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, annotation, item], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 50  # 13 to 20 of them for reading JSON at all


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Text, {"text": "SECRET" * 1_000_000}),
        (Point, {"x": "SECRET" * 1000}),
        (Text, {"text": "", "at": "SECRET\x00\u202e" * 100}),
        (Text, {"text": "", "moods": ["SECRET" * 100]}),
        (Pet, {"kind": "SECRET" * 1000}),
        (list[Pet], [{"kind": "SECRET", "lives": "SECRET"}] * 1000),
        (Strict, {"SECRET" * 1000: 1}),
        (dict[int, int], {"SECRET" * 1000: 1}),
        (Point | Options, "SECRET" * 1000),
        (UUID, "SECRET" * 1000),
    ],
    ids=str,
)
def test_large_input_is_not_quoted(annotation: Any, value: object) -> None:
    message = refusal(reader(annotation), encode(value))
    assert message.count("SECRET") <= 40, message
    assert all(character.isprintable() for character in message)


@pytest.mark.parametrize(
    "text",
    ['{"x":1,"x":2}', '{"x":1,"y":NaN}', '{"x":1,"y":1e999}', '{"x":1,"z":"\\ud800"}', "[" * 101 + "]" * 101],
)
def test_the_rules_of_json_come_first(text: str) -> None:
    """Pydantic alone would take most of these."""
    with pytest.raises(InvalidRequest, match="the payload is n"):
        reader(Point)(json(text))


def test_bytes_are_for_who_asks_for_them() -> None:
    assert reader(bytes)(Payload(b"\xff", BYTES)) == b"\xff"
    either = reader(bytes | Point | None)  # type: ignore[arg-type]  # a union is no type[T] to mypy
    assert either(Payload(b"{}", BYTES)) == b"{}"
    assert either(json("null")) is None
    short: Any = reader(Annotated[bytes, Field(max_length=2)])  # type: ignore[arg-type]
    assert short(Payload(b"ab")) == b"ab"
    assert "at most 2 bytes" in refusal(short, Payload(b"abc"))
    message = refusal(reader(Point), Payload(b"\xffSECRET", BYTES))
    assert message.startswith("the payload is bytes, and JSON is expected, for Point; send")


def test_an_author_s_own_check_speaks_for_itself() -> None:
    message = refusal(reader(Text), encode({"text": "x" * 1000}))
    assert message.startswith("the payload does not fit Text: $.text: too long: xxx")
    assert message.endswith("…")


def test_a_validator_that_breaks_is_a_bug_and_not_the_caller_s_fault() -> None:
    with pytest.raises(KeyError):
        reader(Broken)(json('{"x":1}'))


class Broken(BaseModel):
    x: int

    @field_validator("x")
    @classmethod
    def _breaks(cls, x: int) -> int:
        return dict[int, int]()[x]


class NotDescribed:
    def __repr__(self) -> str:
        return "NotDescribed()"


@dataclass
class HoldsNotDescribed:
    x: NotDescribed = field(default_factory=NotDescribed)


@dataclass
class Undefined:
    x: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (NotDescribed, "NotDescribed is no type that JSON can carry: "),
        (HoldsNotDescribed, "HoldsNotDescribed is no type that JSON can carry: "),
        (list[NotDescribed], "list[NotDescribed] is no type that JSON can carry: "),
        (Undefined, "Undefined is no type that JSON can carry: "),
        (1, "1 is no type that JSON can carry: "),
    ],
)
def test_a_type_without_json_is_refused_before_any_payload(annotation: Any, reason: str) -> None:
    for make in (reader, writer):
        with pytest.raises(InvalidRequest) as refused:
            make(annotation)
        assert str(refused.value).startswith(reason)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [HoldsNotDescribed(), [Undefined(1)]])
def test_a_value_without_json_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="is no type that JSON can carry"):
        encode(value)


@pytest.mark.parametrize(
    ("annotation", "value", "reason"),
    [
        (Point, {"x": 1}, "the value does not fit Point: Point is expected"),
        (Point, Text(text="a", lang="en"), "the value does not fit Point: Point is expected"),
        (Point, None, "the value is None, and Point is expected"),
        (Point, Point("SECRET"), "the value does not fit Point: x: int is expected"),  # type: ignore[arg-type]
        (list[Point], [Point(1), 2], "does not fit list[Point]: Point is expected"),
        (Point, b"SECRET", "does not fit Point: Point is expected"),
        (bytes, "SECRET", "the value is str, and bytes is expected"),
        (Point, Point(1, math.nan), "$.y: NaN is not JSON"),
        (list[Point], [Point(1), Point(1, 2, Point(3, math.inf))], "$[1].next.y: infinity is not JSON"),
        (Anything, Anything(f=math.nan), "$.f: NaN is not JSON"),
        (Anything, Anything(a=math.nan), "$.a: NaN is not JSON"),
        (Anything, Anything(a=[None, Loose(-math.inf)]), "$.a[1].x: infinity is not JSON"),
        (Anything, Anything(a=Anything(a=[Anything(a=math.nan)])), "$.a.a[0].a: NaN is not JSON"),
        (Anything, Anything(a="\ud800"), "$.a: text with a lone surrogate is not JSON"),
        (Anything, Anything(a=NotDescribed()), "the value does not fit Anything: "),
        (Anything, Anything(a=b"\xff"), "the value does not fit Anything: "),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_refused(annotation: Any, value: object, reason: str) -> None:
    message = refusal(writer(annotation), value)
    assert reason in message, message
    assert "SECRET" not in message


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (Anything(a=math.nan), "$.a"),
        ([None, {"k": Anything(a={"b": math.nan})}], "$[1].k.a.b"),
        ((Loose(), Loose(Anything(a=math.nan))), "$[1].x.a"),
    ],
)
def test_nan_is_not_turned_into_null(value: object, place: str) -> None:
    assert refusal(encode, value) == f"{place}: NaN is not JSON"


def test_a_value_is_written_as_its_annotation_says() -> None:
    @dataclass
    class More(Loose):
        secret: str = "s"

    assert decode(writer(Loose)(More(1))) == {"x": 1}
    assert decode(writer(list[Text])([Text(text="a", lang="de")]))[0]["lang"] == "de"  # type: ignore[index]
    assert writer(bytes | Point)(bytearray(b"x")) == Payload(b"x", BYTES)
    assert writer(datetime)(datetime(2026, 1, 1, tzinfo=UTC)) == json('"2026-01-01T00:00:00Z"')


def test_many_digits_do_not_take_long() -> None:
    payload = json(f'{{"x":1,"more":"{("1" * 308 + "x") * 10_000}"}}')
    start = time.process_time()  # what others do on a busy machine does not count
    assert reader(Point)(payload) == Point(1)
    assert time.process_time() - start < 2


def test_pydantic_is_not_loaded_without_a_type() -> None:
    script = """
import sys
from typing import Any
from parallax.sdk import SecureAgent
from parallax.sdk.payload import decode, encode
class Plain(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0
Plain("agent-1", "Plain", [])
decode(encode({"a": [1, None]}))
assert "pydantic" not in sys.modules
class Typed(SecureAgent):
    async def analyze(self, task: str, data: list[int]):
        return data, 1.0
Typed("agent-1", "Typed", [])
assert "pydantic" in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
