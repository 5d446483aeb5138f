"""Refusals, counted by what they have in common and within bounds, whoever tries what; pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from parallax.runtime.address import host_of
from parallax.runtime.caller import name_of
from parallax.runtime.refusal import Refusal
from parallax.security.verification import Peer

# Kinds that are told apart between two looks, and one more for all others: whoever comes from ever new
# addresses, or under ever new names, gets no more.
MAX_KINDS: Final = 32
MAX_REPORTED: Final = 4  # of them by one reporter, and one more: whoever lies leaves room for others
MAX_NAMED: Final = 8  # methods of one kind that are named, and addresses
MAX_TEXT: Final = 200  # characters of what a peer chooses
OTHERS: Final = "others"
MORE: Final = "..."  # stands for those that are not named


@dataclass(frozen=True, slots=True)
class Kind:
    """
    What is counted together.

    Args:
        who: Who is refused: an identity as a URI, or a description where there is none.
        where: For whom no certificate vouches, the address; "": one identity counts as one, wherever it is.
        reporter: At whose port, as a URI; "": at our own.
    """

    action: str
    reason: str
    who: str
    where: str = ""
    reporter: str = ""


@dataclass(frozen=True, slots=True)
class Count:
    """
    How often, and when.

    Args:
        methods, sources: Those seen, `MAX_NAMED` at most; `MORE` behind them stands for the others.
    """

    times: int
    first: datetime
    last: datetime
    methods: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def with_(self, other: Count) -> Count:
        """Both together."""
        return Count(
            self.times + other.times,
            min(self.first, other.first),
            max(self.last, other.last),
            some(self.methods + other.methods),
            some(self.sources + other.sources),
        )


class RefusalCounts:
    """
    Counts by kind; beyond `MAX_KINDS` of them, what else there is of one action is one kind.

    So is, beyond `MAX_REPORTED`, what else one reporter tells.
    """

    def __init__(self) -> None:
        self._counts: dict[Kind, Count] = {}

    def note(
        self, action: str, refusal: Refusal, now: datetime, network_of: Callable[[str], str] = str
    ) -> None:
        """
        Count *refusal*.

        Args:
            network_of: Of an address that no certificate vouches for, whatever counts as one.
        """
        source = host_of(refusal.source)[:MAX_TEXT]
        where = "" if isinstance(refusal.caller, Peer) else network_of(source)
        kind = Kind(action, refusal.reason, name_of(refusal.caller), where)
        self.add(kind, Count(1, now, now, (refusal.method[:MAX_TEXT],), (source,)))

    def add(self, kind: Kind, count: Count) -> None:
        """Count these, too."""
        if kind not in self._counts:
            kind = self._fitting(kind)
        before = self._counts.get(kind)
        self._counts[kind] = before.with_(count) if before else count

    def take(self) -> dict[Kind, Count]:
        """What there is, which is not counted any more."""
        taken, self._counts = self._counts, {}
        return taken

    def _fitting(self, kind: Kind) -> Kind:
        """*kind*, if there is room for another one, or what stands for it."""
        if len(self._counts) >= MAX_KINDS:
            return Kind(kind.action, OTHERS, OTHERS)
        told = sum(known.reporter == kind.reporter for known in self._counts)
        if kind.reporter and told >= MAX_REPORTED:
            return Kind(kind.action, OTHERS, OTHERS, reporter=kind.reporter)
        return kind


def some(names: tuple[str, ...]) -> tuple[str, ...]:
    """Each of *names* once, the first `MAX_NAMED`."""
    once = tuple(dict.fromkeys(names))
    return once if len(once) <= MAX_NAMED else (*once[:MAX_NAMED], MORE)
