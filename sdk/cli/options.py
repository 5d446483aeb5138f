"""The options that several commands share, and the settings they lead to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias, Unpack

import typer

if TYPE_CHECKING:
    from parallax.runtime.settings import Overrides, Settings
    from parallax.security.config import MTLSConfig

# Spelled out, because their enumerations live beside cryptography, which `--help` must not wait for.
KeyTypeName: TypeAlias = Literal["p256", "rsa-2048", "rsa-4096"]
LayoutName: TypeAlias = Literal["parallax", "flat"]

MAX_DAYS: Final = 36_500  # a hundred years

ConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A parallax.toml; environment variables win over it."),
]
CertsDir: TypeAlias = Annotated[
    Path | None,
    typer.Option("--certs-dir", metavar="DIR", help="Where certificates lie (PARALLAX_CERTS_DIR, ./certs)."),
]
ActAs: TypeAlias = Annotated[
    str | None,
    typer.Option("--identity", metavar="KIND/NAME", help="Act as this one (PARALLAX_IDENTITY, client/cli)."),
]
ControlPlane: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--control-plane",
        metavar="HOST:PORT",
        help="Dial this one (PARALLAX_CONTROL_PLANE, localhost:50051).",
    ),
]
EdgeUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="https://HOST:PORT",
        help="Where one enrolls (PARALLAX_ENROLL_URL, port 8080 of the control plane).",
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Write JSON, and nothing else, to stdout.")]
PassphraseFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Its first line is the passphrase of the CA's key "
        "(PARALLAX_CA_PASSPHRASE_FILE; PARALLAX_CA_PASSPHRASE is the passphrase itself).",
    ),
]


def tls_settings(config: Path | None, certs_dir: Path | None) -> MTLSConfig:
    """The TLS settings in force; an argument wins over the environment, that over *config*."""
    from parallax.security.config import get_mtls_config

    return get_mtls_config(config_file=config, certs_dir=certs_dir)


def adopt_settings(config: Path | None, certs_dir: Path | None, **overrides: Unpack[Overrides]) -> Settings:
    """
    The settings in force, after making them the environment of this process.

    So that all who read it later, an agent's own module included, follow the options of the command
    and its `--config` too. What is at its default is left to them.

    Raises:
        ConfigError: One line that names the setting at fault.
    """
    from parallax.runtime.settings import VARIABLES, load_settings
    from parallax.security.config import VARIABLES as TLS_VARIABLES

    settings, tls = load_settings(config, **overrides), tls_settings(config, certs_dir)
    for values, variables in ((settings, VARIABLES), (tls, TLS_VARIABLES)):
        for field, variable in variables.items():
            value = getattr(values, field)
            if value is None or field not in values.model_fields_set:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = _spell(value)
    return settings


def serve_no_metrics() -> None:
    """Leave where metrics are served to the process that is set up with the same variables, and stays."""
    from parallax.runtime.settings import VARIABLES

    os.environ.pop(VARIABLES["metrics_listen"], None)


def quiet_grpc() -> None:
    """
    Keep gRPC's own lines about handshakes off stderr: our one line says what they would.

    gRPC reads the variable when it is imported. What the user has set stays.
    """
    if "GRPC_TRACE" not in os.environ:
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _spell(value: object) -> str:
    from pydantic import SecretStr

    match value:
        case bool():
            return "true" if value else "false"
        case SecretStr():
            return value.get_secret_value()
        case _:
            return str(value)
