"""What the command writes: tables for people, JSON for programs, one line for an error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from parallax.security.errors import ConfigError
from parallax.security.identity import Identity

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_T = TypeVar("_T")

_FOLDED_WIDTH: Final = 20
_PIPED_WIDTH: Final = 10_000  # wider than any row: nothing is cut where no terminal limits it
_UNITS: Final = (("day", timedelta(days=1)), ("hour", timedelta(hours=1)), ("minute", timedelta(minutes=1)))


def say_error(message: str) -> None:
    """The one line on stderr that a failure gets."""
    say(f"parallax: {message}")


def say(message: str) -> None:
    """One line for people on stderr, where it spoils no output that a program reads."""
    sys.stderr.write(printable(message) + "\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """*text* on one line, and so that it cannot steer a terminal: peers choose some of what we show."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def write_json(value: object) -> None:
    """*value* to stdout, readable to people too; characters that a terminal would act on are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    text = "\n".join(line if line.isprintable() else _escape(line) for line in text.split("\n"))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, default=_plain)
    _emit(text + "\n")


def write_json_line(value: object) -> None:
    """*value* to stdout on one line, in ASCII."""
    _emit(json.dumps(value, default=_plain) + "\n")


def write_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], styles: Iterable[str] = (), *, long: int = 1
) -> None:
    """
    A table to stdout.

    Args:
        styles: One for each row, where they differ.
        long: So many of the last columns are folded where a terminal is narrow; the others, which one
            copies from, are written as they are, however narrow it is.
    """
    from rich.cells import cell_len
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    cells = [[printable(cell) for cell in row] for row in rows]
    needed = 0
    for number, column in enumerate(columns):
        width = max(cell_len(text) for text in (column, *(row[number] for row in cells)))
        if number >= len(columns) - long:
            width = min(width, _FOLDED_WIDTH)
        table.add_column(column, overflow="fold", min_width=width)
        needed += width + 2
    styles = iter(styles)
    for row in cells:
        table.add_row(*row, style=next(styles, None))
    write(table, at_least=needed)


@contextmanager
def live_table(columns: Sequence[str], rows: Callable[[], Iterable[Sequence[str]]]) -> Iterator[None]:
    """A table on a terminal that shows what *rows* gives, several times a second, until the block ends."""
    from rich.live import Live
    from rich.table import Table

    def draw() -> Table:
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for row in rows():
            table.add_row(*map(printable, row))
        return table

    with Live(get_renderable=draw, console=console(), refresh_per_second=4):
        yield


def write_facts(title: str, facts: Iterable[Sequence[str]]) -> None:
    """
    What there is to say about one thing to stdout, framed.

    Args:
        facts: Each a name and the lines of its value.
    """
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, *lines in facts:
        grid.add_row(name, Text("\n".join(map(printable, lines))))
    write(Panel(grid, title=Text(printable(title)), title_align="left", border_style="cyan", expand=False))


def write_lines(*lines: str) -> None:
    """Each of *lines* to stdout."""
    _emit("".join(f"{printable(line)}\n" for line in lines))


def write_bytes(content: bytes) -> None:
    """*content* to stdout as it is."""
    with _to_stdout():
        sys.stdout.buffer.write(content)


def write(renderable: RenderableType, at_least: int = 0) -> None:
    """*renderable* to stdout, *at_least* so wide even where the terminal is not."""
    target = console()
    target.width = max(target.width, at_least)
    with target.capture() as drawn:
        target.print(renderable)
    _emit(drawn.get())


def track(items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
    """*items*, with a bar on stderr that shows how many of *total* have come, if somebody can see it."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """What is to be told how much of how much is done; a bar on stderr, if somebody can see it."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def console(*, stderr: bool = False) -> Console:
    """Where rich draws; text is taken literally, since a name may well contain `[red]`."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(file=stream, markup=False, emoji=False, highlight=False, width=width)


def abandon_output() -> None:
    """Let nothing more be written to stdout, so that the interpreter's own last flush cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def instant(moment: datetime) -> str:
    """*moment* as people and parsers read it: ISO 8601, UTC, to the second."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def distance(moment: datetime, now: datetime) -> str:
    """How far *moment* is from *now*: `in 364 days`, `2 hours ago`."""
    away = abs(moment - now)
    for unit, length in _UNITS:
        if count := away // length:
            span = f"{count} {unit}{'s' if count > 1 else ''}"
            break
    else:
        span = "less than a minute"
    return f"in {span}" if moment > now else f"{span} ago"


def _plain(value: object) -> str:
    match value:
        case datetime():
            return instant(value)
        case Path() | Identity():
            return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _escape(line: str) -> str:
    """*line* of JSON with what cannot be printed escaped, which can only lie within a string."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in line)


def _emit(text: str) -> None:
    with _to_stdout():
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


@contextmanager
def _to_stdout() -> Iterator[None]:
    """
    What the block writes is out at its end.

    Raises:
        BrokenPipeError: Nobody reads it.
        ConfigError: It cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        abandon_output()
        reason = (exc.strerror or type(exc).__name__).lower()
        raise ConfigError(f"the output cannot be written: {reason}: lead it elsewhere") from exc
