"""
What users hand over and get back, as the payload of a task.

JSON unless the value is bytes. What comes out of `decode` equals what went into `encode`, tuples
aside: they arrive as lists. Whatever JSON would change or drop silently is refused, with its place.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, Final, Literal, NoReturn, TypeVar

from parallax.runtime.outcome import (
    BYTES,
    JSON,
    MAX_PAYLOAD_BYTES,
    Payload,
    Value,
    check_confidence,
    check_payload,
)
from parallax.sdk.place import at, shown, step, type_of
from parallax.security.errors import InvalidRequest

T = TypeVar("T")

# Levels of lists and objects. Far below what exhausts the stack, so that both ends agree on it whatever
# their Python version and however deep the call.
MAX_DEPTH: Final = 100

UNTYPED: Final = (Any, object, dict)  # annotations that let any payload through

_INFINITY: Final = float("inf")
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_NOT_FINITE: Final = ("NaN is not JSON", "infinity is not JSON")
_SURROGATE_ESCAPE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def encode(value: object) -> Payload:
    """
    *value* as a payload: bytes, bytearray and memoryview as they are, anything else as JSON.

    JSON here means None, bool, int of any size, finite float, str, and lists, tuples and dicts of these
    with str keys, at most `MAX_DEPTH` levels deep. Pydantic models and instances of dataclasses count as
    the dicts that pydantic makes of them, by alias.

    Raises:
        InvalidRequest: The value is something else; the message says what, and where in it.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return Payload(bytes(value), BYTES)
    if not _keeps_its_shape(value, MAX_DEPTH):
        raise InvalidRequest(_reason(value))
    try:
        return Payload(_ENCODER.encode(value).encode(), JSON)
    except (ValueError, TypeError) as exc:
        if not _holds_record(value):
            raise InvalidRequest(_reason(value)) from exc
    from parallax.sdk.typed import dump

    return _encode_dumped(dump, value)


def decode(payload: Payload) -> object:
    """
    The value in *payload*: bytes for octet-stream (also when the type is left empty), else from JSON.

    Strict (RFC 8259, and RFC 7493 for what that leaves open): UTF-8, no NaN or Infinity, no number that a
    float would turn into infinity, no key twice, no lone surrogate, at most `MAX_DEPTH` levels.

    Raises:
        InvalidRequest: Malformed, or a content type that nobody here reads.
    """
    match payload.content_type.partition(";")[0].strip().lower():  # JSON has no parameters (RFC 8259 §11)
        case "" | "application/octet-stream":
            return payload.data
        case "application/json":
            return _decode_json(payload.data)
        case _:
            raise InvalidRequest(
                f"the content type {shown(payload.content_type)} is not understood; send {JSON} or {BYTES}"
            )


def reader(annotation: type[T]) -> Callable[[Payload], T]:
    """
    What makes a value of the type *annotation* of a payload; `decode` where that says nothing.

    The payload is first what `decode` takes; then pydantic reads it by the rules of its strict mode for
    JSON: no text for a number, but for a date. `Any`, `object` and a bare `dict` say nothing.

    Raises:
        InvalidRequest: Here, that pydantic knows no JSON of that type; from the reader, that a payload does
            not fit, with its places.
    """
    if annotation in UNTYPED:
        return decode  # type: ignore[return-value]  # anything goes for Any and object; dict is taken at its word
    from parallax.sdk.typed import shape_of

    shape = shape_of(annotation)

    def read(payload: Payload) -> T:
        value = decode(payload)
        fitting: T = (
            shape.from_bytes(value) if isinstance(value, bytes) else shape.from_json(payload.data, value)
        )
        return fitting

    return read


def writer(annotation: Any) -> Callable[[object], Payload]:
    """
    What makes a payload of a value of the type *annotation*; `encode` where that says nothing.

    Raises:
        InvalidRequest: As with `reader`.
    """
    if annotation in UNTYPED:
        return encode
    from parallax.sdk.typed import shape_of

    shape = shape_of(annotation)

    def write(value: object) -> Payload:
        if isinstance(value, bytes | bytearray | memoryview) and shape.accepts_bytes():
            return encode(shape.from_bytes(bytes(value)))
        return _encode_dumped(shape.dump, value)

    return write


def check_result(
    result: object,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    *,
    write: Callable[[object], Payload] = encode,
    rule: str = "analyze() must return",
) -> Value:
    """
    What `analyze` returned, encoded, if it is a tuple `(value, confidence)`.

    Args:
        write: Encodes the value.
        rule: How the message begins when it is no such tuple.

    Raises:
        InvalidRequest: Of another shape, the confidence is not a number from 0 to 1, the value is not
            JSON, or it is larger than *max_payload_bytes*.
    """
    if not isinstance(result, tuple):
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that nobody awaited it
            raise InvalidRequest(
                "analyze() returned a coroutine instead of awaiting it; "
                "declare it, and what decorates it, `async def`"
            )
        raise InvalidRequest(f"{rule} (value, confidence), not {type_of(result)}")
    if len(result) != 2:
        raise InvalidRequest(f"{rule} (value, confidence), not a tuple of {len(result)}")
    value, confidence = result
    checked = check_confidence(confidence)
    return Value(check_payload(write(value), max_payload_bytes), checked)


def is_record(value: object) -> bool:
    """Whether *value* is a pydantic model or an instance of a dataclass."""
    cls = type(value)
    return is_dataclass(cls) or hasattr(cls, "__pydantic_serializer__")


