"""Who is told of which change: a log of what changed lately, and watchers that fall behind without harm."""

from __future__ import annotations

import asyncio
import base64
import binascii
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from itertools import islice
from typing import Final

from parallax.control_plane.registry import AgentRef
from parallax.control_plane.sessions import Cause, Instance, Roster
from parallax.control_plane.views import AgentFilter, AgentView, Views
from parallax.security.errors import InvalidRequest, Unavailable

LOG_LIMIT: Final = 16_384  # agents whose last change is remembered: a reference and a number each
UNSETTLED_LIMIT: Final = 1_024  # agents looked at together, at the most
MAX_WATCHERS: Final = 256  # each costs a look at every change
BATCH: Final = 128  # agents told, or looked at, before anybody else has a turn

_TOKEN: Final = struct.Struct(">QQ8s")


class ChangeKind(Enum):
    """What can happen to an agent, as far as a watcher's filter sees it."""

    ADDED = auto()
    CHANGED = auto()
    REMOVED = auto()


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one agent; *view* is None when it was removed."""

    kind: ChangeKind
    ref: AgentRef
    view: AgentView | None


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What a watcher is told at once.

    Args:
        fresh: The first one of a telling of the whole current state.
        synced: Everything was told that was so when the watch began.
        resume: The token of everything told so far; empty where there is none.
    """

    changes: tuple[Change, ...]
    fresh: bool = False
    synced: bool = False
    resume: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point between two changes, of one control plane's life and as seen through one filter."""

    epoch: int
    revision: int
    filter_digest: bytes

    @classmethod
    def parse(cls, token: str) -> Mark:
        """The mark spelled *token*; raises InvalidRequest."""
        try:
            return cls(*_TOKEN.unpack(base64.b64decode(token, b"-_", validate=True)))
        except (ValueError, binascii.Error, struct.error):
            raise InvalidRequest(
                "the resume token is not one that a watch has given; leave it out to begin anew"
            ) from None

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(_TOKEN.pack(self.epoch, self.revision, self.filter_digest)).decode()


class Changes:
    """
    Every change of every agent, in order, and those who watch.

    Whoever changes something says of whom (`note`). The agents noted are looked at together before
    anybody is told: what came and went in between is no change, and several changes are one. What
    then differs from the last look gets the next revision.

    Only the last revision of an agent is logged, and only so many agents': a watcher resumes from
    there if it missed no more than that, and is otherwise told the whole state.

    Args:
        views: Where to look.
        epoch: Different in every life of the control plane, since revisions begin anew.
    """

    def __init__(self, views: Views, epoch: int, *, log_limit: int = LOG_LIMIT, batch: int = BATCH) -> None:
        self.views = views
        self.epoch = epoch
        self.batch = batch
        self.revision = 0
        self._log_limit = log_limit
        self._log: OrderedDict[AgentRef, int] = OrderedDict()  # by revision
        self._forgotten = 0  # the newest revision that has left the log
        self._seen: dict[AgentRef, AgentView] = {}
        self._noted: dict[AgentRef, None] = {}
        self._watchers: dict[Watcher, None] = {}
        self.closed = False

    def __len__(self) -> int:
        return len(self._watchers)

    def note(self, ref: AgentRef) -> None:
        """Take note that something about *ref* may have changed."""
        if not self._noted:
            for watcher in self._watchers:
                watcher.wake()
        self._noted[ref] = None
        if len(self._noted) >= UNSETTLED_LIMIT:
            self.settle()

    def settle(self) -> None:
        """Look at the agents noted, and tell what changed."""
        noted, self._noted = self._noted, {}
        for ref in noted:
            before, after = self._seen.get(ref), self.views.find(ref)
            if before == after:
                continue
            if after is None:
                del self._seen[ref]
            else:
                self._seen[ref] = after
            self.revision += 1
            self._log[ref] = self.revision
            self._log.move_to_end(ref)
            if len(self._log) > self._log_limit:
                _, self._forgotten = self._log.popitem(last=False)
            for watcher in self._watchers:
                watcher.tell(ref, before, after, self.revision)

    def watch(self, wanted: AgentFilter, resume: str = "") -> Watcher:
        """
        Begin to watch; whoever does must `close` it.

        Raises:
            InvalidRequest: *resume* is no token.
            Unavailable: The control plane drains, or as many watch as may.
        """
        mark = Mark.parse(resume) if resume else None
        if self.closed:
            raise shutting_down()
        if len(self._watchers) >= MAX_WATCHERS:
            raise Unavailable(f"{MAX_WATCHERS} watches are open, which is as many as may be; try again")
        self.settle()
        watcher = Watcher(self, wanted)
        if mark is not None and self._reaches(mark, watcher.digest):
            for ref in reversed(self._since(mark.revision)):
                watcher.resume(ref, self._log[ref])
        else:
            watcher.begin()
        self._watchers[watcher] = None
        return watcher

    def close(self) -> None:
        """Let every watch end, and none begin."""
        self.closed = True
        for watcher in self._watchers:
            watcher.wake()

    def leave(self, watcher: Watcher) -> None:
        """Tell *watcher* nothing more."""
        self._watchers.pop(watcher, None)

    def _reaches(self, mark: Mark, digest: bytes) -> bool:
        """Whether the log tells everything that changed after *mark*."""
        same = mark.epoch == self.epoch and mark.filter_digest == digest
        return same and self._forgotten <= mark.revision <= self.revision

    def _since(self, revision: int) -> list[AgentRef]:
        """Who changed after *revision*, newest first."""
        changed = []
        for ref, at in reversed(self._log.items()):
            if at <= revision:
                break
            changed.append(ref)
        return changed


