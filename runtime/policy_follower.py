"""An agent's own policy: what the control plane tells it to enforce."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

from grpc import aio

from parallax.protos import policy_pb2, policy_pb2_grpc
from parallax.runtime.authorization import Authorization
from parallax.runtime.following import Follower
from parallax.runtime.policy import NO_LABELS, Labels, Policy, Rule
from parallax.runtime.policy_text import built_in_policy
from parallax.runtime.status import error_of

if TYPE_CHECKING:
    from parallax.runtime.connection import Line
    from parallax.security.identity import Identity

logger = logging.getLogger(__name__)


class PolicyFollower(Follower):
    """
    Keeps what an agent enforces at its own port like what the control plane tells it.

    Until it is told, the policy that is built in is in force; when the control plane is away, what it told
    last. Labels of callers are not told: rules for these let nobody in here.

    Args:
        identity: The agent's own.
        on_change: Told when something else is in force.

    Attributes:
        authorization: What is in force.
    """

    def __init__(self, identity: Identity, on_change: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._identity = identity
        self._labels: Labels = NO_LABELS
        self._told: policy_pb2.WatchPolicyResponse | None = None
        self.on_change = on_change
        self.authorization = Authorization(built_in_policy(), identity.trust_domain, self._labels_of)

    async def _listen(self, line: Line) -> bool:
        went_well = False
        watch = line.stub(_policies).WatchPolicy(policy_pb2.WatchPolicyRequest())
        try:
            async for told in watch:
                self._take(told)
                went_well = True
        except aio.AioRpcError as exc:
            error = error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ()))
            logger.debug("the policy is not told", extra={"cause": str(error)})
        except Exception:  # a bug of ours must not end what still works
            logger.exception("the policy cannot be followed")
        finally:
            watch.cancel()
        return went_well

    def _take(self, told: policy_pb2.WatchPolicyResponse) -> None:
        if told == self._told:
            return
        self._told = told
        self._labels = MappingProxyType(dict(told.labels))
        self.authorization.replace(Policy(tuple(map(_read, told.rules))))
        self.on_change()
        logger.info("policy in force", extra={"rules": len(told.rules), "hash": told.hash.hex()[:16]})

    def _labels_of(self, identity: Identity) -> Labels:
        return self._labels if identity == self._identity else NO_LABELS


def _read(rule: policy_pb2.PolicyRule) -> Rule:
    """*rule* as it is: what this version knows no word for fits nobody."""
    return Rule(rule.name, frozenset(rule.who), frozenset(rule.methods), frozenset(rule.targets))


def _policies(channel: aio.Channel) -> policy_pb2_grpc.PolicyServiceAsyncStub:
    return policy_pb2_grpc.PolicyServiceStub(channel)
