"""
The child process that empties descriptor 2 of a process that speaks gRPC.

Run as a script by `parallax.runtime.handshake_log`, with nothing but the standard
library: standard input is what the parent writes to its descriptor 2, standard output
takes reports, standard error is the real one. It ends when its input does.

It is a process of its own because whoever empties that pipe must never wait for the
parent's event loop: once the pipe is full, gRPC's own threads would wait for it.

A report is one line of JSON, `{"detail": text, "count": n}`. A parent that does not read
loses none of the counts: equal details are added up until there is room.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
from typing import Final

UNFILTERED: Final = "--unfiltered"  # gRPC's own INFO lines too

# What gRPC says of a server name that our certificate does not carry; the name follows.
UNKNOWN_NAME: Final = "No match found for server name: "

_STDIN: Final = 0
_STDOUT: Final = 1
_STDERR: Final = 2
_CHUNK: Final = 65536
_MAX_LINE: Final = 65536  # an unfinished line beyond this is passed on as it stands
_MAX_DETAIL: Final = 200  # as JSON below any PIPE_BUF, so that a report is written whole or not at all
_MAX_PENDING: Final = 64  # distinct details; only a forger has more, BoringSSL's vocabulary being small
_MAX_NAME: Final = 255  # bytes of a server name (RFC 6066 §3; BoringSSL's limit)

# I1122 17:01:59.265999    5069 ssl_transport_security.cc:2563] text
_GRPC: Final = re.compile(rb"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./+-]+:\d+\] (.*)", re.DOTALL)
_FAILED: Final = re.compile(rb"Handshake failed with error (?:SSL_ERROR_SSL: )?(.*)", re.DOTALL)
_OWN_WARNING: Final = b"Log level INFO is not suitable for production"  # said because we asked for that level
_UNSAFE: Final = re.compile(rb"[^\t\x20-\x7e]")


class Sieve:
    """
    Sorts lines into those to pass on and details to count.

    gRPC prints the server name that a peer asks for as the peer sent it, line feeds
    included: whoever reaches the port could write log lines of its own making. So the
    bytes after such a name, as many as it may have had, are escaped and marked with `| `.

    Args:
        unfiltered: Keep what gRPC says at level INFO.

    Attributes:
        pending: Detail → how often, for the next reports.
    """

    def __init__(self, *, unfiltered: bool) -> None:
        self._unfiltered = unfiltered
        self._peers_bytes = 0  # of what follows, at most this much may be a peer's
        self.pending: dict[str, int] = {}

    def sift(self, line: bytes) -> bytes:
        """What of *line*, given without its end, goes to the real stderr: nothing, or a line with its end."""
        suspect = self._peers_bytes > 0
        self._peers_bytes -= len(line) + 1
        said = _GRPC.fullmatch(line)
        if said is None:
            return b"| " + _escape(line) + b"\n" if suspect else line + b"\n"
        if self._is_news(*said.groups()) or self._unfiltered:
            return (b"| " if suspect else b"") + _escape(line) + b"\n"
        return b""

    def _is_news(self, level: bytes, text: bytes) -> bool:
        """Whether *text* of gRPC is to be passed on, now that it has been counted."""
        if text.startswith(UNKNOWN_NAME.encode()):
            self._peers_bytes = _MAX_NAME - (len(text) - len(UNKNOWN_NAME)) - 1
            self._count(text)
            return False
        if failed := _FAILED.fullmatch(text):
            self._count(failed[1])
            return False
        return level != b"I" and not text.startswith(_OWN_WARNING)

    def _count(self, detail: bytes) -> None:
        text = _escape(detail).decode("ascii")[:_MAX_DETAIL]
        if text not in self.pending and len(self.pending) >= _MAX_PENDING:
            text = f"{UNKNOWN_NAME}(several)" if text.startswith(UNKNOWN_NAME) else "(several)"
        self.pending[text] = self.pending.get(text, 0) + 1


def _escape(line: bytes) -> bytes:
    """*line* as printable ASCII: it can neither steer a terminal nor start a new line."""
    return _UNSAFE.sub(lambda match: rb"\x%02x" % match[0][0], line)


def drain(sieve: Sieve) -> None:
    """Until standard input ends: pass lines on and report."""
    rest = b""
    reporting = True
    while True:
        readable, _, _ = select.select([_STDIN], [_STDOUT] if reporting and sieve.pending else [], [])
        if not readable:
            reporting = _report(sieve.pending)
            continue
        chunk = os.read(_STDIN, _CHUNK)
        *lines, rest = (rest + chunk).split(b"\n")
        if rest and (not chunk or len(rest) > _MAX_LINE):
            lines, rest = [*lines, rest], b""
        kept = b"".join(map(sieve.sift, lines))
        if not chunk:
            _write(kept)
            os.set_blocking(_STDOUT, True)  # the parent reads to the end, or has ended itself
            _report(sieve.pending)
            return
        # Counts first: the real stderr may be a terminal that somebody has stopped.
        reporting = reporting and _report(sieve.pending)
        _write(kept)


def _report(pending: dict[str, int]) -> bool:
    """Tell the parent as many counts as there is room for; False once nobody reads."""
    while pending:
        detail, count = next(iter(pending.items()))
        try:
            os.write(_STDOUT, json.dumps({"detail": detail, "count": count}).encode() + b"\n")
        except BlockingIOError:
            return True
        except OSError:
            return False
        del pending[detail]
    return True


def _write(text: bytes) -> None:
    while text:
        try:
            text = text[os.write(_STDERR, text) :]
        except BlockingIOError:  # somebody made the terminal non-blocking
            select.select([], [_STDERR], [])
        except OSError:
            return  # nobody reads the real stderr any more; go on counting


if __name__ == "__main__":
    # The parent says when to stop, by closing its end; a signal to the whole group does not.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(_STDOUT, False)
    drain(Sieve(unfiltered=UNFILTERED in sys.argv[1:]))