def _holds_record(value: object) -> bool:
    """Whether there is one in the lists and dicts of *value*, which is not circular."""
    if isinstance(value, dict):
        return any(type(item) not in _SCALARS and _holds_record(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(type(item) not in _SCALARS and _holds_record(item) for item in value)
    return is_record(value)


def _keeps_its_shape(value: object, room: int) -> bool:
    """
    Whether containers nest at most *room* deep and all keys are text; says nothing of scalars.

    Python's encoder checks those, but turns the keys 1, 1.0, True and None into text without a word.
    """
    if isinstance(value, dict):
        if not room:
            return False
        for key, item in value.items():
            if not isinstance(key, str):
                return False
            if type(item) not in _SCALARS and not _keeps_its_shape(item, room - 1):
                return False
    elif isinstance(value, list | tuple):
        if not room:
            return False
        for item in value:
            if type(item) not in _SCALARS and not _keeps_its_shape(item, room - 1):
                return False
    return True


def _encode_dumped(dump: Callable[[object, Literal["json", "python"]], object], value: object) -> Payload:
    """The payload of what *dump*, of `parallax.sdk.typed`, makes of *value*."""
    from parallax.sdk.typed import is_finite

    payload = encode(dump(value, "json"))
    # Pydantic says null for NaN and infinity in a field that is annotated `Any`.
    if b"null" in payload.data and not is_finite(before := dump(value, "python")):
        lost = (fault for fault in _faults(before, "$", ()) if fault.endswith(_NOT_FINITE))
        raise InvalidRequest(next(lost, "$: a number in it is not finite, which is not JSON"))
    return payload


def _decode_json(data: bytes) -> object:
    try:
        value = _DECODER.decode(data.decode())
        # The encoder writes a lone surrogate as it is, and UTF-8 has no bytes for one.
        if _SURROGATE_ESCAPE.search(data) is not None:
            _ENCODER.encode(value).encode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the payload is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"the payload is not JSON: {_reason(value)}") from exc
    except json.JSONDecodeError as exc:
        raise InvalidRequest(f"the payload is not JSON: {exc.msg} at character {exc.pos}") from exc
    except RecursionError as exc:
        raise InvalidRequest(f"the payload is nested more than {MAX_DEPTH} levels deep") from exc
    except ValueError as exc:  # from a hook below, or the interpreter's limit on the digits of an integer
        raise InvalidRequest(f"the payload is not JSON: {exc}") from exc
    # Every level has its bracket: with few of them there is nothing to walk.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and not _keeps_its_shape(value, MAX_DEPTH):
        raise InvalidRequest(f"the payload is nested more than {MAX_DEPTH} levels deep")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if -_INFINITY < number < _INFINITY:
        return number
    raise ValueError(f"the number {text[:40]} is too large for a float")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# The hooks cost up to 60 % more time on a list of floats or small objects, little on 1 KiB of text.
_DECODER: Final = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
)
# Nothing that nests too deep comes this far, so nothing circular either.
_ENCODER: Final = json.JSONEncoder(
    check_circular=False, allow_nan=False, ensure_ascii=False, separators=(",", ":")
)


def _reason(value: object) -> str:
    """The place of the first thing in *value* that is not JSON, and why."""
    return next(_faults(value, "$", ()), "$: not JSON")


def _faults(value: object, path: str, above: tuple[object, ...]) -> Iterator[str]:
    """What in *value* is not JSON, in order; *above* are the containers that it lies in."""
    if not isinstance(value, dict | list | tuple):
        if fault := _fault_of_scalar(value):
            yield f"{at(path)}: {fault}"
    elif any(value is container for container in above):
        yield f"{at(path)}: the value contains itself"
    elif len(above) == MAX_DEPTH:
        yield f"{at(path)}: nested more than {MAX_DEPTH} levels deep"
    elif isinstance(value, dict):
        for key, item in value.items():
            if fault := _fault_of_key(key):
                yield f"{at(path)}: {fault}"
            else:
                yield from _faults(item, path + step(key), (*above, value))
    else:
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}[{index}]", (*above, value))


def _fault_of_key(key: object) -> str:
    """Why *key* cannot be one in JSON; empty when it can."""
    if not isinstance(key, str):
        return f"the key {shown(key)} is {type_of(key)}, and keys must be str"
    return "" if _is_unicode(key) else f"the key {shown(key)} has a lone surrogate, which is not JSON"


def _fault_of_scalar(value: object) -> str:
    """Why *value*, which is no container, is not JSON; empty when it is."""
    fault = f"{type_of(value)} is not JSON"
    match value:
        case None:
            fault = ""
        case str():
            fault = "" if _is_unicode(value) else "text with a lone surrogate is not JSON"
        case int():
            # Python refuses to print longer ones, 4,300 digits unless told otherwise, and to parse them.
            limit = sys.get_int_max_str_digits()
            is_too_long = limit and abs(value) >= 10**limit
            fault = f"an integer of more than {limit:,} digits is too long" if is_too_long else ""
        case float():
            if value != value:  # noqa: PLR0124 - so is NaN
                fault = _NOT_FINITE[0]
            else:
                fault = "" if -_INFINITY < value < _INFINITY else _NOT_FINITE[1]
        case bytes() | bytearray() | memoryview():
            fault += "; give bytes as the whole value, or as base64 text"
        case _ if is_record(value):
            fault = ""
    return fault


def _is_unicode(text: str) -> bool:
    try:
        str.encode(text)
    except UnicodeEncodeError:
        return False
    return True
