import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class IssuanceRule(_message.Message):
    __slots__ = ("holder", "lifetime", "shortest", "longest", "keys", "sans", "any_san")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    SHORTEST_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SANS_FIELD_NUMBER: _ClassVar[int]
    ANY_SAN_FIELD_NUMBER: _ClassVar[int]
    holder: str
    lifetime: _duration_pb2.Duration
    shortest: _duration_pb2.Duration
    longest: _duration_pb2.Duration
    keys: _containers.RepeatedScalarFieldContainer[str]
    sans: _containers.RepeatedScalarFieldContainer[str]
    any_san: bool
    def __init__(self, holder: _Optional[str] = ..., lifetime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., shortest: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., longest: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., keys: _Optional[_Iterable[str]] = ..., sans: _Optional[_Iterable[str]] = ..., any_san: _Optional[bool] = ...) -> None: ...

class GetIssuancePolicyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetIssuancePolicyResponse(_message.Message):
    __slots__ = ("rules", "problem")
    RULES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[IssuanceRule]
    problem: str
    def __init__(self, rules: _Optional[_Iterable[_Union[IssuanceRule, _Mapping]]] = ..., problem: _Optional[str] = ...) -> None: ...
