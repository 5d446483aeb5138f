"""`parallax certs pin`, `unpin` and `pins`: self-signed certificates that the control plane lets in."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import distance, say, write_json, write_lines, write_table
from parallax.security.identity import Identity

if TYPE_CHECKING:
    from grpc import aio

    from parallax.protos import pin_pb2, pin_pb2_grpc
    from parallax.sdk.client import ParallaxClient

Holder: TypeAlias = Annotated[
    str, typer.Argument(metavar="KIND/NAME", help="Whose certificate it is: agent/07048933.")
]


def pin(
    holder: Holder,
    *,
    file: Annotated[
        Path,
        typer.Option(
            "--file",
            metavar="FILE",
            help="The certificate, PEM. Its fingerprint would not do: the handshake needs all of it.",
        ),
    ],
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Let in the holder of a self-signed certificate, within a second.

    Beyond 500 the port has no room: then the device exchanges it, with 'parallax certs renew'.

    An identity has two pins at most: the one in use, and the one that takes its place.
    Only client/admin may pin (--identity client/admin).
    """
    from cryptography.hazmat.primitives.serialization import Encoding

    from parallax.sdk.cli.inventory import read_chain

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    der = read_chain(file)[0].public_bytes(Encoding.DER)

    async def add(client: ParallaxClient) -> pin_pb2.PinnedCertificate:
        from parallax.protos import pin_pb2
        from parallax.sdk.client import READ_S

        async with client._asking(_pins) as stub:  # noqa: SLF001 - our own
            request = pin_pb2.PinRequest(holder=holder, certificate=der)
            return (await stub.Pin(request, timeout=READ_S)).pin

    added = ask(add)
    if as_json:
        write_json(_to_json(added))
        return
    if added.on_port:
        write_lines(f"{holder} is let in with {added.fingerprint}")
        return
    write_lines(f"{holder} is pinned with {added.fingerprint}")
    say(
        "there is no room for it on the port until others go; the device can exchange it meanwhile: "
        f"parallax certs renew {Identity.parse(added.identity).name}"
    )


def unpin(
    holder: Holder,
    *,
    fingerprint: Annotated[
        str, typer.Option(metavar="SHA256", help="The one that is meant; all of this identity if none.")
    ] = "",
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Let nobody in any more with a certificate that was pinned; what is open under it ends.

    Only client/admin may (--identity client/admin).
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def take_out(client: ParallaxClient) -> list[pin_pb2.PinnedCertificate]:
        from parallax.protos import pin_pb2
        from parallax.sdk.client import READ_S

        async with client._asking(_pins) as stub:  # noqa: SLF001
            request = pin_pb2.UnpinRequest(holder=holder, fingerprint=fingerprint.replace(":", "").lower())
            return list((await stub.Unpin(request, timeout=READ_S)).pins)

    gone = ask(take_out)
    if as_json:
        write_json([_to_json(each) for each in gone])
    else:
        write_lines(*(f"{holder} is not let in any more with {each.fingerprint}" for each in gone))
    if any(each.exchanged for each in gone):
        say(
            f"it was issued another certificate, which stays good: 'parallax certs revoke {holder}' ends that"
        )


def pins(
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the certificates that are pinned; only client/admin may (--identity client/admin)."""
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    found, now = ask(_read_all), datetime.now(UTC)
    if as_json:
        write_json([_to_json(each) for each in found])
    elif found:
        columns = ("IDENTITY", "ENDS", "STATUS", "PINNED", "FINGERPRINT")
        write_table(columns, (_as_cells(each, now) for each in found))
    else:
        say("nothing is pinned: 'parallax certs pin' lets a self-signed certificate in")


async def _read_all(client: ParallaxClient) -> list[pin_pb2.PinnedCertificate]:
    from parallax.protos import pin_pb2
    from parallax.sdk.client import PAGE, READ_S

    request = pin_pb2.ListPinsRequest(page_size=PAGE)
    found: list[pin_pb2.PinnedCertificate] = []
    deadline = time.monotonic() + READ_S
    while True:
        async with client._asking(_pins) as stub:  # noqa: SLF001
            page = await stub.ListPins(request, timeout=max(0.0, deadline - time.monotonic()))
        found.extend(page.pins)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


def _pins(channel: aio.Channel) -> pin_pb2_grpc.PinServiceAsyncStub:
    from parallax.protos import pin_pb2_grpc

    return pin_pb2_grpc.PinServiceStub(channel)


def _to_json(pinned: pin_pb2.PinnedCertificate) -> dict[str, object]:
    return {
        "identity": pinned.identity,
        "fingerprint": pinned.fingerprint,
        "serial": pinned.serial,
        "not_after": pinned.not_after.ToDatetime(UTC),
        "pinned_at": pinned.pinned_at.ToDatetime(UTC),
        "pinned_by": pinned.pinned_by,
        "on_port": pinned.on_port,
        "exchanged": pinned.exchanged,
        "revoked": pinned.revoked,
    }


def _as_cells(pinned: pin_pb2.PinnedCertificate, now: datetime) -> tuple[str, ...]:
    status = "exchanged" if pinned.exchanged else "let in" if pinned.on_port else "to be exchanged"
    if pinned.revoked:
        status = "revoked"
    if pinned.not_after.ToDatetime(UTC) < now:
        status = "ended"
    return (
        Identity.parse(pinned.identity).short,
        distance(pinned.not_after.ToDatetime(UTC), now),
        status,
        distance(pinned.pinned_at.ToDatetime(UTC), now),
        pinned.fingerprint,
    )
