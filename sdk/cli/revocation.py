"""`parallax certs revoke`, `reinstate` and `revoked`: what is withdrawn before its time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, TypeAlias

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import say, write_json, write_lines, write_table

# RFC 5280, section 5.3.1.
ReasonName: TypeAlias = Literal[
    "unspecified",
    "key-compromise",
    "ca-compromise",
    "affiliation-changed",
    "superseded",
    "cessation-of-operation",
    "certificate-hold",
    "privilege-withdrawn",
    "aa-compromise",
]


def revoke(
    name: Annotated[
        str | None, typer.Argument(metavar="[KIND/NAME]", help="Everything of this identity, seen or not.")
    ] = None,
    *,
    serial: Annotated[
        str | None, typer.Option(metavar="HEX", help="One certificate, or a CA's with all below it.")
    ] = None,
    issuer: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="With --serial: the SHA-256 of its issuer's public key."),
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="HEX", help="One certificate of the ledger, by its SHA-256.")
    ] = None,
    reason: Annotated[ReasonName, typer.Option(help="Why; it is kept.")] = "unspecified",
    force: Annotated[
        bool,
        typer.Option("--force", help="Mean it, though the control plane or this command depends on it."),
    ] = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Withdraw one certificate, or an identity with all its certificates.

    In force when this command ends: new calls are refused and open ones end. An
    identity is neither renewed nor enrolled until it is reinstated. Only
    client/admin may.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    from parallax.sdk.cli import revoking

    request = revoking.plan(name, serial, issuer, fingerprint)
    request.reason, request.force = revoking.reason_of(reason), force
    answer = ask(lambda client: revoking.revoke(client, request))
    if answer.unknown:  # and whoever was meant goes on
        say(f"no certificate of {name} is known: is that how it is spelled?")
    if as_json:
        write_json({**revoking.to_json(answer.revocation), "already": answer.already})
    else:
        write_lines(revoking.told(answer))


def reinstate(
    name: Annotated[str, typer.Argument(metavar="KIND/NAME", help="Of an identity that is revoked.")],
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Let an identity be issued certificates again; what it had before stays revoked.

    Only client/admin may.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    from parallax.sdk.cli import revoking

    entry = ask(lambda client: revoking.reinstate(client, name))
    if as_json:
        write_json(revoking.to_json(entry))
    else:
        write_lines(f"{revoking.short(entry.identity)} is reinstated; issue it a new certificate")


def revoked(
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    List what is revoked: certificates until a week after their end, and identities.

    Only client/admin may.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    from parallax.sdk.cli import revoking

    entries = ask(revoking.revoked)
    now = datetime.now(UTC)
    if as_json:
        write_json([revoking.to_json(entry) for entry in entries])
    elif entries:
        columns = ("IDENTITY", "WHAT", "REASON", "SINCE", "BY")
        write_table(columns, (revoking.as_cells(entry, now) for entry in entries))
    else:
        say("nothing is revoked")
