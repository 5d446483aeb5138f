"""An agent's own policy: what the control plane tells it to enforce."""

from __future__ import annotations

import asyncio
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
from parallax.security.errors import ParallaxError, Unavailable

if TYPE_CHECKING:
    from parallax.runtime.connection import Line
    from parallax.security.identity import Identity

logger = logging.getLogger(__name__)


class PolicyFollower(Follower):
    """
    Keeps what an agent enforces at its own port like what the control plane tells it.

    Until it is told, the policy that is built in is in force, which allows more than others: who is to be
    told one lets nobody in before, see `check_told`. When the control plane is away, it is what it told last.
    Labels of callers are not told: rules for these let nobody in here.

    Args:
        identity: The agent's own.

    Attributes:
        authorization: What is in force.
        on_change: Called when that is something else.
    """

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self._identity = identity
        self._labels: Labels = NO_LABELS
        self._told: policy_pb2.WatchPolicyResponse | None = None
        self._known = asyncio.Event()
        self._said = ""
        self.on_change: Callable[[], None] = lambda: None
        self.authorization = Authorization(built_in_policy(), identity.trust_domain, self._labels_of)

    def check_told(self) -> None:
        """Pass if it has been told; raises Unavailable."""
        if self._told is None:
            raise Unavailable(
                "this agent has not heard from its control plane who may ask it, and lets nobody in until it "
                "does: see its log, or ask it through the control plane"
            )

    async def known(self) -> None:
        """Wait until it has been told once."""
        await self._known.wait()

    async def _listen(self, line: Line) -> bool:
        went_well = False
        watch = line.stub(_policies).WatchPolicy(policy_pb2.WatchPolicyRequest())
        try:
            async for told in watch:
                self._take(told)
                went_well = True
        except aio.AioRpcError as exc:
            self._say(error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())))
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
        self._known.set()
        self.on_change()
        logger.info("policy in force", extra={"rules": len(told.rules), "hash": told.hash.hex()[:16]})

    def _say(self, cause: ParallaxError) -> None:
        text = f"{type(cause).__name__}: {cause}"
        if self._told is None and text != self._said:  # later, what was told last is in force
            self._said = text
            logger.warning("nobody is let in yet: the policy is not told", extra={"cause": text})

    def _labels_of(self, identity: Identity) -> Labels:
        return self._labels if identity == self._identity else NO_LABELS


def _read(rule: policy_pb2.PolicyRule) -> Rule:
    """*rule* as it is: what this version knows no word for fits nobody."""
    return Rule(rule.name, frozenset(rule.who), frozenset(rule.methods), frozenset(rule.targets))


def _policies(channel: aio.Channel) -> policy_pb2_grpc.PolicyServiceAsyncStub:
    return policy_pb2_grpc.PolicyServiceStub(channel)
