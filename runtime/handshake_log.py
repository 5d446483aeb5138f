"""
Why TLS handshakes fail, in our log.

gRPC tells a refused peer nothing but "Socket closed" and our process nothing at all:
the reason is only in a line that its C core writes to descriptor 2 (grpc/grpc#38665).
`HandshakeLog` puts a pipe in that place, which a child process empties
(`parallax.runtime.handshake_drain`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import StrEnum
from types import TracebackType
from typing import IO, Final, Self, TextIO

from parallax.runtime import handshake_drain
from parallax.runtime.handshakes import HandshakeResult

logger = logging.getLogger(__name__)

_STDERR: Final = 2
_VERBOSITY: Final = "GRPC_VERBOSITY"
_TRACE: Final = "GRPC_TRACE"
_SILENT: Final = frozenset({"ERROR", "NONE"})  # every other value, an unknown one included, shows INFO lines
_CLOSE_TIMEOUT: Final = timedelta(seconds=2)  # for a child that somebody has stopped
_CHUNK: Final = 65536
_NOT_AVAILABLE: Final = "reasons of failed TLS handshakes are not available"


class HandshakeFailure(StrEnum):
    """Why a handshake failed; a closed set, so that it can label a metric."""

    NO_CERTIFICATE = "no_certificate"
    UNTRUSTED_ISSUER = "untrusted_issuer"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    WRONG_PURPOSE = "wrong_purpose"
    PLAINTEXT_PEER = "plaintext_peer"
    PROTOCOL_VERSION = "protocol_version"
    PEER_REJECTED_US = "peer_rejected_us"
    UNKNOWN_SERVER_NAME = "unknown_server_name"
    OTHER = "other"

    @property
    def remedy(self) -> str:
        """What it means and what to do about it."""
        return _REMEDIES[self]

    @property
    def result(self) -> HandshakeResult:
        """The same in the terms of gRFC A118."""
        return _RESULTS[self]


_REMEDIES: Final = {
    HandshakeFailure.NO_CERTIFICATE: "the peer sent no certificate: give it one of this trust domain",
    HandshakeFailure.UNTRUSTED_ISSUER: (
        "no CA of our bundle issued the peer's certificate: issue it one with our CA, "
        "or add its CA to the bundle"
    ),
    HandshakeFailure.EXPIRED: "the peer's certificate has expired: renew it",
    HandshakeFailure.NOT_YET_VALID: "the peer's certificate is not valid yet: compare both hosts' clocks",
    HandshakeFailure.WRONG_PURPOSE: (
        "the peer's certificate has an extended key usage that lacks clientAuth (of a server: serverAuth): "
        "issue it anew with both"
    ),
    HandshakeFailure.PLAINTEXT_PEER: "the peer does not speak TLS: set PARALLAX_TLS_ENABLED=true there",
    HandshakeFailure.PROTOCOL_VERSION: "the peer offers no TLS version from 1.2 on: update it",
    HandshakeFailure.PEER_REJECTED_US: (
        "the peer refused our certificate: read its log, and compare the CAs it accepts with ours"
    ),
    HandshakeFailure.UNKNOWN_SERVER_NAME: (
        "the peer asked for a name that our certificate does not carry: it expects another identity, "
        "or the certificate lacks that DNS name"
    ),
    HandshakeFailure.OTHER: "see detail",
}

_RESULTS: Final = {
    HandshakeFailure.NO_CERTIFICATE: HandshakeResult.CERTIFICATE_VERIFICATION_FAILED,
    HandshakeFailure.UNTRUSTED_ISSUER: HandshakeResult.CERTIFICATE_AUTHORITY_INVALID,
    HandshakeFailure.EXPIRED: HandshakeResult.CERTIFICATE_EXPIRED,
    HandshakeFailure.NOT_YET_VALID: HandshakeResult.CERTIFICATE_NOT_YET_VALID,
    HandshakeFailure.WRONG_PURPOSE: HandshakeResult.CERTIFICATE_VERIFICATION_FAILED,
    HandshakeFailure.PLAINTEXT_PEER: HandshakeResult.UNEXPECTED_MESSAGE,
    HandshakeFailure.PROTOCOL_VERSION: HandshakeResult.PROTOCOL_VERSION_UNSUPPORTED,
    HandshakeFailure.PEER_REJECTED_US: HandshakeResult.CERTIFICATE_VERIFICATION_FAILED,
    HandshakeFailure.UNKNOWN_SERVER_NAME: HandshakeResult.CERTIFICATE_HOSTNAME_MISMATCH,
    HandshakeFailure.OTHER: HandshakeResult.UNKNOWN_FAILURE,
}

_NO_VERDICT: Final = ": Invalid certificate verification context"  # said where no certificate was judged

# What BoringSSL says of the peer's certificate, at the end of the line.
_BY_VERDICT: Final = {
    "certificate has expired": HandshakeFailure.EXPIRED,
    "certificate is not yet valid": HandshakeFailure.NOT_YET_VALID,
    "unsupported certificate purpose": HandshakeFailure.WRONG_PURPOSE,
    "unable to get local issuer certificate": HandshakeFailure.UNTRUSTED_ISSUER,
    "unable to get issuer certificate": HandshakeFailure.UNTRUSTED_ISSUER,
    "unable to verify the first certificate": HandshakeFailure.UNTRUSTED_ISSUER,
    "self signed certificate": HandshakeFailure.UNTRUSTED_ISSUER,
    "self signed certificate in certificate chain": HandshakeFailure.UNTRUSTED_ISSUER,
    "certificate signature failure": HandshakeFailure.UNTRUSTED_ISSUER,  # a CA of the same name, another key
    "invalid CA certificate": HandshakeFailure.UNTRUSTED_ISSUER,  # issued by a leaf, for example
    "path length constraint exceeded": HandshakeFailure.UNTRUSTED_ISSUER,
}

# Its name for the error, where no certificate was judged.
_BY_NAME: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": HandshakeFailure.NO_CERTIFICATE,
    "HTTP_REQUEST": HandshakeFailure.PLAINTEXT_PEER,
    "HTTPS_PROXY_REQUEST": HandshakeFailure.PLAINTEXT_PEER,
    "WRONG_VERSION_NUMBER": HandshakeFailure.PLAINTEXT_PEER,  # the first bytes are no TLS record: HTTP/2, SSH
    "UNSUPPORTED_PROTOCOL": HandshakeFailure.PROTOCOL_VERSION,
    "TLSV1_ALERT_PROTOCOL_VERSION": HandshakeFailure.PROTOCOL_VERSION,
    # What an alert in plaintext looks like in TLS 1.3, where OpenSSL's clients send theirs so.
    "BAD_PACKET_LENGTH": HandshakeFailure.PEER_REJECTED_US,
}
_ALERT: Final = re.compile(r"(?:TLSV1|SSLV3)_ALERT_\w+")
_DETAIL: Final = re.compile(r".*?:OPENSSL_internal:(?P<name>\w+)(?:: (?P<verdict>.*))?")


def classify(detail: str) -> HandshakeFailure:
    """The reason that gRPC's *detail* of a failed handshake stands for."""
    if detail.startswith(handshake_drain.UNKNOWN_NAME):
        return HandshakeFailure.UNKNOWN_SERVER_NAME
    match = _DETAIL.fullmatch(detail)
    if match is None:
        return HandshakeFailure.OTHER
    by_verdict = _BY_VERDICT.get(match["verdict"] or "")
    if by_verdict is not None:
        return by_verdict
    if match["name"] in _BY_NAME:
        return _BY_NAME[match["name"]]
    return HandshakeFailure.PEER_REJECTED_US if _ALERT.fullmatch(match["name"]) else HandshakeFailure.OTHER


