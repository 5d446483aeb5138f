"""The certificates in a certificate directory, whichever layout they lie in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography.x509 import Certificate

from parallax.sdk.cli.facts import Facts, Status, facts_of
from parallax.sdk.cli.render import distance
from parallax.security.bundle import parse_certificates
from parallax.security.errors import ConfigError, IdentityError
from parallax.security.files import read_file, show
from parallax.security.identity import RESERVED_NAMES, check_name
from parallax.security.layouts import (
    Layout,
    Paths,
    advise_issue,
    authority_paths,
    find_authority,
    find_layout,
    leaf_paths,
)

ISSUER: Final = "ca"
_ENDINGS: Final = ("-cert.pem", "-key.pem")
_MOUNTED: Final = "tls"  # as Kubernetes calls it, whoever it is
_STYLES: Final = {Status.ENDS_SOON: "yellow", Status.EXPIRED: "red", Status.NOT_YET_VALID: "yellow"}


@dataclass(frozen=True, slots=True)
class Entry:
    """
    What lies in the place of one name.

    Attributes:
        name: As its files or its directory are called; what the certificate says may differ.
        chain: Leaf first; empty if it cannot be read, and then `problem` says why.
    """

    name: str
    layout: Layout
    path: Path
    key: Path
    chain: tuple[Certificate, ...] = field(repr=False)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One entry as `certs list` shows it; *facts* are missing where there is a *problem*."""

    entry: Entry
    facts: Facts | None
    problem: str

    @property
    def style(self) -> str:
        """How a terminal shows it."""
        return "red" if self.facts is None else _STYLES.get(self.facts.status, "")

    def as_json(self) -> dict[str, object]:
        """For programs; `problem` is null where there is none."""
        return {
            "name": self.entry.name,
            "layout": self.entry.layout,
            "file": self.entry.path,
            "problem": self.problem or None,
            **(self.facts.as_json() if self.facts else {}),
        }

    def as_cells(self, now: datetime) -> tuple[str, ...]:
        """For people: whose, status, end, key, file; what is wrong comes last, where it may be long."""
        if self.facts is None:
            return (self.entry.name, "unreadable", "", "", self.problem)
        facts = self.facts
        file = show(self.entry.path)
        return (
            facts.name or self.entry.name,
            facts.status,
            distance(facts.not_after, now),
            facts.key_type,
            f"{file}: {facts.identity_problem}" if facts.identity_problem else file,
        )


def list_rows(directory: Path, trust_domain: str, now: datetime) -> list[Row]:
    """
    Everything in *directory*, what cannot be read included.

    Raises:
        ConfigError: The directory itself cannot be read.
    """
    rows = []
    for entry in scan(directory):
        facts, problem = None, entry.problem
        if not problem:
            try:
                facts = facts_of(entry.chain[0], trust_domain, now)
            except ConfigError as exc:
                problem = f"{show(entry.path)}: {exc}"
        rows.append(Row(entry, facts, problem))
    return rows


def scan(directory: Path) -> list[Entry]:
    """
    Everything in *directory*, the issuer first, then by name; nothing where there is no directory.

    Raises:
        ConfigError: The directory itself cannot be read.
    """
    try:
        names = [each.name for each in directory.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise ConfigError(
            f"{show(directory)} cannot be listed: {(exc.strerror or '').lower()}: "
            "name the directory with certificates with --certs-dir"
        ) from None
    places: dict[tuple[str, Layout], Paths] = {}
    for name in names:
        if name.startswith("."):
            continue  # the versions behind our own links
        inner = directory / name
        if inner.is_dir():
            if _may_hold_certificate(inner):
                places[name, Layout.PARALLAX] = Paths(inner / "cert.pem", inner / "key.pem", inner / "ca.pem")
            continue
        if name in {"tls.crt", "tls.key"}:
            places[_MOUNTED, Layout.KUBERNETES] = leaf_paths(directory, Layout.KUBERNETES, _MOUNTED)
        for ending in _ENDINGS:
            stem = name.removesuffix(ending)
            if stem and stem != name:
                cert, key = (directory / f"{stem}{each}" for each in _ENDINGS)
                places[stem, Layout.FLAT] = Paths(cert, key, directory / "ca-cert.pem")
    ordered = sorted(places.items(), key=lambda place: (place[0][0] != ISSUER, place[0]))
    return [_entry(name, layout, paths) for (name, layout), paths in ordered]


def find(directory: Path, target: str) -> Paths:
    """
    The files that *target* means: a file, or the name of an identity in *directory*.

    A file's key is not looked for. Its CA is the one beside it, else that of *directory*, which may
    be missing.

    Raises:
        ConfigError: There is no such certificate.
    """
    path = Path(target)
    if os.path.isfile(target):  # noqa: PTH113 - never raises, however odd the text
        return Paths(path, path, _authority_beside(path, directory))
    if target in RESERVED_NAMES:
        return _authority(directory)
    try:
        check_name(target)
        return _locate(directory, target)
    except IdentityError as exc:
        raise ConfigError(f"there is no file {show(target)}, and it is {exc}") from None
    except ConfigError as exc:
        raise ConfigError(f"there is no file {show(target)}, and {exc}") from None


def facts_in(path: Path, trust_domain: str, now: datetime) -> list[Facts]:
    """
    What each certificate in *path* says.

    Raises:
        ConfigError: One line that names the file.
    """
    try:
        return [facts_of(each, trust_domain, now) for each in read_chain(path)]
    except ConfigError as exc:
        raise ConfigError(str(exc) if show(path) in str(exc) else f"{show(path)}: {exc}") from None


def read_chain(path: Path) -> tuple[Certificate, ...]:
    """
    The certificates in *path*, leaf first.

    Raises:
        ConfigError: One line that names the file.
    """
    pem = read_file(path, remedy="restore it, or issue it again with 'parallax certs issue'")
    try:
        return parse_certificates(pem)
    except ConfigError as exc:
        raise ConfigError(f"{show(path)}: {exc}: restore it, or issue it again") from None


def _locate(directory: Path, name: str) -> Paths:
    layout = find_layout(directory, name)
    if layout is Layout.HOME:  # ours, and not in this directory
        raise ConfigError(f"{show(directory)} holds no certificate of {name}: {advise_issue(name, None)}")
    return leaf_paths(directory, layout, name)


def _entry(name: str, layout: Layout, paths: Paths) -> Entry:
    try:
        return Entry(name, layout, paths.cert, paths.key, read_chain(paths.cert))
    except ConfigError as exc:
        return Entry(name, layout, paths.cert, paths.key, (), str(exc))


def _may_hold_certificate(directory: Path) -> bool:
    """True also where that cannot be seen: whoever reads it then says why."""
    try:
        return any(each.name in {"cert.pem", "key.pem"} for each in directory.iterdir())
    except OSError:
        return True


def _authority(directory: Path) -> Paths:
    return authority_paths(directory, find_authority(directory) or Layout.PARALLAX)


def _authority_beside(path: Path, directory: Path) -> Path:
    for name in ("ca.pem", "ca-cert.pem", "ca.crt"):
        if (path.parent / name).is_file():
            return path.parent / name
    return _authority(directory).cert
