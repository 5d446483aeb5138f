"""The gRPC service of the issuance policy: the translation between domain and proto."""

from __future__ import annotations

from typing import Any

from grpc import aio

from parallax.control_plane.issuance_file import IssuanceFile
from parallax.protos import issuance_pb2, issuance_pb2_grpc
from parallax.security.issuance_policy import IssuanceRule

Context = aio.ServicerContext[Any, Any]


class IssuanceService(issuance_pb2_grpc.IssuanceServiceServicer):
    """The issuance policy over gRPC."""

    def __init__(self, file: IssuanceFile) -> None:
        self._file = file

    async def GetIssuancePolicy(
        self, request: issuance_pb2.GetIssuancePolicyRequest, context: Context
    ) -> issuance_pb2.GetIssuancePolicyResponse:
        rules = map(_to_proto, (*self._file.current.rules, IssuanceRule()))
        return issuance_pb2.GetIssuancePolicyResponse(rules=rules, problem=self._file.problem)


def _to_proto(rule: IssuanceRule) -> issuance_pb2.IssuanceRule:
    message = issuance_pb2.IssuanceRule(
        holder=rule.holder,
        keys=rule.keys,
        sans=map(str, rule.sans or ()),
        any_san=rule.sans is None,
    )
    message.lifetime.FromTimedelta(rule.lifetime)
    message.shortest.FromTimedelta(rule.shortest)
    message.longest.FromTimedelta(rule.longest)
    return message