class HandshakeLog:
    """
    While open, every failed handshake of this process is counted and its reason logged.

    For the owner of the process, before gRPC's first server. Descriptor 2 becomes a pipe
    that never blocks (what does not fit is dropped, so that gRPC's threads never wait), and
    `sys.stderr` a duplicate of the real one; both are as before once it is closed. Lines
    that are not about handshakes pass through to the real stderr.

    If the user has set `GRPC_VERBOSITY` or `GRPC_TRACE`, they stay as they are and gRPC's
    INFO lines pass through too; otherwise those are dropped.

    gRPC names no peer's address, and handshakes that this process begins as a client count
    too. A peer that hangs up without an alert leaves no line, as gRPC's own clients do when
    they refuse our certificate: that reason is only in the peer's log.

    Args:
        on_failure: Told each reason and how often it occurred since it was last told.
        interval: A reason is logged at most once in this time, with a count.
    """

    def __init__(
        self,
        on_failure: Callable[[HandshakeFailure, int], None] | None = None,
        *,
        interval: timedelta = timedelta(seconds=1),
    ) -> None:
        self._on_failure = on_failure
        self._throttle = _Throttle(interval)
        self._child: subprocess.Popen[bytes] | None = None
        self._undo = contextlib.ExitStack()
        self._rest = b""
        self._ended = asyncio.Event()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        verbosity = os.environ.get(_VERBOSITY, "")
        try:
            self._child = self._start(unfiltered=bool(verbosity or os.environ.get(_TRACE)))
        except OSError as exc:  # descriptor 2 is closed, or no process can be started
            logger.warning(_NOT_AVAILABLE, extra={"error": exc.strerror or str(exc)})
            return self
        if verbosity.upper() in _SILENT:
            logger.warning(_NOT_AVAILABLE, extra={"error": f"{_VERBOSITY}={verbosity} hides them"})
        assert self._child.stdout is not None  # noqa: S101 - we asked for a pipe
        os.set_blocking(self._child.stdout.fileno(), False)
        asyncio.get_running_loop().add_reader(self._child.stdout, self._read, self._child.stdout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._child is None or self._child.stdout is None or self._is_closing:
            return
        self._is_closing = True
        self._undo.close()  # and with it ends the child's input
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT.total_seconds()):
                    await self._ended.wait()
        finally:
            self._child.kill()  # it has ended by now, or somebody has stopped it
            self._child.wait()
            asyncio.get_running_loop().remove_reader(self._child.stdout)
            self._child.stdout.close()
            self._throttle.close()

    def _start(self, *, unfiltered: bool) -> subprocess.Popen[bytes]:
        """Start the child and hand it descriptor 2, or raise OSError and leave all as it was."""
        if sys.__stderr__ is None:  # started with descriptor 2 closed: by now it may be anything
            raise OSError(errno.EBADF, "the process was started without a standard error")
        with contextlib.ExitStack() as undo:
            real = os.dup(_STDERR)
            undo.callback(os.close, real)
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
                # -I -S: nothing of the user's or the site's, and it starts twice as fast.
                [sys.executable, "-I", "-S", handshake_drain.__file__]
                + ([handshake_drain.UNFILTERED] if unfiltered else []),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=real,
                bufsize=0,
            )
            assert child.stdin is not None  # noqa: S101 - we asked for a pipe
            with child.stdin as pipe:
                os.set_blocking(pipe.fileno(), False)
                undo.enter_context(_python_stderr(real))
                os.dup2(pipe.fileno(), _STDERR)
            undo.callback(os.dup2, real, _STDERR)
            self._undo = undo.pop_all()
        return child

    def _read(self, reports: IO[bytes]) -> None:
        try:
            chunk = os.read(reports.fileno(), _CHUNK)
        except BlockingIOError:  # nothing there after all
            return
        if not chunk:
            self._end(reports)
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            report = json.loads(line)
            self._count(str(report["detail"]), int(report["count"]))

    def _count(self, detail: str, count: int) -> None:
        reason = classify(detail)
        self._throttle.add(reason, detail.removesuffix(_NO_VERDICT), count)
        if self._on_failure is not None:
            self._on_failure(reason, count)

    def _end(self, reports: IO[bytes]) -> None:
        """The child is gone."""
        asyncio.get_running_loop().remove_reader(reports)
        self._ended.set()
        if not self._is_closing:
            self._undo.close()  # nobody empties the pipe any more
            logger.warning(_NOT_AVAILABLE, extra={"error": "the process that reads them was killed"})


