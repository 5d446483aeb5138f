"""Nonces: numbers by which what is signed is signed now, and counts once."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Final

from parallax.security.errors import InvalidRequest

LIFETIME_S: Final = 60.0

_ENDS: Final = struct.Struct(">d")
_RANDOM_BYTES: Final = 17  # with that the whole is a multiple of three: base64 without padding
_MAC_BYTES: Final = 32


class Nonces:
    """
    Gives nonces that are good for a minute, here, and once.

    Each says when it ends, and that it is ours (a MAC by a key that this process has for as long as it
    runs). So none is kept before it is spent, and whoever only asks for many uses up nothing.

    Args:
        clock: Seconds, of a clock that does not go back.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(_MAC_BYTES)
        self._spent: OrderedDict[bytes, float] = OrderedDict()  # to be forgotten then, earliest first

    def new(self) -> str:
        """Another one, base64url."""
        body = _ENDS.pack(self._clock() + LIFETIME_S) + secrets.token_bytes(_RANDOM_BYTES)
        return urlsafe_b64encode(body + self._mac(body)).decode()

    def spend(self, nonce: str) -> None:
        """
        Pass if *nonce* is good, and never again.

        Raises:
            InvalidRequest: It was spent, has ended, or is another's.
        """
        now = self._clock()
        self._forget(now)
        body = self._body_of(nonce)
        if body is None or body in self._spent or _ENDS.unpack_from(body)[0] <= now:
            raise InvalidRequest(
                "the nonce is not one of this control plane's, was used or has ended: ask for another"
            )
        self._spent[body] = now + LIFETIME_S

    def _body_of(self, nonce: str) -> bytes | None:
        """What we have made it of; None: we have not."""
        try:
            given = urlsafe_b64decode(nonce)
        except ValueError:
            return None
        body, mac = given[:-_MAC_BYTES], given[-_MAC_BYTES:]
        return body if hmac.compare_digest(mac, self._mac(body)) else None

    def _forget(self, now: float) -> None:
        """Drop those that have ended: they are refused for that."""
        while self._spent and next(iter(self._spent.values())) <= now:
            self._spent.popitem(last=False)

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)
