"""Certificate, key and CA of one identity: read at one moment, and what they are worth."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import Credentials, check_usable
from parallax.security.errors import (
    ConfigError,
    Defect,
    Expired,
    IdentityError,
    ParallaxError,
    VerificationError,
    WrongIdentity,
)
from parallax.security.keys import fits, is_encrypted, parse_key
from parallax.security.layouts import advise_issue
from parallax.security.snapshot import Part, take_snapshot

if TYPE_CHECKING:
    from collections.abc import Generator
    from datetime import datetime

    from parallax.security.identity import Identity
    from parallax.security.layouts import Paths
    from parallax.security.snapshot import Content, Source


@dataclass(frozen=True, slots=True)
class Sources:
    """The three parts of an identity's credentials, each a file or its content."""

    cert: Source
    key: Source
    ca: Source


@dataclass(frozen=True, slots=True)
class Material:
    """What the three parts contain, whether it can be used or not."""

    cert: Content
    key: Content
    ca: Content


def load_credentials(source: Paths | Sources, identity: Identity, now: datetime) -> Credentials:
    """
    The usable credentials of *identity* in *source*.

    Raises:
        ConfigError: A part is missing, unreadable, damaged, encrypted, expired, somebody else's,
            does not fit the others, or the key is open to others; its `defect` says which.
    """
    return parse_material(read_material(source, identity), identity, now)


def read_material(source: Paths | Sources, identity: Identity) -> Material:
    """
    What *source* contains, for *identity*.

    One snapshot: if a file is replaced while the three are read, they are read again.

    Raises:
        ConfigError: A file is missing or unreadable, or the key is open to others.
    """
    issue = advise_issue(identity.name, identity.kind)
    return Material(
        *take_snapshot(
            Part(source.cert, issue),
            Part(source.key, issue, private=True),
            Part(source.ca, "copy the CA's certificate there"),
        )
    )


def parse_material(material: Material, identity: Identity, now: datetime) -> Credentials:
    """
    The credentials of *identity* that *material* is, usable at *now*.

    Raises:
        ConfigError: It is not: one line that names part and remedy, and a `defect`.
    """
    cert, key, ca = material.cert, material.key, material.ca
    issue = advise_issue(identity.name, identity.kind)
    with _damaged(cert, issue):
        chain = parse_certificates(cert.data)
    with _damaged(ca, "put the CA's certificate there"):
        bundle = TrustBundle.parse(ca.data)
    decrypt = "decrypt it with `openssl pkey`, or " if is_encrypted(key.data) else ""
    with _damaged(key, decrypt + issue):
        private = parse_key(key.data)
    if not fits(private, chain[0]):
        text = f"{key.name} does not fit {cert.name}: put both files of one pair there, or {issue}"
        raise ConfigError(text, Defect.MISMATCHED_KEY)
    credentials = Credentials(chain, private, bundle)
    try:
        check_usable(credentials, identity, now)
    except (WrongIdentity, IdentityError) as exc:
        text = f"{cert.name} is not for {identity}: {exc}: {issue}"
        raise ConfigError(text, Defect.WRONG_IDENTITY) from exc
    except Expired as exc:
        early = now < credentials.leaf.not_valid_before_utc
        text = f"{cert.name}: {exc}: check this host's clock, or {issue}"
        raise ConfigError(text, Defect.NOT_YET_VALID if early else Defect.EXPIRED) from exc
    except VerificationError as exc:
        text = f"{cert.name} cannot be used with {ca.name}: {exc}: {issue}"
        raise ConfigError(text, Defect.UNTRUSTED_CHAIN) from exc
    return credentials


@contextmanager
def _damaged(content: Content, remedy: str) -> Generator[None]:
    """Give an error that is the cause alone its part and its remedy."""
    try:
        yield
    except ParallaxError as exc:
        raise ConfigError(f"{content.name}: {exc}: {remedy}", Defect.DAMAGED) from exc
