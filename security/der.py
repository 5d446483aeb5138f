"""
DER that is put together of parts which are encoded already (X.690 §8 and §10).

What is small, `cryptography` writes as a whole; this is for what is too long to be encoded anew each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

SEQUENCE: Final = 0x30
EXPLICIT_0: Final = 0xA0

_INTEGER: Final = 0x02
_BIT_STRING: Final = 0x03
_OCTET_STRING: Final = 0x04
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_LONG: Final = 0x80  # from so many octets on, the length of the length comes first
_LAST_OF_UTC_TIME: Final = 2049


def element(tag: int, *parts: bytes) -> bytes:
    """One element, whose content is *parts*, one after the other."""
    size = sum(map(len, parts))
    if size < _LONG:
        return b"".join((bytes((tag, size)), *parts))
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return b"".join((bytes((tag, _LONG | len(length))), length, *parts))


def integer(number: int) -> bytes:
    """*number*, which is not negative."""
    return element(_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def octet_string(content: bytes) -> bytes:
    """*content*, as extensions have their values."""
    return element(_OCTET_STRING, content)


def bit_string(content: bytes) -> bytes:
    """*content*, of which every bit counts, as of a signature."""
    return element(_BIT_STRING, b"\0", content)


def instant(at: datetime) -> bytes:
    """*at*, which is in UTC, to the second; with two digits of the year until 2049 (RFC 5280 §4.1.2.5)."""
    if at.year <= _LAST_OF_UTC_TIME:
        return element(_UTC_TIME, f"{at:%y%m%d%H%M%SZ}".encode())
    return element(_GENERALIZED_TIME, f"{at:%Y%m%d%H%M%SZ}".encode())
