"""`parallax ca`: the issuer that everybody trusts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import (
    MAX_DAYS,
    ActAs,
    AsJson,
    CertsDir,
    ConfigFile,
    ControlPlane,
    KeyTypeName,
    LayoutName,
    PassphraseFile,
    adopt_settings,
    tls_settings,
)
from parallax.sdk.cli.render import (
    say,
    say_error,
    write_bytes,
    write_facts,
    write_json,
    write_json_line,
    write_lines,
    write_table,
)
from parallax.sdk.exits import FAILED
from parallax.security.errors import VerificationError

if TYPE_CHECKING:
    from parallax.protos import root_pb2
    from parallax.sdk.client import ParallaxClient

app = typer.Typer(help="The certificate authority that signs for the fleet.", no_args_is_help=True)


@app.command()
def init(
    *,
    layout: Annotated[LayoutName, typer.Option(help="How its files are called.")] = "parallax",
    key_type: Annotated[KeyTypeName, typer.Option(help="The kind of its key.")] = "p256",
    days: Annotated[int, typer.Option(min=1, max=MAX_DAYS, help="How long it is valid.")] = 3650,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Protect the key with a passphrase, asked for unless given.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Make a CA. One that is there is never replaced.

    A passphrase given by file or variable encrypts its key, too.
    """
    from parallax.runtime.passphrase import given_passphrase
    from parallax.sdk.cli.authority import authority_facts, refuse_existing
    from parallax.sdk.cli.passphrase import ask_passphrase
    from parallax.security.authority import CertificateAuthority
    from parallax.security.keys import KeyType
    from parallax.security.layouts import Layout, authority_paths, save_authority

    tls = tls_settings(config, certs_dir)
    refuse_existing(tls.certs_dir)  # before anybody thinks of a passphrase for it
    passphrase = given_passphrase(passphrase_file, config)
    if passphrase is None and encrypt:
        passphrase = ask_passphrase(authority_paths(tls.certs_dir, Layout(layout)).key, twice=True)
    now = datetime.now(UTC)
    authority = CertificateAuthority.create(
        now=now, key_type=KeyType(key_type), lifetime=timedelta(days=days)
    )
    save_authority(tls.certs_dir, Layout(layout), authority, passphrase)
    facts = authority_facts(tls.certs_dir, tls.trust_domain, now)
    if as_json:
        write_json(facts.as_json())
        return
    write_facts("New certificate authority", facts.as_lines(now))
    say(f"Back up {facts.key} and let nobody read it: who has it can pass for anybody in the fleet.")


@app.command()
def show(*, certs_dir: CertsDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the CA, and what it signed here."""
    from parallax.sdk.cli.authority import authority_facts, write_family

    tls = tls_settings(config, certs_dir)
    now = datetime.now(UTC)
    facts = authority_facts(tls.certs_dir, tls.trust_domain, now)
    if as_json:
        write_json(facts.as_json())
        return
    write_facts("Certificate authority", facts.as_lines(now))
    write_family(tls.certs_dir, tls.trust_domain, now)


@app.command()
def crl(
    *,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there, in place of an older one.")
    ] = None,
    pem: Annotated[
        bool, typer.Option("--pem", help="Write PEM, to stdout without --out; else --out is DER.")
    ] = False,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Show or write the list of certificates that the CA has revoked.

    As the control plane on this host has published it in PARALLAX_DATA_DIR.
    Others fetch it from the address of its metrics, at /crl/. Ends with 1,
    and writes nothing, if it is stale or not the CA's.
    """
    from parallax.sdk.cli.crl import find_crl

    settings, tls, now = adopt_settings(config, certs_dir), tls_settings(config, certs_dir), datetime.now(UTC)
    try:
        published = find_crl(tls.certs_dir, settings.data_dir, now)
    except VerificationError as exc:
        say_error(f"{exc}: see under crl in the control plane's /readyz")
        raise typer.Exit(FAILED) from None
    if out is not None:
        published.save(out, pem=pem)
    if as_json:
        write_json(published.as_json())
    elif pem and out is None:
        write_bytes(published.crl.pem)
    elif out is None:
        write_facts("Certificate revocation list", published.as_lines(now))


@app.command()
def rotate(
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Mean it: whoever is left out may lose the fleet.")
    ] = False,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="KIND/NAME", help="Do not wait for it in this stage; repeat for several."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show how it goes on until it has ended.")
    ] = True,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Replace the CA and the root that everybody trusts, and nobody loses a call.

    The next CA is what lies in ca/next/, else a new root. Both roots are trusted
    first; the new CA signs once everybody has acknowledged its root, the old one
    goes once nobody depends on it. It goes on without this command: interrupt it,
    and see it through with 'parallax ca status --wait'. Only client/admin may.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def begin(client: ParallaxClient) -> root_pb2.RootRotation:
        from parallax.sdk.cli import rotating

        begun = await rotating.rotate(client, without or [], force=force)
        if wait:
            await _see_through(client, as_json=as_json)
        return begun

    try:
        begun = ask(begin)
    except KeyboardInterrupt:
        say("A rotation that has begun goes on: see it through with 'parallax ca status --wait'.")
        raise
    if not wait:
        _write(begun, as_json=as_json)


@app.command()
def status(
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show how it goes on until none is under way; begin none.")
    ] = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Show how far the rotation of the root has come, and who is missing.

    Also who has never asked for a certificate by itself. Only client/admin may.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def now(client: ParallaxClient) -> root_pb2.RootRotation:
        from parallax.sdk.cli import rotating

        return await rotating.status(client)

    if wait:
        ask(partial(_see_through, as_json=as_json))
    else:
        _write(ask(now), as_json=as_json)


@app.command()
def abort(
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Take back a rotation, as long as the new CA does not sign. Only client/admin may.

    The new CA stays in ca/next/, where the next rotation finds it: move it away
    if it is not to be used.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def back(client: ParallaxClient) -> root_pb2.RootRotation:
        from parallax.sdk.cli import rotating

        return await rotating.abort(client)

    _write(ask(back), as_json=as_json)


async def _see_through(client: ParallaxClient, *, as_json: bool) -> None:
    """Show how the rotation under way goes on, until it has ended."""
    from parallax.sdk.cli import rotating

    async for step in rotating.steps(client):
        if as_json:
            write_json_line(rotating.to_json(step))
        else:
            write_lines(rotating.progress(step))


def _write(rotation: root_pb2.RootRotation, *, as_json: bool) -> None:
    from parallax.sdk.cli import rotating

    if as_json:
        write_json(rotating.to_json(rotation))
        return
    write_facts("Rotation of the root", rotating.as_lines(rotation))
    if members := rotating.members(rotation):
        write_table(("WHO", "WHAT"), members)
