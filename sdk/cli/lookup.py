"""`parallax certs show`: what the control plane knows of some certificates."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import say, write_facts, write_json
from parallax.sdk.exits import FAILED

if TYPE_CHECKING:
    from parallax.protos import ledger_pb2
    from parallax.sdk.client import ParallaxClient


def show(
    what: Annotated[
        str, typer.Argument(metavar="SERIAL|FINGERPRINT|KIND/NAME", help="Of which, or whose that are valid.")
    ],
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Show what the control plane knows of a certificate, by its serial or fingerprint, or of somebody's.

    Serial and fingerprint as openssl writes them, or as they are listed. The exit
    code is 1 if there is none. Only client/admin may.
    """
    from parallax.sdk.cli.ledger import as_facts, to_json

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def look(client: ParallaxClient) -> list[ledger_pb2.LedgerEntry]:
        from parallax.sdk.cli.ledger import certificates, find

        return await (certificates(client, what, None, ended=False) if "/" in what else find(client, what))

    found, now = ask(look), datetime.now(UTC)
    if as_json:
        write_json([to_json(entry) for entry in found])
    for entry in found if not as_json else ():
        write_facts(entry.identity, as_facts(entry, now))
    if not found:
        say(f"the ledger holds no such certificate: {what}")
        raise typer.Exit(FAILED)
