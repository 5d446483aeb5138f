"""`parallax doctor`: what is wrong here, or between here and the control plane, and what mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, quiet_grpc
from parallax.sdk.cli.render import console, printable, write, write_json, write_lines
from parallax.sdk.exits import OK

if TYPE_CHECKING:
    from parallax.sdk.cli.case import Finding

_DOING: Final = {
    "setup": "reading the settings",
    "material": "reading certificates",
    "way": "looking for the control plane",
    "served": "shaking hands",
    "answers": "asking it",
}
_STYLES: Final = {"ok": "green", "failed": "bold red", "skipped": "dim"}
_WIDTH: Final = 16


def doctor(
    address: Annotated[
        str | None,
        typer.Argument(
            metavar="[HOST:PORT]", help="The control plane (PARALLAX_CONTROL_PLANE, localhost:50051)."
        ),
    ] = None,
    *,
    identity: ActAs = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Find the first thing that is wrong, here or on the way to the control plane, and say what mends it.

    The exit code is 0 if nothing is, 2 if it is on this host, 69 if the control plane cannot be
    reached, and 77 if one side does not accept the other.
    """
    quiet_grpc()
    from parallax.sdk.cli.case import Case
    from parallax.sdk.cli.diagnosis import CHECKS, diagnose, first_failed
    from parallax.sdk.cli.probing import collect, collect_setup, now

    with _busy(_DOING["setup"]):
        case = Case(now(), collect_setup(config, certs_dir, identity, address))
    findings: list[Finding] = []
    for section in CHECKS:
        with _busy(_DOING[section]):
            case = collect(case, section)
        for finding in diagnose(case, section):
            findings.append(finding)
            if not as_json:
                _show(finding)
    first = first_failed(findings)
    if as_json:
        write_json([finding.as_json() for finding in findings])
    else:
        write_lines("", *_conclusion(findings, first))
    raise typer.Exit(first.code if first else OK)


def _show(finding: Finding) -> None:
    from rich.text import Text

    remark = f" ({finding.remedy})" if finding.status == "ok" and finding.remedy else ""
    style = "yellow" if remark else _STYLES[finding.status]
    line = Text(f"{finding.status:<8}", style=style)
    line.append(f"{finding.name:<{_WIDTH}}", style="bold")
    line.append(printable(finding.detail + remark), style="dim" if finding.status == "skipped" else "")
    write(line)


def _conclusion(findings: list[Finding], first: Finding | None) -> list[str]:
    """What was found in all; the last line is what to do."""
    if first is None:
        skipped = sum(finding.status == "skipped" for finding in findings)
        rest = f", {skipped} did not apply" if skipped else ""
        return [f"Nothing is wrong: {len(findings) - skipped} checks passed{rest}."]
    return [
        f"First: {first.name}: {first.detail}",
        f"Then: {first.remedy}",
        *([first.command] if first.command else []),
    ]


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """Show on stderr that something goes on, if somebody can see it."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(what):
        yield
