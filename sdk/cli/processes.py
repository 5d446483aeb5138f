"""`parallax control-plane start` and `parallax agent run`: what stays up until it is told to stop."""

from __future__ import annotations

from typing import Annotated

import typer

from parallax.sdk.cli.options import CertsDir, ConfigFile, ControlPlane, adopt_settings, quiet_grpc
from parallax.security.errors import ConfigError
from parallax.security.identity import clip

control_plane_app = typer.Typer(help="The process that agents and clients dial.", no_args_is_help=True)
agent_app = typer.Typer(help="Agents on this host.", no_args_is_help=True)


@control_plane_app.command()
def start(
    *,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve there (PARALLAX_LISTEN, 127.0.0.1:50051)."),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve metrics there (PARALLAX_METRICS_LISTEN, 127.0.0.1:9464)."
        ),
    ] = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is held and stop."""
    from parallax.control_plane.process import run

    adopt_settings(config, certs_dir, listen=listen, metrics_listen=metrics_listen)
    run()


@agent_app.command("run")
def run_agent(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CLASS", help="A SecureAgent, or an instance of one; the current directory counts."
        ),
    ],
    *,
    agent_id: Annotated[
        str | None,
        typer.Option("--id", metavar="NAME", help="Its name; unless given, that in ~/.mtls/client.crt."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="For people; its id unless given.")] = None,
    capability: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What it can do; repeat it for more.")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Tasks that it works on at once, 16 unless given.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Shown in the list of agents; repeat it for more."),
    ] = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
) -> None:
    """
    Run an agent until SIGTERM or Ctrl-C, then finish what is held and stop.

    The exit code is 78 when another instance with the same identity took over.
    """
    quiet_grpc()
    from parallax.sdk.cli.loading import AgentOptions, load_agent

    options = AgentOptions(agent_id, name, tuple(capability or ()), max_concurrency, _labels(label or []))
    # Before the agent's module is imported, which may read them at once.
    adopt_settings(config, certs_dir, control_plane=control_plane)
    load_agent(target, options).run()


def _labels(pairs: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--label {clip(pair)} is not KEY=VALUE, such as --label zone=a")
        if key in labels:
            raise ConfigError(f"--label {clip(key)} is given twice: keep one")
        labels[key] = value
    return labels