class Watcher:
    """
    One who watches, through a filter, at its own pace.

    Of an agent only the latest state waits to be told, so what waits is bounded by the number of
    agents. The whole state is told in the order of the agents' names: of those whose turn is yet to
    come nothing waits at all.
    """

    def __init__(self, changes: Changes, wanted: AgentFilter) -> None:
        self._changes = changes
        self._filter = wanted
        self.digest = _digest(wanted)
        # Who waits: since which revision, and whether the watcher may know it.
        self._waiting: OrderedDict[AgentRef, tuple[int, bool]] = OrderedDict()
        self._unsynced = 0  # of those who wait when a watch resumes
        self._walking = False
        self._reached: AgentRef | None = None  # by the walk
        self._fresh = False
        self._synced = False
        self._awake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self) -> None:
        """Tell the whole state first."""
        self._walking = self._fresh = True

    def resume(self, ref: AgentRef, revision: int) -> None:
        """Tell first what became of *ref*; whether the watcher knows it cannot be told any more."""
        self._waiting[ref] = revision, True
        self._unsynced += 1

    def wake(self) -> None:
        """Let `take` look again."""
        self._awake.set()

    def tell(self, ref: AgentRef, before: AgentView | None, after: AgentView | None, revision: int) -> None:
        """Take note of a change, if it is to be told."""
        if self._walking and (self._reached is None or ref > self._reached):
            return  # it will be told as it is when its turn comes
        is_wanted = self._matches(after)
        waiting = self._waiting.get(ref)
        if waiting is None:
            known = self._matches(before)
            if known or is_wanted:
                self._waiting[ref] = revision, known
        elif not is_wanted and not waiting[1]:
            del self._waiting[ref]  # it came and went unseen: what waits must not grow by such
        self._awake.set()

    async def take(self) -> Batch | None:
        """Wait for something to tell, and take as much as is told at once; None once nothing more follows."""
        while True:
            if self._changes.closed:
                return None
            self._changes.settle()
            batch = self._walk() if self._walking else self._changed()
            if batch is not None:
                return batch
            if self._walking:
                await asyncio.sleep(0)  # many do not match: others have their turn
                continue
            self._awake.clear()
            await self._awake.wait()

    def close(self) -> None:
        """Watch no longer."""
        self._changes.leave(self)

    def _walk(self) -> Batch | None:
        views = self._changes.views.after(self._reached, self._changes.batch)
        if views:
            self._reached = views[-1].record.ref
        self._walking = len(views) == self._changes.batch
        told = tuple(Change(ChangeKind.ADDED, v.record.ref, v) for v in views if self._matches(v))
        fresh = self._fresh
        if self._walking:
            if not told:
                return None
            self._fresh = False
            return Batch(told, fresh)
        self._fresh, self._synced = False, True
        return Batch(told, fresh, synced=True, resume=self._token())

    def _changed(self) -> Batch | None:
        if self._synced and not self._waiting:
            return None
        told = []
        for ref, (_, known) in [*islice(self._waiting.items(), self._changes.batch)]:
            del self._waiting[ref]
            self._unsynced -= self._unsynced > 0
            view = self._changes.views.find(ref)
            if self._matches(view):
                told.append(Change(ChangeKind.CHANGED if known else ChangeKind.ADDED, ref, view))
            elif known:
                told.append(Change(ChangeKind.REMOVED, ref, None))
        synced = not self._synced and not self._unsynced
        self._synced = self._synced or synced
        return Batch(tuple(told), synced=synced, resume=self._token())

    def _token(self) -> str:
        """Everything before the first change that waits has been told; what follows is told again."""
        first = next(iter(self._waiting.values()), None)
        revision = self._changes.revision if first is None else first[0] - 1
        return str(Mark(self._changes.epoch, revision, self.digest))

    def _matches(self, view: AgentView | None) -> bool:
        return view is not None and self._filter.matches(view.record, view.state)


class Watched:
    """A roster that notes every change before it hands it on; *note* is set when there is who takes notes."""

    def __init__(self, roster: Roster, note: Callable[[AgentRef], None] = lambda _: None) -> None:
        self._roster = roster
        self.note = note

    def changed(self, instance: Instance) -> None:
        """See `Roster.changed`."""
        self.note(instance.ref)
        self._roster.changed(instance)

    def lost(self, instance: Instance, cause: Cause) -> None:
        """See `Roster.lost`."""
        self.note(instance.ref)
        self._roster.lost(instance, cause)

    def forgotten(self, instance: Instance, held: Collection[int]) -> None:
        """See `Roster.forgotten`; who holds what is no news."""
        self._roster.forgotten(instance, held)


def shutting_down() -> Unavailable:
    """Why a watch ends that nobody ended."""
    return Unavailable("the control plane is shutting down; watch again")


def _digest(wanted: AgentFilter) -> bytes:
    """The same for the same filter, in every process."""
    states = sorted(state.name for state in wanted.states)
    labels = sorted(wanted.labels.items(), key=lambda pair: pair[0])
    spelled = repr((sorted(wanted.capabilities), labels, states, wanted.verified))
    return blake2b(spelled.encode(), digest_size=8).digest()
