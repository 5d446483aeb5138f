"""The CA that this control plane signs with, and those beside it, as their files are now."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Final

from parallax.security.authority import CertificateAuthority
from parallax.security.errors import ConfigError
from parallax.security.files import show
from parallax.security.layouts import Paths, authority_paths, find_authority, load_authority, read_authority
from parallax.security.succession import next_paths, paths_beside

logger = logging.getLogger(__name__)

_RESTORE: Final = "restore it from the backup, or take it away"

_State = tuple[tuple[int, ...], ...]


class IssuerFiles:
    """
    Reads the CAs in *directory* when they are needed, and again when their files are others.

    Args:
        passphrase: Asked for only if a key is encrypted; None if there is none.
    """

    def __init__(self, directory: Path, passphrase: Callable[[], bytes | None] = lambda: None) -> None:
        self._directory = directory
        self._passphrase = passphrase
        self._in_force = _Kept(self._paths, self._load)
        self._beside: dict[Paths, _Kept] = {}
        self._unusable: dict[Paths, str] = {}

    def current(self) -> CertificateAuthority:
        """
        The CA in force; blocks while it is read. Safe to call from any thread.

        Raises:
            ConfigError: This host has none, or it cannot be used: which file, and what to do.
        """
        return self._in_force.current()

    def beside(self) -> list[CertificateAuthority]:
        """
        The next CA and those before, as far as their keys are here; blocks while they are read.

        One that cannot be used is left out, and the log says so once.
        """
        usable, unusable = [], {}
        places = paths_beside(self._directory)
        self._beside = {paths: self._beside.get(paths) or self._kept(paths) for paths in places}
        for paths, kept in self._beside.items():
            try:
                usable.append(kept.current())
            except ConfigError as exc:
                unusable[paths] = str(exc)
        for problem in {*unusable.values()} - {*self._unusable.values()}:
            logger.warning("a CA beside the one in force cannot be used", extra={"cause": problem})
        self._unusable = unusable
        return usable

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

    def _paths(self) -> Paths | None:
        layout = find_authority(self._directory)
        return authority_paths(self._directory, layout) if layout else None

    def _kept(self, paths: Paths) -> _Kept:
        def load() -> CertificateAuthority:
            return read_authority(paths, lambda: self._given(paths.key), remedy=_RESTORE)

        return _Kept(lambda: paths, load)


class _Kept:
    """One CA, which is read again when its files are others."""

    def __init__(self, paths: Callable[[], Paths | None], load: Callable[[], CertificateAuthority]) -> None:
        self._paths = paths
        self._load = load
        self._seen: _State = ()
        self._authority: CertificateAuthority | None = None
        self._lock = Lock()

    def current(self) -> CertificateAuthority:
        """The CA; raises ConfigError."""
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

    def _state(self) -> _State:
        """What changes when a file does; nothing if there is no CA, or two."""
        try:
            paths = self._paths()
            about = [path.stat() for path in (paths.cert, paths.key)] if paths else []
        except (OSError, ConfigError):
            return ()
        return tuple((each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns) for each in about)
