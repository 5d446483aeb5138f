"""
Where certificates, keys and CAs lie, and how they are read and written there.

========  ==================================  ===========================================
layout    identity                            issuer
========  ==================================  ===========================================
parallax  `<dir>/<name>/{cert,key,ca}.pem`    `<dir>/ca/{cert,key}.pem`
flat      `<dir>/<name>-{cert,key}.pem`       `<dir>/ca-{cert,key}.pem`, trusted by all
========  ==================================  ===========================================

Hand-made files load just as well as ours. Every failure is a `ConfigError` of one line that names
the file and what to do about it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.certificate import is_signed_by
from parallax.security.credentials import Credentials, check_usable
from parallax.security.errors import (
    ConfigError,
    Expired,
    IdentityError,
    ParallaxError,
    UntrustedChain,
    VerificationError,
    WrongIdentity,
)
from parallax.security.files import (
    PRIVATE,
    PUBLIC,
    File,
    command,
    create_file,
    exists,
    publish_set,
    read_file,
    show,
    writing,
)
from parallax.security.identity import RESERVED_NAMES, check_name
from parallax.security.keys import fits, is_encrypted, key_to_pem, parse_key
from parallax.security.snapshot import Part, take_snapshot
from parallax.security.verification import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from datetime import datetime
    from pathlib import Path

    from cryptography.x509 import Certificate

    from parallax.security.identity import Identity, Kind
    from parallax.security.keys import PrivateKey
    from parallax.security.snapshot import Source


class Layout(StrEnum):
    """How a certificate directory is laid out."""

    PARALLAX = "parallax"
    FLAT = "flat"


@dataclass(frozen=True, slots=True)
class Paths:
    """The three files of an identity; or of a CA, and then `ca` is its own certificate."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Sources:
    """The three parts of an identity's credentials, each a file or its content."""

    cert: Source
    key: Source
    ca: Source


def leaf_paths(certs_dir: Path, layout: Layout, name: str) -> Paths:
    """Where *layout* keeps the identity called *name*. Raises `IdentityError` if that is no name."""
    check_name(name)
    if name in RESERVED_NAMES:
        raise IdentityError(f"the name {name!r} is reserved for the issuer")
    if layout is Layout.FLAT:
        return Paths(certs_dir / f"{name}-cert.pem", certs_dir / f"{name}-key.pem", certs_dir / "ca-cert.pem")
    return Paths(certs_dir / name / "cert.pem", certs_dir / name / "key.pem", certs_dir / name / "ca.pem")


def authority_paths(certs_dir: Path, layout: Layout) -> Paths:
    """Where *layout* keeps the issuer."""
    if layout is Layout.FLAT:
        cert, key = certs_dir / "ca-cert.pem", certs_dir / "ca-key.pem"
    else:
        cert, key = certs_dir / "ca" / "cert.pem", certs_dir / "ca" / "key.pem"
    return Paths(cert, key, cert)


def locate(certs_dir: Path, name: str, kind: Kind | None = None) -> Paths:
    """
    The files of the identity called *name* in *certs_dir*: `<dir>/<name>/`, else flat.

    *kind* is for the advice in the error only.

    Raises:
        ConfigError: There are none, or they cannot be looked for.
        IdentityError: *name* is not a name.
    """
    own, flat = (leaf_paths(certs_dir, layout, name) for layout in Layout)
    if os.path.isdir(own.cert.parent):  # noqa: PTH112 - in flat, `<dir>/<name>` may be a file of another
        return own
    if os.path.lexists(flat.cert) or os.path.lexists(flat.key):
        return flat
    if os.path.exists(certs_dir) and not os.path.isdir(certs_dir):  # noqa: PTH110, PTH112 - these never raise
        raise ConfigError(f"{show(certs_dir)} is not a directory: set PARALLAX_CERTS_DIR to one")
    if os.path.isdir(certs_dir) and not os.access(certs_dir, os.X_OK):  # noqa: PTH112
        us = str(os.geteuid())
        raise ConfigError(f"{show(certs_dir)} cannot be entered: {command('chown', us, certs_dir)}")
    layout = Layout.FLAT if os.path.lexists(flat.ca) else Layout.PARALLAX
    missing = f"{show(certs_dir)} holds no certificate of {name}: {_issue(name, kind, layout)}"
    if any(os.path.lexists(authority_paths(certs_dir, each).cert) for each in Layout):
        raise ConfigError(missing)
    generate = command("parallax", "certs", "generate")
    raise ConfigError(f"{missing}; there is no CA either: set PARALLAX_CERTS_DIR, or begin with {generate}")


