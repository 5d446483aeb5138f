"""Refusals, counted by what they have in common and within bounds, whoever tries what; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

# Kinds that are told apart between two looks, and one more for all others: whoever comes from ever new
# addresses, or under ever new names, gets no more.
MAX_KINDS: Final = 32
MAX_NAMED: Final = 8  # methods of one kind that are named, and addresses
OTHERS: Final = "others"
MORE: Final = "..."  # stands for those that are not named


@dataclass(frozen=True, slots=True)
class Kind:
    """
    What is counted together.

    Args:
        who: Who is refused: an identity as a URI, or a description where there is none.
        where: For whom no certificate vouches, the address; "": one identity counts as one, wherever it is.
    """

    action: str
    reason: str
    who: str
    where: str = ""


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
            _some(self.methods, other.methods),
            _some(self.sources, other.sources),
        )


class RefusalCounts:
    """Counts by kind; beyond `MAX_KINDS` of them, what else there is of one action is one kind."""

    def __init__(self) -> None:
        self._counts: dict[Kind, Count] = {}

    def add(self, kind: Kind, count: Count) -> None:
        """Count these, too."""
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = Kind(kind.action, OTHERS, OTHERS)
        before = self._counts.get(kind)
        self._counts[kind] = before.with_(count) if before else count

    def take(self) -> dict[Kind, Count]:
        """What there is, which is not counted any more."""
        taken, self._counts = self._counts, {}
        return taken


def _some(known: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(known + more))
    return names if len(names) <= MAX_NAMED else (*names[:MAX_NAMED], MORE)
