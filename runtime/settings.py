"""Everything that is set from outside except TLS: arguments, `PARALLAX_*` variables and a TOML file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, TypedDict, Unpack

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from parallax.runtime.address import parse_address, parse_url
from parallax.runtime.logs import LogFormat, LogLevel
from parallax.runtime.outcome import LARGEST_LIMIT_BYTES, MAX_PAYLOAD_BYTES
from parallax.security.config import read_toml
from parallax.security.errors import ConfigError, IdentityError
from parallax.security.identity import Identity, clip

VARIABLES: Final[Mapping[str, str]] = {
    "control_plane": "PARALLAX_CONTROL_PLANE",
    "listen": "PARALLAX_LISTEN",
    "advertise": "PARALLAX_ADVERTISE",
    "http_listen": "PARALLAX_HTTP_LISTEN",
    "enroll_url": "PARALLAX_ENROLL_URL",
    "metrics_listen": "PARALLAX_METRICS_LISTEN",
    "identity": "PARALLAX_IDENTITY",
    "data_dir": "PARALLAX_DATA_DIR",
    "audit_days": "PARALLAX_AUDIT_DAYS",
    "policy_file": "PARALLAX_POLICY_FILE",
    "ca_passphrase_file": "PARALLAX_CA_PASSPHRASE_FILE",
    "crl_lifetime_seconds": "PARALLAX_CRL_LIFETIME_SECONDS",
    "crl_url": "PARALLAX_CRL_URL",
    "issuance_file": "PARALLAX_ISSUANCE_FILE",
    "log_level": "LOG_LEVEL",
    "log_format": "PARALLAX_LOG_FORMAT",
    "max_payload_bytes": "PARALLAX_MAX_PAYLOAD_BYTES",
    "queue_limit": "PARALLAX_QUEUE_LIMIT",
    "approval_seconds": "PARALLAX_APPROVAL_SECONDS",
    "lease_seconds": "PARALLAX_LEASE_SECONDS",
    "drain_seconds": "PARALLAX_DRAIN_SECONDS",
    "certs_poll_seconds": "PARALLAX_CERTS_POLL_SECONDS",
    "revocation_max_age_seconds": "PARALLAX_REVOCATION_MAX_AGE",
}
"""Field of `Settings` → environment variable; in the TOML file and as an argument it has the field's name."""

NO_CONTROL_PLANE: Final = "none"
NOWHERE: Final = "none"
"""Where the control plane listens over HTTPS if it does not."""

# What `parallax.security.config` reads from the same file.
_FOR_TLS: Final = frozenset({"tls", "trust_domain"})

# ASCII alone, as a certificate spells it. Of https one would have to know whom to trust before one can ask.
_URL: Final = re.compile(r"http://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~-]+)*/?", re.ASCII)


class Overrides(TypedDict, total=False):
    """What `load_settings` accepts by name; None means not given."""

    control_plane: str | None
    listen: str | None
    advertise: str | None
    http_listen: str | None
    enroll_url: str | None
    metrics_listen: str | None
    identity: str | None
    data_dir: Path | None
    audit_days: float | None
    policy_file: Path | None
    ca_passphrase_file: Path | None
    crl_lifetime_seconds: float | None
    crl_url: str | None
    issuance_file: Path | None
    log_level: str | None
    log_format: str | None
    max_payload_bytes: int | None
    queue_limit: int | None
    approval_seconds: float | None
    lease_seconds: float | None
    drain_seconds: float | None
    certs_poll_seconds: float | None
    revocation_max_age_seconds: float | None


