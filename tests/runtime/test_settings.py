from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from parallax.runtime.address import parse_address
from parallax.runtime.logs import LogFormat, LogLevel
from parallax.runtime.settings import VARIABLES, Overrides, Settings, load_settings
from parallax.security.errors import ConfigError

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "parallax.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_are_the_documented_ones() -> None:
    settings = load_settings()
    assert settings.control_plane == "localhost:50051"
    assert settings.listen is None
    assert settings.http_listen == "127.0.0.1:8080"
    assert settings.metrics_listen is None
    assert settings.identity == "client/cli"
    assert settings.ca_passphrase_file is None
    assert settings.policy_file is None
    assert settings.log_level is LogLevel.INFO
    assert settings.log_format is LogFormat.CONSOLE
    assert settings.max_payload_bytes == 4 * 1024 * 1024
    assert settings.queue_limit == 256
    assert settings.approval == timedelta(hours=1)
    assert settings.lease == timedelta(seconds=15)
    assert settings.drain == timedelta(seconds=30)
    assert settings.crl_lifetime == timedelta(days=1)


def test_an_agent_may_do_without_a_control_plane() -> None:
    assert load_settings(control_plane="none").control_plane == "none"
    for wrong in ("None", "nothing", ""):
        with pytest.raises(ConfigError, match="control_plane"):
            load_settings(control_plane=wrong)


@pytest.mark.parametrize("good", ["http://[::1]:9464/crl/", "http://crl.example.com", "http://h:80/a/b-c"])
def test_a_url_of_crls_is_taken_as_it_is(good: str) -> None:
    assert load_settings(crl_url=good).crl_url == good


@pytest.mark.parametrize(
    "wrong",
    ["https://h/crl", "h/crl", "http://", "http://h/\u00e9", "http://h/a b", "http://u@h/", "http://h/?q"],
)
def test_what_a_certificate_cannot_say_of_crls_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"crl_url: not the URL of a folder: .*http://host:port/crl"):
        load_settings(crl_url=wrong)


@pytest.mark.parametrize("wrong", ["http://h:8080", "h:8080", "https://h", "https://u@h:1", "https://h:1/v1"])
def test_where_nobody_could_enroll_is_refused(wrong: str) -> None:
    assert load_settings(enroll_url="https://[::1]:8080").enroll_url == "https://[::1]:8080"
    with pytest.raises(ConfigError, match=r"enroll_url: not where one enrolls: .*https://localhost:8080"):
        load_settings(enroll_url=wrong)


def test_every_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {
        "PARALLAX_CONTROL_PLANE": "cp.example.com:443",
        "PARALLAX_LISTEN": "[::1]:50051",
        "PARALLAX_ADVERTISE": "agent.example.com:50052",
        "PARALLAX_HTTP_LISTEN": "none",
        "PARALLAX_ENROLL_URL": "https://cp.example.com:8443",
        "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
        "PARALLAX_IDENTITY": "client/admin",
        "PARALLAX_DATA_DIR": "/srv/parallax",
        "PARALLAX_AUDIT_DAYS": "30",
        "PARALLAX_CA_PASSPHRASE_FILE": "pass.txt",
        "PARALLAX_CRL_LIFETIME_SECONDS": "3600",
        "PARALLAX_CRL_URL": "http://crl.example.com/crl",
        "PARALLAX_POLICY_FILE": "policy.toml",
        "PARALLAX_ISSUANCE_FILE": "issuance.toml",
        "LOG_LEVEL": "DEBUG",
        "PARALLAX_LOG_FORMAT": "Json",
        "PARALLAX_MAX_PAYLOAD_BYTES": "1024",
        "PARALLAX_QUEUE_LIMIT": "7",
        "PARALLAX_APPROVAL_SECONDS": "60",
        "PARALLAX_LEASE_SECONDS": "2.5",
        "PARALLAX_DRAIN_SECONDS": "0",
        "PARALLAX_CERTS_POLL_SECONDS": "0.5",
        "PARALLAX_REVOCATION_MAX_AGE": "60",
    }.items():
        monkeypatch.setenv(variable, value)
    assert load_settings().model_dump() == {
        "control_plane": "cp.example.com:443",
        "listen": "[::1]:50051",
        "advertise": "agent.example.com:50052",
        "http_listen": "none",
        "enroll_url": "https://cp.example.com:8443",
        "metrics_listen": "127.0.0.1:0",
        "identity": "client/admin",
        "data_dir": Path("/srv/parallax"),
        "audit_days": 30.0,
        "ca_passphrase_file": Path("pass.txt"),
        "crl_lifetime_seconds": 3600.0,
        "crl_url": "http://crl.example.com/crl",
        "policy_file": Path("policy.toml"),
        "issuance_file": Path("issuance.toml"),
        "log_level": LogLevel.DEBUG,
        "log_format": LogFormat.JSON,
        "max_payload_bytes": 1024,
        "queue_limit": 7,
        "approval_seconds": 60.0,
        "lease_seconds": 2.5,
        "drain_seconds": 0.0,
        "certs_poll_seconds": 0.5,
        "revocation_max_age_seconds": 60.0,
    }


def test_every_field_has_a_variable_and_an_argument() -> None:
    assert set(Settings.model_fields) == set(VARIABLES) == set(get_type_hints(Overrides))


