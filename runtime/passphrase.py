"""The passphrase of a CA's key, as the deployment gives it: in a file or in a variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from parallax.runtime.settings import load_settings
from parallax.security.errors import ConfigError
from parallax.security.files import read_file, show

VARIABLE: Final = "PARALLAX_CA_PASSPHRASE"
FILE_VARIABLE: Final = "PARALLAX_CA_PASSPHRASE_FILE"
MAX_BYTES: Final = 1023  # what OpenSSL accepts


def given_passphrase(file: Path | None, config: Path | None = None) -> bytes | None:
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
        return check_passphrase(os.fsencode(value), VARIABLE)
    file = file or load_settings(config).ca_passphrase_file
    return None if file is None else _read(file)


def _read(file: Path) -> bytes:
    content = read_file(file, remedy="put the passphrase of the CA's key there, mode 0600", private=True)
    first_line = content.split(b"\n", 1)[0]  # as openssl's file: takes it
    return check_passphrase(first_line, show(file))


def check_passphrase(passphrase: bytes, origin: str) -> bytes:
    """*passphrase* itself, if it can be one; raises ConfigError, which names *origin*."""
    if not passphrase:
        raise ConfigError(f"empty passphrase ({origin}): it would protect nothing; choose another")
    if len(passphrase) > MAX_BYTES:
        raise ConfigError(f"the passphrase ({origin}) has more than {MAX_BYTES} bytes: choose a shorter one")
    return passphrase
