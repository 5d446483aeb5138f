"""Who may call what, and ask whom for it: rules that allow, and the decision that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from parallax.runtime.methods import (
    ADMINISTRATION,
    CERTIFICATES,
    HEALTH,
    OF_AGENTS,
    POLICY_NEWS,
    TARGETED,
    short,
)
from parallax.security.identity import AGENT_PROXY, Identity, Kind, clip

ADMIN: Final = f"{Kind.CLIENT}/admin"
ANONYMOUS: Final = "anonymous"  # whom no certificate vouches for
ANY: Final = "*"
CAPABILITY: Final = "capability:"
LABEL: Final = "label:"
GUARANTEE: Final = "guaranteed: "  # begins the names of rules that are in no file
_SHOWN: Final = 8  # targets, in a reason
_ANOTHER: Final = "act as another --identity"

Labels = Mapping[str, str]
"""Those *granted* to an identity: what an agent states of itself counts for nothing here."""
NO_LABELS: Final[Labels] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Target:
    """
    Whom something is asked of.

    Args:
        name: An agent, `agent-1`, or whoever offers something, `capability:audit`.
        labels: Granted to that agent.
    """

    name: str
    labels: Labels = field(default_factory=lambda: NO_LABELS)

    @property
    def is_capability(self) -> bool:
        """Whether any agent that offers it will do."""
        return self.name.startswith(CAPABILITY)

    @property
    def spellings(self) -> frozenset[str]:
        """What a rule that covers it names."""
        return frozenset({ANY, self.name, *spelled(self.labels)})


@dataclass(frozen=True, slots=True)
class Rule:
    """
    One thing that is allowed.

    Args:
        who: `client/ci`, `client/*`, `label:team=audit` or `anonymous`.
        methods: Full names.
        targets: `agent-1`, `label:env=prod`, `capability:audit` or `*`; only methods that ask something of
            an agent look at them.
    """

    name: str
    who: frozenset[str]
    methods: frozenset[str]
    targets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """
    Whether a call is let in, and why.

    Args:
        rule: The name of the rule that lets it in; None if none does.
        why: A sentence, lower case.
        only: Where a capability is asked for, and not everybody who offers it may be: who may.
    """

    allowed: bool
    rule: str | None
    why: str
    only: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Policy:
    """
    Rules, each of which only adds to what is allowed: their order does not count.

    Those of `GUARANTEED` hold besides. Made from text by `parse_policy`.

    Args:
        text: What it was read from.
    """

    rules: tuple[Rule, ...]
    text: str = field(default="", repr=False)

    @property
    def hash(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def for_agents(self) -> tuple[Rule, ...]:
        """What concerns agents' own ports."""
        return tuple(
            replace(rule, methods=rule.methods & OF_AGENTS) for rule in self.rules if rule.methods & OF_AGENTS
        )

    @property
    def labels(self) -> frozenset[str]:
        """Those that its rules name, as these spell them."""
        return _labels_in(each for rule in self.rules for each in (*rule.who, *rule.targets))

    def callers_of(self, agent: Target) -> frozenset[str]:
        """The labels by which callers are let in at the own port of *agent*, as rules spell them."""
        return _labels_in(
            each
            for rule in self.for_agents
            if not rule.targets.isdisjoint(agent.spellings)
            for each in rule.who
        )

    def names_administrator(self, identity: Identity) -> bool:
        """Whether a rule lets *identity*, by that very name, do some of what is administration."""
        return any(
            identity.short in rule.who and not rule.methods.isdisjoint(ADMINISTRATION)
            for rule in self._all_rules()
        )

    def decide(self, caller: Identity | None, labels: Labels, method: str, target: Target | None) -> Decision:
        """
        Whether *caller* may call *method*.

        Args:
            caller: None: somebody whom no certificate vouches for.
            labels: Granted to the caller.
            method: Its full name.
            target: None: whether the method may be called at all. Where it is a capability, one of those
                who offer it may do; see `Decision.only`.
        """
        names = spellings(caller, labels)
        rules = [
            rule for rule in self._all_rules() if method in rule.methods and not names.isdisjoint(rule.who)
        ]
        if not rules:
            hint = self._hint(method) if caller is not None else _ANOTHER
            why = f"{_say(caller)} may not call {clip(method)}; {hint}"
            return Decision(allowed=False, rule=None, why=why)
        wanted = target.spellings if target is not None and method in TARGETED else None
        for rule in rules:
            if wanted is None or not wanted.isdisjoint(rule.targets):
                whom = _whom(rule, method, target)
                why = f"rule {rule.name!r} lets {_say(caller)} call {short(method)}{whom}"
                return Decision(allowed=True, rule=rule.name, why=why)
        assert target is not None, "else every rule covers it"  # noqa: S101 - our own bug
        return _of_others(caller, method, target, rules)

    def _all_rules(self) -> Iterator[Rule]:
        yield from self.rules
        yield from GUARANTEED
        if not any(rule.methods >= ADMINISTRATION for rule in self.rules):
            yield _ADMINISTRATION

    def _hint(self, method: str) -> str:
        who = {each for rule in self._all_rules() if method in rule.methods for each in rule.who}
        named = sorted(each for each in who if each.startswith(f"{Kind.CLIENT}/"))
        if named and f"{Kind.CLIENT}/{ANY}" not in named:
            return f"act as --identity {named[0]}"
        return _ANOTHER


