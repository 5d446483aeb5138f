"""Whether an audit log is whole: each entry where it belongs, and the one that was written."""

from __future__ import annotations

from typing import Final

from parallax.control_plane.audit import START, Entry, Head
from parallax.security.errors import ChainBroken

PRUNED: Final = "audit/pruned"
"""The action of an entry that tells up to which entry the log was pruned; its detail has `until`, a head."""


class Chain:
    """
    Reads a log from its first entry on, and raises at the first that is not what was written.

    A chain without a key proves that nothing was changed to whoever has noted a head, elsewhere, and up to
    there. Without a note it proves that it was not changed by halves: who can write all of the database
    can write another chain, or the beginning of this one.

    Args:
        noted: The head as it once was.

    Attributes:
        head: Of what was read so far.
    """

    def __init__(self, noted: Head | None = None) -> None:
        self._noted = noted
        self._begin: Head | None = None  # what the first entry follows
        self._may_begin = False  # there: an entry tells that those before were pruned
        self.head = START

    def add(self, sequence: int, content: bytes) -> Entry:
        """
        The entry that is kept as *content* with this number, the next one.

        Raises:
            ChainBroken: It is not.
        """
        # Whether it may begin where it does, a later entry has to tell.
        expected = sequence if self._begin is None else self.head.sequence + 1
        if sequence != expected:
            raise ChainBroken(f"entry {expected} is missing: the next one there is {sequence}", expected)
        entry = Entry.decode(sequence, content)
        if self._begin is None:
            self._begin = Head(sequence - 1, entry.before)
            self._compare_note(self._begin)
        elif entry.before != self.head.hash:
            raise ChainBroken(
                f"entry {sequence - 1} is not the one that entry {sequence} follows: one of them was changed",
                sequence - 1,
            )
        if entry.deed.action == PRUNED:
            self._may_begin |= entry.deed.detail.get("until") == str(self._begin)
        self.head = entry.head
        self._compare_note(self.head)
        return entry

    def finish(self, head: Head) -> None:
        """
        Pass if what was read is all there is to the log whose head is *head*.

        Raises:
            ChainBroken: It is not.
        """
        begin = self._begin or START
        if begin != START and not self._may_begin:
            first = begin.sequence + 1
            raise ChainBroken(
                f"the log begins with entry {first}, and no entry tells that those before were pruned", first
            )
        if self.head != head:
            last = self.head.sequence
            raise ChainBroken(
                f"the last entry is {last}, where the head tells of {head.sequence}"
                if last != head.sequence
                else f"entry {last}, the last, is not the one that the head tells of",
                last,
            )
        noted = self._noted
        if noted is not None and noted.sequence > head.sequence:
            raise ChainBroken(
                f"the last entry is {head.sequence}, where there was an entry {noted.sequence}: "
                "the end was cut off, or this is another log",
                head.sequence + 1,
            )
        if noted is not None and noted.sequence < begin.sequence:
            raise ChainBroken(
                f"the log was pruned up to entry {begin.sequence}: "
                f"nothing tells any more what entry {noted.sequence} was; note a newer head",
                begin.sequence,
            )

    def _compare_note(self, head: Head) -> None:
        noted = self._noted
        if noted is not None and noted.sequence == head.sequence and noted != head:
            raise ChainBroken(
                f"entry {head.sequence} is not the one that was noted: the log was rewritten", head.sequence
            )