def load_credentials(source: Paths | Sources, identity: Identity, now: datetime) -> Credentials:
    """
    The usable credentials of *identity* in *source*.

    One snapshot: if a file is replaced while the three are read, they are read again.

    Raises:
        ConfigError: A part is missing, unreadable, damaged, encrypted, expired, somebody else's,
            does not fit the others, or the key is open to others.
    """
    issue = _issue(identity.name, identity.kind)
    cert, key, ca = take_snapshot(
        Part(source.cert, issue),
        Part(source.key, issue, private=True),
        Part(source.ca, "copy the CA's certificate there"),
    )
    with _about(cert.name, issue):
        chain = parse_certificates(cert.data)
    with _about(ca.name, "put the CA's certificate there"):
        bundle = TrustBundle.parse(ca.data)
    decrypt = "decrypt it with `openssl pkey`, or " if is_encrypted(key.data) else ""
    with _about(key.name, decrypt + issue):
        private = parse_key(key.data)
    if not fits(private, chain[0]):
        raise ConfigError(
            f"{key.name} does not fit {cert.name}: put both files of one pair there, or {issue}"
        )
    credentials = Credentials(chain, private, bundle)
    try:
        check_usable(credentials, identity, now)
    except (WrongIdentity, IdentityError) as exc:
        raise ConfigError(f"{cert.name} is not for {identity}: {exc}: {issue}") from exc
    except Expired as exc:
        raise ConfigError(f"{cert.name}: {exc}: check this host's clock, or {issue}") from exc
    except VerificationError as exc:
        raise ConfigError(f"{cert.name} cannot be used with {ca.name}: {exc}: {issue}") from exc
    return credentials


def save_leaf(
    directory: Path,
    layout: Layout,
    identity: Identity,
    chain: Sequence[Certificate],
    key: PrivateKey,
    bundle: TrustBundle,
) -> Paths:
    """
    Put the credentials of *identity* into the certificate directory, in place of older ones of the same.

    They are swapped in one rename: `files.publish_set` says what a reader and a crash see. A flat
    directory's `ca-cert.pem` is shared, so it is made if missing and never changed.

    Raises:
        ConfigError: Somebody else's files, or files of unknown owner, lie there; or a link leads
            elsewhere; or the parts do not belong together. Nothing was changed.
    """
    paths = leaf_paths(directory, layout, identity.name)
    with _about(show(paths.cert), "nothing was written"):
        if identity_of(chain[0], identity.trust_domain) != identity or not fits(key, chain[0]):
            raise WrongIdentity(f"the certificate and key to save are not a pair of {identity}")
    cert_file, key_file = File(certificates_to_pem(chain), PUBLIC), File(key_to_pem(key), PRIVATE)
    if layout is Layout.FLAT:
        with writing(directory) as place:
            _check_owner(paths, identity)
            _check_shared(paths.ca, bundle)
            files = {paths.cert.name: ("cert.pem", cert_file), paths.key.name: ("key.pem", key_file)}
            publish_set(place, f"..{identity.name}", files)
            if not exists(place, paths.ca.name):
                create_file(place, paths.ca.name, File(bundle.pem, PUBLIC))
    else:
        with writing(directory, identity.name) as place:
            _check_owner(paths, identity)
            contents = {"cert.pem": cert_file, "key.pem": key_file, "ca.pem": File(bundle.pem, PUBLIC)}
            publish_set(place, "..data", {name: (name, file) for name, file in contents.items()})
    return paths


def find_authority(directory: Path) -> Layout | None:
    """
    The layout of the issuer in *directory*, a part of one included; None if there is none.

    Raises:
        ConfigError: There are two.
    """
    found = [
        layout
        for layout in Layout
        for paths in [authority_paths(directory, layout)]
        if os.path.lexists(paths.cert) or os.path.lexists(paths.key)
    ]
    if len(found) > 1:
        both = " and ".join(show(authority_paths(directory, layout).cert) for layout in found)
        raise ConfigError(f"two CAs in one directory, {both}: move one away")
    return found[0] if found else None


