from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrustBundle(_message.Message):
    __slots__ = ("roots", "hash")
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    roots: _containers.RepeatedScalarFieldContainer[bytes]
    hash: bytes
    def __init__(self, roots: _Optional[_Iterable[bytes]] = ..., hash: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("chain", "bundle")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    chain: _containers.RepeatedScalarFieldContainer[bytes]
    bundle: TrustBundle
    def __init__(self, chain: _Optional[_Iterable[bytes]] = ..., bundle: _Optional[_Union[TrustBundle, _Mapping]] = ...) -> None: ...

class GetTrustBundleRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTrustBundleResponse(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: TrustBundle
    def __init__(self, bundle: _Optional[_Union[TrustBundle, _Mapping]] = ...) -> None: ...

class WatchTrustBundleRequest(_message.Message):
    __slots__ = ("hash",)
    HASH_FIELD_NUMBER: _ClassVar[int]
    hash: bytes
    def __init__(self, hash: _Optional[bytes] = ...) -> None: ...

class WatchTrustBundleResponse(_message.Message):
    __slots__ = ("bundle", "issuer")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    bundle: TrustBundle
    issuer: bytes
    def __init__(self, bundle: _Optional[_Union[TrustBundle, _Mapping]] = ..., issuer: _Optional[bytes] = ...) -> None: ...

class AcknowledgeTrustBundleRequest(_message.Message):
    __slots__ = ("hash",)
    HASH_FIELD_NUMBER: _ClassVar[int]
    hash: bytes
    def __init__(self, hash: _Optional[bytes] = ...) -> None: ...

class AcknowledgeTrustBundleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
