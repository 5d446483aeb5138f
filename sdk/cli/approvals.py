"""`parallax agents pending`, `approve` and `reject`: those who ask for a certificate without a token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import distance, say, write_json, write_lines, write_table
from parallax.sdk.cli.tokens import labels_of, stub_of

if TYPE_CHECKING:
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import ParallaxClient

Which = Annotated[
    str,
    typer.Argument(metavar="KIND/NAME|FINGERPRINT", help="As listed; of a fingerprint, 16 digits at least."),
]


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
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import READ_S

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def read(client: ParallaxClient) -> list[enrollment_pb2.EnrollmentRequest]:
        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            request = enrollment_pb2.ListEnrollmentRequestsRequest()
            return list((await stub.ListEnrollmentRequests(request, timeout=READ_S)).requests)

    waiting = ask(read)
    if as_json:
        write_json([_as_json(each) for each in waiting])
        return
    if not waiting:
        say("nobody waits to be approved: 'parallax enroll NAME --request' asks")
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


def approve(
    which: Which,
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
    """Let somebody who waits have a certificate: that name for that key, and no other."""
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import READ_S

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    request = enrollment_pb2.ApproveEnrollmentRequest(which=which, labels=labels_of(label or []))

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


def _as_json(request: enrollment_pb2.EnrollmentRequest) -> dict[str, object]:
    """For programs."""
    return {
        "identity": request.identity,
        "fingerprint": f"sha256:{request.fingerprint}",
        "source": request.source,
        "asked_at": request.asked_at.ToDatetime(UTC),
        "expires_at": request.expires_at.ToDatetime(UTC),
    }
