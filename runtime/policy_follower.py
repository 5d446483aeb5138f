"""An agent's own policy: what the control plane tells it to enforce."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from grpc import aio

from parallax.protos import policy_pb2, policy_pb2_grpc
from parallax.runtime.authorization import Authorization
from parallax.runtime.following import Follower
from parallax.runtime.freshness import Freshness
from parallax.runtime.policy import LABEL, NO_LABELS, Labels, Policy, Rule
from parallax.runtime.policy_text import built_in_policy
from parallax.runtime.status import error_of

if TYPE_CHECKING:
    from parallax.runtime.connection import Line
    from parallax.security.identity import Identity

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Told:
    """
    What an agent was told.

    Args:
        own: Labels of its own.
        holders: Who has the labels by which others are let in, as `<kind>/<name>`; by label.
    """

    rules: tuple[Rule, ...]
    own: Labels
    hash: bytes
    holders: dict[str, set[str]] = field(default_factory=dict)

    def enter(self, told: Iterable[policy_pb2.LabelHolders]) -> None:
        """Put in whom labels were granted, and from whom they were taken back."""
        for each in told:
            known = self.holders.setdefault(each.label, set())
            known.update(each.holders)
            known.difference_update(each.others)

    def labels_of(self, identity: Identity) -> Labels:
        """Those of *identity* that rules name."""
        return dict(_pair(label) for label, holders in self.holders.items() if identity.short in holders)


class PolicyFollower(Follower):
    """
    Keeps what an agent enforces at its own port like what the control plane tells it.

    Until it is told, the policy that is built in is in force, which allows more than others: who is to be
    told one lets nobody in before, nor when it was told too long ago, see `freshness`.

    Args:
        identity: The agent's own.
        max_age: How long ago it may have been told that it knows everything.

    Attributes:
        authorization: What is in force.
        freshness: Whether it is known what ought to be.
        on_change: Called when that is something else.
    """

    def __init__(self, identity: Identity, max_age: timedelta) -> None:
        super().__init__()
        self.on_change: Callable[[], None] = lambda: None
        self.freshness = Freshness("who may ask it", max_age)
        self.authorization = Authorization(built_in_policy(), identity.trust_domain, self._labels_of)
        self._identity = identity
        self._told: Told | None = None
        self._anew: Told | None = None  # an account that is not complete yet

    async def _listen(self, line: Line) -> bool:
        went_well = False
        max_age = self.freshness.max_age
        request = policy_pb2.WatchPolicyRequest(max_age_ms=int(max_age / timedelta(milliseconds=1)))
        watch = line.stub(_policies).WatchPolicy(request)
        self._anew = None
        try:
            while True:
                async with asyncio.timeout(max_age.total_seconds()):
                    told = await watch.read()
                if not isinstance(told, policy_pb2.WatchPolicyResponse):
                    break
                went_well |= self._take(told)
        except aio.AioRpcError as exc:
            self.freshness.say(error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())))
        except TimeoutError as exc:
            self.freshness.say(exc)
        except Exception:  # a bug of ours must not end what still works
            logger.exception("the policy cannot be followed")
        finally:
            watch.cancel()
        return went_well

    def _take(self, told: policy_pb2.WatchPolicyResponse) -> bool:
        """Go by what is *told*; whether that is everything."""
        if told.restart:
            self._anew = _begun(told)
        account = self._anew or self._told
        if account is None:  # of nothing there can be no more
            return False
        account.enter(told.callers)
        if account is self._told and told.callers:
            self.authorization.forget()
            self.on_change()
        if told.complete:
            self._adopt(account)
            self._anew = None
            self.freshness.note()
        return told.complete

    def _adopt(self, told: Told) -> None:
        if told == self._told:
            return
        self._told = told
        self.authorization.replace(Policy(told.rules))
        self.on_change()
        logger.info("policy in force", extra={"rules": len(told.rules), "hash": told.hash.hex()[:16]})

    def _labels_of(self, identity: Identity) -> Labels:
        if self._told is None:
            return NO_LABELS
        return self._told.own if identity == self._identity else self._told.labels_of(identity)


def _begun(told: policy_pb2.WatchPolicyResponse) -> Told:
    """What *told* begins to tell. Words in rules that this version does not know fit nobody."""
    rules = (
        Rule(each.name, frozenset(each.who), frozenset(each.methods), frozenset(each.targets))
        for each in told.rules
    )
    return Told(tuple(rules), dict(told.labels), told.hash)


def _pair(label: str) -> tuple[str, str]:
    """Key and value of *label*, as a rule spells it."""
    key, _, value = label.removeprefix(LABEL).partition("=")
    return key, value


def _policies(channel: aio.Channel) -> policy_pb2_grpc.PolicyServiceAsyncStub:
    return policy_pb2_grpc.PolicyServiceStub(channel)
