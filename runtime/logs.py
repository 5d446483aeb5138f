"""How log records look: structlog renders what every module says through the standard library's `logging`."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

if TYPE_CHECKING:
    from structlog.typing import ExcInfo, Processor

# Libraries that have nothing to say to an operator below a warning.
_QUIET: Final = ("asyncio", "grpc", "uvicorn")


class LogLevel(StrEnum):
    """From which severity on a record is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def number(self) -> int:
        """The same for `logging`."""
        return int(getattr(logging, self.name))


class LogFormat(StrEnum):
    """For whom: `console` for people, `json` (one object a line) for machines."""

    CONSOLE = "console"
    JSON = "json"


class Stream(Protocol):
    """What log lines can be written to."""

    def write(self, text: str, /) -> object:
        """Take whole lines."""

    def flush(self) -> None:
        """Send them on."""

    def isatty(self) -> bool:
        """Whether people see them at once."""


def configure_logging(level: LogLevel, format: LogFormat, stream: Stream | None = None) -> None:  # noqa: A002
    """
    From now on every record goes to *stream*, its `extra` fields beside a constant message.

    Called again, it replaces what it did before and leaves other handlers alone. Libraries
    such as gRPC stay at warnings unless *level* is debug. Without a *stream* that is whatever
    `sys.stderr` is when a record is written: while `parallax.runtime.handshake_log` holds
    descriptor 2, still the real one.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _Handler):
            root.removeHandler(handler)
    handler = _Handler(stream)
    handler.setFormatter(_formatter(format, colors=_is_terminal(stream or sys.stderr)))
    root.addHandler(handler)
    root.setLevel(level.number)
    for name in _QUIET:
        quiet = logging.NOTSET if level is LogLevel.DEBUG else max(level.number, logging.WARNING)
        logging.getLogger(name).setLevel(quiet)


class _Handler(logging.Handler):
    """Writes to one stream, or to what `sys.stderr` is at that moment (as `logging.lastResort` does)."""

    def __init__(self, stream: Stream | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        stream = self._stream or sys.stderr
        if stream is None:
            return
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:  # noqa: BLE001 - a log line must not end what it reports on
            self.handleError(record)


def _formatter(format: LogFormat, *, colors: bool) -> logging.Formatter:  # noqa: A002
    # Importing structlog takes 0.22 s, most of it rich and pygments: only a process that logs pays.
    import structlog

    # Fields first, so that none of them can pass for the level or the time.
    describe: list[Processor] = [
        structlog.stdlib.ExtraAdder(),
        _without_leftovers,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    render: list[Processor]
    match format:
        case LogFormat.JSON:
            render = [
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(default=_plain),
            ]
        case LogFormat.CONSOLE:
            render = [
                _printable,
                # Not the default, rich: it prints every local variable, private keys included.
                structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_traceback),
            ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=describe,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )


def _is_terminal(stream: Stream | None) -> bool:
    return stream is not None and stream.isatty()


def _plain(value: object) -> object:
    """*value* as people and JSON parsers read it: a time in ISO 8601, a duration in seconds."""
    match value:
        case bool() | int() | float() | None:
            return value
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case _:
            return str(value)


def _without_leftovers(
    logger: object,  # noqa: ARG001 - structlog's signature
    name: str,  # noqa: ARG001
    event: MutableMapping[str, Any],
) -> MutableMapping[str, Any]:
    """The fields alone: other handlers' formatters leave what they made on the record they share."""
    for key in ("message", "asctime", "color_message"):
        event.pop(key, None)
    return event


def _printable(
    logger: object,  # noqa: ARG001
    name: str,  # noqa: ARG001
    event: MutableMapping[str, Any],
) -> MutableMapping[str, Any]:
    """Every value so that it neither starts a new line nor steers the terminal (JSON escapes by itself)."""
    for key, value in event.items():
        if key in {"exc_info", "stack"}:
            continue
        plain = _plain(value)
        event[key] = _escape(plain) if isinstance(plain, str) else plain
    return event


def _traceback(out: TextIO, exc_info: ExcInfo) -> None:
    """The traceback as Python prints it; the text of an exception may be a peer's."""
    text = "".join(traceback.format_exception(*exc_info)).rstrip("\n")
    out.write("\n" + "\n".join(_escape(line) for line in text.split("\n")))


def _escape(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
