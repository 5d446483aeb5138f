"""What a process says to `crashes.py` before it is killed, beside the heads of the audit log."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Attempt:
    """
    Somebody's attempt to enroll, which whoever comes after a crash has to be able to repeat.

    Args:
        token: Empty: by an approval.
    """

    token: str = field(repr=False)
    name: str
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Begun:
    """From here on it may have been granted."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Ended:
    """It was granted, and acknowledged."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class There:
    """This record was acknowledged, of which the audit log does not tell."""

    key: str


@dataclass(frozen=True, slots=True)
class NoMore:
    """It may go from here on."""

    key: str


@dataclass(frozen=True, slots=True)
class Turn:
    """All that there is to do of one kind was done once."""

    kind: str


@dataclass(frozen=True, slots=True)
class Refused:
    """It could not be recorded, and reads went on."""

    kind: str


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not go on, which it has to, whatever became of those before it."""

    why: str
