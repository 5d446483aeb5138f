"""`parallax token`: secrets that let somebody in who has no certificate yet."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import (
    ActAs,
    AsJson,
    CertsDir,
    ConfigFile,
    ControlPlane,
    adopt_settings,
    tls_settings,
)
from parallax.sdk.cli.render import distance, instant, say, write_json, write_lines, write_table
from parallax.security.errors import InvalidRequest
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, clip

if TYPE_CHECKING:
    from grpc import aio

    from parallax.protos import enrollment_pb2, enrollment_pb2_grpc
    from parallax.sdk.client import ParallaxClient

app = typer.Typer(help="Tokens, with which agents and clients enroll.", no_args_is_help=True)

ALLOTTED: Final = "#"  # as in `parallax.security.tokens`, which is slow to import
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@app.command()
def create(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Whose certificate it is good for; or give --pattern."),
    ] = None,
    *,
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it is good: 90s, 10m, 2h, 7d.")] = "10m",
    kind: Annotated[Literal["agent", "client"], typer.Option(help="What enrolls.")] = "agent",
    pattern: Annotated[
        str | None, typer.Option(metavar="'STEM*'", help="Whichever name of that beginning is free.")
    ] = None,
    device: Annotated[
        bool, typer.Option("--device", help="An agent, whose name is allotted when it enrolls.")
    ] = False,
    uses: Annotated[
        int, typer.Option(min=1, help="How many may enroll; more than one with --pattern or --device.")
    ] = 1,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Granted to whoever enrolls, for policy; repeat it for more."),
    ] = None,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Make a token, and write the command that enrolls with it: the only time that it is shown.

    Only client/admin may (--identity client/admin).
    """
    names = _one_of(name, pattern, device=device)
    lasts, labels = _seconds(ttl), labels_of(label or [])
    settings = adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    trust_domain = tls_settings(config, certs_dir).trust_domain

    from parallax.protos import enrollment_pb2
    from parallax.runtime.address import parse_address
    from parallax.sdk.client import READ_S

    grant = enrollment_pb2.TokenGrant(kind=kind, names=names, labels=labels, uses=uses)
    request = enrollment_pb2.CreateTokenRequest(grant=grant)
    request.ttl.FromTimedelta(lasts)

    async def create_one(client: ParallaxClient) -> enrollment_pb2.CreateTokenResponse:
        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            answer: enrollment_pb2.CreateTokenResponse = await stub.CreateToken(request, timeout=READ_S)
            return answer

    made = ask(create_one)
    host, _ = parse_address(settings.control_plane)
    command = _join(made, host, trust_domain)
    if as_json:
        write_json(
            _as_json(made.token) | {"secret": made.secret, "pins": list(made.pins), "command": command}
        )
        return
    write_lines(command)
    ends = made.token.expires_at.ToDatetime(UTC)
    say(f"good until {instant(ends)} and shown only now; run it where the {kind} is to be")
    if not made.http_port:
        say("nobody can enroll there yet: PARALLAX_HTTP_LISTEN is none on the control plane")


@app.command("list")
def list_all(
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the tokens that there are, those included that ended within a day; never the secrets."""
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    tokens = ask(_all)
    if as_json:
        write_json([_as_json(token) for token in tokens])
        return
    if not tokens:
        say("there is no token: make one with 'parallax token create NAME'")
        return
    now = datetime.now(UTC)
    columns = ("ID", "FOR", "USED", "ENDS", "MADE BY", "LABELS")
    write_table(columns, (_as_cells(token, now) for token in tokens), long=2)


@app.command()
def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As listed: the part after plxt_.")],
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Take tokens out: they let nobody in any more.

    Certificates that they gave stay valid. One that is not there is no error.
    """
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)

    async def revoke_all(client: ParallaxClient) -> list[dict[str, object]]:
        from parallax.protos import enrollment_pb2
        from parallax.sdk.client import READ_S

        outcomes: list[dict[str, object]] = []
        for each in dict.fromkeys(ids):
            async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
                answer = await stub.RevokeToken(enrollment_pb2.RevokeTokenRequest(id=each), timeout=READ_S)
            outcomes.append({"id": each, "revoked": answer.revoked})
            if not as_json:
                write_lines(f"{each} {'revoked' if answer.revoked else 'is not there'}")
        return outcomes

    outcomes = ask(revoke_all)
    if as_json:
        write_json(outcomes)


