"""The settings of TLS: where they come from, which one wins, and what a wrong one gets."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from parallax.security.config import VARIABLES, MTLSConfig, MTLSOverrides, get_mtls_config
from parallax.security.errors import ConfigError

SECRET = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG-do-not-show\n-----END PRIVATE KEY-----\n"
BOOLEANS = ("PARALLAX_TLS_ENABLED", "PARALLAX_TLS_VERIFY_CLIENT", "PARALLAX_TLS_ALLOW_INSECURE")
FILES = ("PARALLAX_TLS_CA_FILE", "PARALLAX_TLS_CERT_FILE", "PARALLAX_TLS_KEY_FILE")
FIELD = {variable: field for field, variable in VARIABLES.items()}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "parallax.toml"
        path.write_text(text)
        return path

    return write


def message(exc: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(exc.value)
    assert "\n" not in text
    assert "do-not-show" not in repr(exc.value)
    return text


def test_defaults_are_the_documented_ones() -> None:
    config = get_mtls_config()
    assert config == MTLSConfig(
        enabled=False,
        certs_dir=Path("./certs"),
        verify_client=False,
        allow_insecure=False,
        trust_domain="parallax.local",
    )
    assert (config.ca_file, config.cert_file, config.key_file) == (None, None, None)
    assert (config.ca_pem, config.cert_pem, config.key_pem) == (None, None, None)
    assert not config.is_explicit


def test_every_variable_is_read_under_its_documented_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_CERTS_DIR": "/certs",
        "PARALLAX_TLS_CA_FILE": "/ca.pem",
        "PARALLAX_TLS_CERT_FILE": "/cert.pem",
        "PARALLAX_TLS_KEY_PEM": SECRET,
        "PARALLAX_TLS_VERIFY_CLIENT": "yes",
        "PARALLAX_TLS_ALLOW_INSECURE": "1",
        "PARALLAX_TRUST_DOMAIN": "example.org",
    }.items():
        monkeypatch.setenv(name, value)
    config = get_mtls_config()
    assert config.enabled
    assert config.verify_client
    assert config.allow_insecure
    assert config.is_explicit
    assert config.certs_dir == Path("/certs")
    assert (config.ca_file, config.cert_file, config.key_file) == (Path("/ca.pem"), Path("/cert.pem"), None)
    assert config.key_pem == SecretStr(SECRET)
    assert config.trust_domain == "example.org"


@pytest.mark.parametrize("other", ["ENABLED", "enabled", "CERTS_DIR", "parallax_tls_enabled", "TRUST_DOMAIN"])
def test_other_variables_mean_nothing(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(other, "true")
    assert get_mtls_config() == MTLSConfig()


@pytest.mark.parametrize("variable", BOOLEANS)
@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("true", True),
        ("1", True),
        ("yes", True),
        ("YES", True),
        ("True", True),
        ("false", False),
        ("0", False),
        ("no", False),
        ("No", False),
        ("FALSE", False),
    ],
)
def test_six_words_are_booleans_in_any_case(
    *, variable: str, word: str, meaning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, word)
    assert getattr(get_mtls_config(), FIELD[variable]) is meaning


@pytest.mark.parametrize("variable", BOOLEANS)
@pytest.mark.parametrize(
    "word",
    ["ture", "on", "off", "t", "f", "y", "n", "2", "01", " true", "true\n", "None", "\uff59\uff45\uff53"],
)
def test_any_other_word_is_an_error_that_names_the_variable(
    variable: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, word)
    with pytest.raises(ConfigError) as exc:
        get_mtls_config()
    assert message(exc).startswith(f"{variable}=")
    assert message(exc).endswith("is not a boolean: use true, false, 1, 0, yes or no")


def test_the_error_of_a_boolean_reads_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_TLS_ENABLED", "ture")
    with pytest.raises(ConfigError) as exc:
        get_mtls_config()
    assert message(exc) == "PARALLAX_TLS_ENABLED=ture is not a boolean: use true, false, 1, 0, yes or no"


@given(st.text().filter(lambda text: text.lower() not in {"", "true", "false", "1", "0", "yes", "no"}))
def test_no_other_text_at_all_is_a_boolean(text: str) -> None:
    with pytest.raises(ConfigError) as exc:
        MTLSConfig(enabled=text)  # type: ignore[arg-type]
    assert message(exc).startswith("enabled=")


@pytest.mark.parametrize("variable", VARIABLES.values())
def test_an_empty_variable_is_unset(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "")
    assert get_mtls_config() == MTLSConfig()


def test_argument_wins_over_environment_over_file_over_default(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        'trust_domain = "of.file"\n[tls]\nenabled = true\ncerts_dir = "/of/file"\nverify_client = true\n'
    )
    monkeypatch.setenv("PARALLAX_CERTS_DIR", "/of/environment")
    monkeypatch.setenv("PARALLAX_TRUST_DOMAIN", "of.environment")
    config = get_mtls_config(config_file=file, trust_domain="of.argument")
    assert config.trust_domain == "of.argument"
    assert config.certs_dir == Path("/of/environment")
    assert config.enabled
    assert config.verify_client
    assert not config.allow_insecure


def test_the_documented_programmatic_use_takes_nothing_given_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PARALLAX_TLS_ENABLED", "false")
    monkeypatch.setenv("PARALLAX_CERTS_DIR", "/elsewhere")
    monkeypatch.setenv("PARALLAX_TLS_VERIFY_CLIENT", "false")
    monkeypatch.setenv("PARALLAX_TLS_ALLOW_INSECURE", "true")
    for variable in FILES:
        monkeypatch.setenv(variable, "/elsewhere/file.pem")
    config = MTLSConfig(enabled=True, certs_dir=Path("/path"), verify_client=True, allow_insecure=False)
    assert config.enabled
    assert config.verify_client
    assert not config.allow_insecure
    assert config.certs_dir == Path("/path")
    assert not config.is_explicit, "files named in the environment won over the directory that was given"


def test_a_file_given_as_argument_wins_over_content_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PARALLAX_TLS_KEY_PEM", SECRET)
    config = MTLSConfig(ca_file=Path("ca"), cert_file=Path("cert"), key_file=Path("key"))
    assert config.key_file == Path("key")
    assert config.key_pem is None


def test_files_win_over_a_directory_from_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_CERTS_DIR", "/certs")
    for variable in FILES:
        monkeypatch.setenv(variable, "/file.pem")
    assert get_mtls_config().is_explicit


def test_none_as_an_override_means_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_CERTS_DIR", "/certs")
    assert get_mtls_config(certs_dir=None, enabled=None).certs_dir == Path("/certs")


@pytest.mark.parametrize("part", ["CA", "CERT", "KEY"])
def test_file_and_content_of_the_same_thing_are_an_error(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PARALLAX_TLS_{part}_FILE", "/file.pem")
    monkeypatch.setenv(f"PARALLAX_TLS_{part}_PEM", SECRET)
    with pytest.raises(ConfigError) as exc:
        get_mtls_config()
    both = f"PARALLAX_TLS_{part}_FILE and PARALLAX_TLS_{part}_PEM"
    assert message(exc) == f"{both} are both set: keep one"


@pytest.mark.parametrize("form", ["FILE", "PEM"])
@pytest.mark.parametrize(
    "given_parts", [{"CA"}, {"CERT"}, {"KEY"}, {"CA", "CERT"}, {"CA", "KEY"}, {"CERT", "KEY"}]
)
def test_some_of_the_three_parts_are_an_error_that_names_the_others(
    given_parts: set[str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in given_parts:
        monkeypatch.setenv(f"PARALLAX_TLS_{part}_{form}", SECRET)
    with pytest.raises(ConfigError) as exc:
        get_mtls_config()
    for part in {"CA", "CERT", "KEY"} - given_parts:
        assert f"PARALLAX_TLS_{part}_FILE" in message(exc)


def test_a_key_is_in_no_text_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """pydantic-settings logs what it collected when its own debug variable is set."""
    monkeypatch.setenv("PYDANTIC_SETTINGS_DEBUG", "1")
    for part in ("CA", "CERT", "KEY"):
        monkeypatch.setenv(f"PARALLAX_TLS_{part}_PEM", SECRET if part == "KEY" else "public")
    with caplog.at_level(logging.DEBUG):
        config = get_mtls_config()
    for text in (repr(config), str(config), f"{config.model_dump()}", config.model_dump_json(), caplog.text):
        assert "do-not-show" not in text


@pytest.mark.parametrize(
    "arguments", [{"key_pem": SECRET}, {"key_pem": SECRET.encode() + b"\xff"}, {"key_pem": [SECRET]}]
)
def test_a_key_is_in_no_text_of_an_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as exc:
        MTLSConfig(**{**arguments, "certs_dir": 3})
    message(exc)
    assert exc.value.__context__ is None, "a traceback would show the pydantic error too"


def test_it_is_immutable() -> None:
    config = MTLSConfig()
    with pytest.raises(ValidationError):
        config.enabled = True


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"certs_dir": 3}, "certs_dir is not usable: input is not a valid path"),
        ({"enabled": 2}, "enabled=2 is not a boolean"),
        ({"verify_clients": True}, "verify_clients is not a setting"),
        ({"trust_domain": "Not A Domain"}, "PARALLAX_TRUST_DOMAIN: not a trust domain"),
        ({"trust_domain": "a\nb"}, "PARALLAX_TRUST_DOMAIN: not a trust domain"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError) as exc:
        MTLSConfig(**arguments)
    assert message(exc).startswith(cause)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('[tls]\nenabled = "ture"', "parallax.toml: tls.enabled=ture is not a boolean"),
        ("[tls]\nenabeld = true", "parallax.toml: tls.enabeld is not a setting: use allow_insecure"),
        ('[tls]\nkey_pem = "x"', "parallax.toml: tls.key_pem is not a setting"),
        ("[tls]\ncert_file = 3", "cert_file is not usable"),
        ('[tls]\ncert_file = "x"', "TLS cert given without ca and key"),
        ("tls = true", "parallax.toml: tls is not a table"),
        ("trust_domain = 3", "trust_domain is not usable"),
        ("[tls", "parallax.toml is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(text: str, cause: str, write: Any) -> None:
    with pytest.raises(ConfigError) as exc:
        get_mtls_config(config_file=write(text))
    assert cause in message(exc)


def test_a_file_that_is_not_utf8_or_not_there_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "parallax.toml"
    with pytest.raises(ConfigError) as exc:
        get_mtls_config(config_file=path)
    assert message(exc) == f"cannot read the configuration file {path}: no such file or directory"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        get_mtls_config(config_file=path)


def test_the_rest_of_the_file_is_for_others(write: Any) -> None:
    file = write('listen = "127.0.0.1:1"\n[tls]\nenabled = true\nallow_insecure = "no"\n[other]\nx = 1\n')
    config = get_mtls_config(config_file=file)
    assert config.enabled
    assert not config.allow_insecure


def test_overrides_are_exactly_the_fields() -> None:
    assert set(get_type_hints(MTLSOverrides)) == set(VARIABLES)
    assert set(MTLSConfig.model_fields) == {*VARIABLES, "config_file"}


def test_the_package_and_its_provider_do_not_load_pydantic() -> None:
    """pydantic-settings costs 0.4 s; a command that is given its configuration need not pay it."""
    code = (
        "import sys, parallax.security;"
        "assert not {'cryptography', 'grpc', 'pydantic'} & set(sys.modules), 'the package';"
        "import parallax.security.provider, parallax.security.tls;"
        "assert 'pydantic' not in sys.modules, 'the provider'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
