"""`parallax agents pending`, `approve` and `reject`: those who ask for a certificate without a token."""

from __future__ import annotations

import re
import shlex
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import distance, say, say_error, write_json, write_lines, write_table
from parallax.sdk.cli.tokens import labels_of, stub_of
from parallax.sdk.exits import CONFIG

if TYPE_CHECKING:
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import ParallaxClient

Key = Annotated[
    str, typer.Argument(metavar="FINGERPRINT", help="Of the key, as the host shows it: 16 digits at least.")
]
Which = Annotated[
    str,
    typer.Argument(metavar="KIND/NAME|FINGERPRINT", help="As listed; of a fingerprint, 16 digits at least."),
]
_FINGERPRINT: Final = re.compile(r"(?:sha256:)?[0-9a-f]{16,64}", re.ASCII)


def pending(
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    List who asks for a certificate and waits to be approved.

    Anybody can ask under any name: compare the fingerprint with that which the host shows.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    waiting = ask(_read)
    if not waiting and not as_json:
        say("nobody waits to be approved: 'parallax enroll NAME --request' asks")
        return
    _list(waiting, as_json=as_json)


def approve(
    key: Key,
    *,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Granted to it, for policy; repeat it for more."),
    ] = None,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Let somebody who waits have a certificate: that name for that key, and no other.

    Anybody can ask under any name: given a name, it only says with which keys who of that name waits.
    """
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import READ_S

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    request = enrollment_pb2.ApproveEnrollmentRequest(which=key, labels=labels_of(label or []))
    if not _FINGERPRINT.fullmatch(key) and (named := [each for each in ask(_read) if _is_named(each, key)]):
        given: list[tuple[str, object]] = [("--label", each) for each in label or []]
        given += [("--identity", identity), ("--control-plane", control_plane)]
        given += [("--certs-dir", certs_dir), ("--config", config)]
        words = [str(word) for option, value in given if value is not None for word in (option, value)]
        _list(named, as_json=as_json)
        say_error("what is approved is a key: compare it with that which the right host shows, then type")
        for each in named:
            say(shlex.join(["parallax", "agents", "approve", f"sha256:{each.fingerprint}", *words]))
        raise typer.Exit(CONFIG)

    async def decide(client: ParallaxClient) -> enrollment_pb2.EnrollmentRequest:
        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            return (await stub.ApproveEnrollment(request, timeout=READ_S)).approved

    _decide(decide, "approved", as_json=as_json)


def reject(
    which: Which,
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Have somebody who waits be refused, for as long as it would have waited; or take an approval back."""
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import READ_S

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    request = enrollment_pb2.RejectEnrollmentRequest(which=which)

    async def decide(client: ParallaxClient) -> enrollment_pb2.EnrollmentRequest:
        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            return (await stub.RejectEnrollment(request, timeout=READ_S)).rejected

    _decide(decide, "rejected", as_json=as_json)


def _decide(
    decide: Callable[[ParallaxClient], Awaitable[enrollment_pb2.EnrollmentRequest]],
    verdict: str,
    *,
    as_json: bool,
) -> None:
    decided = ask(decide)
    if as_json:
        write_json(_as_json(decided) | {"verdict": verdict})
    else:
        write_lines(f"{decided.identity} with the key sha256:{decided.fingerprint} {verdict}")


async def _read(client: ParallaxClient) -> list[enrollment_pb2.EnrollmentRequest]:
    """Who waits."""
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import READ_S

    async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
        request = enrollment_pb2.ListEnrollmentRequestsRequest()
        return list((await stub.ListEnrollmentRequests(request, timeout=READ_S)).requests)


def _is_named(request: enrollment_pb2.EnrollmentRequest, name: str) -> bool:
    """Whether it is for *name*, or for the one of its kind that is called so."""
    return name in {request.identity, request.identity.partition("/")[2]}


def _list(waiting: Sequence[enrollment_pb2.EnrollmentRequest], *, as_json: bool) -> None:
    if as_json:
        write_json([_as_json(each) for each in waiting])
        return
    now = datetime.now(UTC)
    rows = (
        (
            each.identity,
            distance(each.asked_at.ToDatetime(UTC), now),
            each.source,
            f"sha256:{each.fingerprint}",
        )
        for each in waiting
    )
    write_table(("IDENTITY", "ASKED", "FROM", "KEY"), rows, long=0)


def _as_json(request: enrollment_pb2.EnrollmentRequest) -> dict[str, object]:
    """For programs."""
    return {
        "identity": request.identity,
        "fingerprint": f"sha256:{request.fingerprint}",
        "source": request.source,
        "asked_at": request.asked_at.ToDatetime(UTC),
        "expires_at": request.expires_at.ToDatetime(UTC),
    }