class _Throttle:
    """Logs each reason at once and then at most once per *interval*, with the count since."""

    def __init__(self, interval: timedelta) -> None:
        self._interval = interval.total_seconds()
        self._timers: dict[HandshakeFailure, asyncio.TimerHandle] = {}
        self._held: dict[HandshakeFailure, tuple[str, int]] = {}

    def add(self, reason: HandshakeFailure, detail: str, count: int) -> None:
        _, before = self._held.get(reason, ("", 0))
        self._held[reason] = (detail, before + count)
        if reason not in self._timers:
            self._say(reason)

    def close(self) -> None:
        """Say what is still held back."""
        for timer in self._timers.values():
            timer.cancel()
        for reason in list(self._held):
            _log(reason, *self._held.pop(reason))

    def _say(self, reason: HandshakeFailure) -> None:
        self._timers.pop(reason, None)
        if reason in self._held:
            _log(reason, *self._held.pop(reason))
            self._timers[reason] = asyncio.get_running_loop().call_later(self._interval, self._say, reason)


def _log(reason: HandshakeFailure, detail: str, count: int) -> None:
    logger.warning(
        "TLS handshake failed",
        extra={"reason": reason.value, "remedy": reason.remedy, "detail": detail, "count": count},
    )


@contextlib.contextmanager
def _python_stderr(descriptor: int) -> Iterator[None]:
    """Within, what Python itself writes to descriptor 2 goes to a duplicate of *descriptor*."""
    before = sys.stderr
    if not _is_descriptor_2(before):
        yield
        return
    before.flush()
    duplicate = open(  # noqa: PTH123, SIM115 - a descriptor; closed below
        os.dup(descriptor), "w", buffering=1, encoding=before.encoding, errors=before.errors
    )
    sys.stderr = duplicate
    try:
        yield
    finally:
        if sys.stderr is duplicate:
            sys.stderr = before
        with contextlib.suppress(OSError):  # it holds what nobody read; that must not change how we end
            duplicate.close()


def _is_descriptor_2(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    try:
        return stream.fileno() == _STDERR
    except (OSError, ValueError):  # not a file, or closed
        return False
