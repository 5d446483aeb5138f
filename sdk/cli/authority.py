"""What there is to say about the CA in a certificate directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from parallax.sdk.cli.facts import Facts, facts_of
from parallax.sdk.cli.inventory import read_chain, scan
from parallax.sdk.cli.render import printable, write
from parallax.security.certificate import is_signed_by
from parallax.security.errors import ConfigError
from parallax.security.files import read_file, show
from parallax.security.keys import is_encrypted
from parallax.security.layouts import Layout, authority_paths, find_authority


class KeyState(StrEnum):
    """What protects the CA's key."""

    ENCRYPTED = "encrypted with a passphrase"
    PLAIN = "not encrypted"
    MISSING = "not here"
    UNUSABLE = "not usable"


@dataclass(frozen=True, slots=True)
class AuthorityFacts:
    """
    The CA of one directory.

    Attributes:
        key_problem: With `KeyState.UNUSABLE`, one line that names the remedy.
    """

    layout: Layout
    certificate: Path
    key: Path
    key_state: KeyState
    key_problem: str
    facts: Facts

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "subject": self.facts.subject,
            "issuer": self.facts.issuer,
            "fingerprint": self.facts.fingerprint,
            "serial": self.facts.serial,
            "key_type": self.facts.key_type,
            "not_before": self.facts.not_before,
            "not_after": self.facts.not_after,
            "status": self.facts.status,
            "layout": self.layout,
            "certificate": self.certificate,
            "key": self.key,
            "key_encrypted": {KeyState.ENCRYPTED: True, KeyState.PLAIN: False}.get(self.key_state),
            "key_problem": self.key_problem or None,
        }

    def as_lines(self, now: datetime) -> list[tuple[str, ...]]:
        """For people."""
        shown = {"validity", "serial", "fingerprint", "subject"}
        return [
            *(line for line in self.facts.as_lines(now) if line[0] in shown),
            ("key", f"{self.facts.key_type}, {self.key_problem or self.key_state}"),
            ("certificate", show(self.certificate)),
            ("private key", show(self.key)),
        ]


def refuse_existing(directory: Path) -> None:
    """Pass if there is no CA in *directory*, nor a part of one."""
    layout = find_authority(directory)
    if layout is not None:
        paths = authority_paths(directory, layout)
        there = paths.cert if os.path.lexists(paths.cert) else paths.key
        raise ConfigError(
            f"{show(there)} exists already and a CA is never replaced: see it with 'parallax ca show', "
            "or make another in another directory with --certs-dir"
        )


def authority_facts(directory: Path, trust_domain: str, now: datetime) -> AuthorityFacts:
    """
    The CA in *directory*; its key is not decrypted, and may be elsewhere.

    Raises:
        ConfigError: There is none, or its certificate cannot be read.
    """
    layout = find_authority(directory)
    if layout is None:
        raise ConfigError(f"{show(directory)} holds no CA: make one with 'parallax ca init'")
    paths = authority_paths(directory, layout)
    facts = facts_of(read_chain(paths.cert)[0], trust_domain, now)
    return AuthorityFacts(layout, paths.cert, paths.key, *_key_state(paths.key), facts)


def write_family(directory: Path, trust_domain: str, now: datetime) -> None:
    """The CA as a tree with what it signed in *directory*."""
    from rich.text import Text
    from rich.tree import Tree

    issuer, *entries = scan(directory)
    if not issuer.chain:
        return
    tree = Tree(Text(printable(issuer.chain[0].subject.rfc4514_string()), style="bold"))
    for entry in entries:
        if entry.chain and is_signed_by(entry.chain[0], issuer.chain[0]):
            facts = facts_of(entry.chain[0], trust_domain, now)
            tree.add(Text(printable(f"{facts.identity or facts.subject}: {facts.verdict(now)}")))
    if tree.children:
        write(tree)


def _key_state(path: Path) -> tuple[KeyState, str]:
    if not os.path.lexists(path):
        return KeyState.MISSING, ""
    try:
        pem = read_file(path, remedy="restore it from the backup", private=True)
    except ConfigError as exc:
        return KeyState.UNUSABLE, str(exc)
    return (KeyState.ENCRYPTED if is_encrypted(pem) else KeyState.PLAIN), ""
