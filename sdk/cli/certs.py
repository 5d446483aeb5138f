"""`parallax certs`: what agents, services and clients prove themselves with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from parallax.sdk.cli.options import (
    MAX_DAYS,
    ActAs,
    AsJson,
    CertsDir,
    ConfigFile,
    ControlPlane,
    EdgeUrl,
    KeyTypeName,
    LayoutName,
    PassphraseFile,
    adopt_settings,
    quiet_grpc,
    tls_settings,
)
from parallax.sdk.cli.render import (
    distance,
    say,
    say_error,
    track,
    write_facts,
    write_json,
    write_lines,
    write_table,
)
from parallax.sdk.exits import FAILED, exit_code
from parallax.security.errors import InvalidRequest
from parallax.security.identity import Identity, Kind

if TYPE_CHECKING:
    from parallax.sdk.cli.issuing import Made

app = typer.Typer(help="Certificates: make them, look at them, check them.", no_args_is_help=True)

Target: TypeAlias = Annotated[
    str, typer.Argument(metavar="FILE|NAME", help="A certificate's file, or whose it is in the directory.")
]


@app.command()
def generate(
    *,
    days: Annotated[
        int | None, typer.Option(min=1, max=MAX_DAYS, help="How long they are valid: 365, or as before.")
    ] = None,
    key_type: Annotated[
        KeyTypeName | None, typer.Option(help="The kind of their keys: p256, or as before.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Make the CA and the first certificates; run again, replace all but the CA's.

    The first are the services control-plane and agent-proxy, the agent agent-1,
    the clients cli and admin. Run again, it rotates by hand: each certificate
    that the CA signed here gets a fresh key and keeps the names it has.
    """
    from parallax.runtime.passphrase import given_passphrase
    from parallax.sdk.cli import issuing
    from parallax.security.keys import KeyType

    tls = tls_settings(config, certs_dir)
    now = datetime.now(UTC)
    batch = issuing.plan_set(
        tls.certs_dir,
        tls.trust_domain,
        issuing.Changes(
            lifetime=timedelta(days=days) if days else None, key_type=KeyType(key_type) if key_type else None
        ),
        _passphrase(passphrase_file, config),
        lambda: given_passphrase(passphrase_file, config),
        now,
    )
    made = list(track(issuing.make(batch), len(batch.orders), "Making certificates"))
    paths = batch.authority_paths
    if as_json:
        write_json(
            {
                "certs_dir": tls.certs_dir.absolute(),
                "layout": batch.layout,
                "ca": {"certificate": paths.cert, "key": paths.key, "is_new": batch.is_new},
                "certificates": [_as_json(each) for each in made],
            }
        )
        return
    write_lines(f"{'New' if batch.is_new else 'Kept'} CA: {paths.cert}")
    _write_made(made, now)
    if any(each.order.replaces for each in made):
        write_lines("What runs takes up the new ones by itself; nothing has to be restarted.")
    if not all(each.order.replaces for each in made):
        write_lines(*_next_steps(tls.certs_dir))


