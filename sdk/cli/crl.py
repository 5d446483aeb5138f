"""The CRL of the CA in a certificate directory, as the control plane of this host has published it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from parallax.control_plane.crl import FOLDER, load_crl
from parallax.sdk.cli.inventory import read_chain
from parallax.sdk.cli.render import distance, instant
from parallax.security.crl import CRL
from parallax.security.errors import ConfigError
from parallax.security.files import PUBLIC, File, command, replace_file, show, writing
from parallax.security.keys import key_id
from parallax.security.layouts import authority_paths, find_authority


@dataclass(frozen=True, slots=True)
class PublishedCRL:
    """
    One list, checked.

    Attributes:
        issuer: SHA-256 of the CA's SubjectPublicKeyInfo, lower-case hex.
        path: Where it lies as DER.
    """

    issuer: str
    path: Path
    crl: CRL

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "issuer": self.issuer,
            "number": self.crl.number,
            "this_update": self.crl.this_update,
            "next_update": self.crl.next_update,
            "entries": len(self.crl),
            "file": self.path,
        }

    def as_lines(self, now: datetime) -> list[tuple[str, str]]:
        """For people."""
        end = self.crl.next_update
        return [
            ("issuer", self.issuer),
            ("number", str(self.crl.number)),
            ("revoked", str(len(self.crl))),
            ("stale", f"{distance(end, now)}, {instant(end)}"),
            ("file", show(self.path)),
        ]

    def save(self, path: Path, *, pem: bool) -> None:
        """Write it to *path*, in one rename; raises ConfigError."""
        with writing(path.parent) as place:
            replace_file(place, path.name, File(self.crl.pem if pem else self.crl.der, PUBLIC))


def find_crl(certs_dir: Path, data_dir: Path, now: datetime) -> PublishedCRL:
    """
    The list of the CA in *certs_dir*.

    Raises:
        ConfigError: There is no CA, or no list of it in *data_dir*.
        VerificationError: The list is not of that CA, or stale.
    """
    layout = find_authority(certs_dir)
    if layout is None:
        raise ConfigError(f"{show(certs_dir)} holds no CA: make one with {command('parallax', 'ca', 'init')}")
    certificate, *_ = read_chain(authority_paths(certs_dir, layout).cert)
    issuer = key_id(certificate.public_key()).hex()
    path = data_dir / FOLDER / f"{issuer}.crl"
    remedy = "start the control plane with this data directory; /readyz says under crl why there is none"
    crl = load_crl(path, remedy=remedy)
    crl.check(certificate, now)
    return PublishedCRL(issuer, path, crl)
