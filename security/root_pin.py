"""A pin: the hash of a root's key, by which somebody who trusts nobody yet knows the right root."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from parallax.security.errors import InvalidRequest, UntrustedChain
from parallax.security.identity import clip
from parallax.security.keys import key_id

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.security.bundle import TrustBundle

_PIN: Final = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class RootPin:
    """
    `sha256:` and the SHA-256 of a SubjectPublicKeyInfo, lower-case hex (RFC 7469 §2.4, as kubeadm spells it).

    Of the key, not of the certificate: a root that gets a new certificate for its key stays the same.
    """

    digest: bytes

    @classmethod
    def of(cls, root: Certificate) -> Self:
        """That of *root*."""
        return cls(key_id(root.public_key()))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The pin spelled *text*."""
        match = _PIN.fullmatch(text)
        if match is None:
            raise InvalidRequest(f"not a pin: {clip(text)} (sha256: and 64 hex digits, as token create says)")
        return cls(bytes.fromhex(match[1]))

    def __str__(self) -> str:
        return f"sha256:{self.digest.hex()}"


def pinned_roots(bundle: TrustBundle, pins: Collection[RootPin]) -> tuple[Certificate, ...]:
    """
    The roots of *bundle* that *pins* vouch for, whoever has sent it; there may be others in it.

    Raises:
        UntrustedChain: There is none: it is not the fleet's, or the pins are of another.
    """
    found = tuple(root for root in bundle.roots if RootPin.of(root) in pins)
    if not found:
        raise UntrustedChain(
            "whoever answers there does not show the root that is pinned: check the address, and ask for "
            "another pin if the root was rotated since, for else it is an impostor"
        )
    return found
