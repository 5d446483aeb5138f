"""The policy in force, and what it has decided so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from parallax.runtime.caller import Anonymous, Caller
from parallax.runtime.policy import ANONYMOUS, CAPABILITY, NO_LABELS, Decision, Labels, Policy, Target
from parallax.security.errors import NotAuthorized
from parallax.security.identity import Identity, Kind

MAX_KNOWN: Final = 50_000  # decisions; about 300 bytes each

LabelsOf = Callable[[Identity], Labels]


def no_labels(_: Identity) -> Labels:
    """Where none are granted."""
    return NO_LABELS


class Authorization:
    """
    Decides by the policy in force, and each thing once until that changes.

    Args:
        trust_domain: Of the agents that are asked.
        labels_of: The labels granted to an identity; when any that the policy names changes, `forget` has to
            be called.
    """

    def __init__(self, policy: Policy, trust_domain: str, labels_of: LabelsOf = no_labels) -> None:
        self._policy = policy
        self._trust_domain = trust_domain
        self._labels_of = labels_of
        self._known: dict[tuple[Identity | None, str, str], Decision] = {}

    @property
    def policy(self) -> Policy:
        """What is in force."""
        return self._policy

    def replace(self, policy: Policy) -> None:
        """Put *policy* in force; what is open is for the server's `review`."""
        self._policy = policy
        self.forget()

    def forget(self) -> None:
        """Decide everything anew, as after labels were granted or taken back."""
        self._known.clear()

    def authorize(self, caller: Caller, method: str) -> None:
        """Return if *caller* may call *method*, a full gRPC method name; raises NotAuthorized."""
        self.check(caller, method, "")

    def check(self, caller: Caller, method: str, target: str) -> None:
        """The same, if something is asked of *target*: an agent or `capability:<name>`; empty: of any."""
        decision = self.decide(None if isinstance(caller, Anonymous) else caller.identity, method, target)
        if not decision.allowed:
            raise NotAuthorized(decision.why)

    def decide(self, caller: Identity | None, method: str, target: str) -> Decision:
        """What `Policy.decide` says, with the labels granted."""
        key = caller, method, target
        decision = self._known.get(key)
        if decision is None:
            decision = self._policy.decide(
                caller, self.labels(caller), method, self._target(target) if target else None
            )
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = decision
        return decision

    def labels(self, caller: Identity | None) -> Labels:
        """Those granted to *caller*."""
        return self._labels_of(caller) if caller is not None else NO_LABELS

    def _target(self, name: str) -> Target:
        if name.startswith((CAPABILITY, f"{ANONYMOUS}/")):
            return Target(name)
        return Target(name, self._labels_of(Identity(self._trust_domain, Kind.AGENT, name)))
