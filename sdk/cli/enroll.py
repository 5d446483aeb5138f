"""`parallax enroll`: a first certificate, for somebody who has none."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias, TypeVar

import typer

from parallax.sdk.cli.options import (
    AsJson,
    CertsDir,
    ConfigFile,
    EdgeUrl,
    KeyTypeName,
    adopt_settings,
    tls_settings,
)
from parallax.sdk.cli.render import instant, say, write_json, write_lines
from parallax.security.errors import ConfigError, InvalidRequest, NotAuthorized, Unavailable
from parallax.security.identity import Identity, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.x509 import Certificate

    from parallax.sdk.enrolling import Enrolling
    from parallax.security.credentials import Credentials
    from parallax.security.keys import PrivateKey
    from parallax.security.layouts import Paths
    from parallax.security.newcomer import Newcomer

VARIABLE: Final = "PARALLAX_TOKEN"
MAX_TOKEN_BYTES: Final = 1_024
POLL_S: Final = 2.0
DEVICE: Final = "device"  # what the key of one waits as that has no name yet

T = TypeVar("T")
Attempt: TypeAlias = "Callable[[], T | None]"


def enroll(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the agent or client; or give --device.")
    ] = None,
    *,
    device: Annotated[
        bool, typer.Option("--device", help="An agent, whose name the control plane allots.")
    ] = False,
    pin: Annotated[
        list[str],
        typer.Option("--pin", metavar="sha256:HEX", help="Of the fleet's root; 'token create' says it."),
    ],
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help=f"What admits you; or {VARIABLE}, which no list of processes shows."
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE|-", help="Its first line is the token; -: stdin.")
    ] = None,
    url: EdgeUrl = None,
    kind: Annotated[Literal["agent", "client"], typer.Option(help="What it is.")] = "agent",
    layout: Annotated[
        Literal["parallax", "flat", "kubernetes", "home"], typer.Option(help="How the files are called.")
    ] = "parallax",
    key_type: Annotated[
        KeyTypeName | None, typer.Option(help="The kind of its key: p256, or of a device rsa-4096.")
    ] = None,
    request: Annotated[
        bool, typer.Option("--request", help="Without a token: wait until the administrator approves.")
    ] = False,
    self_signed: Annotated[
        bool, typer.Option("--self-signed", help="Sign the certificate here, and have it pinned.")
    ] = False,
    patience: Annotated[
        float | None,
        typer.Option("--wait", min=0, max=604_800, metavar="S", help="Seconds to wait: 60, or an hour."),
    ] = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Get a first certificate, with a token or an approval; the key is made here and stays here.

    Whoever answers is believed only if it shows the root that is pinned. Run again after a failure, it
    uses the same key, so that an answer that was lost is given again.
    """
    from parallax.sdk.enrolling import Edge, Enrolling
    from parallax.security.files import show
    from parallax.security.keys import KeyType, key_id
    from parallax.security.layouts import Layout
    from parallax.security.newcomer import Newcomer
    from parallax.security.root_pin import RootPin

    settings = adopt_settings(config, certs_dir)
    tls = tls_settings(config, certs_dir)
    secret = None if request else _token(token, token_file)
    if request and (token is not None or token_file is not None):
        raise InvalidRequest("a token needs no approval: give either --request or the token")
    if (name is None) is not device or (device and kind != "agent"):
        raise InvalidRequest("give either the NAME, or --device for an agent that is allotted one")
    identity = Identity(tls.trust_domain, Kind(kind), name or DEVICE)
    edge = Edge.find(url or settings.enroll_url, settings.control_plane)
    asking = Enrolling(edge, frozenset(map(RootPin.parse, pin)), tls.trust_domain)
    newcomer = Newcomer(tls.certs_dir, Layout(layout), identity)
    if device and layout in {"home", "kubernetes"}:
        _check_free(newcomer)
    key = newcomer.key(KeyType(key_type or ("rsa-4096" if device else "p256")))
    patience = (60.0 if secret else 3_600.0) if patience is None else patience
    if device:
        identity = _persist(partial(asking.name, secret, key), patience)
        newcomer = replace(newcomer, identity=identity, waits_as=DEVICE)
    if secret is None:
        fingerprint = f"sha256:{key_id(key.public_key()).hex()}"
        say(f"{identity.short} asks for a certificate for the key {fingerprint}")
        say(f"compare and approve it: parallax agents approve {fingerprint} --identity client/admin")
    attempt = _attempt(asking, newcomer, secret, key, self_signed=self_signed)
    try:
        credentials = _persist(attempt, patience)
    except (InvalidRequest, NotAuthorized) as exc:  # and so it would be the next time
        raise type(exc)(f"{exc}: its key waits in {show(newcomer.waiting)}, remove it for a new one") from exc
    tell = partial(_tell, identity, credentials.leaf, as_json=as_json)
    if self_signed:
        tell(newcomer.paths)
        newcomer.forget()
    else:
        newcomer.save(credentials, tell)


