from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PolicyRule(_message.Message):
    __slots__ = ("name", "who", "methods", "targets")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    who: _containers.RepeatedScalarFieldContainer[str]
    methods: _containers.RepeatedScalarFieldContainer[str]
    targets: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., who: _Optional[_Iterable[str]] = ..., methods: _Optional[_Iterable[str]] = ..., targets: _Optional[_Iterable[str]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("text", "file", "hash", "problem")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    text: str
    file: str
    hash: bytes
    problem: str
    def __init__(self, text: _Optional[str] = ..., file: _Optional[str] = ..., hash: _Optional[bytes] = ..., problem: _Optional[str] = ...) -> None: ...

class ExplainPolicyRequest(_message.Message):
    __slots__ = ("caller", "method", "target")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    caller: str
    method: str
    target: str
    def __init__(self, caller: _Optional[str] = ..., method: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class ExplainPolicyResponse(_message.Message):
    __slots__ = ("allowed", "rule", "why", "method")
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    allowed: bool
    rule: str
    why: str
    method: str
    def __init__(self, allowed: _Optional[bool] = ..., rule: _Optional[str] = ..., why: _Optional[str] = ..., method: _Optional[str] = ...) -> None: ...

class GrantedLabels(_message.Message):
    __slots__ = ("identity", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    identity: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, identity: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ListLabelsRequest(_message.Message):
    __slots__ = ("identity", "page_token")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    identity: str
    page_token: str
    def __init__(self, identity: _Optional[str] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListLabelsResponse(_message.Message):
    __slots__ = ("granted", "next_page_token")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    granted: _containers.RepeatedCompositeFieldContainer[GrantedLabels]
    next_page_token: str
    def __init__(self, granted: _Optional[_Iterable[_Union[GrantedLabels, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ChangeLabelsRequest(_message.Message):
    __slots__ = ("identity", "granted", "taken")
    class GrantedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    identity: str
    granted: _containers.ScalarMap[str, str]
    taken: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, identity: _Optional[str] = ..., granted: _Optional[_Mapping[str, str]] = ..., taken: _Optional[_Iterable[str]] = ...) -> None: ...

class ChangeLabelsResponse(_message.Message):
    __slots__ = ("granted",)
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    granted: GrantedLabels
    def __init__(self, granted: _Optional[_Union[GrantedLabels, _Mapping]] = ...) -> None: ...

class WatchPolicyRequest(_message.Message):
    __slots__ = ("max_age_ms",)
    MAX_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    max_age_ms: int
    def __init__(self, max_age_ms: _Optional[int] = ...) -> None: ...

class LabelHolders(_message.Message):
    __slots__ = ("label", "holders", "others")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    label: str
    holders: _containers.RepeatedScalarFieldContainer[str]
    others: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, label: _Optional[str] = ..., holders: _Optional[_Iterable[str]] = ..., others: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchPolicyResponse(_message.Message):
    __slots__ = ("rules", "labels", "hash", "restart", "callers", "complete")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RULES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    CALLERS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[PolicyRule]
    labels: _containers.ScalarMap[str, str]
    hash: bytes
    restart: bool
    callers: _containers.RepeatedCompositeFieldContainer[LabelHolders]
    complete: bool
    def __init__(self, rules: _Optional[_Iterable[_Union[PolicyRule, _Mapping]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., hash: _Optional[bytes] = ..., restart: _Optional[bool] = ..., callers: _Optional[_Iterable[_Union[LabelHolders, _Mapping]]] = ..., complete: _Optional[bool] = ...) -> None: ...
