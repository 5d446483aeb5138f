"""Policies as they are written: TOML that is judged as a whole, and the one that is built in."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parallax.runtime.description import check_capability
from parallax.runtime.methods import ADMINISTRATION, TARGETED, UNAUTHENTICATED, methods_of, short
from parallax.runtime.policy import ADMIN, ANONYMOUS, ANY, CAPABILITY, GUARANTEE, LABEL, Policy, Rule
from parallax.security.errors import ConfigError, IdentityError, InvalidRequest
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity, Kind, check_name, clip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic_core import ErrorDetails

MAX_BYTES: Final = 1 << 20
MAX_RULES: Final = 1_000

BUILT_IN: Final = """\
# Who may call what. What no rule allows is refused.
#
# who      client/ci, client/* for all of a kind, label:team=audit for whom that label was granted,
#          anonymous for whom no certificate vouches
# may      Execute, DispatchService/Link, RegistryService/*; administration is all that is client/admin's here
# targets  of which agents: agent-1, label:env=prod, capability:audit, or * for all

[[rule]]
name = "agents work"
who = ["agent/*", "anonymous"]
may = ["Connect", "Register", "Heartbeat", "Deregister"]

[[rule]]
name = "clients ask"
who = ["client/*", "anonymous"]
may = ["Execute", "Link", "Analyze", "AnalyzeStream", "GetCapabilities"]
targets = ["*"]

[[rule]]
name = "clients look"
who = ["client/*", "anonymous"]
may = ["GetAgent", "ListAgents", "WatchAgents", "ServerReflectionInfo"]

[[rule]]
name = "admin administers"
who = ["client/admin"]
may = ["administration"]
"""

_HEADER: Final = re.compile(r"^[ \t]*\[\[[ \t]*rule[ \t]*\]\]", re.MULTILINE)
_LABEL: Final = re.compile(r"[^=\s]{1,128}=[^\s]{1,128}")
_UNFIT: Final = re.compile(r"[^\x20-\x7e]")

# More likely half a file than meant: everybody but one would be turned away.
_NO_RULE: Final = (
    "it has no rule, as when not written to its end: whoever means to refuse everybody says so in one, "
    f'name = "nobody else", who = ["{ADMIN}"], may = ["administration"]'
)

_Name = Annotated[str, Field(min_length=1, max_length=64)]
_Entries = Annotated[list[Annotated[str, Field(max_length=300)]], Field(max_length=1_000)]


class _WrittenRule(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: _Name
    who: Annotated[_Entries, Field(min_length=1)]
    may: Annotated[_Entries, Field(min_length=1)]
    targets: _Entries = []


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rule: Annotated[list[_WrittenRule], Field(max_length=MAX_RULES)] = []


@dataclass(frozen=True, slots=True)
class Problem:
    """
    Why a text is no policy.

    Args:
        text: What is wrong, and what to write instead.
        line: Where, as far as that is known; from 1.
        rule: In which rule.
    """

    text: str
    line: int | None = None
    rule: str | None = None

    def __str__(self) -> str:
        line = f"line {self.line}: " if self.line is not None else ""
        rule = f"rule {clip(self.rule)}: " if self.rule is not None else ""
        return f"{line}{rule}{self.text}"


def parse_policy(text: str, source: str) -> Policy:
    """
    The policy that *text*, of *source*, spells.

    Raises:
        ConfigError: It is none; the first cause, in one line.
    """
    found = read_policy(text)
    if isinstance(found, Policy):
        return found
    more = f" (and {len(found) - 1} more: see 'parallax policy check')" if len(found) > 1 else ""
    raise ConfigError(f"{source}: {found[0]}{more}")


def read_policy(text: str) -> Policy | tuple[Problem, ...]:
    """The policy that *text* spells, or all that keeps it from being one."""
    if len(text.encode()) > MAX_BYTES:
        return (Problem(f"it has more than {MAX_BYTES} bytes: name kinds and labels, not each identity"),)
    try:
        document = tomllib.loads(text)
    except ValueError as exc:
        return (_not_toml(str(exc)),)
    lines = [text.count("\n", 0, found.start()) + 1 for found in _HEADER.finditer(text)]
    written = document.get("rule")
    names = (
        [each.get("name") for each in written if isinstance(each, dict)] if isinstance(written, list) else []
    )
    place = _Places(lines if len(lines) == len(names) else [], names)
    try:
        policy = _Written.model_validate(document)
    except ValidationError as exc:
        return tuple(_judge_apart(written, exc.errors(include_url=False), place))
    if not policy.rule:
        return (Problem(_NO_RULE),)
    rules: list[Rule] = []
    problems: list[Problem] = []
    for number, each in enumerate(policy.rule):
        rule, wrong = _read_rule(each)
        rules.append(rule)
        problems.extend(place.problem(number, text) for text in wrong)
    problems.extend(_judge_together(rules, place))
    return tuple(problems) or Policy(tuple(rules), text)


def _judge_apart(written: object, errors: Sequence[ErrorDetails], place: _Places) -> Iterator[Problem]:
    """What is wrong with rules of which some have not the form of one, by the *errors* in that."""
    misshapen = {_index(error["loc"]) for error in errors}
    for error in errors:
        yield place.problem(_index(error["loc"]), _say(error["loc"], error["type"], error["msg"]))
    if any(error["loc"] == ("rule",) for error in errors) or not isinstance(written, list):
        return
    for number, each in enumerate(written):
        if number not in misshapen:
            _, wrong = _read_rule(_WrittenRule.model_validate(each))
            yield from (place.problem(number, text) for text in wrong)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the rules stand; *lines* is empty where that cannot be told."""

    lines: list[int]
    names: list[object]

    def problem(self, number: int | None, text: str) -> Problem:
        """One of the rule with *number*, or of none."""
        if number is None or number >= len(self.names):
            return Problem(text)
        name = self.names[number]
        line = self.lines[number] if self.lines else None
        return Problem(text, line, name if isinstance(name, str) else f"number {number + 1}")


