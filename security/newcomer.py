"""Who has no certificate yet: its key waits in a file, so that a second attempt is for the same one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallax.security.bundle import parse_certificates
from parallax.security.errors import ConfigError
from parallax.security.files import PRIVATE, File, create_file, read_file, remove_file, show, writing
from parallax.security.keys import KeyType, generate_key, key_to_pem, parse_key
from parallax.security.layouts import Layout, leaf_paths, save_leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cryptography.x509 import Certificate

    from parallax.security.bundle import TrustBundle
    from parallax.security.credentials import Credentials
    from parallax.security.identity import Identity
    from parallax.security.keys import PrivateKey
    from parallax.security.layouts import Paths


@dataclass(frozen=True, slots=True)
class Newcomer:
    """
    The place in *directory* that *identity* will have in *layout*.

    Args:
        waits_as: The name under which its key waits, where it has none of its own yet; else that.
    """

    directory: Path
    layout: Layout
    identity: Identity
    waits_as: str = ""

    def key(self, key_type: KeyType = KeyType.P256) -> PrivateKey:
        """
        The key that a certificate is asked for: a new one, or that of an attempt which did not succeed.

        Raises:
            ConfigError: It cannot be kept, or that which was cannot be used.
        """
        path = self.waiting
        if os.path.lexists(path):
            remedy = "remove it to begin again"
            content = read_file(path, remedy=remedy, private=True)
            try:
                return parse_key(content)
            except ConfigError as exc:
                raise ConfigError(f"{show(path)}: {exc}: {remedy}") from exc
        key = generate_key(key_type)
        with writing(path.parent) as place:
            create_file(place, path.name, File(key_to_pem(key), PRIVATE))
        return key

    def save(self, credentials: Credentials, tell: Callable[[Paths], None] = lambda _: None) -> Paths:
        """
        Put *credentials* where they belong, and forget that the key has waited; see `save_leaf`.

        Args:
            tell: Called between the two, so that whoever was not told can ask for the same key again.

        Raises:
            ConfigError: Somebody else's files lie there. Nothing was changed.
        """
        paths = self.write(credentials.chain, credentials.key, credentials.bundle)
        tell(paths)
        self.forget()
        return paths

    def own(self, key: PrivateKey) -> Certificate | None:
        """The certificate for *key* that lies there already; raises ConfigError for somebody else's."""
        path = self.paths.cert
        if not os.path.exists(path):  # noqa: PTH110 - nor a link of a save that ended before its rename
            return None
        leaf = parse_certificates(read_file(path, remedy="move it away"))[0]
        if leaf.public_key() != key.public_key():
            raise ConfigError(f"{show(path)} exists already and is never replaced: move it away")
        return leaf

    def write(self, chain: Sequence[Certificate], key: PrivateKey, bundle: TrustBundle) -> Paths:
        """Put them where they belong, while the key goes on waiting; see `save`."""
        return save_leaf(self.directory, self.layout, self.identity, chain, key, bundle)

    def forget(self) -> None:
        """Let the key wait no longer."""
        path = self.waiting
        with writing(path.parent) as place:
            remove_file(place, path.name)

    @property
    def is_waiting(self) -> bool:
        """Whether there was an attempt that did not succeed."""
        return os.path.lexists(self.waiting)

    @property
    def paths(self) -> Paths:
        """Where its files will be."""
        return leaf_paths(self.directory, self.layout, self.identity.name)

    @property
    def waiting(self) -> Path:
        """Where the key waits until it has a certificate."""
        home = self.paths.cert.parent
        name = self.waits_as or self.identity.name
        return (home if self.layout is Layout.HOME else self.directory) / f".{name}.enrolling"
