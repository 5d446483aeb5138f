"""
Types that users write in annotations, as pydantic reads them from JSON and writes them to it.

Importing this imports pydantic, so others do it where a type turns up: an agent without one starts quicker.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic_core import SchemaValidator

from parallax.sdk.payload import is_record
from parallax.sdk.place import at, said, shown, step, type_of
from parallax.security.errors import InvalidRequest

_MAX_REASONS: Final = 3  # enough for the members of a usual union
_MAX_COUNTED: Final = 10_000  # pydantic says them all at once or none: up to here 20 ms, a few MiB
# Where schemas of pydantic-core hold others: alone, in lists, or by name. What else they hold may be users'.
INNER: Final = frozenset(
    {
        *("schema", "definitions", "steps", "choices", "fields"),
        *("items_schema", "keys_schema", "values_schema", "extras_schema", "extras_keys_schema"),
        *("lax_schema", "strict_schema", "json_schema", "python_schema"),
        *("arguments_schema", "var_args_schema", "var_kwargs_schema"),
    }
)
_ELEMENTS: Final = frozenset({"items_schema", "keys_schema", "values_schema"})
# A float of 309 digits may be infinity. The look-behind keeps the search linear.
_MANY_DIGITS: Final = re.compile(rb"(?<![0-9])[0-9]{309}")
# What pydantic says of a value that is not what the annotation promised; then the value, which is not told.
_UNEXPECTED: Final = re.compile(r"Expected `([^`]{1,80})`[^\[]*\[(?:field_name='(\w{1,80})', )?")


class Shape:
    """
    A type, to check what JSON or bytes say against it, and to write its values.

    Where `bytes` is the type or a member of the union that it is, bytes are read and written as they are,
    and JSON is for the other members.

    Raises:
        InvalidRequest: Not a type of which pydantic knows the JSON.
    """

    def __init__(self, annotation: Any) -> None:
        self.name = _name(annotation)
        members = _members(annotation)
        raw = tuple(member for member in members if _is_bytes(member))
        rest = tuple(member for member in members if not _is_bytes(member))
        self._raw = _adapter(Union[raw]) if raw else None  # noqa: UP007 - of so many members
        self._json = _adapter(Union[rest] if raw else annotation) if rest else None  # noqa: UP007
        self._reader = _reader(self._json) if self._json else None

    def from_bytes(self, data: bytes) -> Any:
        """*data*, if bytes are what the type wants; InvalidRequest if they are not."""
        if self._raw is None:
            raise InvalidRequest(
                f"the payload is bytes, and JSON is expected, for {self.name}; send it as application/json"
            )
        try:
            return self._raw.validate_python(data, strict=True)
        except ValidationError as exc:
            reason = _reason(exc, data)
        # Outside the handler: the context of the error would hold the data, and a traceback show it.
        raise InvalidRequest(f"the payload does not fit {self.name}: {reason}")

    def from_json(self, data: bytes, value: object) -> Any:
        """
        The value of the type that *data* says, by pydantic's rules for JSON in its strict mode.

        Args:
            data: JSON that has been found free of what pydantic would let pass: keys that occur twice, NaN.
            value: The same, decoded.

        Raises:
            InvalidRequest: It does not fit; the message says what does not and where, never the data.
        """
        if self._reader is None:
            raise InvalidRequest("the payload is JSON, and bytes are expected; send them as they are")
        try:
            found = self._reader.validate_json(data, strict=True)
        except ValidationError as exc:
            reason = _reason(exc, value)
        else:
            if _MANY_DIGITS.search(data) is None or is_finite(found):
                return found
            reason = "an integer in it is too large for a float"
        raise InvalidRequest(f"the payload does not fit {self.name}: {reason}")

    def accepts_bytes(self) -> bool:
        """Whether bytes are values of the type."""
        return self._raw is not None

    def dump(self, value: object, mode: Literal["json", "python"]) -> object:
        """
        *value* in lists, dicts and scalars, each field as its annotation says and by its alias.

        With *mode* "python", scalars and keys are left as they are: what "json" writes of them differs.
        Nothing here looks for NaN.

        Raises:
            InvalidRequest: It is no value of the type.
        """
        if self._json is None:
            raise InvalidRequest(f"the value is {type_of(value)}, and {self.name} is expected")
        if value is None and not self._takes_none():
            raise InvalidRequest(f"the value is None, and {self.name} is expected")
        try:
            return self._json.dump_python(value, mode=mode, by_alias=True, warnings="error")
        except ValueError as exc:  # pydantic's error is one, and so is that of bytes that are no text
            reason = _mismatch(str(exc))
        raise InvalidRequest(f"the value does not fit {self.name}: {reason}")

    def _takes_none(self) -> bool:
        """XXX: pydantic writes None for anything; within a dataclass that stays for whoever reads it."""
        assert self._json is not None, "asked by dump"  # noqa: S101 - our own
        try:
            self._json.validate_python(None, strict=True)
        except ValidationError:
            return False
        return True


def dump(value: object, mode: Literal["json", "python"]) -> object:
    """
    *value* with all models and dataclasses in it, at any depth of lists and dicts, as `Shape.dump` has them.

    The caller sees to it that *value* is not circular.
    """
    if is_record(value):
        return _shape(type(value)).dump(value, mode)
    if isinstance(value, dict):
        return {key: dump(item, mode) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item, mode) for item in value]
    return value


# Bounded, for a program may make types without end.
_shape: Callable[[Any], Shape] = lru_cache(maxsize=512)(Shape)


def shape_of(annotation: Any) -> Shape:
    """The shape of *annotation*, kept for the next time where it can be."""
    try:
        return _shape(annotation)
    except TypeError:  # something unhashable in `Annotated`
        return Shape(annotation)


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        if (
            not adapter.pydantic_complete
        ):  # it names a type that was not there: tell now, not at the first use
            adapter.rebuild(force=True, raise_errors=True)
    except PydanticUndefinedAnnotation as exc:
        reason = f"{shown(exc.name)} in it is not defined at the top level of its module"
    except Exception as exc:  # noqa: BLE001 - a type may bring code of its own
        reason = said(str(exc))
    else:
        return adapter
    raise InvalidRequest(f"{_name(annotation)} is no type that JSON can carry: {reason}")


def _reader(adapter: TypeAdapter[Any]) -> SchemaValidator:
    """
    What reads for *adapter*, and has enough of a container once one thing in it is wrong.

    Pydantic would note all that is: 200 to 400 bytes for each, so that 4 MiB of wrong items took 1.5 GiB.

    XXX: fields that a model forbids are still noted one by one, within one object. A model with an `__init__`
    of its own is read by its own validator, and notes all.
    """
    # Not the validators that the models have made for themselves already: those know nothing of this.
    return SchemaValidator(_failing_fast(adapter.core_schema), _use_prebuilt=False)


def _failing_fast(schema: Any) -> Any:
    """A copy of *schema*, of pydantic-core, or of several; the users' objects in it are not copied."""
    match schema:
        case {"type": str()}:
            found = {key: _failing_fast(part) if key in INNER else part for key, part in schema.items()}
            # Who knows no such thing ignores it, so it does no harm to a container without elements.
            return {**found, "fail_fast": True} if _ELEMENTS & found.keys() else found
        case dict():
            return {name: _failing_fast(part) for name, part in schema.items()}
        case list() | tuple():
            return type(schema)(map(_failing_fast, schema))
        case _:
            return schema


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of the union that *annotation* is; itself, if it is none."""
    while hasattr(annotation, "__value__"):  # `type X = ...`
        annotation = annotation.__value__
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(inner for member in get_args(annotation) for inner in _members(member))
    return (annotation,)


def _is_bytes(member: Any) -> bool:
    return (get_args(member)[0] if get_origin(member) is Annotated else member) is bytes


def _name(annotation: Any) -> str:
    """As users write it, without modules and what `Annotated` adds."""
    if get_origin(annotation) is Annotated:
        return _name(get_args(annotation)[0])
    text = annotation.__name__ if isinstance(annotation, type) else re.sub(r"\b\w+\.", "", repr(annotation))
    return said(text, 80)


def _reason(exc: ValidationError, value: object) -> str:
    """What is wrong with *value*, and where: of the first few things."""
    count = exc.error_count()
    if count > _MAX_COUNTED:
        return f"{count:,} things in it are wrong"
    errors = exc.errors(include_url=False, include_input=False)
    reasons = [f"{_place(error, value)}: {_said_of(error)}" for error in errors[:_MAX_REASONS]]
    more = f"; and {count - _MAX_REASONS} more" if count > _MAX_REASONS else ""
    return "; ".join(reasons) + more


def _said_of(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_invalid":  # the one message that quotes what came
        return f"the tag {error['ctx']['discriminator']} must be one of {said(error['ctx']['expected_tags'])}"
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return said(text[:1].lower() + text[1:])


def _place(error: Mapping[str, Any], value: object) -> str:
    """
    Where in *value* the error is, as a path.

    Pydantic has the names of a union's members among the keys and indexes: they go behind, in brackets.
    """
    path, members = "$", list[str]()
    *above, last = error["loc"] or [""]
    for part in above if error["type"] == "missing" else error["loc"]:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(part, str) and isinstance(value, dict) and part in value:
            path, value = path + step(part), value[part]
        else:
            members.append(str(part))
    if error["type"] == "missing":
        path += step(str(last))
    return at(path) + (f" (as {said(', '.join(members), 80)})" if members else "")


def _mismatch(text: str) -> str:
    """What pydantic said about a value that it could not write, without the value."""
    if (found := _UNEXPECTED.search(text)) is None:
        return said(text)
    expected, field = found.groups()
    return f"{field}: {expected} is expected" if field else f"{expected} is expected"


def is_finite(value: object) -> bool:
    """Whether there is neither NaN nor infinity in *value*: containers, models, dataclasses and scalars."""
    inside: Iterable[object]
    match value:
        case float():
            return math.isfinite(value)
        case Mapping():
            inside = value.values()
        case list() | tuple() | set() | frozenset():
            inside = value
        case _ if is_record(value):
            # A model has no fields to `dataclasses`, a slotted dataclass no `__dict__`.
            own = fields(value) if is_dataclass(value) else ()
            extra = getattr(value, "__pydantic_extra__", None) or {}
            inside = (
                *(getattr(value, field.name, None) for field in own),
                *getattr(value, "__dict__", {}).values(),
                *extra.values(),
            )
        case _:
            return True
    return all(map(is_finite, inside))
