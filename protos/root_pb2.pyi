from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RootStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROOT_STAGE_UNSPECIFIED: _ClassVar[RootStage]
    ROOT_STAGE_IDLE: _ClassVar[RootStage]
    ROOT_STAGE_PREPARED: _ClassVar[RootStage]
    ROOT_STAGE_ACTIVE: _ClassVar[RootStage]
    ROOT_STAGE_RETIRING: _ClassVar[RootStage]
    ROOT_STAGE_ABORTING: _ClassVar[RootStage]
ROOT_STAGE_UNSPECIFIED: RootStage
ROOT_STAGE_IDLE: RootStage
ROOT_STAGE_PREPARED: RootStage
ROOT_STAGE_ACTIVE: RootStage
ROOT_STAGE_RETIRING: RootStage
ROOT_STAGE_ABORTING: RootStage

class RootRotation(_message.Message):
    __slots__ = ("stage", "old_issuer", "new_issuer", "missing", "missing_count", "without", "cannot_renew", "adoption", "problem")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OLD_ISSUER_FIELD_NUMBER: _ClassVar[int]
    NEW_ISSUER_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    MISSING_COUNT_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_FIELD_NUMBER: _ClassVar[int]
    CANNOT_RENEW_FIELD_NUMBER: _ClassVar[int]
    ADOPTION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    stage: RootStage
    old_issuer: str
    new_issuer: str
    missing: _containers.RepeatedScalarFieldContainer[str]
    missing_count: int
    without: _containers.RepeatedScalarFieldContainer[str]
    cannot_renew: _containers.RepeatedScalarFieldContainer[str]
    adoption: float
    problem: str
    def __init__(self, stage: _Optional[_Union[RootStage, str]] = ..., old_issuer: _Optional[str] = ..., new_issuer: _Optional[str] = ..., missing: _Optional[_Iterable[str]] = ..., missing_count: _Optional[int] = ..., without: _Optional[_Iterable[str]] = ..., cannot_renew: _Optional[_Iterable[str]] = ..., adoption: _Optional[float] = ..., problem: _Optional[str] = ...) -> None: ...

class GetRootRotationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRootRotationResponse(_message.Message):
    __slots__ = ("rotation",)
    ROTATION_FIELD_NUMBER: _ClassVar[int]
    rotation: RootRotation
    def __init__(self, rotation: _Optional[_Union[RootRotation, _Mapping]] = ...) -> None: ...

class RotateRootRequest(_message.Message):
    __slots__ = ("without", "force")
    WITHOUT_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    without: _containers.RepeatedScalarFieldContainer[str]
    force: bool
    def __init__(self, without: _Optional[_Iterable[str]] = ..., force: _Optional[bool] = ...) -> None: ...

class RotateRootResponse(_message.Message):
    __slots__ = ("rotation",)
    ROTATION_FIELD_NUMBER: _ClassVar[int]
    rotation: RootRotation
    def __init__(self, rotation: _Optional[_Union[RootRotation, _Mapping]] = ...) -> None: ...

class AbortRootRotationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRootRotationResponse(_message.Message):
    __slots__ = ("rotation",)
    ROTATION_FIELD_NUMBER: _ClassVar[int]
    rotation: RootRotation
    def __init__(self, rotation: _Optional[_Union[RootRotation, _Mapping]] = ...) -> None: ...
