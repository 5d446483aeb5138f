"""What `parallax agent run` makes of `module:attribute`, up to the point where the agent would dial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallax.sdk import exits

MODULE = """
import os
from parallax.sdk import SecureAgent

class Plain(SecureAgent):
    def analyze(self, task, data):
        return data, 1.0

class Named(Plain):
    def __init__(self):
        super().__init__("named", "Its own name", ["own"])

class Picky(Plain):
    def __init__(self, model):
        super().__init__("picky", "Picky", [])

class Broken(Plain):
    def __init__(self):
        raise RuntimeError("no GPU here")

class Outer:
    Inner = Plain

made = Plain("made", "Made at import", [])
misnamed = {"not": "an agent"}
environment = dict(os.environ)
"""


@pytest.fixture
def module(empty_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module in the current directory, not imported yet."""
    monkeypatch.delitem(sys.modules, "shop_agents", raising=False)
    monkeypatch.setenv("PARALLAX_TLS_ENABLED", "true")  # and no certificate: so that no agent comes to dial
    path = empty_environment / "shop_agents.py"
    path.write_text(MODULE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "agent"),
    [
        (["shop_agents:Plain", "--id", "a-1", "--capability", "x", "--label", "zone=a=b"], "a-1"),
        (["shop_agents:Plain", "--id", "a-1", "--max-concurrency", "3", "--name", "A one"], "a-1"),
        (["shop_agents:Outer.Inner", "--id", "a-1"], "a-1"),
        (["shop_agents:Named"], "named"),
        (["shop_agents:made"], "made"),
    ],
)
def test_the_agent_that_is_named_is_the_one_that_starts(
    spawn: Any, module: Path, arguments: list[str], agent: str
) -> None:
    """It says whose certificate is missing: so it was built, and would have dialled."""
    ended = spawn("agent", "run", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith(f"parallax: certs holds no certificate of {agent}")
    assert f"parallax certs issue {agent} --kind agent" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shop_agents"], "'shop_agents' is not MODULE:CLASS, such as shop_agents:MyAgent"),
        (["shop_agents.py:Plain"], "there is no module shop_agents.py"),
        (["./shop_agents.py"], "is not MODULE:CLASS"),
        (["shop_agents:"], "is not MODULE:CLASS"),
        ([":Plain"], "is not MODULE:CLASS"),
        (["../shop:Plain"], "is not MODULE:CLASS"),
        (["nowhere:Plain", "--id", "a"], "there is no module nowhere"),
        (["nowhere.deeper:Plain", "--id", "a"], "there is no module nowhere"),
        (["shop_agents:Missing"], "shop_agents has no 'Missing': it has Broken, Named, Picky, Plain, made"),
        (["shop_agents:misnamed"], "shop_agents:misnamed is no SecureAgent but dict"),
        (["shop_agents:Outer"], "shop_agents:Outer is no SecureAgent but type"),
        (["shop_agents:Plain"], "shop_agents:Plain needs an id: give --id NAME"),
        (["shop_agents:Plain", "--name", "x"], "shop_agents:Plain needs an id: give --id NAME"),
        (["shop_agents:Picky"], "shop_agents:Picky needs an id"),
        (["shop_agents:Picky", "--id", "a"], "shop_agents:Picky takes (model), which --id do not fit"),
        (
            ["shop_agents:Broken"],
            "making shop_agents:Broken failed: RuntimeError: no GPU here (shop_agents.py, line 19)",
        ),
        (
            ["shop_agents:made", "--id", "b"],
            "shop_agents:made is an instance already, so --id cannot change it",
        ),
        (["shop_agents:Plain", "--id", "Not/OK"], "not a name: 'Not/OK'"),
        (["shop_agents:Plain", "--id", "a", "--capability", "A B"], "not a capability: 'A B'"),
        (
            ["shop_agents:Plain", "--id", "a", "--max-concurrency", "0"],
            "max_concurrency must be from 1 to 4096",
        ),
        (["shop_agents:Plain", "--id", "a", "--label", "zone"], "--label 'zone' is not KEY=VALUE"),
        (["shop_agents:Plain", "--id", "a", "--label", "=x"], "--label '=x' is not KEY=VALUE"),
        (
            ["shop_agents:Plain", "--id", "a", "--label", "z=1", "--label", "z=2"],
            "--label 'z' is given twice",
        ),
    ],
)
def test_what_cannot_be_run_is_one_line_with_the_cause(
    parallax: Any, module: Path, arguments: list[str], message: str
) -> None:
    ended = parallax("agent", "run", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert message in ended.err
    assert ended.err.startswith("parallax: ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import no_such_library",
            "ModuleNotFoundError: No module named 'no_such_library' (failing.py, line 1)",
        ),
        ("\nx = 1 / 0", "ZeroDivisionError: division by zero (failing.py, line 2)"),
        ("def f(:", "SyntaxError: invalid syntax (failing.py, line 1)"),
        ("raise ValueError('a\\nb')", r"ValueError: a\nb (failing.py, line 1)"),
        ("import json\njson.loads('{')", "(failing.py, line 2)"),
    ],
)
def test_a_module_that_fails_is_one_line_that_names_the_place(
    spawn: Any, empty_environment: Path, source: str, message: str
) -> None:
    (empty_environment / "failing.py").write_text(source, encoding="utf-8")
    ended = spawn("agent", "run", "failing:Agent", "--id", "a")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith("parallax: importing failing failed: ")
    assert message in ended.err
    assert ended.err.endswith("LOG_LEVEL=debug shows the traceback\n")
    assert ended.err.count("\n") == 1


