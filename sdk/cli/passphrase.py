"""Where the passphrase of a CA's key comes from: a file, a variable, or whoever sits at the terminal."""

from __future__ import annotations

import os
import sys
from getpass import getpass
from pathlib import Path
from typing import Final

from parallax.runtime.settings import load_settings
from parallax.security.errors import ConfigError
from parallax.security.files import read_file, show

VARIABLE: Final = "PARALLAX_CA_PASSPHRASE"
FILE_VARIABLE: Final = "PARALLAX_CA_PASSPHRASE_FILE"
MAX_BYTES: Final = 1023  # what OpenSSL accepts


def given_passphrase(file: Path | None, config: Path | None) -> bytes | None:
    """
    The passphrase that was given without anybody being asked: *file*, else a variable, else *config*.

    Raises:
        ConfigError: It is empty or too long, two variables give one, or the file cannot be read or is
            open to others.
    """
    value = os.environ.get(VARIABLE)
    if file is None and value:
        if os.environ.get(FILE_VARIABLE):
            raise ConfigError(f"{VARIABLE} and {FILE_VARIABLE} are both set: keep one")
        return _check(os.fsencode(value), VARIABLE)
    file = file or load_settings(config).ca_passphrase_file
    return None if file is None else _read(file)


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
    return _check(os.fsencode(typed), "what was typed")


def _read(file: Path) -> bytes:
    content = read_file(file, remedy="put the passphrase of the CA's key there, mode 0600", private=True)
    return _check(content.split(b"\n", 1)[0], show(file))  # the first line, as openssl's file: takes it


def _check(passphrase: bytes, origin: str) -> bytes:
    if not passphrase:
        raise ConfigError(f"empty passphrase ({origin}): it would protect nothing; choose another")
    if len(passphrase) > MAX_BYTES:
        raise ConfigError(f"the passphrase ({origin}) has more than {MAX_BYTES} bytes: choose a shorter one")
    return passphrase
