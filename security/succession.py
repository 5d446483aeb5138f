"""
The files of a CA that gives way to another.

The next CA lies in `<dir>/ca/next/` until it signs: an operator has put it there, or it is made there.
Then the two files of the CA in force become its own, in one rename, and the one before lies in
`<dir>/ca/retired-<fingerprint>/`, key included, until the operator takes it away. Each function may
be called again after a crash at any moment of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.errors import ConfigError
from parallax.security.files import PRIVATE, PUBLIC, File, publish_set, read_file, remove_set, show, writing
from parallax.security.keys import KeyType, is_encrypted, key_to_pem
from parallax.security.layouts import Layout, Paths, authority_paths, find_authority, read_authority
from parallax.security.profiles import ROOT_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from cryptography.x509 import Certificate

NEXT: Final = "next"
RETIRED: Final = "retired-"

_RESTORE: Final = "restore it from the backup"
_WHOLE: Final = (
    "put the CA's certificate, its intermediates and its root, in this order, into cert.pem "
    "and its key into key.pem, or take both away"
)


def next_paths(directory: Path) -> Paths:
    """Where the next CA of *directory* lies."""
    cert = directory / "ca" / NEXT / "cert.pem"
    return Paths(cert, cert.with_name("key.pem"), cert)


def paths_beside(directory: Path) -> tuple[Paths, ...]:
    """Where CAs lie beside the one in force that could sign: the next one, and those that gave way."""
    places: list[Path] = []
    with suppress(OSError):  # the one in force cannot be read then either, and says so
        places = sorted((directory / "ca").glob(f"{RETIRED}*"))
    beside = [Paths(place / "cert.pem", place / "key.pem", place / "cert.pem") for place in places]
    return tuple(each for each in (next_paths(directory), *beside) if _lies(each.cert) and _lies(each.key))


def prepare_next(
    directory: Path, in_force: CertificateAuthority, passphrase: Callable[[], bytes], now: datetime
) -> CertificateAuthority:
    """
    The next CA: what an operator has put there, or what was left there; else a new root.

    The new root has a key of the same kind as that of the one *in_force*, and is encrypted as that is.

    Raises:
        ConfigError: The layout shares one file with everybody; or nothing is there, and the CA in force is
            below a root that is elsewhere; or see `read_next`; or it cannot be written.
    """
    layout = find_authority(directory)
    if layout is Layout.FLAT:
        cert = authority_paths(directory, layout).cert
        raise ConfigError(
            f"{show(cert)} is what every identity of a flat directory trusts, so a second root cannot be "
            "brought to them one by one: move to the layout parallax first"
        )
    paths = next_paths(directory)
    if not _lies(paths.cert) and not _lies(paths.key):
        if in_force.certificate not in in_force.bundle.roots:
            raise ConfigError(
                "the CA on this host is below a root that is elsewhere, so the next is to be made there: "
                f"put it into {show(paths.cert)} (its certificate, its intermediates, its root) "
                f"and {show(paths.key)}"
            )
        _make_next(directory / "ca", in_force, passphrase, now)
    return read_next(directory, in_force, passphrase)


def read_next(
    directory: Path, in_force: CertificateAuthority, passphrase: Callable[[], bytes]
) -> CertificateAuthority:
    """
    The next CA as it lies there; whether peers will believe it is for a leaf of it to prove.

    Raises:
        ConfigError: A part is missing or damaged, the key is open to others or does not fit or is not
            encrypted as that of the CA *in_force*, or it is that CA.
    """
    paths = next_paths(directory)
    authority = read_authority(paths, passphrase, remedy=_WHOLE)
    if authority.key.public_key() == in_force.key.public_key():
        raise ConfigError(f"{show(paths.cert)} has the key of the CA in force: put another CA there")
    if _is_sealed(directory / "ca" / "key.pem") and not _is_sealed(paths.key):
        raise ConfigError(
            f"{show(paths.key)} is not encrypted, and that of the CA in force is: "
            "encrypt it with the same passphrase"
        )
    return authority


def put_in_force(directory: Path, signs: Sequence[Certificate], bundle: TrustBundle) -> None:
    """
    Have the CA *signs*, that in force or the next one, sign, and hand out *bundle* with its leaves.

    Args:
        signs: Its own certificate first, its root last.

    Raises:
        ConfigError: There is no such CA, or its files cannot be written.
    """
    ca, issuer = directory / "ca", signs[0]
    cert_pem = certificates_to_pem(dict.fromkeys((*signs, *bundle.roots)))
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
        _publish(ca, f"{RETIRED}{mark}", present, key_pem)
    _publish(directory, "ca", cert_pem, read_file(source / "key.pem", remedy=_RESTORE, private=True))


def discard_next(directory: Path, issuer: Certificate) -> None:
    """Remove the files of the next CA, *issuer*, which is in force; whatever else lies there stays."""
    paths, place = next_paths(directory), directory / "ca" / NEXT
    if not _lies(place) or place.is_symlink():
        return
    if _lies(paths.cert):
        is_left_over = parse_certificates(read_file(paths.cert, remedy=_RESTORE))[0] == issuer
    else:
        is_left_over = not _lies(paths.key)  # after a crash in here: the key goes first
    if is_left_over:
        with writing(place.parent, NEXT) as opened:
            remove_set(opened, "..data", [paths.key.name, paths.cert.name])
        with suppress(OSError):  # an operator keeps something else there
            place.rmdir()


def _make_next(
    ca: Path, in_force: CertificateAuthority, passphrase: Callable[[], bytes], now: datetime
) -> None:
    new = CertificateAuthority.create(
        now=now, key_type=_kind_of(in_force), name=f"{ROOT_NAME} {now:%Y-%m-%dT%H:%M:%SZ}"
    )
    sealed = key_to_pem(new.key, passphrase() if _is_sealed(ca / "key.pem") else None)
    _publish(ca, NEXT, certificates_to_pem((new.certificate,)), sealed)


def _lies(path: Path) -> bool:
    """Whether there is anything, if only something that we may not look at: whoever reads it is told."""
    try:
        path.stat()
    except FileNotFoundError:  # or a link of a set that was never finished
        return False
    except OSError:
        return True
    return True


def _is_sealed(key: Path) -> bool:
    return is_encrypted(read_file(key, remedy=_RESTORE, private=True))


def _publish(directory: Path, inner: str, cert_pem: bytes, key_pem: bytes) -> None:
    files = {"cert.pem": File(cert_pem, PUBLIC), "key.pem": File(key_pem, PRIVATE)}
    with writing(directory, inner) as place:
        publish_set(place, "..data", {name: (name, file) for name, file in files.items()})


def _kind_of(authority: CertificateAuthority) -> KeyType:
    key = authority.key
    if not isinstance(key, rsa.RSAPrivateKey):
        return KeyType.P256
    return KeyType.RSA2048 if key.key_size <= 3072 else KeyType.RSA4096
