"""What agents are told to enforce at ports of their own: rules, and whom the labels in these were granted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from parallax.control_plane.beats import wait
from parallax.control_plane.grants import Grants, Regrant
from parallax.control_plane.watch import shutting_down
from parallax.protos import policy_pb2
from parallax.runtime.authorization import Authorization
from parallax.runtime.policy import Labels, Policy, Target
from parallax.security.identity import Identity

PIECE: Final = 1_000  # identities in a message, of 70 bytes at the most
REMEMBERED: Final = 10_000  # changes; who reads slower than that is told everything once more

Response = policy_pb2.WatchPolicyResponse


@dataclass(frozen=True, slots=True)
class _Account:
    """
    What an agent goes by.

    Args:
        own: Labels of the agent's own.
        callers: The labels by which others are let in there: of these it is told who has them.
    """

    policy: Policy
    own: Labels
    callers: frozenset[str]


class PolicyFeed:
    """
    Tells agents. Nobody waits for who reads slowly, nor keeps more for him than for others.

    An agent hears of a label only if a rule that lets callers in there names it: of a million identities
    with labels, few concern any one agent.

    Args:
        authorization: The policy in force; `wake` is called when it is another.
        grants: Whom which labels were granted; `note` is told of each change.
    """

    def __init__(self, authorization: Authorization, grants: Grants) -> None:
        self._authorization = authorization
        self._grants = grants
        self._rules: tuple[Policy, Response] | None = None  # once for all who are told
        self._holders: dict[str, tuple[Response, ...]] = {}  # likewise, by label
        self._recent: deque[Regrant] = deque(maxlen=REMEMBERED)
        self._count = 0  # of all changes, those too that are remembered no more
        self._changed = asyncio.Event()  # replaced by a new one with every change
        self._is_closed = False

    def note(self, change: Regrant) -> None:
        """Tell whom it concerns of *change*, which is in force."""
        for label in change.labels:
            self._holders.pop(label, None)
        if change.labels.isdisjoint(self._authorization.policy.labels):
            return
        self._recent.append(change)
        self._count += 1
        self.wake()

    def wake(self) -> None:
        """Look whether there is anything to tell, as after another policy was put in force."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        self.wake()

    async def tell(
        self, agent: Identity, beat_s: float, write: Callable[[Response], Awaitable[object]]
    ) -> None:
        """Tell *agent* everything, then what changes, and all *beat_s* seconds that nothing has."""
        told: _Account | None = None
        told_of = 0  # of all changes
        while not self._is_closed:
            changed, count = self._changed, self._count
            account = self._account(agent, told)
            missed = count - told_of
            if account is not told or missed > len(self._recent):
                pieces = self._everything(account)
            else:
                missing = islice(self._recent, len(self._recent) - missed, None)
                pieces = self._changes(missing, account)
            for piece in pieces:
                await write(piece)
            told, told_of = account, count
            await write(Response(complete=True))
            await wait(changed, beat_s)
        raise shutting_down()

    def _account(self, agent: Identity, told: _Account | None) -> _Account:
        """What *agent* goes by; *told* itself, if it is still that."""
        policy, own = self._authorization.policy, self._authorization.labels(agent)
        if told is not None and told.policy is policy and told.own == own:
            return told
        return _Account(policy, own, policy.callers_of(Target(agent.name, own)))

    def _everything(self, account: _Account) -> Iterator[Response]:
        if self._rules is None or self._rules[0] is not account.policy:
            self._rules = account.policy, _to_proto(account.policy)
            self._holders.clear()  # the labels may be others
        first = Response(labels=dict(account.own), restart=True)
        first.MergeFrom(self._rules[1])
        yield first
        for label in sorted(account.callers):
            if label not in self._holders:
                self._holders[label] = tuple(_holding(label, self._grants.holders(label)))
            yield from self._holders[label]

    def _changes(self, changes: Iterable[Regrant], account: _Account) -> Iterator[Response]:
        """
        Of each label and identity in *changes*, whether it has it by now.

        Not what became of it in each: that could let somebody in who has lost the label since.
        """
        pairs = ((label, each.identity) for each in changes for label in each.labels & account.callers)
        rest = iter(dict.fromkeys(pairs))
        while some := list(islice(rest, PIECE)):
            by_label: dict[str, policy_pb2.LabelHolders] = {}
            for label, identity in some:
                told = by_label.setdefault(label, policy_pb2.LabelHolders(label=label))
                has_it = identity in self._grants.holders(label)
                (told.holders if has_it else told.others).append(identity.short)
            yield Response(callers=by_label.values())


def _holding(label: str, holders: Iterable[Identity]) -> Iterator[Response]:
    rest = iter(holders)
    while some := [each.short for each in islice(rest, PIECE)]:
        yield Response(callers=[policy_pb2.LabelHolders(label=label, holders=some)])


def _to_proto(policy: Policy) -> Response:
    rules = [
        policy_pb2.PolicyRule(
            name=rule.name,
            who=sorted(rule.who),
            methods=sorted(rule.methods),
            targets=sorted(rule.targets),
        )
        for rule in policy.for_agents
    ]
    return Response(rules=rules, hash=policy.hash)
