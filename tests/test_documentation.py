"""What is documented runs: every command in README and docs, in the order in which a reader types them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from parallax.runtime.methods import METHODS
from parallax.runtime.settings import VARIABLES
from parallax.security.config import VARIABLES as TLS_VARIABLES
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# What a reader's eyes do between two blocks: wait until the fleet that he started is there.
READY = """
for attempt in $(seq 100); do
  parallax agents list --json 2>/dev/null | grep -q '"ready"' && break; sleep 0.1
done
"""
SHELL_S = 240.0  # finds what hangs: a machine that is busy takes a minute for some
STOP = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n"
SERVING = """
[ -e certs ] || parallax certs generate
parallax control-plane start &
for attempt in $(seq 600); do
  (exec 3<>/dev/tcp/127.0.0.1/$PARALLAX_TEST_PORT) 2>/dev/null && break; sleep 0.1
done
"""


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of *language* in *document*."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """Runs a script in an empty directory with the `parallax` command, on free ports, as one session."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    port = free_port()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PARALLAX_CONTROL_PLANE": f"localhost:{port}",
        "PARALLAX_TEST_PORT": str(port),
    }
    children: list[subprocess.Popen[str]] = []

    def run(script: str) -> subprocess.CompletedProcess[str]:
        # The default ports may be taken; agents have none unless they are set.
        script = script.replace(":50052", f":{free_port()}")
        script = script.replace("localhost:50051", f"localhost:{port}").replace(
            "parallax control-plane start",
            f"PARALLAX_LISTEN=127.0.0.1:{port} PARALLAX_METRICS_LISTEN=127.0.0.1:{free_port()} "
            f"PARALLAX_HTTP_LISTEN=127.0.0.1:{free_port()} "
            "parallax control-plane start",
        )
        child = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"{STOP}{script}"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",  # s_client shows what HTTP/2 says
            start_new_session=True,
        )
        children.append(child)
        output, _ = child.communicate(timeout=SHELL_S)
        return subprocess.CompletedProcess(script, child.returncode, output, "")

    yield run
    for child in children:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # what the script left in the background, if anything
        except ProcessLookupError:
            continue


def test_readme_shows_the_agent_that_the_examples_hold() -> None:
    first, *_ = blocks(ROOT / "README.md", "python")
    assert first == (ROOT / "examples" / "sentiment.py").read_text()
    assert len(first.splitlines()) == 12


def test_readme_names_make_targets_that_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([a-z]+)", "\n".join(blocks(ROOT / "README.md", "sh")), re.MULTILINE)
    assert named
    assert set(named) <= set(targets)


