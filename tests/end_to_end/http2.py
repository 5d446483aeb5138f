"""HTTP/2 by hand (RFC 9113), for peers that have no library for it."""

from __future__ import annotations

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0, 1, 4, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_WINDOW = b"\x00\x04" + bytes(4)  # a setting: answers may have no byte, until there is an update (§6.9.2)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (§4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def grpc_call(method: str, message: bytes = b"", *, settings: bytes = b"", ends: bool = True) -> bytes:
    """A connection's first bytes, with one gRPC call; *ends*: it has no more messages."""
    headers = {
        b":method": b"POST",
        b":scheme": b"https",
        b":path": method.encode(),
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    return b"".join(
        (
            PREFACE,
            frame(SETTINGS, 0, 0, settings),
            frame(SETTINGS, ACK, 0),
            frame(HEADERS, END_HEADERS, 1, b"".join(_literal(*header) for header in headers.items())),
            frame(DATA, END_STREAM if ends else 0, 1, b"\x00" + len(message).to_bytes(4, "big") + message),
        )
    )


def _literal(name: bytes, value: bytes) -> bytes:
    """A header without compression (RFC 7541 §6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
