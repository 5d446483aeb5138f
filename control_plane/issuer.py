"""The CA that this control plane signs with, as its files are now."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from parallax.security.authority import CertificateAuthority
from parallax.security.errors import ConfigError
from parallax.security.files import show
from parallax.security.layouts import authority_paths, find_authority, load_authority
from parallax.security.succession import next_paths

_State = tuple[tuple[int, ...], ...]


class IssuerFiles:
    """
    Reads the CA in *directory* when it is needed, and again when its files are others.

    Args:
        passphrase: Asked for only if the key is encrypted; None if there is none.
    """

    def __init__(self, directory: Path, passphrase: Callable[[], bytes | None] = lambda: None) -> None:
        self._directory = directory
        self._passphrase = passphrase
        self._seen: _State = ()
        self._authority: CertificateAuthority | None = None
        self._lock = Lock()

    def current(self) -> CertificateAuthority:
        """
        The CA; blocks while it is read. Safe to call from any thread.

        Raises:
            ConfigError: This host has none, or it cannot be used: which file, and what to do.
        """
        with self._lock:
            state = self._state()
            while self._authority is None or state != self._seen:
                self._authority = None
                try:
                    self._authority = self._load()
                except ConfigError:
                    if self._state() == state:
                        raise
                self._seen, state = state, self._state()  # two files: they may have been swapped in between
            return self._authority

    def passphrase(self) -> bytes:
        """Of the key, and of that of the next CA; raises ConfigError if none is given."""
        return self._given(next_paths(self._directory).key)  # without one, that in force is not encrypted

    def _load(self) -> CertificateAuthority:
        layout = find_authority(self._directory)
        if layout is None:
            raise ConfigError(f"there is no CA in {show(self._directory)} to renew certificates with")
        paths = authority_paths(self._directory, layout)
        if not os.path.lexists(paths.key):
            raise ConfigError(f"there is no {show(paths.key)} to renew certificates with")
        return load_authority(self._directory, layout, lambda: self._given(paths.key))

    def _given(self, key: Path) -> bytes:
        passphrase = self._passphrase()
        if passphrase is None:
            raise ConfigError(f"{show(key)} needs a passphrase: set PARALLAX_CA_PASSPHRASE_FILE")
        return passphrase

    def _state(self) -> _State:
        """What changes when a file does; nothing if there is no CA, or two."""
        try:
            layout = find_authority(self._directory)
            if layout is None:
                return ()
            paths = authority_paths(self._directory, layout)
            about = [path.stat() for path in (paths.cert, paths.key)]
        except (OSError, ConfigError):
            return ()
        return tuple((each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns) for each in about)
