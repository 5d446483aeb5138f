"""
Where certificates, keys and CAs lie, and how they are written there; CAs also how they are read.

==========  ========================================  =========================================
layout      identity                                  issuer
==========  ========================================  =========================================
parallax    `<dir>/<name>/{cert,key,ca}.pem`          `<dir>/ca/{cert,key}.pem`
flat        `<dir>/<name>-{cert,key}.pem`             `<dir>/ca-{cert,key}.pem`, trusted by all
kubernetes  `<dir>/{tls.crt,tls.key,ca.crt}`, one     none: cert-manager's, elsewhere
home        `~/.mtls/client.{crt,key}`, one; trusts   none
            `~/.mtls/ca.crt`, else as the system
==========  ========================================  =========================================

Hand-made files load just as well as ours. Every failure is a `ConfigError` of one line that names
the file and what to do about it.
"""

from __future__ import annotations

import os
import ssl
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.certificate import is_signed_by
from parallax.security.errors import (
    ConfigError,
    IdentityError,
    InvalidTransition,
    ParallaxError,
    UntrustedChain,
    WrongIdentity,
)
from parallax.security.files import (
    PRIVATE,
    PUBLIC,
    File,
    command,
    create_file,
    ensure_file,
    is_published,
    publish_set,
    read_file,
    show,
    writing,
)
from parallax.security.identity import RESERVED_NAMES, check_name
from parallax.security.keys import fits, is_encrypted, key_to_pem, parse_key
from parallax.security.verification import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from cryptography.x509 import Certificate

    from parallax.security.identity import Identity, Kind
    from parallax.security.keys import PrivateKey


class Layout(StrEnum):
    """How certificates are laid out; the first that holds an identity counts."""

    PARALLAX = "parallax"
    FLAT = "flat"
    KUBERNETES = "kubernetes"
    HOME = "home"


WITH_ISSUER: Final = (Layout.PARALLAX, Layout.FLAT)
"""The layouts that hold many identities, and the CA that issues them."""

_SYSTEM_ROOTS: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/cert.pem",  # Alpine, macOS
)


@dataclass(frozen=True, slots=True)
class Paths:
    """The three files of an identity; or of a CA, and then `ca` is its own certificate."""

    cert: Path
    key: Path
    ca: Path


def leaf_paths(certs_dir: Path, layout: Layout, name: str) -> Paths:
    """
    Where *layout* keeps the identity called *name*; kubernetes and home hold one, whatever its name.

    Raises:
        IdentityError: That is no name.
    """
    check_name(name)
    if name in RESERVED_NAMES:
        raise IdentityError(f"the name {name!r} is reserved for the issuer")
    match layout:
        case Layout.PARALLAX:
            own = certs_dir / name
            return Paths(own / "cert.pem", own / "key.pem", own / "ca.pem")
        case Layout.FLAT:
            return Paths(
                certs_dir / f"{name}-cert.pem", certs_dir / f"{name}-key.pem", certs_dir / "ca-cert.pem"
            )
        case Layout.KUBERNETES:
            return Paths(certs_dir / "tls.crt", certs_dir / "tls.key", certs_dir / "ca.crt")
        case Layout.HOME:
            # Without a home it is a name that nothing has; `Path.expanduser` would raise.
            home = Path(os.path.expanduser("~/.mtls"))  # noqa: PTH111
            return Paths(home / "client.crt", home / "client.key", home / "ca.crt")


def authority_paths(certs_dir: Path, layout: Layout) -> Paths:
    """Where *layout* keeps the issuer; raises `ConfigError` if it is none of those `WITH_ISSUER`."""
    if layout not in WITH_ISSUER:
        raise ConfigError(f"the layout {layout} holds no CA: use {' or '.join(WITH_ISSUER)}")
    if layout is Layout.FLAT:
        cert, key = certs_dir / "ca-cert.pem", certs_dir / "ca-key.pem"
    else:
        cert, key = certs_dir / "ca" / "cert.pem", certs_dir / "ca" / "key.pem"
    return Paths(cert, key, cert)