def test_debugging_shows_the_traceback_of_a_module_that_fails(
    spawn: Any, empty_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_LEVEL", "debug")
    (empty_environment / "failing.py").write_text("x = 1 / 0", encoding="utf-8")
    ended = spawn("agent", "run", "failing:Agent", "--id", "a")
    assert ended.code == exits.CONFIG
    assert 'failing.py", line 1, in <module>' in ended.err
    assert "parallax: importing failing failed: ZeroDivisionError" in ended.err


def test_the_agents_module_sees_the_settings_of_the_command(
    spawn: Any, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may make its agent at import, or read them there: argument, environment and file alike."""
    Path("parallax.toml").write_text("lease_seconds = 7\n[tls]\nverify_client = true\n", encoding="utf-8")
    Path("looks.py").write_text(
        "import os\nraise LookupError({k: v for k, v in os.environ.items() if k.startswith('PARALLAX_')})",
        encoding="utf-8",
    )
    monkeypatch.setenv("PARALLAX_TLS_CERT_FILE", "put-aside-by-the-directory")
    monkeypatch.setenv("PARALLAX_TLS_KEY_FILE", "put-aside-by-the-directory")
    monkeypatch.setenv("PARALLAX_TLS_CA_FILE", "put-aside-by-the-directory")
    options = ("--config", "parallax.toml", "--certs-dir", "elsewhere", "--control-plane", "there:1")
    seen = spawn("agent", "run", "looks:Agent", "--id", "a", *options).err
    for name, value in {
        "PARALLAX_LEASE_SECONDS": "7.0",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_CERTS_DIR": "elsewhere",
        "PARALLAX_CONTROL_PLANE": "there:1",
        "PARALLAX_TLS_ENABLED": "true",
    }.items():
        assert f"'{name}': '{value}'" in seen
    assert "put-aside" not in seen


def test_the_current_directory_is_imported_from(module: Path) -> None:
    """Also by the console script, where Python itself does not see to it."""
    command = "import sys; sys.path.pop(0); from parallax.sdk.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", command, "agent", "run", "shop_agents:made"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr.startswith("parallax: certs holds no certificate of made")


def test_a_current_directory_that_is_gone_is_one_line(parallax: Any, module: Path) -> None:
    module.unlink()
    module.parent.rmdir()
    ended = parallax("agent", "run", "shop_agents:Plain", "--id", "a")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith("parallax: the current directory is gone")
