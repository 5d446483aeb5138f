"""The command's tree, and how its errors end the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import typer
import typer.main

from parallax.sdk.cli import (
    approvals,
    audit,
    ca,
    certs,
    doctor,
    enroll,
    fleet,
    issuance,
    labels,
    lookup,
    pins,
    policy,
    processes,
    revocation,
    self_sign,
    tokens,
)
from parallax.sdk.cli.render import say_error
from parallax.sdk.exits import CONFIG, OK, exit_code
from parallax.security.errors import ParallaxError

PROGRAM: Final = "parallax"
DISTRIBUTION: Final = "parallax-mesh"

app = typer.Typer(
    help="Agents with an identity, and work for them, over mutual TLS.",
    epilog="Exit codes: 0 done · 1 the answer is no · 2 usage or configuration · 69 nobody can answer · "
    "77 not authenticated or not authorized · 78 another instance took over",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, private keys included
)
ca.app.command("policy")(issuance.policy)
certs.app.command("show")(lookup.show)
app.add_typer(ca.app, name="ca")
certs.app.command("self-sign")(self_sign.self_sign)
certs.app.command("pin")(pins.pin)
certs.app.command("unpin")(pins.unpin)
certs.app.command("pins")(pins.pins)
app.add_typer(certs.app, name="certs")
app.add_typer(policy.app, name="policy")
certs.app.command("revoke")(revocation.revoke)
certs.app.command("reinstate")(revocation.reinstate)
certs.app.command("revoked")(revocation.revoked)
app.add_typer(processes.control_plane_app, name="control-plane")
app.add_typer(processes.agent_app, name="agent")
app.add_typer(fleet.agents_app, name="agents")
app.add_typer(audit.app, name="audit")
fleet.agents_app.command("pending")(approvals.pending)
fleet.agents_app.command("approve")(approvals.approve)
fleet.agents_app.command("reject")(approvals.reject)
fleet.agents_app.command("label")(labels.label)
app.add_typer(tokens.app, name="token")
app.command("enroll")(enroll.enroll)
app.command("call")(fleet.call)
app.command("doctor")(doctor.doctor)


def run(arguments: Sequence[str]) -> int:
    """
    The exit code of the command with *arguments*.

    Wrong usage, and what Parallax raises on purpose, become one line on stderr.
    """
    command = typer.main.get_command(app)
    try:
        # Not `app()`: it decides itself what becomes of Ctrl-C and of a broken pipe.
        with command.make_context(PROGRAM, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as exc:
        return exc.exit_code
    except ParallaxError as exc:
        say_error(str(exc))
        return exit_code(exc)
    except typer.TyperException as exc:
        if message := " ".join(exc.format_message().split()):  # empty: help was shown instead
            wrong = getattr(exc, "ctx", None)
            path = wrong.command_path if wrong else PROGRAM
            say_error(f"{message[0].lower()}{message[1:].removesuffix('.')}: see '{path} --help'")
        return CONFIG
    return OK


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{PROGRAM} {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Agents with an identity, and work for them, over mutual TLS."""