def find_layout(certs_dir: Path, name: str, kind: Kind | None = None) -> Layout:
    """
    The layout that holds the identity called *name*: `<dir>/<name>/`, else flat or kubernetes, else home.

    *kind* is for the advice in the error only.

    Raises:
        ConfigError: There is none, or both of flat and kubernetes, or they cannot be looked for.
        IdentityError: *name* is not a name.
    """
    own, flat, kubernetes, home = (leaf_paths(certs_dir, layout, name) for layout in Layout)
    if os.path.isdir(own.cert.parent):  # noqa: PTH112 - in flat, `<dir>/<name>` may be a file of another
        return Layout.PARALLAX
    if _is_there(flat) and _is_there(kubernetes):
        both = f"{show(flat.cert)} and {show(kubernetes.cert)}"
        raise ConfigError(
            f"two layouts in one directory, {both}: move one away, or name the files in PARALLAX_TLS_*_FILE"
        )
    if _is_there(flat):
        return Layout.FLAT
    if _is_there(kubernetes):
        return Layout.KUBERNETES
    if os.path.exists(certs_dir) and not os.path.isdir(certs_dir):  # noqa: PTH110, PTH112 - these never raise
        raise ConfigError(f"{show(certs_dir)} is not a directory: set PARALLAX_CERTS_DIR to one")
    if os.path.isdir(certs_dir) and not os.access(certs_dir, os.X_OK):  # noqa: PTH112
        us = str(os.geteuid())
        raise ConfigError(f"{show(certs_dir)} cannot be entered: {command('chown', us, certs_dir)}")
    if _is_there(home):
        return Layout.HOME
    layout = Layout.FLAT if os.path.lexists(flat.ca) else Layout.PARALLAX
    missing = f"{show(certs_dir)} holds no certificate of {name}: {advise_issue(name, kind, layout)}"
    if any(os.path.lexists(authority_paths(certs_dir, each).cert) for each in WITH_ISSUER):
        raise ConfigError(missing)
    generate = command("parallax", "certs", "generate")
    raise ConfigError(f"{missing}; there is no CA either: set PARALLAX_CERTS_DIR, or begin with {generate}")


def locate(certs_dir: Path, name: str, kind: Kind | None = None) -> Paths:
    """
    The files of the identity called *name*, in the layout that `find_layout` finds, which see.

    A home without a `ca.crt` trusts what the system trusts. That is decided here and now: a
    `ca.crt` that goes away later must not widen whom a running process believes.
    """
    layout = find_layout(certs_dir, name, kind)
    paths = leaf_paths(certs_dir, layout, name)
    if layout is Layout.HOME and not os.path.lexists(paths.ca):
        return replace(paths, ca=system_roots() or paths.ca)
    return paths


def system_roots() -> Path | None:
    """The file with the roots that this host trusts; None if there is none in the usual places."""
    configured = ssl.get_default_verify_paths().cafile  # what SSL_CERT_FILE says, too
    candidates = [Path(configured)] if configured else []
    return next((path for path in (*candidates, *map(Path, _SYSTEM_ROOTS)) if path.is_file()), None)


def advise_issue(name: str, kind: Kind | None, layout: Layout = Layout.PARALLAX) -> str:
    """The remedy where the certificate of the identity called *name* is what is wrong."""
    flat = ("--layout", "flat") if layout is Layout.FLAT else ()
    return f"issue it with {command('parallax', 'certs', 'issue', name, '--kind', kind or 'KIND', *flat)}"


