from parallax.protos import link_pb2 as _link_pb2
from parallax.protos import registry_pb2 as _registry_pb2
from parallax.protos import task_pb2 as _task_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AnalyzeRequest(_message.Message):
    __slots__ = ("task", "payload", "timeout_ms", "max_payload_bytes")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    task: str
    payload: _task_pb2.Payload
    timeout_ms: int
    max_payload_bytes: int
    def __init__(self, task: _Optional[str] = ..., payload: _Optional[_Union[_task_pb2.Payload, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ...) -> None: ...

class AnalyzeResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: _task_pb2.Outcome
    def __init__(self, outcome: _Optional[_Union[_task_pb2.Outcome, _Mapping]] = ...) -> None: ...

class AnalyzePart(_message.Message):
    __slots__ = ("part", "outcome")
    PART_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    part: _task_pb2.Value
    outcome: _task_pb2.Outcome
    def __init__(self, part: _Optional[_Union[_task_pb2.Value, _Mapping]] = ..., outcome: _Optional[_Union[_task_pb2.Outcome, _Mapping]] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("description", "identity")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    description: _registry_pb2.AgentDescription
    identity: str
    def __init__(self, description: _Optional[_Union[_registry_pb2.AgentDescription, _Mapping]] = ..., identity: _Optional[str] = ...) -> None: ...
