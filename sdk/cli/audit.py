"""`parallax audit`: what was done and refused, by whom, and when."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import (
    ActAs,
    AsJson,
    CertsDir,
    ConfigFile,
    ControlPlane,
    adopt_settings,
    quiet_grpc,
)
from parallax.sdk.cli.render import say, write_json, write_json_line, write_lines, write_table
from parallax.security.errors import InvalidRequest

if TYPE_CHECKING:
    from parallax.control_plane.audit import Entry, Head
    from parallax.protos import audit_pb2
    from parallax.sdk.client import ParallaxClient

app = typer.Typer(
    help="The audit log: what was done and refused, by whom, and when. Only client/admin may read it.",
    no_args_is_help=True,
)


@app.command("list")
def list_entries(
    *,
    since: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Only what is not older: 90s, 10m, 1h, 30d.")
    ] = None,
    action: Annotated[
        str, typer.Option(metavar="AREA[/VERB]", help="Only what begins so: certificate/, call/refused.")
    ] = "",
    who: Annotated[
        str, typer.Option(metavar="KIND/NAME", help="Only what was done by this one, or to it.")
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on: show what is added, until interrupted.")
    ] = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List what the audit log tells, the oldest first (--identity client/admin)."""
    from parallax.sdk.cli.auditing import as_cells, request_of, to_json
    from parallax.sdk.cli.spans import parse_span

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    now = datetime.now(UTC)
    request = request_of(now - parse_span(since) if since is not None else None, action, who)
    if watch:
        ask(lambda client: _watch(client, request, as_json=as_json))
        return
    found = ask(lambda client: _read(client, request))
    if as_json:
        write_json([to_json(entry) for entry in found])
    elif found:
        columns = ("NUMBER", "WHEN", "ACTION", "BY", "OF", "FROM", "DETAIL")
        seen = datetime.now(UTC)  # later than what reading itself has added
        write_table(columns, (as_cells(entry, seen) for entry in found))
    else:
        say("the audit log tells of nothing such")


@app.command()
def verify(
    *,
    head: Annotated[
        str | None,
        typer.Option(metavar="NUMBER:HASH", help="What an earlier run printed, and was noted elsewhere."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Read this data directory, which no control plane uses meanwhile."),
    ] = None,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Check that every entry is the one that was written; exit code 1 if one is not.

    Who can write all of the data directory can write another log. So note what this
    prints somewhere else, and state it with --head the next time: then nothing up to
    there can be another.
    """
    import asyncio

    from parallax.sdk.cli import auditing

    noted = _parse(head) if head is not None else None
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    if data_dir is not None:
        quiet_grpc()
        now, count = asyncio.run(auditing.verify(auditing.pages_in(data_dir), noted))
    else:
        request = auditing.request_of(None, "", "")
        now, count = ask(lambda client: auditing.verify(auditing.pages(client, request), noted))
    if as_json:
        write_json({"entries": count, "head": str(now)})
    else:
        write_lines(f"{count} entries, all as they were written", f"head {now}")


async def _read(client: ParallaxClient, request: audit_pb2.ListAuditEntriesRequest) -> list[Entry]:
    from parallax.sdk.cli.auditing import entries, pages

    return [entry async for page in pages(client, request) for entry in entries(page)]


async def _watch(
    client: ParallaxClient, request: audit_pb2.ListAuditEntriesRequest, *, as_json: bool
) -> None:
    from parallax.sdk.cli.auditing import as_cells, entries, pages, to_json

    async for page in pages(client, request, follow=True):
        for entry in entries(page):
            if as_json:
                write_json_line(to_json(entry))
            else:
                write_lines("  ".join(filter(None, as_cells(entry, datetime.now(UTC)))))


def _parse(head: str) -> Head:
    from parallax.control_plane.audit import Head

    try:
        return Head.parse(head)
    except ValueError as exc:
        raise InvalidRequest(f"--head is {exc}: give what 'parallax audit verify' printed") from None