def load_settings(config_file: Path | None = None, **overrides: Unpack[Overrides]) -> Settings:
    """
    The settings in force: argument, else environment, else *config_file*, else default.

    Raises:
        ConfigError: One line that names the variable, the file's key or the argument at fault.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    filed = {
        key: value
        for key, value in (_read(config_file) if config_file else {}).items()
        if key not in given and not os.environ.get(VARIABLES[key])
    }
    try:
        return Settings(**filed, **given)  # type: ignore[arg-type]  # checked by pydantic
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        name = str(first["loc"][0])
        where = f"{config_file}: {name}" if name in filed else name if name in given else VARIABLES[name]
        raise ConfigError(f"{where}: {_say(first['msg'], first['input'])}") from None


def _address(text: str) -> str:
    try:
        parse_address(text)
    except ConfigError as exc:
        raise ValueError(str(exc)) from None
    return text


def _identity(text: str) -> str:
    try:
        Identity.parse_short(text)
    except IdentityError as exc:
        raise ValueError(str(exc)) from None
    return text


def _url(text: str) -> str:
    if not _URL.fullmatch(text):
        raise ValueError(f"not the URL of a folder: {clip(text)} (http://host:port/crl)")
    return text


def _https(text: str) -> str:
    try:
        parse_url(text)
    except ConfigError as exc:
        raise ValueError(str(exc)) from None
    return text


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _address_or_none(text: str) -> str:
    return text if text == NO_CONTROL_PLANE else _address(text)


Address = Annotated[str, AfterValidator(_address)]


class Settings(BaseSettings):
    """
    One process's settings, apart from TLS. Immutable.

    What is not given as an argument comes from the environment; an empty variable
    is an unset one. `load_settings` adds the file and says what is wrong in one line.

    Attributes:
        control_plane: What a client or an agent dials, `host:port`; "none": agents and proxies do without.
        listen: Where the process itself serves gRPC; None: what its command defaults to, an agent not at all.
        advertise: Where others reach an agent that listens, if that is not the address it listens on.
        http_listen: Where the control plane enrolls over HTTPS; "none": nowhere.
        enroll_url: Where one enrolls, `https://host:port`; None: port 8080 beside the control plane.
        metrics_listen: Where it serves metrics and health over plain HTTP; None likewise.
        identity: `<kind>/<name>` that a command acts as, among those in the certificate directory.
        data_dir: Where the control plane keeps what must survive it; made if need be.
        audit_days: How long an entry of the audit log stays.
        policy_file: Says who may call what at the control plane; None: as is built in.
        ca_passphrase_file: Holds the passphrase of the CA's key on its first line.
        crl_lifetime_seconds: How long a CRL is good; half-way through it another one is published.
        crl_url: Where others find CRLs, for certificates to say; None: they do not.
        issuance_file: Says what certificates may be like, and for whom; see `IssuancePolicy`.
        max_payload_bytes: A larger payload is refused before it reaches a shared stream.
        queue_limit: Tasks that may wait for one agent; one more is answered `OVERLOADED`.
        approval_seconds: How long somebody without a token may wait to be approved, and an approval is good.
        lease_seconds: How long an agent counts as alive after its last sign of life.
        drain_seconds: How long a stopping process lets running tasks finish.
        certs_poll_seconds: How often certificate files are looked at without being told of a change.
        revocation_max_age_seconds: How long ago an agent that listens may have heard what is revoked; after
            that it lets nobody in.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    control_plane: Annotated[str, AfterValidator(_address_or_none)] = "localhost:50051"
    listen: Address | None = None
    advertise: Address | None = None
    http_listen: Annotated[str, AfterValidator(_address_or_none)] = "127.0.0.1:8080"
    enroll_url: Annotated[str, AfterValidator(_https)] | None = None
    metrics_listen: Address | None = None
    identity: Annotated[str, AfterValidator(_identity)] = "client/cli"
    data_dir: Path = Path("data")
    audit_days: float = Field(default=400, ge=1, le=36_500)  # a year, and time to look at it
    policy_file: Path | None = None
    ca_passphrase_file: Path | None = None
    crl_lifetime_seconds: float = Field(default=86_400, ge=60, le=2_678_400)
    crl_url: Annotated[str, AfterValidator(_url)] | None = None
    issuance_file: Path | None = None
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = LogLevel.INFO
    log_format: Annotated[LogFormat, BeforeValidator(_lower)] = LogFormat.CONSOLE
    max_payload_bytes: int = Field(default=MAX_PAYLOAD_BYTES, ge=1, le=LARGEST_LIMIT_BYTES)
    queue_limit: int = Field(default=256, ge=1, le=1_000_000)
    approval_seconds: float = Field(default=3_600, ge=10, le=604_800)
    lease_seconds: float = Field(default=15, ge=1, le=86_400)  # below 1 s a busy loop alone loses it
    drain_seconds: float = Field(default=30, ge=0, le=86_400)
    certs_poll_seconds: float = Field(default=30, ge=0.1, le=86_400)
    revocation_max_age_seconds: float = Field(
        default=300, ge=3, le=86_400
    )  # three beats, of a second or more

    @property
    def approval(self) -> timedelta:
        """`approval_seconds` as a duration."""
        return timedelta(seconds=self.approval_seconds)

    @property
    def lease(self) -> timedelta:
        """`lease_seconds` as a duration."""
        return timedelta(seconds=self.lease_seconds)

    @property
    def drain(self) -> timedelta:
        """`drain_seconds` as a duration."""
        return timedelta(seconds=self.drain_seconds)

    @property
    def audit_kept(self) -> timedelta:
        """`audit_days` as a duration."""
        return timedelta(days=self.audit_days)

    @property
    def crl_lifetime(self) -> timedelta:
        """`crl_lifetime_seconds` as a duration."""
        return timedelta(seconds=self.crl_lifetime_seconds)

    @property
    def certs_poll(self) -> timedelta:
        """`certs_poll_seconds` as a duration."""
        return timedelta(seconds=self.certs_poll_seconds)

    @property
    def revocation_max_age(self) -> timedelta:
        """`revocation_max_age_seconds` as a duration."""
        return timedelta(seconds=self.revocation_max_age_seconds)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - read by exact name instead
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - a .env file is the shell's business
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Argument, then environment."""
        environment = {
            name: value for name, variable in VARIABLES.items() if (value := os.environ.get(variable))
        }
        return init_settings, InitSettingsSource(settings_cls, environment)


def _read(path: Path) -> dict[str, object]:
    """The settings in the TOML file *path*, those for TLS left out."""
    document = read_toml(path)
    unknown = sorted(document.keys() - VARIABLES.keys() - _FOR_TLS)
    if unknown:
        known = ", ".join([*VARIABLES, *sorted(_FOR_TLS)])
        raise ConfigError(f"{path}: {clip(unknown[0])} is no setting: use one of {known}")
    return {key: value for key, value in document.items() if key not in _FOR_TLS and value != ""}


def _say(message: str, value: object) -> str:
    """What pydantic's *message* says of *value*, as part of a sentence."""
    own = message.removeprefix("Value error, ")
    if own != message:
        return own  # ours, and it quotes the value
    return f"{own.removeprefix('Input ')}, not {clip(str(value))}"
