import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRevocationsRequest(_message.Message):
    __slots__ = ("max_age_ms", "identities_only")
    MAX_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_ONLY_FIELD_NUMBER: _ClassVar[int]
    max_age_ms: int
    identities_only: bool
    def __init__(self, max_age_ms: _Optional[int] = ..., identities_only: _Optional[bool] = ...) -> None: ...

class RevokedCertificates(_message.Message):
    __slots__ = ("issuer", "serials")
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    SERIALS_FIELD_NUMBER: _ClassVar[int]
    issuer: bytes
    serials: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, issuer: _Optional[bytes] = ..., serials: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RevokedIdentity(_message.Message):
    __slots__ = ("identity", "issued_before")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ISSUED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    identity: str
    issued_before: _timestamp_pb2.Timestamp
    def __init__(self, identity: _Optional[str] = ..., issued_before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class WatchRevocationsResponse(_message.Message):
    __slots__ = ("restart", "certificates", "identities", "complete")
    RESTART_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    restart: bool
    certificates: _containers.RepeatedCompositeFieldContainer[RevokedCertificates]
    identities: _containers.RepeatedCompositeFieldContainer[RevokedIdentity]
    complete: bool
    def __init__(self, restart: _Optional[bool] = ..., certificates: _Optional[_Iterable[_Union[RevokedCertificates, _Mapping]]] = ..., identities: _Optional[_Iterable[_Union[RevokedIdentity, _Mapping]]] = ..., complete: _Optional[bool] = ...) -> None: ...