def test_argument_beats_environment_beats_file_beats_default(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path = write("queue_limit = 3")
    assert load_settings().queue_limit == 256
    assert load_settings(path).queue_limit == 3
    monkeypatch.setenv("PARALLAX_QUEUE_LIMIT", "2")
    assert load_settings(path).queue_limit == 2
    assert load_settings(path, queue_limit=1).queue_limit == 1


def test_none_as_an_argument_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_QUEUE_LIMIT", "2")
    assert load_settings(None, queue_limit=None, listen=None).queue_limit == 2


def test_empty_is_unset(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setenv("PARALLAX_QUEUE_LIMIT", "")
    monkeypatch.setenv("PARALLAX_LISTEN", "")
    settings = load_settings(write('queue_limit = 3\nmetrics_listen = ""'))
    assert settings.queue_limit == 3
    assert settings.listen is None
    assert settings.metrics_listen is None


def test_only_the_exact_names_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN", "listen", "parallax_listen", "PARALLAX_LOG_LEVEL", "log_level"):
        monkeypatch.setenv(name, "127.0.0.1:1")
    assert load_settings().listen is None
    assert load_settings().log_level is LogLevel.INFO


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError):
        load_settings().queue_limit = 3


def test_what_is_for_tls_in_the_file_is_left_to_tls(write: Write) -> None:
    path = write('queue_limit = 3\ntrust_domain = "example.org"\n[tls]\nenabled = true\nnonsense = 1')
    assert load_settings(path).queue_limit == 3


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("PARALLAX_LISTEN", "50051", "host:port"),
        ("PARALLAX_LISTEN", "::1:50051", "host:port"),
        ("PARALLAX_METRICS_LISTEN", "localhost:65536", "0 to 65535"),
        ("PARALLAX_CONTROL_PLANE", ":50051", "all interfaces"),
        ("PARALLAX_IDENTITY", "admin", "client/cli"),
        ("PARALLAX_IDENTITY", "client/../admin", "not a name"),
        ("PARALLAX_IDENTITY", "robot/admin", "not a kind"),
        ("LOG_LEVEL", "verbose", "should be 'debug', 'info', 'warning' or 'error', not 'verbose'"),
        ("PARALLAX_LOG_FORMAT", "xml", "should be 'console' or 'json', not 'xml'"),
        ("PARALLAX_QUEUE_LIMIT", "0", "greater than or equal to 1, not '0'"),
        ("PARALLAX_QUEUE_LIMIT", "many", "valid integer"),
        ("PARALLAX_MAX_PAYLOAD_BYTES", "4 MiB", "valid integer"),
        ("PARALLAX_MAX_PAYLOAD_BYTES", str(1 << 31), "less than or equal to 1073741824"),
        ("PARALLAX_LEASE_SECONDS", "nan", "not 'nan'"),
        ("PARALLAX_LEASE_SECONDS", "0.1", "greater than or equal to 1"),
        ("PARALLAX_DRAIN_SECONDS", "inf", "not 'inf'"),
        ("PARALLAX_CERTS_POLL_SECONDS", "0", "greater than or equal to 0.1"),
        ("PARALLAX_DRAIN_SECONDS", "-1", "greater than or equal to 0"),
        ("PARALLAX_LISTEN", "evil\nline:1", r"evil\nline"),
        ("PARALLAX_QUEUE_LIMIT", "9" * 5000, "…"),
    ],
)
def test_bad_variable_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert says in message.replace(r"\u2026", "…")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("queue_limit = 0", "queue_limit: should be greater than or equal to 1, not '0'"),
        ("listen = 50051", "listen: should be a valid string, not '50051'"),
        ('lease = "15"', "'lease' is no setting: use one of control_plane,"),
        ("[runtime]\nqueue_limit = 1", "'runtime' is no setting"),
        ("config_file = 1", "'config_file' is no setting"),
        ("queue_limit = ", "is not TOML"),
    ],
)
def test_bad_file_is_named_in_one_line(write: Write, text: str, says: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*none\.toml"):
        load_settings(tmp_path / "none.toml")


def test_file_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "parallax.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_settings(path)


def test_bad_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^listen: 'x' is not an address"):
        load_settings(listen="x")


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^lease: "):
        load_settings(lease=3)  # type: ignore[call-arg]  # that is what is tested


def test_environment_is_read_when_asked_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "PARALLAX_QUEUE_LIMIT" not in os.environ
    monkeypatch.setenv("PARALLAX_QUEUE_LIMIT", "9")
    assert Settings().queue_limit == 9


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:50051", "localhost", 50051),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("0.0.0.0:65535", "0.0.0.0", 65535),  # noqa: S104 - read, not listened on
        ("[::1]:50051", "::1", 50051),
        ("[0:0::1]:1", "::1", 1),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("control_plane-1.example.com:443", "control_plane-1.example.com", 443),
    ],
)
def test_address_is_parsed(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "localhost",
        "localhost:",
        ":1",
        "localhost:65536",
        "localhost:-1",
        "localhost:1 ",
        " localhost:1",
        "localhost:٣",
        "local host:1",
        "::1:1",
        "[]:1",
        "[localhost]:1",
        "[::1]",
        "[::1]1",
        "http://localhost:1",
        "localhost:1/path",
        "-x:1",
        "ünïcode:1",
        "localhost:1\n",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an address") as caught:
        parse_address(text)
    assert "\n" not in str(caught.value)


@given(st.text() | st.from_regex(r"\[?[a-z0-9:.]*\]?:[0-9]{0,6}", fullmatch=True))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = parse_address(text)
    except ConfigError:
        return
    assert host
    assert 0 <= port <= 65535
    again = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert parse_address(again) == (host, port)