async def _all(client: ParallaxClient) -> list[enrollment_pb2.EnrollmentToken]:
    from parallax.protos import enrollment_pb2
    from parallax.sdk.client import READ_S

    request = enrollment_pb2.ListTokensRequest()
    found: list[enrollment_pb2.EnrollmentToken] = []
    while True:
        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            page = await stub.ListTokens(request, timeout=READ_S)
        found.extend(page.tokens)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


def stub_of(channel: aio.Channel) -> enrollment_pb2_grpc.EnrollmentServiceAsyncStub:
    """What administers enrollment."""
    from parallax.protos import enrollment_pb2_grpc

    return enrollment_pb2_grpc.EnrollmentServiceStub(channel)


def _join(made: enrollment_pb2.CreateTokenResponse, host: str, trust_domain: str) -> str:
    """The command that enrolls with what was *made*, fit for a shell."""
    grant = made.token.grant
    name = "NAME" if grant.names.endswith("*") else grant.names
    who = ["--device", "--layout", "home"] if name == ALLOTTED else [name]
    words = ["parallax", "enroll", *who, "--token", made.secret]
    for pin in made.pins:
        words += ["--pin", pin]
    bracketed = f"[{host}]" if ":" in host else host
    words += ["--url", f"https://{bracketed}:{made.http_port or 8080}"]
    if grant.kind != "agent":
        words += ["--kind", grant.kind]
    settings = [] if trust_domain == DEFAULT_TRUST_DOMAIN else [f"PARALLAX_TRUST_DOMAIN={trust_domain}"]
    return " ".join([*settings, shlex.join(words)])


def _one_of(name: str | None, pattern: str | None, *, device: bool) -> str:
    if (name is not None) + (pattern is not None) + device != 1:
        raise InvalidRequest("give either the NAME that it is for, or --pattern 'edge-*', or --device")
    if device:
        return ALLOTTED
    if name is not None and "*" in name:
        raise InvalidRequest(f"{clip(name)} is no name: give --pattern {clip(name)}")
    return name or pattern or ""


def _seconds(text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,7})([smhd])", text, re.ASCII)
    if match is None:
        raise InvalidRequest(f"--ttl {clip(text)} is not a time, such as 90s, 10m, 2h or 7d")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def labels_of(pairs: list[str]) -> dict[str, str]:
    """The labels that *pairs* of `KEY=VALUE` mean."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"--label {clip(pair)} is not KEY=VALUE, such as --label zone=a")
        if key in labels:
            raise InvalidRequest(f"--label {clip(key)} is given twice: keep one")
        labels[key] = value
    return labels


def _as_json(token: enrollment_pb2.EnrollmentToken) -> dict[str, object]:
    """For programs."""
    grant = token.grant
    return {
        "id": token.id,
        "kind": grant.kind,
        "names": grant.names,
        "labels": dict(grant.labels),
        "uses": grant.uses,
        "redeemed": list(token.redeemed),
        "redeemed_count": token.redeemed_count,
        "created_by": token.created_by,
        "created_at": token.created_at.ToDatetime(UTC),
        "expires_at": token.expires_at.ToDatetime(UTC),
    }


def _as_cells(token: enrollment_pb2.EnrollmentToken, now: datetime) -> tuple[str, ...]:
    """For people."""
    grant = token.grant
    return (
        token.id,
        f"{grant.kind}/{grant.names}",
        f"{token.redeemed_count} of {grant.uses}",
        distance(token.expires_at.ToDatetime(UTC), now),
        token.created_by.rpartition("://")[2].partition("/")[2],
        _spell(grant.labels),
    )


def _spell(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
