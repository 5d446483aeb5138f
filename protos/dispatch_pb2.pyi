from parallax.protos import link_pb2 as _link_pb2
from parallax.protos import task_pb2 as _task_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExecuteRequest(_message.Message):
    __slots__ = ("target", "task", "payload", "timeout_ms", "wait_for_agent_ms", "idempotent", "allow_unverified")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_AGENT_MS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_UNVERIFIED_FIELD_NUMBER: _ClassVar[int]
    target: str
    task: str
    payload: _task_pb2.Payload
    timeout_ms: int
    wait_for_agent_ms: int
    idempotent: bool
    allow_unverified: bool
    def __init__(self, target: _Optional[str] = ..., task: _Optional[str] = ..., payload: _Optional[_Union[_task_pb2.Payload, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., wait_for_agent_ms: _Optional[int] = ..., idempotent: _Optional[bool] = ..., allow_unverified: _Optional[bool] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("outcome", "agent_id", "attempts")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    outcome: _task_pb2.Outcome
    agent_id: str
    attempts: int
    def __init__(self, outcome: _Optional[_Union[_task_pb2.Outcome, _Mapping]] = ..., agent_id: _Optional[str] = ..., attempts: _Optional[int] = ...) -> None: ...
