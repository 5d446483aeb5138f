"""`parallax agents label`: labels that identities were granted, for policy to go by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.policy import stub_of
from parallax.sdk.cli.render import say, write_json, write_lines, write_table
from parallax.security.errors import InvalidRequest
from parallax.security.identity import clip

if TYPE_CHECKING:
    from parallax.protos import policy_pb2
    from parallax.sdk.client import ParallaxClient


def label(
    who: Annotated[
        str | None, typer.Argument(metavar="KIND/NAME", help="Whose; without it, everybody's who has any.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE|KEY-", help="Grants a label, or takes it back."),
    ] = None,
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Show the labels that were granted, grant more, or take some back.

    They are what a policy's rules go by, within a second, unlike those that an agent states itself and
    'parallax agents list' shows. Only client/admin may (--identity client/admin).
    """
    granted, taken = _read(changes or [])
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    if who is None:
        _show_all(ask(_read_all), as_json=as_json)
        return

    async def change(client: ParallaxClient) -> policy_pb2.GrantedLabels:
        from parallax.protos import policy_pb2
        from parallax.sdk.client import READ_S

        async with client._asking(stub_of) as stub:  # noqa: SLF001 - our own
            if not changes:
                found = await stub.ListLabels(policy_pb2.ListLabelsRequest(identity=who), timeout=READ_S)
                return found.granted[0]
            request = policy_pb2.ChangeLabelsRequest(identity=who, granted=granted, taken=taken)
            return (await stub.ChangeLabels(request, timeout=READ_S)).granted

    now = ask(change)
    if as_json:
        write_json(_to_json(now))
    else:
        write_lines(f"{now.identity}: {_spell(now)}" if now.labels else f"{now.identity} has no labels")


def _show_all(found: Sequence[policy_pb2.GrantedLabels], *, as_json: bool) -> None:
    if as_json:
        write_json([_to_json(each) for each in found])
    elif found:
        write_table(("IDENTITY", "LABELS"), ((each.identity, _spell(each)) for each in found), long=1)
    else:
        say("nobody was granted a label: 'parallax agents label KIND/NAME KEY=VALUE' grants one")


async def _read_all(client: ParallaxClient) -> list[policy_pb2.GrantedLabels]:
    from parallax.protos import policy_pb2
    from parallax.sdk.client import READ_S

    request = policy_pb2.ListLabelsRequest()
    found: list[policy_pb2.GrantedLabels] = []
    deadline = time.monotonic() + READ_S
    while True:
        async with client._asking(stub_of) as stub:  # noqa: SLF001
            page = await stub.ListLabels(request, timeout=max(0.0, deadline - time.monotonic()))
        found.extend(page.granted)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


def _read(changes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Labels to grant, and keys of those to take back."""
    granted: dict[str, str] = {}
    taken: list[str] = []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            key = change.removesuffix("-")
        if not key or key == change:
            raise InvalidRequest(
                f"{clip(change)} is neither KEY=VALUE, which grants it, nor KEY-, which takes it back"
            )
        if key in granted or key in taken:
            raise InvalidRequest(f"{clip(key)} is given twice: keep one")
        if equals:
            granted[key] = value
        else:
            taken.append(key)
    return granted, taken


def _to_json(granted: policy_pb2.GrantedLabels) -> dict[str, object]:
    """For programs."""
    return {"identity": granted.identity, "labels": dict(sorted(granted.labels.items()))}


def _spell(granted: policy_pb2.GrantedLabels) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(granted.labels.items()))
