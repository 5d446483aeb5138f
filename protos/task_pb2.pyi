from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OutcomeCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_CODE_UNSPECIFIED: _ClassVar[OutcomeCode]
    OUTCOME_CODE_AGENT_LOST: _ClassVar[OutcomeCode]
    OUTCOME_CODE_CONTROL_PLANE_LOST: _ClassVar[OutcomeCode]
    OUTCOME_CODE_DEADLINE_EXCEEDED: _ClassVar[OutcomeCode]
    OUTCOME_CODE_CANCELLED: _ClassVar[OutcomeCode]
    OUTCOME_CODE_HANDLER_FAILED: _ClassVar[OutcomeCode]
    OUTCOME_CODE_INVALID_RESULT: _ClassVar[OutcomeCode]
    OUTCOME_CODE_NO_AGENT: _ClassVar[OutcomeCode]
    OUTCOME_CODE_OVERLOADED: _ClassVar[OutcomeCode]
    OUTCOME_CODE_REVOKED: _ClassVar[OutcomeCode]
    OUTCOME_CODE_INVALID_ARGUMENT: _ClassVar[OutcomeCode]
OUTCOME_CODE_UNSPECIFIED: OutcomeCode
OUTCOME_CODE_AGENT_LOST: OutcomeCode
OUTCOME_CODE_CONTROL_PLANE_LOST: OutcomeCode
OUTCOME_CODE_DEADLINE_EXCEEDED: OutcomeCode
OUTCOME_CODE_CANCELLED: OutcomeCode
OUTCOME_CODE_HANDLER_FAILED: OutcomeCode
OUTCOME_CODE_INVALID_RESULT: OutcomeCode
OUTCOME_CODE_NO_AGENT: OutcomeCode
OUTCOME_CODE_OVERLOADED: OutcomeCode
OUTCOME_CODE_REVOKED: OutcomeCode
OUTCOME_CODE_INVALID_ARGUMENT: OutcomeCode

class Payload(_message.Message):
    __slots__ = ("data", "content_type")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    content_type: str
    def __init__(self, data: _Optional[bytes] = ..., content_type: _Optional[str] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("value", "failure", "parts")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    value: Value
    failure: Failure
    parts: int
    def __init__(self, value: _Optional[_Union[Value, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., parts: _Optional[int] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("payload", "confidence")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    payload: Payload
    confidence: float
    def __init__(self, payload: _Optional[_Union[Payload, _Mapping]] = ..., confidence: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "error_type", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_TYPE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: OutcomeCode
    message: str
    error_type: str
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[OutcomeCode, str]] = ..., message: _Optional[str] = ..., error_type: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