def _labels_in(words: Iterable[str]) -> frozenset[str]:
    return frozenset(word for word in words if word.startswith(LABEL))


def spelled(labels: Labels) -> Iterator[str]:
    """*labels* as rules name them; a key with an equals sign would read as another's."""
    return (f"{LABEL}{key}={value}" for key, value in labels.items() if "=" not in key)


def spellings(caller: Identity | None, labels: Labels) -> frozenset[str]:
    """What a rule for *caller* names."""
    if caller is None:
        return frozenset({ANONYMOUS})
    return frozenset({caller.short, f"{caller.kind}/{ANY}", *spelled(labels)})


def _whom(rule: Rule, method: str, target: Target | None) -> str:
    """Of whom *rule* lets *method* be called, where that counts."""
    if method not in TARGETED:
        return ""
    if target is not None:
        return f" of {target.name}"
    return f" of {' or '.join(sorted(rule.targets)[:_SHOWN])}"


def _of_others(caller: Identity | None, method: str, target: Target, rules: list[Rule]) -> Decision:
    """What *rules*, none of which names *target*, make of it."""
    only = frozenset(each for rule in rules for each in rule.targets if not each.startswith(CAPABILITY))
    if target.is_capability and only:
        name = next(rule.name for rule in rules if not only.isdisjoint(rule.targets))
        why = (
            f"rule {name!r} lets {_say(caller)} call {short(method)} of {target.name}, "
            f"as far as that is {' or '.join(sorted(only)[:_SHOWN])}"
        )
        return Decision(allowed=True, rule=name, why=why, only=only)
    others = sorted({each for rule in rules for each in rule.targets})
    return Decision(
        allowed=False,
        rule=None,
        why=f"{_say(caller)} may not call {short(method)} of {clip(target.name)}, "
        f"only of {' or '.join(others[:_SHOWN])}",
    )


def _say(caller: Identity | None) -> str:
    return str(caller) if caller is not None else "an anonymous caller"


_EVERYBODY: Final = frozenset({*(f"{kind}/{ANY}" for kind in Kind), ANONYMOUS})
# What no policy takes away: to be refused here would end what a caller is, or hide why. Those whom no
# certificate vouches for are told which setting keeps them from it.
GUARANTEED: Final = (
    Rule(
        f"{GUARANTEE}certificates",  # each for itself
        _EVERYBODY,
        CERTIFICATES,
    ),
    Rule(f"{GUARANTEE}health", _EVERYBODY, HEALTH),
    Rule(f"{GUARANTEE}the policy for agents", frozenset({f"{Kind.AGENT}/{ANY}", ANONYMOUS}), POLICY_NEWS),
    # What the control plane passes on was allowed there.
    Rule(
        f"{GUARANTEE}agent proxy", frozenset({f"{Kind.SERVICE}/{AGENT_PROXY}"}), OF_AGENTS, frozenset({ANY})
    ),
)
# Unless a rule gives it to somebody else.
_ADMINISTRATION: Final = Rule(f"{GUARANTEE}administration", frozenset({ADMIN}), ADMINISTRATION)
