"""The passphrase of a CA's key, from whoever sits at the terminal."""

from __future__ import annotations

import os
import sys
from getpass import getpass
from pathlib import Path

from parallax.runtime.passphrase import FILE_VARIABLE, VARIABLE, check_passphrase
from parallax.security.errors import ConfigError
from parallax.security.files import show


def ask_passphrase(key: Path, *, twice: bool = False) -> bytes:
    """
    The passphrase of *key*, typed at the terminal and not shown.

    Args:
        twice: It is a new one, so a slip would lock everybody out.

    Raises:
        ConfigError: There is no terminal, or what was typed is empty, too long or differs.
    """
    name = show(key)
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{name} needs a passphrase and there is no terminal to ask at: "
            f"give --passphrase-file, or set {FILE_VARIABLE} or {VARIABLE}"
        )
    try:
        typed = getpass(f"Passphrase for {name}: ")
        if twice and typed and getpass("The same again: ") != typed:
            raise ConfigError("the two passphrases differ: nothing was made; try again")
    except EOFError:
        raise ConfigError(f"no passphrase for {name} was typed: nothing was made") from None
    return check_passphrase(os.fsencode(typed), "what was typed")
