"""Saying in a message what a value is and where in it something lies: short, in one line, fit for UTF-8."""

from __future__ import annotations

import json
import re
from typing import Final

_MAX_SHOWN: Final = 40
_MAX_SHOWN_PATH: Final = 200
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{,39}")


def step(key: str) -> str:
    """The part of a path that leads to the item *key* of an object."""
    return f".{key}" if _PLAIN_KEY.fullmatch(key) else f"[{shown(key)}]"


def at(path: str) -> str:
    """*path*, with its middle left out when it is long."""
    half = _MAX_SHOWN_PATH // 2
    return path if len(path) <= _MAX_SHOWN_PATH else f"{path[:half]}…{path[-half:]}"


def shown(value: object, limit: int = _MAX_SHOWN) -> str:
    """*value* for a message: ASCII, so that a surrogate in it cannot spoil the message; clipped."""
    try:
        text = json.dumps(value[:limit]) if isinstance(value, str) else ascii(value)
    except Exception:  # noqa: BLE001 - `__repr__` of a key is the user's code; an integer may be too long
        text = f"<{type_of(value)}>"
    return text if len(text) <= limit else f"{text[:limit]}…"


def said(text: str, limit: int = _MAX_SHOWN_PATH) -> str:
    """What somebody else's library says, as part of a message: its first line, printable and clipped."""
    line = text.strip().partition("\n")[0]
    line = "".join(character if character.isprintable() else "?" for character in line[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}…"


def type_of(value: object) -> str:
    """The name of the type of *value*."""
    return "None" if value is None else type(value).__name__
