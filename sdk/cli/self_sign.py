"""`parallax certs self-sign`: a device makes its own certificate, for an administrator to pin."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parallax.sdk.cli.options import MAX_DAYS, AsJson, CertsDir, ConfigFile, KeyTypeName, tls_settings
from parallax.sdk.cli.render import write_facts, write_json, write_lines
from parallax.security.errors import ConfigError, InvalidRequest
from parallax.security.identity import Identity, Kind

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.security.keys import PrivateKey
    from parallax.security.layouts import Layout, Paths


def self_sign(
    holder: Annotated[str, typer.Argument(metavar="KIND/NAME", help="Who this is: agent/07048933.")],
    *,
    ca: Annotated[
        Path,
        typer.Option("--ca", metavar="FILE", help="The roots to trust, as the fleet's operator gave them."),
    ],
    layout: Annotated[
        Literal["home", "parallax", "flat"],
        typer.Option(help="How files are called; home: ~/.mtls, wherever certificates lie else."),
    ] = "home",
    days: Annotated[int, typer.Option(min=1, max=MAX_DAYS, help="How long it is valid.")] = 365,
    key_type: Annotated[KeyTypeName, typer.Option(help="The kind of its key.")] = "p256",
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Make a key, and a certificate for it that nobody else signs.

    It lets nobody in until an administrator pins it. What lies there already is never replaced.
    """
    from parallax.sdk.cli.facts import facts_of
    from parallax.sdk.cli.inventory import read_chain
    from parallax.security.layouts import Layout

    tls, now = tls_settings(config, certs_dir), datetime.now(UTC)
    identity = Identity.parse_short(holder, tls.trust_domain)
    paths = _make(identity, tls.certs_dir, Layout(layout), ca, timedelta(days=days), key_type, now)
    facts = facts_of(read_chain(paths.cert)[0], tls.trust_domain, now)
    if as_json:
        files = {"certificate": paths.cert, "key": paths.key, "ca": paths.ca}
        write_json({"name": identity.name, "kind": identity.kind, "files": files, **facts.as_json()})
        return
    write_facts(str(paths.cert), facts.as_lines(now))
    write_lines(
        "Next, let an administrator who has this certificate and knows its fingerprint pin it:",
        f"  parallax certs pin {identity.short} --file {paths.cert.name} --identity client/admin",
    )


def _make(
    identity: Identity,
    directory: Path,
    layout: Layout,
    ca: Path,
    lifetime: timedelta,
    key_type: str,
    now: datetime,
) -> Paths:
    from parallax.security.bundle import TrustBundle
    from parallax.security.files import read_file, show
    from parallax.security.keys import KeyType, generate_key
    from parallax.security.layouts import leaf_paths, save_leaf

    if identity.kind is Kind.SERVICE:
        raise InvalidRequest(f"{identity.short} is a service, whose certificate a CA has to issue")
    paths = leaf_paths(directory, layout, identity.name)
    for path in (paths.cert, paths.key):
        if os.path.lexists(path):
            raise ConfigError(f"{show(path)} exists already and is never replaced: move it away")
    remedy = "give the file with the roots to trust with --ca"
    try:
        bundle = TrustBundle.parse(read_file(ca, remedy=remedy))
    except ConfigError as exc:
        raise ConfigError(str(exc) if show(ca) in str(exc) else f"{show(ca)}: {exc}: {remedy}") from None
    key = generate_key(KeyType(key_type))
    return save_leaf(directory, layout, identity, (sign_self(identity, key, lifetime, now),), key, bundle)


def sign_self(identity: Identity, key: PrivateKey, lifetime: timedelta, now: datetime) -> Certificate:
    """A certificate of *identity* that its holder signs with *key*."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from parallax.security.profiles import LeafProfile, self_signed_template

    profile, serial = LeafProfile(lifetime=lifetime, sans=()), x509.random_serial_number()
    return self_signed_template(identity, key.public_key(), profile, now, serial).sign(key, hashes.SHA256())
