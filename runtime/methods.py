"""The methods that a policy can speak of, and how it spells them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from parallax.protos import (
    agent_pb2,
    audit_pb2,
    certificate_pb2,
    dispatch_pb2,
    enrollment_pb2,
    issuance_pb2,
    ledger_pb2,
    pin_pb2,
    policy_pb2,
    registry_pb2,
    revocation_feed_pb2,
    revocation_pb2,
    root_pb2,
    session_pb2,
)
from parallax.security.errors import InvalidRequest
from parallax.security.identity import clip

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor


def _of(*files: FileDescriptor) -> frozenset[str]:
    """The full names of all methods of *files*."""
    services = (service for file in files for service in file.services_by_name.values())
    return frozenset(
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    )


_WATCH_POLICY: Final = f"/{policy_pb2.DESCRIPTOR.services_by_name['PolicyService'].full_name}/WatchPolicy"
_DEREGISTER: Final = f"/{registry_pb2.DESCRIPTOR.services_by_name['RegistryService'].full_name}/Deregister"

OF_AGENTS: Final = _of(agent_pb2.DESCRIPTOR)
"""What agents serve at ports of their own."""
TARGETED: Final = OF_AGENTS | _of(dispatch_pb2.DESCRIPTOR)
"""These ask something of an agent, so that it counts of which."""
ADMINISTRATION: Final = (
    _of(
        audit_pb2.DESCRIPTOR,
        enrollment_pb2.DESCRIPTOR,
        issuance_pb2.DESCRIPTOR,
        ledger_pb2.DESCRIPTOR,
        pin_pb2.DESCRIPTOR,
        policy_pb2.DESCRIPTOR,
        revocation_pb2.DESCRIPTOR,
        root_pb2.DESCRIPTOR,
    )
    - {_WATCH_POLICY}
) | {_DEREGISTER}
"""What is the administrator's; a policy calls all of it `administration`."""
UNAUTHENTICATED: Final = TARGETED | _of(
    registry_pb2.DESCRIPTOR,
    session_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,  # type: ignore[arg-type]  # its stub has it of another class
)
"""All that a policy may give to those whom no certificate vouches for."""
CERTIFICATES: Final = _of(certificate_pb2.DESCRIPTOR, revocation_feed_pb2.DESCRIPTOR)
HEALTH: Final = _of(health_pb2.DESCRIPTOR)  # type: ignore[arg-type]  # likewise
POLICY_NEWS: Final = frozenset({_WATCH_POLICY})
METHODS: Final = ADMINISTRATION | UNAUTHENTICATED | CERTIFICATES | HEALTH | POLICY_NEWS
"""All there are."""


def _spellings() -> Mapping[str, frozenset[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for method in METHODS:
        service, name = method[1:].split("/")
        short = service.rpartition(".")[2]
        for spelling in (method, f"{service}/{name}", f"{short}/{name}", f"{short}/*", name):
            found[spelling].add(method)
    found["administration"] = set(ADMINISTRATION)
    return MappingProxyType({spelling: frozenset(methods) for spelling, methods in found.items()})


SPELLINGS: Final = _spellings()
"""`Execute`, `DispatchService/Execute`, `DispatchService/*` and full names → what is meant, full names."""


def short(method: str) -> str:
    """*method*, a full name, as a policy would spell it so that only this one is meant."""
    name = method.rpartition("/")[2]
    if len(SPELLINGS.get(name, ())) == 1:
        return name
    return method.rpartition(".")[2]


def methods_of(text: str) -> frozenset[str]:
    """The full names of what *text* spells; raises InvalidRequest."""
    meant = SPELLINGS.get(text)
    if meant is None:
        near = get_close_matches(text, SPELLINGS, n=1)
        advice = f"write {near[0]}" if near else "docs/policy.md lists them"
        raise InvalidRequest(f"{clip(text)} is no method: {advice}")
    return meant


def method_of(text: str) -> str:
    """The full name of the one method that *text* spells; raises InvalidRequest."""
    meant = methods_of(text)
    if len(meant) > 1:
        some = " or ".join(sorted(map(short, meant))[:3])
        raise InvalidRequest(f"{clip(text)} is several methods: say which, such as {some}")
    return next(iter(meant))