def _tell(identity: Identity, leaf: Certificate, paths: Paths, *, as_json: bool) -> None:
    """Say that *identity* is enrolled."""
    if as_json:
        write_json(
            {
                "identity": identity,
                "serial": f"{leaf.serial_number:x}",
                "not_after": leaf.not_valid_after_utc,
                "certificate": paths.cert,
                "key": paths.key,
                "ca": paths.ca,
            }
        )
        return
    write_lines(f"{identity} is enrolled until {instant(leaf.not_valid_after_utc)}: {paths.cert}")


def _check_free(newcomer: Newcomer) -> None:
    """Pass if no certificate lies where one is to be: it would be somebody else's, and the token spent."""
    from parallax.security.files import show

    if os.path.lexists(newcomer.paths.cert) and not newcomer.is_waiting:
        raise ConfigError(f"{show(newcomer.paths.cert)} exists already and is never replaced: move it away")


def _attempt(
    asking: Enrolling, newcomer: Newcomer, secret: str | None, key: PrivateKey, *, self_signed: bool
) -> Attempt[Credentials]:
    """What asks for the certificate, or for its pin, once."""
    if self_signed:
        return _registration(asking, newcomer, secret, key)
    if secret is None:
        return partial(asking.request, newcomer.identity, key)
    return partial(asking.redeem, secret, newcomer.identity, key)


def _registration(
    asking: Enrolling, newcomer: Newcomer, secret: str | None, key: PrivateKey
) -> Attempt[Credentials]:
    """What has the certificate pinned, once, that the newcomer has signed itself."""
    from parallax.sdk.enrolling import Registration

    own: Credentials | None = None

    def register() -> Credentials | None:
        nonlocal own
        own = own or _sign(asking, newcomer, key)
        registered = asking.register(secret, newcomer.identity, own.leaf)
        if registered is Registration.PINNED:
            say(
                "there is no room for it on the control plane's port; have another one issued in its place: "
                f"parallax certs renew {newcomer.identity.name} --url {asking.edge}"
            )
        return None if registered is Registration.WAITING else own

    return register


def _sign(asking: Enrolling, newcomer: Newcomer, key: PrivateKey) -> Credentials:
    """
    What the newcomer signs itself, kept before it is registered, so that it stays the same.

    What an attempt has left that was cut off is written once more: some of it may be missing.
    """
    from parallax.sdk.cli.self_sign import sign_self
    from parallax.security.credentials import Credentials
    from parallax.security.profiles import LEAF_LIFETIME

    bundle = asking.bundle()
    certificate = newcomer.own(key) or sign_self(newcomer.identity, key, LEAF_LIFETIME, datetime.now(UTC))
    newcomer.write((certificate,), key, bundle)
    return Credentials((certificate,), key, bundle)


def _persist(attempt: Attempt[T], patience: float) -> T:
    """What is answered, if that happens within *patience* seconds."""
    import time

    deadline, said = time.monotonic() + patience, ""
    while True:
        pause = POLL_S
        try:
            answer = attempt()
        except Unavailable as exc:
            pause = max(exc.retry_after.total_seconds(), 0.1)
            if time.monotonic() + pause > deadline:
                raise
            if str(exc) != said:
                said = str(exc)
                say(f"{said}; trying again")
        else:
            if answer is not None:
                return answer
            if time.monotonic() + pause > deadline:
                raise Unavailable(f"not approved within {patience:g} seconds: run it again, for the same key")
        time.sleep(pause)


def _token(given: str | None, file: Path | None) -> str:
    """The token, from the one place that it is given in."""
    from parallax.security.files import read_file

    variable = os.environ.pop(VARIABLE, "")  # nobody whom we start has to know it
    if (given is not None) + (file is not None) + bool(variable) > 1:
        raise InvalidRequest(f"the token is given twice: keep one of --token, --token-file and {VARIABLE}")
    if file is None:
        text = given or variable
    elif str(file) == "-":
        text = sys.stdin.readline(MAX_TOKEN_BYTES)
    else:
        text = read_file(file, remedy="put the token there", private=True).decode(errors="replace")
    lines = text.strip().splitlines()
    if not lines:
        raise InvalidRequest(f"no token: give --token-file or {VARIABLE}; 'parallax token create' makes one")
    return lines[0].strip()
