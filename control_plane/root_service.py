"""The gRPC service of the root's rotation: the translation between proto and domain."""

from __future__ import annotations

from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.x509 import Certificate
from grpc import aio

from parallax.control_plane.certificate_service import UNAUTHENTICATED
from parallax.control_plane.root_rotation import Stage
from parallax.control_plane.roots import Roots, RootStatus
from parallax.protos import root_pb2, root_pb2_grpc
from parallax.runtime.caller import current_caller, name_of
from parallax.security.errors import ConfigError

MAX_NAMES: Final = 1_000  # in an answer: more than anybody reads

Context = aio.ServicerContext[Any, Any]

_STAGES: Final = {
    Stage.IDLE: root_pb2.ROOT_STAGE_IDLE,
    Stage.PREPARED: root_pb2.ROOT_STAGE_PREPARED,
    Stage.ACTIVE: root_pb2.ROOT_STAGE_ACTIVE,
    Stage.RETIRING: root_pb2.ROOT_STAGE_RETIRING,
    Stage.ABORTING: root_pb2.ROOT_STAGE_ABORTING,
}


class RootService(root_pb2_grpc.RootServiceServicer):
    """
    The root's rotation over gRPC.

    Args:
        roots: None where nobody is authenticated.
    """

    def __init__(self, roots: Roots | None) -> None:
        self._roots = roots

    async def GetRootRotation(
        self, request: root_pb2.GetRootRotationRequest, context: Context
    ) -> root_pb2.GetRootRotationResponse:
        return root_pb2.GetRootRotationResponse(rotation=_to_proto(await self._known().status()))

    async def RotateRoot(
        self, request: root_pb2.RotateRootRequest, context: Context
    ) -> root_pb2.RotateRootResponse:
        by = name_of(current_caller())
        status = await self._known().rotate(by, request.without, force=request.force)
        return root_pb2.RotateRootResponse(rotation=_to_proto(status))

    async def AbortRootRotation(
        self, request: root_pb2.AbortRootRotationRequest, context: Context
    ) -> root_pb2.AbortRootRotationResponse:
        status = await self._known().abort(name_of(current_caller()))
        return root_pb2.AbortRootRotationResponse(rotation=_to_proto(status))

    def _known(self) -> Roots:
        if self._roots is None:
            raise ConfigError(UNAUTHENTICATED)
        return self._roots


def _to_proto(status: RootStatus) -> root_pb2.RootRotation:
    rotation = status.rotation
    message = root_pb2.RootRotation(
        stage=_STAGES[rotation.stage if rotation else Stage.IDLE],
        missing=[each.short for each in status.missing[:MAX_NAMES]],
        missing_count=len(status.missing),
        cannot_renew=[each.short for each in status.cannot_renew[:MAX_NAMES]],
        adoption=status.adoption,
        problem=status.problem,
    )
    if rotation is not None:
        message.old_issuer = _fingerprint(rotation.old[0])
        message.new_issuer = _fingerprint(rotation.new[0])
        message.without.extend(sorted(rotation.without))
    return message


def _fingerprint(issuer: Certificate) -> str:
    return issuer.fingerprint(hashes.SHA256()).hex()
