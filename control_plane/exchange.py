"""The exchange of pinned certificates for issued ones where there is no room for a handshake with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from parallax.control_plane.issuance import Issuance
from parallax.control_plane.nonces import Nonces
from parallax.control_plane.pins import Pinning
from parallax.security.authority import Issued
from parallax.security.errors import (
    EnrollmentError,
    InvalidRequest,
    ParallaxError,
    Revoked,
    VerificationError,
)
from parallax.security.identity import Identity, control_plane
from parallax.security.pinned import Pin
from parallax.security.possession import Proof

REFUSED: Final = (
    "this certificate is exchanged for none: ask an administrator whether it is pinned "
    "('parallax certs pins'), has ended or was revoked"
)
"""Whatever is wrong with it, or with the proof that it is one's own: who guesses learns nothing."""


class Exchange:
    """
    Issues certificates for pinned ones, as `Renew` does where these have made the connection.

    The key's signature stands for the handshake. It is over the request, a nonce of ours and our name, so
    that it cannot be used again, elsewhere or for another request.

    Args:
        trust_domain: Of the control plane.
    """

    def __init__(self, pinning: Pinning, issuance: Issuance, trust_domain: str) -> None:
        self._pinning = pinning
        self._issuance = issuance
        self._server = control_plane(trust_domain)
        self._nonces = Nonces()

    def nonce(self) -> str:
        """What the next proof is to be for."""
        return self._nonces.new()

    async def exchange(self, identity: Identity, proof: Proof, source: str) -> Issued:
        """
        Another certificate of *identity*, for the pinned one that *proof* is with.

        Args:
            source: The address that it came from.

        Raises:
            EnrollmentError: That is not pinned, has ended or was revoked, or the proof is not its holder's:
                always the same text.
            InvalidRequest: The nonce is not good; or, like the errors below, as `Issuance.renew`.
            ConfigError, NotAuthorized, StorageFailed, Unavailable: Likewise.
        """
        pin = Pin(identity, proof.certificate)
        with _one_answer(InvalidRequest, VerificationError):
            self._check(pin)
            wish = proof.verify(self._server)
        self._nonces.spend(wish.nonce)  # not before: only those who hold a pinned key fill our memory
        with _one_answer(Revoked):
            issued = await self._issuance.renew(identity, proof.certificate, wish.request)
            await self._pinning.renewed(proof.certificate, issued.chain[0], source)
            self._check(pin)  # once more: it takes a while, and what is handed out stays good
        return issued

    def _check(self, pin: Pin) -> None:
        """Pass if *pin* would let its holder in, were there room for it on the port."""
        if self._pinning.find(pin) is None:
            raise Revoked(f"{pin.fingerprint.hex()} is not pinned for {pin.identity}")
        self._pinning.check(pin)


@contextmanager
def _one_answer(*causes: type[ParallaxError]) -> Iterator[None]:
    """Have what is of *causes* say no more than that there is nothing."""
    try:
        yield
    except causes as exc:
        raise EnrollmentError(REFUSED) from exc