def save_authority(
    directory: Path, layout: Layout, authority: CertificateAuthority, passphrase: bytes | None = None
) -> Paths:
    """
    Put a new CA into *directory*, its key encrypted if there is a passphrase.

    The key comes first: so a CA whose certificate is there can issue.

    Raises:
        ConfigError: There is a CA, or a part of one; it is never replaced.
    """
    paths = authority_paths(directory, layout)
    _refuse_authority(directory)
    key = File(key_to_pem(authority.key, passphrase), PRIVATE)
    certificates = dict.fromkeys((authority.certificate, *authority.intermediates, *authority.bundle.roots))
    with writing(directory, None if layout is Layout.FLAT else "ca") as place:
        _refuse_authority(directory)  # again, now that nobody else is writing
        create_file(place, paths.key.name, key)
        create_file(place, paths.cert.name, File(certificates_to_pem(certificates), PUBLIC))
    return paths


def load_authority(
    directory: Path,
    layout: Layout | None = None,
    passphrase: bytes | Callable[[], bytes] | None = None,
) -> CertificateAuthority:
    """
    The issuer in *directory*. Reads only: a CA that is damaged stays as it is, and no other is made.

    Without *layout* it is the one that is there. A *passphrase* that is a function is called only
    if the key is encrypted: it may ask somebody.

    Raises:
        ConfigError: There is no CA, a part is missing or damaged, or the passphrase is wrong.
    """
    layout = layout or find_authority(directory)
    if layout is None:
        raise ConfigError(f"{show(directory)} holds no CA: make one with {command('parallax', 'ca', 'init')}")
    paths = authority_paths(directory, layout)
    cert, key = show(paths.cert), show(paths.key)
    restore = "restore it from the backup; nothing was made in its place"
    certificates_pem = read_file(paths.cert, remedy=restore)
    key_pem = read_file(paths.key, remedy=restore, private=True)
    if callable(passphrase):
        passphrase = passphrase() if is_encrypted(key_pem) else None
    with _about(cert, restore):
        certificate, *others = parse_certificates(certificates_pem)
        roots = tuple(each for each in (certificate, *others) if is_signed_by(each, each))
        bundle = TrustBundle(roots)
    with _about(key, "give the right passphrase (PARALLAX_CA_PASSPHRASE_FILE), or restore the file"):
        private = parse_key(key_pem, passphrase)
    if not fits(private, certificate):
        raise ConfigError(f"{key} does not fit {cert}: restore both from one backup; nothing was changed")
    with _about(cert, restore):
        return CertificateAuthority(
            certificate, private, bundle, tuple(each for each in others if each not in roots)
        )


@contextmanager
def _about(name: str, remedy: str) -> Generator[None]:
    """Give an error that is the cause alone its file and its remedy."""
    try:
        yield
    except ParallaxError as exc:
        raise ConfigError(f"{name}: {exc}: {remedy}") from exc


def _issue(name: str, kind: Kind | None, layout: Layout = Layout.PARALLAX) -> str:
    flat = ("--layout", "flat") if layout is Layout.FLAT else ()
    return f"issue it with {command('parallax', 'certs', 'issue', name, '--kind', kind or 'KIND', *flat)}"


def _check_owner(paths: Paths, identity: Identity) -> None:
    """Pass if nothing is at *paths*, or a certificate of *identity*, in whatever state."""
    if os.path.islink(paths.cert) and not os.path.exists(paths.cert):  # noqa: PTH110, PTH114
        return  # a save that ended before its rename; what the link may be is checked when it is used
    if not os.path.lexists(paths.cert):
        if os.path.lexists(paths.key) and not os.path.islink(paths.key):  # noqa: PTH114
            raise ConfigError(f"{show(paths.key)} has no certificate, so it may be anybody's: move it away")
        return
    with _about(show(paths.cert), "move it away, or use another directory"):
        leaf = parse_certificates(read_file(paths.cert, remedy="try again"))[0]
        owner = identity_of(leaf, identity.trust_domain)
        if owner != identity:
            raise WrongIdentity(f"belongs to {owner}, not to {identity}")


def _check_shared(path: Path, bundle: TrustBundle) -> None:
    """Pass if *path*, the CA certificate of a flat directory, is not there or holds all roots of *bundle*."""
    if not os.path.lexists(path):
        return
    with _about(show(path), "use another directory"):
        present = TrustBundle.parse(read_file(path, remedy="remove the link"))
        if not set(bundle.roots) <= set(present.roots):
            raise UntrustedChain("is of another CA than the certificate to save")


def _refuse_authority(directory: Path) -> None:
    layout = find_authority(directory)
    if layout is not None:
        paths = authority_paths(directory, layout)
        there = paths.cert if os.path.lexists(paths.cert) else paths.key
        raise ConfigError(f"{show(there)} exists already: a CA is never replaced; use another directory")
