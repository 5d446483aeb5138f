"""
The files of a CA whose root gives way to another.

The next CA lies in `<dir>/ca/next/` until it signs; then the two files of the CA in force become its own, in
one rename, and the one before lies in `<dir>/ca/retired-<fingerprint>/`, key included, until the
operator takes it away. Each function may be called again after a crash at any moment of it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.errors import ConfigError
from parallax.security.files import PRIVATE, PUBLIC, File, exists, publish_set, read_file, show, writing
from parallax.security.keys import KeyType, is_encrypted, key_to_pem
from parallax.security.layouts import Layout, authority_paths, find_authority
from parallax.security.profiles import ROOT_NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from cryptography.x509 import Certificate

NEXT: Final = "next"

_RESTORE: Final = "restore it from the backup"


def check_replaceable(directory: Path, in_force: CertificateAuthority) -> None:
    """
    Pass if the CA in *directory*, which is *in_force*, is a root that can give way to another.

    Raises:
        ConfigError: Its layout shares one file with everybody, or it is below a root that is not here.
    """
    layout = find_authority(directory)
    if layout is Layout.FLAT:
        cert = authority_paths(directory, layout).cert
        raise ConfigError(
            f"{show(cert)} is what every identity of a flat directory trusts, so a second root cannot be "
            "brought to them one by one: move to the layout parallax first"
        )
    if in_force.certificate not in in_force.bundle.roots:
        raise ConfigError(
            "the CA on this host is below a root that is elsewhere, which is the one to replace: "
            "put the new root beside the old one into every ca.pem, then replace the CA's files"
        )


def prepare_next(
    directory: Path, in_force: CertificateAuthority, passphrase: Callable[[], bytes], now: datetime
) -> Certificate:
    """
    Make the next CA, with a key of the same kind, encrypted as that of the one *in_force*; its root.

    One that was made before and never used is replaced.

    Raises:
        ConfigError: See `check_replaceable`; or it cannot be written.
    """
    check_replaceable(directory, in_force)
    ca = directory / "ca"
    key_pem = read_file(ca / "key.pem", remedy=_RESTORE, private=True)
    new = CertificateAuthority.create(
        now=now, key_type=_kind_of(in_force), name=f"{ROOT_NAME} {now:%Y-%m-%dT%H:%M:%SZ}"
    )
    sealed = key_to_pem(new.key, passphrase() if is_encrypted(key_pem) else None)
    _publish(ca, NEXT, certificates_to_pem((new.certificate,)), sealed)
    return new.certificate


def put_in_force(directory: Path, issuer: Certificate, bundle: TrustBundle) -> None:
    """
    Have *issuer*, the CA in force or the next one, sign, and hand out *bundle* with what it signs.

    Raises:
        ConfigError: There is no such CA, or its files cannot be written.
    """
    ca = directory / "ca"
    cert_pem = certificates_to_pem((issuer, *(root for root in bundle.roots if root != issuer)))
    present = read_file(ca / "cert.pem", remedy=_RESTORE)
    if present == cert_pem:
        return
    before = parse_certificates(present)[0]
    source = ca if before == issuer else ca / NEXT
    if parse_certificates(read_file(source / "cert.pem", remedy=_RESTORE))[0] != issuer:
        raise ConfigError(f"{show(source / 'cert.pem')} is not the CA that is to sign: {_RESTORE}")
    if before != issuer:
        mark = before.fingerprint(hashes.SHA256()).hex()[:8]
        key_pem = read_file(ca / "key.pem", remedy=_RESTORE, private=True)
        _publish(ca, f"retired-{mark}", present, key_pem)
    _publish(directory, "ca", cert_pem, read_file(source / "key.pem", remedy=_RESTORE, private=True))


def discard_next(directory: Path) -> None:
    """Remove what is left of the next CA, if anything: it has become the one in force, or never will."""
    ca = directory / "ca"
    with writing(directory, "ca") as place:
        if exists(place, NEXT):
            shutil.rmtree(ca / NEXT)
            os.fsync(place.descriptor)


def _publish(directory: Path, inner: str, cert_pem: bytes, key_pem: bytes) -> None:
    files = {"cert.pem": File(cert_pem, PUBLIC), "key.pem": File(key_pem, PRIVATE)}
    with writing(directory, inner) as place:
        publish_set(place, "..data", {name: (name, file) for name, file in files.items()})


def _kind_of(authority: CertificateAuthority) -> KeyType:
    key = authority.key
    if not isinstance(key, rsa.RSAPrivateKey):
        return KeyType.P256
    return KeyType.RSA2048 if key.key_size <= 3072 else KeyType.RSA4096
