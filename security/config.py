"""How TLS is configured: `PARALLAX_*` variables, a TOML file and arguments become one frozen `MTLSConfig`."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from pydantic import Field, SecretStr, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from parallax.security.errors import ConfigError, IdentityError
from parallax.security.files import show
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, check_trust_domain, clip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIABLES: Final[Mapping[str, str]] = {
    "enabled": "PARALLAX_TLS_ENABLED",
    "certs_dir": "PARALLAX_CERTS_DIR",
    "ca_file": "PARALLAX_TLS_CA_FILE",
    "cert_file": "PARALLAX_TLS_CERT_FILE",
    "key_file": "PARALLAX_TLS_KEY_FILE",
    "ca_pem": "PARALLAX_TLS_CA_PEM",
    "cert_pem": "PARALLAX_TLS_CERT_PEM",
    "key_pem": "PARALLAX_TLS_KEY_PEM",
    "verify_client": "PARALLAX_TLS_VERIFY_CLIENT",
    "allow_insecure": "PARALLAX_TLS_ALLOW_INSECURE",
    "trust_domain": "PARALLAX_TRUST_DOMAIN",
}
"""Field of `MTLSConfig` → environment variable. The names are the users' and may not change."""

_WORDS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_BOOLEANS: Final = frozenset({"enabled", "verify_client", "allow_insecure"})
_PARTS: Final = ("ca", "cert", "key")
# What the [tls] table may hold. Not the PEM content: a key belongs in a 0600 file of its own.
_TABLE: Final = frozenset(
    {
        "enabled",
        "certs_dir",
        "ca_file",
        "cert_file",
        "key_file",
        "verify_client",
        "allow_insecure",
    }
)


class MTLSOverrides(TypedDict, total=False):
    """What `get_mtls_config` accepts by name; None means not given."""

    enabled: bool | None
    certs_dir: Path | None
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    ca_pem: str | None
    cert_pem: str | None
    key_pem: SecretStr | None
    verify_client: bool | None
    allow_insecure: bool | None
    trust_domain: str | None


