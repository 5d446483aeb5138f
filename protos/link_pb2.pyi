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

class LinkFrame(_message.Message):
    __slots__ = ("hello", "welcome", "tasks", "cancelled_task_ids", "credits", "parts", "outcomes", "draining", "goodbye", "broken")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_TASK_IDS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    cancelled_task_ids: _containers.RepeatedScalarFieldContainer[int]
    credits: _containers.RepeatedCompositeFieldContainer[Credit]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    outcomes: _containers.RepeatedCompositeFieldContainer[TaskOutcome]
    draining: bool
    goodbye: Goodbye
    broken: Broken
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., cancelled_task_ids: _Optional[_Iterable[int]] = ..., credits: _Optional[_Iterable[_Union[Credit, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., outcomes: _Optional[_Iterable[_Union[TaskOutcome, _Mapping]]] = ..., draining: _Optional[bool] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., broken: _Optional[_Union[Broken, _Mapping]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "work", "timeout_ms", "target", "wait_for_agent_ms", "idempotent", "allow_unverified", "part_credit")
    ID_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_AGENT_MS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_UNVERIFIED_FIELD_NUMBER: _ClassVar[int]
    PART_CREDIT_FIELD_NUMBER: _ClassVar[int]
    id: int
    work: bytes
    timeout_ms: int
    target: str
    wait_for_agent_ms: int
    idempotent: bool
    allow_unverified: bool
    part_credit: int
    def __init__(self, id: _Optional[int] = ..., work: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ..., target: _Optional[str] = ..., wait_for_agent_ms: _Optional[int] = ..., idempotent: _Optional[bool] = ..., allow_unverified: _Optional[bool] = ..., part_credit: _Optional[int] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("name", "payload")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    payload: _task_pb2.Payload
    def __init__(self, name: _Optional[str] = ..., payload: _Optional[_Union[_task_pb2.Payload, _Mapping]] = ...) -> None: ...

class TaskOutcome(_message.Message):
    __slots__ = ("task_id", "value", "failure", "parts", "agent_id", "attempts")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    task_id: int
    value: bytes
    failure: _task_pb2.Failure
    parts: int
    agent_id: str
    attempts: int
    def __init__(self, task_id: _Optional[int] = ..., value: _Optional[bytes] = ..., failure: _Optional[_Union[_task_pb2.Failure, _Mapping]] = ..., parts: _Optional[int] = ..., agent_id: _Optional[str] = ..., attempts: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("task_id", "value", "agent_id")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: int
    value: bytes
    agent_id: str
    def __init__(self, task_id: _Optional[int] = ..., value: _Optional[bytes] = ..., agent_id: _Optional[str] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("task_id", "bytes")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    task_id: int
    bytes: int
    def __init__(self, task_id: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "min_protocol_version", "capability_bits", "instance_id", "description", "sole", "held_task_ids", "heartbeat_ms", "max_payload_bytes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIN_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_BITS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SOLE_FIELD_NUMBER: _ClassVar[int]
    HELD_TASK_IDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    min_protocol_version: int
    capability_bits: int
    instance_id: bytes
    description: _registry_pb2.AgentDescription
    sole: bool
    held_task_ids: _containers.RepeatedScalarFieldContainer[int]
    heartbeat_ms: int
    max_payload_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., min_protocol_version: _Optional[int] = ..., capability_bits: _Optional[int] = ..., instance_id: _Optional[bytes] = ..., description: _Optional[_Union[_registry_pb2.AgentDescription, _Mapping]] = ..., sole: _Optional[bool] = ..., held_task_ids: _Optional[_Iterable[int]] = ..., heartbeat_ms: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "capability_bits", "generation", "agent_id", "lease_ms", "heartbeat_ms", "max_payload_bytes", "max_open_tasks", "instance_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_BITS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_OPEN_TASKS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    capability_bits: int
    generation: int
    agent_id: str
    lease_ms: int
    heartbeat_ms: int
    max_payload_bytes: int
    max_open_tasks: int
    instance_id: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., capability_bits: _Optional[int] = ..., generation: _Optional[int] = ..., agent_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., heartbeat_ms: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ..., max_open_tasks: _Optional[int] = ..., instance_id: _Optional[bytes] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: GoodbyeReason
    message: str
    def __init__(self, reason: _Optional[_Union[GoodbyeReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Broken(_message.Message):
    __slots__ = ("generation", "held_task_ids")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HELD_TASK_IDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    held_task_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, generation: _Optional[int] = ..., held_task_ids: _Optional[_Iterable[int]] = ...) -> None: ...
