"""What is kept of a pin, and how it is stored."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.identity import Identity
from parallax.security.pinned import Pin

PINS: Final = "pins/"


@dataclass(frozen=True, slots=True)
class Pinned:
    """
    One pin as it is kept.

    Args:
        by: Who had it pinned, see `Change` of `pins`.
        exchanged_for: Where the ledger keeps the certificate that its holder was issued for it; "": none yet.
    """

    pin: Pin
    at: datetime
    by: str
    exchanged_for: str = ""

    @property
    def dated(self) -> Pin:
        """The pin with its date, by which it counts as issued, whatever its certificate says."""
        return replace(self.pin, at=self.at)


def kept_at(holder: Identity) -> str:
    """Where the pins of *holder* are kept."""
    return f"{PINS}{holder.trust_domain}/{holder.kind}/{holder.name}"


def encode(pinned: Iterable[Pinned]) -> bytes:
    """*pinned* of one holder as they are stored; nothing of nothing."""
    stored = [
        {
            "identity": str(each.pin.identity),
            "certificate": b64encode(each.pin.certificate.public_bytes(Encoding.DER)).decode(),
            "at": each.at.isoformat(),
            "by": each.by,
            "exchanged_for": each.exchanged_for,
        }
        for each in pinned
    ]
    return json.dumps(stored).encode() if stored else b""


def decode(stored: bytes) -> tuple[Pinned, ...]:
    """What `encode` made *stored* of."""
    return tuple(
        Pinned(
            Pin(
                Identity.parse(each["identity"]),
                x509.load_der_x509_certificate(b64decode(each["certificate"])),
            ),
            datetime.fromisoformat(each["at"]),
            each["by"],
            each["exchanged_for"],
        )
        for each in json.loads(stored)
    )
