"""What holds for the whole `parallax` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import psutil
import pytest

from parallax.sdk import exits
from parallax.sdk.cli import INTERRUPTED, READER_GONE
from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import KeyTypeName, LayoutName
from parallax.sdk.cli.render import printable
from parallax.security.keys import KeyType
from parallax.security.layouts import WITH_ISSUER

if TYPE_CHECKING:
    from parallax.sdk import ParallaxClient

COMMANDS = [
    "ca init",
    "ca show",
    "ca rotate",
    "ca status",
    "ca abort",
    "certs generate",
    "certs issue",
    "certs renew",
    "certs inspect",
    "certs verify",
    "certs list",
    "certs revoke",
    "certs reinstate",
    "certs revoked",
    "control-plane start",
    "agent run",
    "agents list",
    "agents pending",
    "agents approve",
    "agents reject",
    "token create",
    "token list",
    "token revoke",
    "enroll",
    "call",
    "doctor",
]
WITHIN_S = 20.0
# Slow to import, and of no use to `--help`.
HEAVY = {"grpc", "cryptography", "pydantic_settings", "structlog", "uvicorn", "prometheus_client", "fastapi"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(parallax: Any, command: str) -> None:
    ended = parallax(*command.split(), "--help")
    assert ended.code == exits.OK
    assert f"Usage: parallax {command}" in ended.out
    assert ended.err == ""


@pytest.mark.parametrize("group", ["", "ca", "certs", "control-plane", "agent", "agents", "token"])
def test_a_group_alone_shows_its_help_and_is_wrong_usage(parallax: Any, group: str) -> None:
    ended = parallax(*group.split())
    assert ended.code == exits.CONFIG
    assert "Commands" in ended.out
    assert ended.err == ""


def test_the_version_is_that_of_the_distribution(spawn: Any) -> None:
    from importlib.metadata import version

    assert spawn("--version") == (exits.OK, f"parallax {version('parallax-mesh')}\n", "")


def test_help_imports_nothing_slow(empty_environment: Path) -> None:
    code = (
        "import sys; from parallax.sdk.cli.app import run; run(['--help']); sys.exit(' '.join(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert {name.partition(".")[0] for name in ended.stderr.split()} & HEAVY == set()


def test_the_choices_are_those_of_the_enumerations() -> None:
    """They are spelled twice, so that `--help` need not import cryptography."""
    assert list(get_args(KeyTypeName)) == list(KeyType)
    assert list(get_args(LayoutName)) == list(WITH_ISSUER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["certz"], "parallax: no such command 'certz'. Did you mean 'certs'?: see 'parallax --help'\n"),
        (["certs", "issue"], "parallax: missing argument 'NAME': see 'parallax certs issue --help'\n"),
        (["call", "a", "b", "--timeout", "nan"], "is not a number of seconds"),
        (["call", "a", "b", "--wait-for-agent", "-1"], "is not a number of seconds"),
        (["certs", "issue", "a", "--kind", "robot"], "'service', 'agent', 'client'"),
        (["certs", "issue", "a", "--kind", "agent", "--days", "0"], "'--days'"),
        (["ca", "init", "--key-type", "ed25519"], "'p256', 'rsa-2048', 'rsa-4096'"),
        (["ca", "init", "--passphrase", "secret"], "parallax: no such option: --passphrase"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(
    parallax: Any, arguments: list[str], message: str
) -> None:
    ended = parallax(*arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert message in ended.err
    assert ended.err.startswith("parallax: ")
    assert ended.err.endswith(" --help'\n")
    assert ended.err.count("\n") == 1


def test_a_wrong_setting_is_one_line_that_names_it(parallax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_TLS_ENABLED", "ture")
    ended = parallax("certs", "list")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith("parallax: PARALLAX_TLS_ENABLED=ture ")
    assert ended.err.count("\n") == 1


def test_a_configuration_file_says_where_certificates_lie(parallax: Any, tmp_path: Path) -> None:
    (tmp_path / "parallax.toml").write_text(
        'trust_domain = "example.org"\n[tls]\ncerts_dir = "elsewhere"\n', encoding="utf-8"
    )
    assert parallax("certs", "generate", "--config", "parallax.toml").code == exits.OK
    ended = parallax("certs", "inspect", "elsewhere/cli/cert.pem", "--config", "parallax.toml", "--json")
    assert json.loads(ended.out)["identity"] == "spiffe://example.org/client/cli"


def test_an_argument_wins_over_the_environment_and_that_over_the_file(
    parallax: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parallax.toml").write_text('[tls]\ncerts_dir = "by-file"\n', encoding="utf-8")
    monkeypatch.setenv("PARALLAX_CERTS_DIR", "by-variable")
    parallax("ca", "init", "--config", "parallax.toml")
    parallax("ca", "init", "--config", "parallax.toml", "--certs-dir", "by-argument")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["by-argument", "by-variable"]


def test_a_reader_that_goes_away_ends_the_command_without_a_word(spawn: Any) -> None:
    spawn("certs", "generate")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        ended = subprocess.run(
            [sys.executable, "-m", "parallax.sdk.cli", "certs", "list"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (READER_GONE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device of Linux")
def test_output_that_cannot_be_written_is_a_failure(spawn: Any) -> None:
    spawn("certs", "generate")
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "parallax.sdk.cli", "certs", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert ended.returncode == exits.CONFIG
    assert (
        ended.stderr
        == b"parallax: the output cannot be written: no space left on device: lead it elsewhere\n"
    )


def test_ctrl_c_ends_the_command_without_a_word(empty_environment: Path) -> None:
    """It reads from a pipe that stays empty, so that there is something to interrupt."""
    pipe = empty_environment / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [sys.executable, "-m", "parallax.sdk.cli", "call", "agent-1", "echo", "--data-file", "pipe"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            writing = _open_once_read(pipe)
            _wait_until_asleep(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=WITHIN_S)
            os.close(writing)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (INTERRUPTED, b"", b"")


def _wait_until_asleep(pid: int) -> None:
    """Until it waits in its read: a signal just before that would find nothing to interrupt."""
    asleep = 0
    deadline = time.monotonic() + WITHIN_S
    while asleep < 3 and time.monotonic() < deadline:
        asleep = asleep + 1 if psutil.Process(pid).status() == psutil.STATUS_SLEEPING else 0
        time.sleep(0.02)


def _open_once_read(pipe: Path) -> int:
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü", "plain ü"),
        ("a\nb", r"a\nb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b", r"\x9b"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_is_shown_neither_breaks_the_line_nor_steers_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_command_leaves_metrics_to_the_processes_that_stay(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given their variables, and a `ca rotate` may last for longer than a client waits with that."""
    serve()
    monkeypatch.setenv("PARALLAX_TLS_ENABLED", "true")
    monkeypatch.setenv("PARALLAX_METRICS_LISTEN", "127.0.0.1:9464")

    async def serves(client: ParallaxClient) -> str | None:
        assert client._route is not None
        return client._route._keeper._metrics_listen

    assert ask(serves) is None
