import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PinnedCertificate(_message.Message):
    __slots__ = ("identity", "fingerprint", "serial", "not_after", "pinned_at", "pinned_by", "on_port", "exchanged", "revoked")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    PINNED_AT_FIELD_NUMBER: _ClassVar[int]
    PINNED_BY_FIELD_NUMBER: _ClassVar[int]
    ON_PORT_FIELD_NUMBER: _ClassVar[int]
    EXCHANGED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    identity: str
    fingerprint: str
    serial: str
    not_after: _timestamp_pb2.Timestamp
    pinned_at: _timestamp_pb2.Timestamp
    pinned_by: str
    on_port: bool
    exchanged: bool
    revoked: bool
    def __init__(self, identity: _Optional[str] = ..., fingerprint: _Optional[str] = ..., serial: _Optional[str] = ..., not_after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pinned_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pinned_by: _Optional[str] = ..., on_port: _Optional[bool] = ..., exchanged: _Optional[bool] = ..., revoked: _Optional[bool] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("holder", "certificate")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    holder: str
    certificate: bytes
    def __init__(self, holder: _Optional[str] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pin",)
    PIN_FIELD_NUMBER: _ClassVar[int]
    pin: PinnedCertificate
    def __init__(self, pin: _Optional[_Union[PinnedCertificate, _Mapping]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("holder", "fingerprint")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    holder: str
    fingerprint: str
    def __init__(self, holder: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[PinnedCertificate]
    def __init__(self, pins: _Optional[_Iterable[_Union[PinnedCertificate, _Mapping]]] = ...) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPinsResponse(_message.Message):
    __slots__ = ("pins", "next_page_token")
    PINS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[PinnedCertificate]
    next_page_token: str
    def __init__(self, pins: _Optional[_Iterable[_Union[PinnedCertificate, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