def _read_rule(written: _WrittenRule) -> tuple[Rule, list[str]]:
    """The rule, and what is wrong with it."""
    problems = [text for each in written.who if (text := _check_who(each))]
    problems += [text for each in written.targets if (text := _check_target(each))]
    if written.name.startswith(GUARANTEE):
        problems.append(f"{GUARANTEE!r} begins the names of what is in no file: name it otherwise")
    if _UNFIT.search(written.name):
        problems.append("its name has characters that cannot be shown: use ASCII")
    problems += [
        f"{clip(each)} stands twice in one list: take one out"
        for entries in (written.who, written.may, written.targets)
        for each in sorted({entry for entry in entries if entries.count(entry) > 1})
    ]
    methods: set[str] = set()
    for each in written.may:
        try:
            methods |= methods_of(each)
        except InvalidRequest as exc:
            problems.append(str(exc))
    targeted = sorted(map(short, methods & TARGETED))
    if targeted and not written.targets:
        problems.append(f'{targeted[0]} is asked of agents: say of which, as targets = ["*"]')
    if written.targets and methods and not targeted:
        problems.append("none of its methods is asked of an agent: take targets out")
    if ANONYMOUS in written.who and (beyond := sorted(methods - UNAUTHENTICATED)):
        problems.append(f"{short(beyond[0])} is not for anonymous callers: make it a rule of its own")
    rule = Rule(written.name, frozenset(written.who), frozenset(methods), frozenset(written.targets))
    return rule, problems


def _judge_together(rules: list[Rule], place: _Places) -> list[Problem]:
    """What is wrong with *rules* that are right one by one."""
    problems = []
    names: dict[str, int] = {}
    contents: dict[tuple[frozenset[str], ...], int] = {}
    for number, rule in enumerate(rules):
        first = names.setdefault(rule.name, number)
        same = contents.setdefault((rule.who, rule.methods, rule.targets), number)
        if first != number:
            problems.append(place.problem(number, "another rule has its name: give it one of its own"))
        elif same != number and rule.who and rule.methods:
            problems.append(
                place.problem(number, f"it says the same as rule {rules[same].name!r}: take one out")
            )
    administering = [number for number, rule in enumerate(rules) if rule.methods >= ADMINISTRATION]
    if administering and not any(_is_sure(each) for number in administering for each in rules[number].who):
        # A label can be taken back, and only who administers can grant it again.
        problems.append(
            place.problem(
                administering[0],
                f"nobody could be sure to administer: name an identity in who, such as {ADMIN}",
            )
        )
    return problems


def _is_sure(who: str) -> bool:
    return who.startswith((f"{Kind.CLIENT}/", f"{Kind.SERVICE}/"))


def _check_who(text: str) -> str | None:
    if text == ANONYMOUS:
        return None
    if text.startswith(LABEL):
        return _check_label(text)
    kind, _, name = text.partition("/")
    try:
        Identity(DEFAULT_TRUST_DOMAIN, Kind(kind), "any" if name == ANY else name)
    except (ValueError, IdentityError):
        return f"{clip(text)} is nobody: write client/ci, client/*, label:team=audit or {ANONYMOUS}"
    return None


def _check_target(text: str) -> str | None:
    if text == ANY:
        return None
    if text.startswith(LABEL):
        return _check_label(text)
    try:
        check_asked(text)
    except (IdentityError, InvalidRequest):
        return f"{clip(text)} is no target: write agent-1, label:env=prod, capability:audit or {ANY}"
    return None


def _check_label(text: str) -> str | None:
    if _LABEL.fullmatch(text.removeprefix(LABEL)):
        return None
    return f"{clip(text)} is no label: write label:key=value"


def _not_toml(message: str) -> Problem:
    """The decoder's *message*, with its line where others have theirs."""
    found = re.search(r" \(at line (\d+), column \d+\)$", message)
    what = message.removesuffix(found[0]) if found else message
    what = what.replace("\n", " ")
    return Problem(
        f"it is not TOML: {what[:1].lower()}{what[1:]}; mend the syntax", int(found[1]) if found else None
    )


def _index(loc: tuple[int | str, ...]) -> int | None:
    match loc:
        case ("rule", int(number), *_):
            return number
    return None


def _say(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    """What pydantic says of what stands at *loc*, and the remedy."""
    key = next((part for part in reversed(loc) if isinstance(part, str)), "")
    known = list(_WrittenRule.model_fields) if len(loc) > 1 else list(_Written.model_fields)
    match kind:
        case "extra_forbidden":
            return f"{clip(key)} is no key: use {', '.join(known)}"
        case "missing":
            return f"{key} is missing: add it"
    wants = {
        "rule": "write [[rule]] above each rule",
        "name": "write a text of 1 to 64 characters",
        "who": 'write a list, such as ["client/ci"]',
        "may": 'write a list, such as ["Execute"]',
        "targets": 'write a list, such as ["agent-1"]',
    }
    return f"{key}: {message[:1].lower()}{message[1:]}; {wants.get(key, 'see docs/policy.md')}"


def check_asked(text: str) -> str:
    """*text* itself, if it can be asked something: `agent-1` or `capability:audit`; raises if it cannot."""
    if text.startswith(CAPABILITY):
        check_capability(text.removeprefix(CAPABILITY))
    else:
        check_name(text.removeprefix(f"{ANONYMOUS}/"))
    return text


def built_in_policy() -> Policy:
    """What is in force without a file."""
    return parse_policy(BUILT_IN, "the built-in policy")