@app.command()
def issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the agent, service or client.")],
    *,
    kind: Annotated[Kind, typer.Option(help="What it is.")],
    layout: Annotated[LayoutName | None, typer.Option(help="How files are called: as the CA's are.")] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=MAX_DAYS, help="How long it is valid: 365, or by the policy.")
    ] = None,
    key_type: Annotated[KeyTypeName, typer.Option(help="The kind of its key.")] = "p256",
    san: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DNS|IP", help="Where it is reached; repeat it for more. Else localhost, 127.0.0.1, ::1."
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Make one certificate, in place of an older one of the same identity.

    It keeps to the issuance policy (PARALLAX_ISSUANCE_FILE), if there is one.
    """
    from parallax.control_plane.issuance_file import load_issuance
    from parallax.runtime.settings import load_settings
    from parallax.sdk.cli import issuing
    from parallax.security.keys import KeyType
    from parallax.security.layouts import Layout

    tls = tls_settings(config, certs_dir)
    now = datetime.now(UTC)
    identity = Identity(tls.trust_domain, kind, name)  # refuses a bad name before anything is touched
    rule = load_issuance(load_settings(config).issuance_file).rule_for(identity)
    batch = issuing.plan_one(
        tls.certs_dir,
        Layout(layout) if layout else None,
        identity,
        issuing.plan_profile(rule, timedelta(days=days) if days else None, KeyType(key_type), san or ()),
        _passphrase(passphrase_file, config),
        now,
    )
    (made,) = issuing.make(batch)
    if as_json:
        write_json(_as_json(made))
        return
    _write_made([made], now)
    check = ("openssl", "verify", "-CAfile", str(batch.authority_paths.cert), str(made.paths.cert))
    write_lines(f"Check it: {shlex.join(check)}")


@app.command()
def renew(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Whose; all in the directory if none.")
    ] = None,
    *,
    control_plane: ControlPlane = None,
    url: EdgeUrl = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Have the control plane issue another certificate, for a new key, to each identity in the directory.

    Each asks for itself, with the certificate that it has; a self-signed one for which there is no room on
    the port, where one enrolls (--url). What runs takes the new ones up by itself.
    The exit code is that of the first that was not renewed.
    """
    quiet_grpc()
    import asyncio

    from parallax.sdk.cli import renewing

    settings = adopt_settings(config, certs_dir, control_plane=control_plane)
    tls = tls_settings(config, certs_dir)
    places = renewing.plan_renewals(tls, names or [])

    async def renew_all() -> list[renewing.Renewed]:
        return [each async for each in renewing.renew_all(places, tls, settings, url)]

    done = asyncio.run(renew_all())
    if as_json:
        write_json([each.as_json() for each in done])
    else:
        columns = ("IDENTITY", "OLD SERIAL", "NEW SERIAL", "BEGINS", "ENDS")
        write_table(columns, (each.as_cells() for each in done))
    failed = [(each.name, each.problem) for each in done if each.problem is not None]
    for name, problem in failed:
        say_error(f"{name}: {problem}")
    if len(done) < len(places):
        say_error(f"{len(places) - len(done)} more not asked for, since nobody answers")
    if failed:
        raise typer.Exit(exit_code(failed[0][1]))


