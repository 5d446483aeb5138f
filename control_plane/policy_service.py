"""The gRPC service of the policy: the translation between proto and domain."""

from __future__ import annotations

from typing import Any

from grpc import aio

from parallax.control_plane.beats import beat_s
from parallax.control_plane.certificate_service import UNAUTHENTICATED
from parallax.control_plane.grants import Grants
from parallax.control_plane.labelling import Labelling
from parallax.control_plane.paging import DEFAULT_PAGE, position, token_of
from parallax.control_plane.policy_feed import PolicyFeed
from parallax.protos import policy_pb2, policy_pb2_grpc
from parallax.runtime.authorization import Authorization
from parallax.runtime.caller import current_caller, name_of
from parallax.runtime.policy import Labels
from parallax.runtime.policy_file import PolicyFile
from parallax.runtime.question import Question
from parallax.runtime.watches import Watches
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity
from parallax.security.verification import Peer

Context = aio.ServicerContext[Any, Any]


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """
    The policy over gRPC, and the labels that it goes by.

    Args:
        file: Where it comes from.
        feed: Tells agents.
    """

    def __init__(
        self,
        authorization: Authorization,
        file: PolicyFile,
        grants: Grants,
        labelling: Labelling,
        feed: PolicyFeed,
        trust_domain: str,
    ) -> None:
        self._authorization = authorization
        self._file = file
        self._grants = grants
        self._labelling = labelling
        self._feed = feed
        self._trust_domain = trust_domain
        self._watches = Watches("the policy")

    async def GetPolicy(
        self, request: policy_pb2.GetPolicyRequest, context: Context
    ) -> policy_pb2.GetPolicyResponse:
        policy = self._authorization.policy
        return policy_pb2.GetPolicyResponse(
            text=policy.text,
            file=str(self._file.path or ""),
            hash=policy.hash,
            problem=self._file.problem,
        )

    async def ExplainPolicy(
        self, request: policy_pb2.ExplainPolicyRequest, context: Context
    ) -> policy_pb2.ExplainPolicyResponse:
        asked = Question.read(request.caller, request.method, request.target, self._trust_domain)
        decision = self._authorization.decide(asked.caller, asked.method, asked.target)
        return policy_pb2.ExplainPolicyResponse(
            allowed=decision.allowed, rule=decision.rule or "", why=decision.why, method=asked.method
        )

    async def ListLabels(
        self, request: policy_pb2.ListLabelsRequest, context: Context
    ) -> policy_pb2.ListLabelsResponse:
        if request.identity:
            identity = Identity.parse_short(request.identity, self._trust_domain)
            granted = _granted(identity, self._grants.labels_of(identity))
            return policy_pb2.ListLabelsResponse(granted=[granted])
        found, more = await self._grants.page(position(request.page_token), DEFAULT_PAGE)
        return policy_pb2.ListLabelsResponse(
            granted=[_granted(*each) for each in found], next_page_token=token_of(more)
        )

    async def ChangeLabels(
        self, request: policy_pb2.ChangeLabelsRequest, context: Context
    ) -> policy_pb2.ChangeLabelsResponse:
        identity = Identity.parse_short(request.identity, self._trust_domain)
        labels = await self._labelling.change(
            identity, dict(request.granted), request.taken, name_of(current_caller()), context.peer()
        )
        return policy_pb2.ChangeLabelsResponse(granted=_granted(identity, labels))

    async def WatchPolicy(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request: policy_pb2.WatchPolicyRequest, context: Context
    ) -> None:
        """
        Tell what concerns agents, now and when that is something else.

        Raises:
            Unavailable: The caller is told so often already.
        """
        caller = current_caller()
        if not isinstance(caller, Peer):
            raise ConfigError(UNAUTHENTICATED)
        with self._watches.one_more():
            await self._feed.tell(caller.identity, beat_s(request.max_age_ms), context.write)


def _granted(identity: Identity, labels: Labels) -> policy_pb2.GrantedLabels:
    return policy_pb2.GrantedLabels(identity=identity.short, labels=dict(labels))