def get_mtls_config(*, config_file: Path | None = None, **overrides: Unpack[MTLSOverrides]) -> MTLSConfig:
    """
    The TLS configuration in force: argument, else environment, else *config_file*, else default.

    Args:
        config_file: TOML with a `[tls]` table and, at the top level, `trust_domain`.

    Raises:
        ConfigError: One line that names the setting at fault.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    return MTLSConfig(config_file=config_file, **given)  # type: ignore[arg-type]  # a TypedDict without its Nones


class MTLSConfig(BaseSettings):
    """
    What TLS should do and where its material lies. Immutable.

    Built directly, what is not given comes from the environment, as in `get_mtls_config`.
    The certificate, the key and the CA are each a file or the content itself; either all three
    are given or none, and then they are looked for in `certs_dir`. A directory that is given
    closer (as an argument, say) puts aside files named further away (in the environment).

    Raises:
        ConfigError: One line that names the setting at fault, never the content of one.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # a key among them
        case_sensitive=True,
    )

    enabled: bool = False
    certs_dir: Path = Path("certs")
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    ca_pem: str | None = Field(default=None, repr=False)
    cert_pem: str | None = Field(default=None, repr=False)
    key_pem: SecretStr | None = Field(default=None, repr=False)
    verify_client: bool = False
    allow_insecure: bool = False
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    config_file: Path | None = Field(default=None, repr=False)

    @property
    def is_explicit(self) -> bool:
        """Whether certificate, key and CA are named one by one instead of looked for in `certs_dir`."""
        return self.key_file is not None or self.key_pem is not None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - read below by exact name instead
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - a .env file is the shell's business
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Argument, environment, file: the first that says something about a thing decides it."""
        arguments = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        environment = {name: os.environ.get(variable) for name, variable in VARIABLES.items()}
        file = Path(arguments.get("config_file") or "")

        def spell_in_file(name: str) -> str:
            return f"{show(file)}: {'tls.' if name in _TABLE else ''}{name}"

        return (
            _Layer(settings_cls, arguments, str),
            _Layer(settings_cls, environment, VARIABLES.__getitem__),
            _Layer(settings_cls, _read_table(file) if file.name else {}, spell_in_file),
        )

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, data: object, handler: ValidatorFunctionWrapHandler) -> MTLSConfig:
        try:
            config: MTLSConfig = handler(data)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
            name = ".".join(str(part) for part in first["loc"][:1])
            verdict = "not a setting" if first["type"] == "extra_forbidden" else "not usable"
            problem = f"{clip(name)[1:-1]} is {verdict}: {first['msg'].lower()}"
        else:
            return config
        # Not in the handler: the ValidationError there holds the input, a key even.
        raise ConfigError(problem)

    @model_validator(mode="after")
    def _check(self) -> MTLSConfig:
        given = [part for part in _PARTS if getattr(self, f"{part}_file") or getattr(self, f"{part}_pem")]
        missing = [part for part in _PARTS if part not in given]
        if given and missing:
            parts = f"TLS {' and '.join(given)} given without {' and '.join(missing)}"
            variables = " and ".join(VARIABLES[f"{part}_file"] for part in missing)
            raise ConfigError(f"{parts}: set {variables} too, or none of the three")
        try:
            check_trust_domain(self.trust_domain)
        except IdentityError as exc:
            raise ConfigError(f"{VARIABLES['trust_domain']}: {exc}") from None
        return self


class _Layer(InitSettingsSource):
    """
    One place that settings come from. Empty means unset.

    Args:
        spell: How a field is called in this place, for messages.
    """

    def __init__(
        self, settings_cls: type[BaseSettings], values: Mapping[str, object], spell: Callable[[str], str]
    ) -> None:
        given = {name: value for name, value in values.items() if not _is_unset(value)}
        super().__init__(settings_cls, given)
        self._spell = spell

    def __call__(self) -> dict[str, Any]:
        found = self.init_kwargs
        for part in _PARTS:
            if f"{part}_file" in found and f"{part}_pem" in found:
                both = f"{self._spell(f'{part}_file')} and {self._spell(f'{part}_pem')}"
                raise ConfigError(f"{both} are both set: keep one")
        settled = self.current_state
        return {
            name: self._value(name, value) for name, value in found.items() if not _is_settled(name, settled)
        }

    def _value(self, name: str, value: object) -> object:
        if name in _BOOLEANS and not isinstance(value, bool):
            word = str(value)
            if word.lower() not in _WORDS:
                wrong = f"{self._spell(name)}={clip(word)[1:-1]}"
                raise ConfigError(f"{wrong} is not a boolean: use true, false, 1, 0, yes or no")
            return _WORDS[word.lower()]
        if name == "key_pem" and isinstance(value, str):
            return SecretStr(value)  # from here on no repr shows it
        return value


def _is_unset(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _is_settled(name: str, by: Mapping[str, object]) -> bool:
    """Whether a closer layer, *by*, has decided the thing that field *name* is about."""
    part, _, form = name.partition("_")
    if part not in _PARTS or form not in {"file", "pem"}:
        return name in by
    return f"{part}_file" in by or f"{part}_pem" in by or "certs_dir" in by


def read_toml(path: Path) -> dict[str, Any]:
    """The configuration file *path*; whoever reads it takes what is its own. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(
            f"cannot read the configuration file {show(path)}: {(exc.strerror or '').lower()}"
        ) from None
    except ValueError as exc:  # not UTF-8, or not TOML
        raise ConfigError(f"the configuration file {show(path)} is not TOML: {exc}") from None


def _read_table(path: Path) -> dict[str, object]:
    """The TLS settings in the TOML file *path*; its other top-level keys are somebody else's."""
    document = read_toml(path)
    table = document.get("tls", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{show(path)}: tls is not a table: write [tls] above its settings")
    unknown = sorted(table.keys() - _TABLE)
    if unknown:
        known = ", ".join(sorted(_TABLE))
        raise ConfigError(f"{show(path)}: tls.{clip(unknown[0])[1:-1]} is not a setting: use {known}")
    return {**table, "trust_domain": document.get("trust_domain")}
