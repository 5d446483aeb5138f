"""`parallax ca`: the issuer that everybody trusts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from parallax.sdk.cli.options import (
    MAX_DAYS,
    AsJson,
    CertsDir,
    ConfigFile,
    KeyTypeName,
    LayoutName,
    PassphraseFile,
    tls_settings,
)
from parallax.sdk.cli.render import say, write_facts, write_json

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
