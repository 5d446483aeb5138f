from parallax.protos import registry_pb2 as _registry_pb2
from parallax.protos import task_pb2 as _task_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GoodbyeReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GOODBYE_REASON_UNSPECIFIED: _ClassVar[GoodbyeReason]
    GOODBYE_REASON_SHUTTING_DOWN: _ClassVar[GoodbyeReason]
    GOODBYE_REASON_SUPERSEDED: _ClassVar[GoodbyeReason]
    GOODBYE_REASON_DEREGISTERED: _ClassVar[GoodbyeReason]
    GOODBYE_REASON_REPLACED: _ClassVar[GoodbyeReason]
GOODBYE_REASON_UNSPECIFIED: GoodbyeReason
GOODBYE_REASON_SHUTTING_DOWN: GoodbyeReason
GOODBYE_REASON_SUPERSEDED: GoodbyeReason
GOODBYE_REASON_DEREGISTERED: GoodbyeReason
GOODBYE_REASON_REPLACED: GoodbyeReason

class AgentFrame(_message.Message):
    __slots__ = ("hello", "outcomes", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    outcomes: _containers.RepeatedCompositeFieldContainer[_task_pb2.Outcome]
    draining: bool
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., outcomes: _Optional[_Iterable[_Union[_task_pb2.Outcome, _Mapping]]] = ..., draining: _Optional[bool] = ...) -> None: ...

class ControlFrame(_message.Message):
    __slots__ = ("welcome", "tasks", "cancelled_task_ids", "goodbye")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_TASK_IDS_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    tasks: _containers.RepeatedCompositeFieldContainer[_task_pb2.Task]
    cancelled_task_ids: _containers.RepeatedScalarFieldContainer[int]
    goodbye: Goodbye
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., tasks: _Optional[_Iterable[_Union[_task_pb2.Task, _Mapping]]] = ..., cancelled_task_ids: _Optional[_Iterable[int]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "min_protocol_version", "capability_bits", "instance_id", "description")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIN_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_BITS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    min_protocol_version: int
    capability_bits: int
    instance_id: bytes
    description: _registry_pb2.AgentDescription
    def __init__(self, protocol_version: _Optional[int] = ..., min_protocol_version: _Optional[int] = ..., capability_bits: _Optional[int] = ..., instance_id: _Optional[bytes] = ..., description: _Optional[_Union[_registry_pb2.AgentDescription, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "capability_bits", "generation", "agent_id", "lease_ms", "heartbeat_ms", "max_payload_bytes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_BITS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    capability_bits: int
    generation: int
    agent_id: str
    lease_ms: int
    heartbeat_ms: int
    max_payload_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., capability_bits: _Optional[int] = ..., generation: _Optional[int] = ..., agent_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., heartbeat_ms: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: GoodbyeReason
    message: str
    def __init__(self, reason: _Optional[_Union[GoodbyeReason, str]] = ..., message: _Optional[str] = ...) -> None: ...