@app.command()
def inspect(
    target: Target, *, certs_dir: CertsDir = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Show what a certificate says; nothing is verified."""
    from parallax.sdk.cli.inventory import facts_in, find

    tls = tls_settings(config, certs_dir)
    now = datetime.now(UTC)
    path = find(tls.certs_dir, target).cert
    first, *others = facts_in(path, tls.trust_domain, now)
    if as_json:
        write_json({"file": path, **first.as_json(), "others": [each.as_json() for each in others]})
        return
    write_facts(str(path), first.as_lines(now))
    for number, each in enumerate(others, start=2):
        write_facts(f"{path}, certificate {number}", each.as_lines(now))


@app.command()
def verify(
    target: Target,
    *,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", metavar="FILE", help="The roots to trust: else those beside it, or the CA."),
    ] = None,
    purpose: Annotated[
        Literal["client", "server"] | None, typer.Option(help="For this end of a connection only.")
    ] = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Check whether peers would accept a certificate, at either end of a connection.

    The exit code is 1 if not.
    """
    from parallax.sdk.cli.checking import check
    from parallax.security.verification import Usage

    tls = tls_settings(config, certs_dir)
    usages = (Usage(purpose),) if purpose else tuple(Usage)
    report = check(tls.certs_dir, tls.trust_domain, target, ca, usages, datetime.now(UTC))
    if as_json:
        write_json(report.as_json())
    else:
        write_lines(*report.as_lines())
    if not report.is_ok:
        raise typer.Exit(FAILED)


@app.command("list")
def list_all(
    *,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Those that the control plane knows instead; asks it.")
    ] = False,
    holder: Annotated[
        str | None, typer.Option(metavar="KIND[/NAME]", help="With --ledger: only of these.")
    ] = None,
    ends_within: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, max=MAX_DAYS, help="With --ledger: only those that end so soon."),
    ] = None,
    ended: Annotated[
        bool, typer.Option("--ended", help="With --ledger: those too that have ended; kept for a week.")
    ] = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    List all certificates in the directory; those that have ended, or will within 30 days, in colour.

    With --ledger, list what the control plane has issued or seen in use: only client/admin may
    (--identity client/admin).
    """
    from parallax.sdk.cli.inventory import list_rows

    now = datetime.now(UTC)
    if ledger:
        adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
        _list_ledger(
            holder,
            timedelta(days=ends_within) if ends_within is not None else None,
            now,
            ended=ended,
            as_json=as_json,
        )
        return
    if holder is not None or ends_within is not None or ended:
        raise InvalidRequest("--holder, --ends-within and --ended are for --ledger: give that too")
    tls = tls_settings(config, certs_dir)
    rows = list_rows(tls.certs_dir, tls.trust_domain, now)
    if as_json:
        write_json([row.as_json() for row in rows])
    elif rows:
        write_table(
            ("IDENTITY", "STATUS", "ENDS", "KEY", "FILE"),
            (row.as_cells(now) for row in rows),
            (row.style for row in rows),
        )
    else:
        say(f"{tls.certs_dir} holds no certificates: make some with 'parallax certs generate'")


def _list_ledger(
    holder: str | None, ends_within: timedelta | None, now: datetime, *, ended: bool, as_json: bool
) -> None:
    from parallax.sdk.cli.asking import ask
    from parallax.sdk.cli.ledger import as_cells, certificates, to_json

    entries = ask(
        lambda client: certificates(
            client, holder or "", now + ends_within if ends_within is not None else None, ended=ended
        )
    )
    if as_json:
        write_json([to_json(entry) for entry in entries])
    elif entries:
        columns = ("IDENTITY", "ENDS", "SEEN", "SERIAL", "FOR")
        write_table(columns, (as_cells(entry, now) for entry in entries))
    else:
        say("the ledger holds no such certificate: it enters what is issued, or seen in use")


def _passphrase(file: Path | None, config: Path | None) -> Callable[[Path], bytes]:
    """For a key that turns out to be encrypted: what was given, else what somebody types."""

    def find(key: Path) -> bytes:
        from parallax.runtime.passphrase import given_passphrase
        from parallax.sdk.cli.passphrase import ask_passphrase

        given = given_passphrase(file, config)
        return ask_passphrase(key) if given is None else given

    return find


def _as_json(made: Made) -> dict[str, object]:
    return {
        "name": made.order.identity.name,
        "kind": made.order.identity.kind,
        "replaced": made.order.replaces,
        "files": {"certificate": made.paths.cert, "key": made.paths.key, "ca": made.paths.ca},
        **made.facts.as_json(),
    }


def _write_made(made: Sequence[Made], now: datetime) -> None:
    write_table(
        ("IDENTITY", "", "ENDS", "KEY", "FILE"),
        (
            (
                each.order.identity.short,
                "replaced" if each.order.replaces else "new",
                distance(each.facts.not_after, now),
                each.facts.key_type,
                str(each.paths.cert),
            )
            for each in made
        ),
    )


def _next_steps(directory: Path) -> tuple[str, ...]:
    return (
        "Next, in each terminal:",
        "  export PARALLAX_TLS_ENABLED=true",
        "  export PARALLAX_TLS_VERIFY_CLIENT=true",
        f"  export PARALLAX_CERTS_DIR={shlex.quote(str(directory.absolute()))}",
        "then start the control plane in one, your agent in another, and look at it from a third:",
        "  parallax control-plane start",
        "  parallax agent run my_agent:MyAgent --id agent-1",
        "  parallax agents list",
    )
