from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from parallax.runtime.logs import LogFormat, LogLevel, configure_logging
from parallax.security.identity import control_plane

logger = logging.getLogger("parallax.runtime.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What `configure_logging` changes is the process's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("asyncio", "grpc", "uvicorn", "watchdog"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def written(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_has_one_object_a_line_with_the_fields() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, stream)
    before = datetime.now(UTC)
    not_after = datetime(2030, 1, 1, tzinfo=UTC)
    logger.info("renewed", extra={"serial": 12, "not_after": not_after, "wait": timedelta(seconds=1.5)})
    logger.warning("lost %s", "contact", extra={"identity": control_plane(), "reasons": ["a\nb", 1]})
    first, second = written(stream)
    assert before <= datetime.fromisoformat(first.pop("timestamp")) <= datetime.now(UTC)
    assert first == {
        "event": "renewed",
        "level": "info",
        "logger": "parallax.runtime.test",
        "serial": 12,
        "not_after": "2030-01-01T00:00:00+00:00",
        "wait": 1.5,
    }
    assert second["event"] == "lost contact"
    assert second["identity"] == "spiffe://parallax.local/service/control-plane"
    assert second["reasons"] == ["a\nb", 1]
    assert second["timestamp"].endswith("Z")


def test_json_has_the_traceback_as_a_field() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, stream)
    try:
        raise ValueError("no good")  # noqa: TRY301 - to have a traceback
    except ValueError:
        logger.exception("failed", extra={"task": "t-1"})
    (record,) = written(stream)
    assert record["event"] == "failed"
    assert record["task"] == "t-1"
    assert record["exception"].startswith("Traceback (most recent call last):\n")
    assert record["exception"].endswith("ValueError: no good")


@pytest.mark.parametrize("format_", LogFormat)
def test_a_traceback_shows_no_local_variable(format_: LogFormat) -> None:
    """structlog's own default on a console prints them all, keys included."""
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, format_, stream)
    private_key = "very" + "secret"
    try:
        raise ValueError(str(len(private_key)))  # noqa: TRY301
    except ValueError:
        logger.exception("failed")
    assert "ValueError: 10" in stream.getvalue()
    assert private_key not in stream.getvalue()


def test_console_is_one_readable_line() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.CONSOLE, stream)
    logger.info("renewed", extra={"serial": 12, "not_after": datetime(2030, 1, 1, tzinfo=UTC)})
    (line,) = stream.getvalue().splitlines()
    assert "renewed" in line
    assert "serial=12" in line
    assert "not_after=2030-01-01T00:00:00+00:00" in line
    assert "[info" in line
    assert "[parallax.runtime.test]" in line
    assert "\x1b" not in line


def test_a_hostile_text_neither_forges_a_line_nor_steers_the_terminal() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.CONSOLE, stream)
    hostile = "x\n2030-01-01 [info] forged\x1b[2J\r"
    logger.info("refused", extra={"name_asked_for": hostile})
    logger.info("refused %s", hostile)
    assert len(stream.getvalue().splitlines()) == 2
    try:
        raise ValueError(hostile)  # noqa: TRY301
    except ValueError:
        logger.exception("failed")
    assert not set(stream.getvalue()) & {"\x1b", "\r"}


def test_fields_cannot_pass_for_level_time_or_logger() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, stream)
    logger.info("said", extra={"level": "critical", "timestamp": "never", "logger": "root"})
    (record,) = written(stream)
    assert record["level"] == "info"
    assert record["logger"] == "parallax.runtime.test"
    assert record["timestamp"] != "never"


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [
        (LogLevel.DEBUG, ["debug", "info", "warning", "error"], ["debug", "info", "warning", "error"]),
        (LogLevel.INFO, ["info", "warning", "error"], ["warning", "error"]),
        (LogLevel.WARNING, ["warning", "error"], ["warning", "error"]),
        (LogLevel.ERROR, ["error"], ["error"]),
    ],
)
def test_level_is_for_us_and_libraries_stay_quiet(
    level: LogLevel, ours: list[str], theirs: list[str]
) -> None:
    stream = io.StringIO()
    configure_logging(level, LogFormat.JSON, stream)
    for name in ("parallax.runtime.test", "my_agent", "grpc._channel", "uvicorn.error", "asyncio"):
        for method in LogLevel:
            getattr(logging.getLogger(name), method)("said")
    said = written(stream)
    assert [record["level"] for record in said if record["logger"] == "parallax.runtime.test"] == ours
    assert [record["level"] for record in said if record["logger"] == "my_agent"] == ours
    for name in ("grpc._channel", "uvicorn.error", "asyncio"):
        assert [record["level"] for record in said if record["logger"] == name] == theirs


def test_what_another_formatter_leaves_on_the_record_is_no_field() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, stream)
    other = logging.StreamHandler(io.StringIO())
    other.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().handlers.insert(0, other)
    logger.info("said")
    (record,) = written(stream)
    assert set(record) == {"event", "level", "logger", "timestamp"}


def test_configured_again_it_replaces_only_itself() -> None:
    old, new = io.StringIO(), io.StringIO()
    foreign = logging.NullHandler()
    logging.getLogger().addHandler(foreign)
    configure_logging(LogLevel.INFO, LogFormat.JSON, old)
    configure_logging(LogLevel.INFO, LogFormat.JSON, new)
    logger.info("said")
    assert old.getvalue() == ""
    assert len(written(new)) == 1
    assert foreign in logging.getLogger().handlers


def test_without_a_stream_it_follows_sys_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogLevel.INFO, LogFormat.JSON)
    logger.info("before")
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    logger.info("after")
    monkeypatch.setattr(sys, "stderr", None)
    logger.info("nowhere")
    assert '"before"' in capsys.readouterr().err
    assert [record["event"] for record in written(later)] == ["after"]


def test_a_field_that_cannot_be_rendered_does_not_end_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, stream)
    circle: list[object] = []
    circle.append(circle)
    logger.info("said", extra={"circle": circle})
    logger.info("went on")
    assert [record["event"] for record in written(stream)] == ["went on"]
    assert "Circular reference" in capsys.readouterr().err


def test_records_of_many_threads_do_not_mix() -> None:
    stream = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, stream)

    def say() -> None:
        for _ in range(50):
            logger.info("said", extra={"text": "x" * 200})

    threads = [threading.Thread(target=say) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written(stream)) == 200


def test_colour_is_for_a_terminal_only() -> None:
    program = (
        "import logging\n"
        "from parallax.runtime.logs import *\n"
        "configure_logging(LogLevel.INFO, LogFormat.CONSOLE)\n"
        "logging.getLogger('parallax').info('said')\n"
    )
    controller, terminal = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stderr=terminal, check=True)
    finally:
        os.close(terminal)
    assert b"\x1b[" in os.read(controller, 1000)
    os.close(controller)
    piped = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=True)
    assert b"\x1b[" not in piped.stderr
    assert b"said" in piped.stderr


def test_importing_the_module_does_not_import_structlog() -> None:
    """It costs 0.2 s, which a command that never logs need not pay."""
    program = "import sys, parallax.runtime.logs; sys.exit('structlog' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