@pytest.mark.timeout(300)
def test_readme_commands_run_as_written(shell: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    _, fleet, calls, _ = blocks(ROOT / "README.md", "sh")
    _, client = blocks(ROOT / "README.md", "python")
    done = shell(f"{fleet}{READY}{calls}python - <<'END'\n{client}END\n")
    assert done.returncode == 0, done.stdout
    assert "agent-1" in done.stdout
    assert "{'mood': 'good'} 0.9" in done.stdout


@pytest.mark.timeout(300)
def test_an_agent_elsewhere_answers_after_four_commands(
    shell: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    _, fleet, _, elsewhere = blocks(ROOT / "README.md", "sh")
    assert len(elsewhere.splitlines()) == 4
    done = shell(
        f"{fleet}{READY}{elsewhere}cd ..\n"
        """parallax call agent-7 rate --wait-for-agent 30 '{"text": "This is great"}'"""
    )
    assert done.returncode == 0, done.stdout
    assert "is enrolled until" in done.stdout
    assert "good" in done.stdout


@pytest.mark.timeout(300)
def test_fleet_commands_run_as_written(shell: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    _, fleet, *_ = blocks(ROOT / "README.md", "sh")
    page = ROOT / "docs" / "fleet.md"
    listing, watching, removing = blocks(page, "sh")
    [watch] = blocks(page, "python")
    synced = "until grep -q synced changes.log && grep -q synced changes.jsonl; do sleep 0.1; done\n"
    told = "until grep -q removed changes.log; do sleep 0.1; done\n"
    done = shell(
        f"{fleet}{READY}{listing}{watching}python - <<'END'\n{watch}END\n"
        f"{synced}{removing}{told}cat changes.log changes.jsonl"
    )
    assert done.returncode == 0, done.stdout
    assert "added agent-1\nsynced" in done.stdout
    assert "agent-1 removed\n" in done.stdout
    assert "no-longer-there is not registered\n" in done.stdout
    assert '{"event": "synced"}' in done.stdout
    assert " removed agent-1 " in done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", ["critic", "countdown"])
def test_tasks_examples_run_as_written(
    example: str, shell: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    _, fleet, *_ = blocks(ROOT / "README.md", "sh")
    page = ROOT / "docs" / "tasks.md"
    critic, judging, countdown, counting = blocks(page, "python")
    [streaming] = blocks(page, "sh")
    agent, client, command, shown = {
        "critic": (critic, judging, "", "2.5 Review(text='broken', stars=1)\n"),
        "countdown": (
            countdown,
            counting,
            streaming,
            "".join(f"{number}\nconfidence 1, by agent-1\n" for number in (3, 2, 1))
            + "".join(f"{number} 1.0 agent-1\n" for number in (10, 9, 8)),
        ),
    }[example]
    started = fleet.replace("python examples/sentiment.py", f"python {example}.py")
    assert example in started
    done = shell(
        f"cat >{example}.py <<'END'\n{agent}END\n{started}{READY}{command}python - <<'END'\n{client}END\n"
    )
    assert done.returncode == 0, done.stdout
    assert shown in done.stdout, done.stdout
    assert "7 1.0 agent-1" not in done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_run_as_written(
    document: Path,
    shell: Callable[[str], subprocess.CompletedProcess[str]],
    require_tool: Callable[[str], str],
) -> None:
    if document.name in {"README.md", "fleet.md", "tasks.md"}:
        return  # above: their commands need a fleet
    require_tool("openssl")
    for block in blocks(document, "sh"):
        words = (
            "s_client",
            "--ledger",
            "agents label",
            "agents pending",
            "audit list",
            "ca policy",
            "ca rotate",
            "certs pin",
            "certs renew",
            "certs revoke",
            "certs unpin",
            "parallax token",
        )
        needs_server = any(word in block for word in words)
        script = f"{SERVING}{block}" if needs_server else block
        done = shell(f"export PARALLAX_TLS_ENABLED=true PARALLAX_TLS_VERIFY_CLIENT=true\n{script}")
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        if "s_client" in block:
            assert "Verify return code: 0 (ok)" in done.stdout
        if document.name == "direct.md":
            assert "('sentiment',) True\n({'mood': 'good'}, 0.9)\n" in done.stdout


def test_every_metric_is_documented_and_no_other() -> None:
    folders = (ROOT / name for name in ("control_plane", "runtime", "sdk"))
    code = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    made = set(re.findall(r'"(parallax_[a-z_]+)"', code))
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = re.findall(r"^\| `(parallax_[a-z_]+)`", page, re.MULTILINE)
    assert {name.removesuffix("_total") for name in documented} == made


def test_every_setting_is_in_the_readme_by_variable_and_key() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)`[^|]* \| `(?:tls\.)?([a-z_]+)`", readme, re.MULTILINE))
    settings = {variable: field for field, variable in {**TLS_VARIABLES, **VARIABLES}.items()}
    shared = {f"PARALLAX_TLS_{part}" for part in ("CERT_FILE", "KEY_FILE", "CA_PEM", "CERT_PEM", "KEY_PEM")}
    assert rows == {variable: field for variable, field in settings.items() if variable not in shared}


def test_every_method_that_a_policy_can_name_is_documented() -> None:
    page = (ROOT / "docs" / "policy.md").read_text()
    by_service: defaultdict[str, set[str]] = defaultdict(set)
    for method in METHODS:
        service, name = method.rpartition(".")[2].split("/")
        by_service[service].add(name)
    for service, methods in by_service.items():
        [row] = re.findall(rf"^\| `{service}` \| (.*) \|$", page, re.MULTILINE)
        assert set(re.findall(r"`([A-Za-z]+)`", row)) == methods


def test_documents_link_to_files_that_exist() -> None:
    documents = [*DOCUMENTS, *ROOT.glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_picture_is_shown_and_drawn_whole() -> None:
    shown = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", document.read_text())
    }
    assert shown == set((ROOT / "docs" / "pictures").iterdir())
    for picture in shown:
        drawn = ET.parse(picture)  # noqa: S314 - our own
        assert drawn.findtext("{http://www.w3.org/2000/svg}title")
