"""Several files as they were at one moment, though somebody may be replacing them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from parallax.security.errors import ConfigError, Defect
from parallax.security.files import read_file, show

if TYPE_CHECKING:
    from collections.abc import Iterable

_READS: Final = 20  # a replacement takes microseconds, so a second attempt nearly always suffices


@dataclass(frozen=True, slots=True)
class Content:
    """What a file contains, or would contain: given by value in the setting called *name*."""

    name: str
    data: bytes = field(repr=False)


Source: TypeAlias = Path | Content


@dataclass(frozen=True, slots=True)
class Part:
    """
    One file of several that belong together.

    Attributes:
        remedy: What to do if it is missing.
        private: Refuse it if it is open to others, see `read_file`.
    """

    source: Source
    remedy: str
    private: bool = False


def take_snapshot(*parts: Part) -> list[Content]:
    """
    The content of *parts*, read again if one of them was replaced meanwhile.

    Raises:
        ConfigError: One cannot be read, or they do not come to rest.
    """
    paths = [part.source for part in parts if isinstance(part.source, Path)]
    for _ in range(_READS):
        before = _state(paths)
        try:
            contents = [_read(part) for part in parts]
        except ConfigError:
            if _state(paths) == before:
                raise
        else:
            if _state(paths) == before:
                return contents
    text = f"{show(paths[0])} changes faster than it can be read: stop what keeps writing it"
    raise ConfigError(text, Defect.UNSETTLED)


def _read(part: Part) -> Content:
    if isinstance(part.source, Content):
        return part.source
    return Content(show(part.source), read_file(part.source, remedy=part.remedy, private=part.private))


def _state(paths: Iterable[Path]) -> list[tuple[object, ...]]:
    """What differs after a file, or a link on the way to it, has been replaced."""
    states: list[tuple[object, ...]] = []
    for path in paths:
        try:
            about = path.stat()
        except OSError as exc:
            states.append((exc.errno,))
        else:
            # Not the inode alone: a new file may have that of one removed a moment ago.
            states.append((os.path.realpath(path), about.st_ino, about.st_mtime_ns, about.st_size))
    return states