def save_leaf(
    directory: Path,
    layout: Layout,
    identity: Identity,
    chain: Sequence[Certificate],
    key: PrivateKey,
    bundle: TrustBundle,
    *,
    replacing: Certificate | None = None,
) -> Paths:
    """
    Put the credentials of *identity* into the certificate directory, in place of older ones of the same.

    They are swapped in one rename: `files.publish_set` says what a reader and a crash see. A flat
    directory's `ca-cert.pem` is shared, so it is made if missing and never changed. A home that does
    without `ca.crt` goes on trusting what the system trusts.

    Args:
        replacing: The leaf that must lie there now, for who would else undo what another has put there.

    Raises:
        InvalidTransition: It is not *replacing* that lies there. Nothing was changed.
        ConfigError: Somebody else's files, or files of unknown owner, lie there; or a link leads
            elsewhere; or the parts do not belong together; or it is Kubernetes that has written there.
            Nothing was changed.
    """
    paths = leaf_paths(directory, layout, identity.name)
    if layout is Layout.KUBERNETES and not _is_begun(paths, key):
        raise ConfigError(f"{show(paths.cert)} is Kubernetes' to write: let cert-manager renew its secret")
    with _about(show(paths.cert), "nothing was written"):
        if identity_of(chain[0], identity.trust_domain) != identity or not fits(key, chain[0]):
            raise WrongIdentity(f"the certificate and key to save are not a pair of {identity}")
    cert_file, key_file = File(certificates_to_pem(chain), PUBLIC), File(key_to_pem(key), PRIVATE)
    if layout is Layout.FLAT:
        with writing(directory) as place:
            _check_owner(paths, identity, replacing)
            _check_shared(paths.ca, bundle)
            files = {paths.cert.name: ("cert.pem", cert_file), paths.key.name: ("key.pem", key_file)}
            publish_set(place, f"..{identity.name}", files)
            ensure_file(place, paths.ca.name, File(bundle.pem, PUBLIC))
    else:
        inner = identity.name if layout is Layout.PARALLAX else None
        with writing(paths.cert.parent if inner is None else directory, inner) as place:
            _check_owner(paths, identity, replacing)
            contents = {paths.cert.name: cert_file, paths.key.name: key_file}
            if inner is not None or os.path.lexists(paths.ca) or not os.path.exists(paths.cert):  # noqa: PTH110
                contents[paths.ca.name] = File(bundle.pem, PUBLIC)
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
        for layout in WITH_ISSUER
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
    restore = "restore it from the backup; nothing was made in its place"
    return read_authority(authority_paths(directory, layout), passphrase, remedy=restore)


def read_authority(
    paths: Paths, passphrase: bytes | Callable[[], bytes] | None = None, *, remedy: str
) -> CertificateAuthority:
    """
    The issuer in the files at *paths*; see `load_authority`.

    Args:
        remedy: What to do about a part that is missing or damaged.
    """
    cert, key = show(paths.cert), show(paths.key)
    certificates_pem = read_file(paths.cert, remedy=remedy)
    key_pem = read_file(paths.key, remedy=remedy, private=True)
    if callable(passphrase):
        passphrase = passphrase() if is_encrypted(key_pem) else None
    with _about(cert, remedy):
        certificate, *others = parse_certificates(certificates_pem)
        roots = tuple(each for each in (certificate, *others) if is_signed_by(each, each))
        bundle = TrustBundle(roots)
    with _about(key, "give the right passphrase (PARALLAX_CA_PASSPHRASE_FILE), or restore the file"):
        private = parse_key(key_pem, passphrase)
    if not fits(private, certificate):
        raise ConfigError(f"{key} does not fit {cert}: {remedy}")
    with _about(cert, remedy):
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


def _is_there(paths: Paths) -> bool:
    return os.path.lexists(paths.cert) or os.path.lexists(paths.key)


def _is_begun(paths: Paths, key: PrivateKey) -> bool:
    """Whether there is nothing at *paths* but what a save with *key* has left there, which was cut off."""
    if not os.path.exists(paths.cert):  # noqa: PTH110
        return not os.path.exists(paths.key)  # noqa: PTH110 - links of a save that ended before its rename
    if not is_published(paths.cert, "..data"):
        return False
    with _about(show(paths.cert), "nothing was written"):
        leaf, *_ = parse_certificates(read_file(paths.cert, remedy="try again"))
    return fits(key, leaf)


def _check_owner(paths: Paths, identity: Identity, replacing: Certificate | None) -> None:
    """Pass if nothing is at *paths*, or a certificate of *identity*, be it broken; or *replacing*."""
    if replacing is not None:
        with _about(show(paths.cert), "nothing was written"):
            leaf, *_ = parse_certificates(read_file(paths.cert, remedy="restore it"))
        if leaf != replacing:
            raise InvalidTransition(f"{show(paths.cert)} has been replaced meanwhile: nothing was written")
        return
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
