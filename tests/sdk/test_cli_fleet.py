"""The command end to end: a control plane and agents in processes of their own, over mutual TLS."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from parallax.sdk import exits
from parallax.sdk.cli import INTERRUPTED, READER_GONE

pytestmark = pytest.mark.timeout(60)  # ten processes start, with those of the fleet, for the first test

WITHIN_S: Final = 20.0
COMMAND: Final = (sys.executable, "-m", "parallax.sdk.cli")

AGENTS = """
import asyncio
from parallax.sdk import SecureAgent

class Worker(SecureAgent):
    async def analyze(self, task, data):
        match task:
            case "echo":
                return data, 0.75
            case "type":
                return type(data).__name__, 1.0
            case "bytes":
                return bytes(range(256)), 0.5
            case "fail":
                raise ValueError("bad\\nluck \\x1b[31m")
            case "hang":
                open("hangs", "w").close()
                try:
                    await asyncio.sleep(60)
                finally:
                    open("cancelled", "w").close()
        return task, 0

    async def analyze_stream(self, task, data):
        try:
            for number in range(data):
                yield (bytes([number]) if task == "bytes" else {"number": number}), 0.5
                if task == "pause":
                    await asyncio.sleep(60)
                if task == "flood":
                    open("made", "w").write(str(number))
                    yield "x" * 65536, 1
            if task == "fail":
                raise ValueError("no more")
        finally:
            open("closed", "w").close()

class InParts(SecureAgent):
    async def analyze_stream(self, task, data):
        yield data, 1

class Whole(SecureAgent):
    async def analyze(self, task, data):
        return data, 1

ready_made = Worker("admin-agent", "Ready made", ["ready-made"])
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Fleet:
    """A directory with certificates and agents, and commands run there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"  # of what was started last
        self._logs = (directory / f"log-{number}" for number in itertools.count())
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("PARALLAX_", "LOG_"))
            },
            "PARALLAX_LOG_FORMAT": "json",
        }

    def run(self, *arguments: str | Path, given: bytes = b"") -> Ended:
        """The command, once it has ended."""
        ended = self.run_raw(*arguments, given=given)
        return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())

    def run_raw(self, *arguments: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The same, its output as bytes."""
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=self.directory,
            env=self.environment,
            input=given,
            capture_output=True,
            timeout=WITHIN_S,
            check=False,
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The command, running for as long as the block; its stderr goes to a `log` of its own."""
        self.log = next(self._logs)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*COMMAND, *arguments],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def logged(self, event: str) -> dict[str, Any]:
        """The first record of *event* in the log, once it is there."""
        log = self.log

        def records() -> list[dict[str, Any]]:
            lines = log.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            return [record for record in found if record["event"] == event]

        until(lambda: bool(records()), lambda: log.read_text(encoding="utf-8"))
        return records()[0]


def until(condition: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    """Wait until *condition* holds, or fail."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A control plane that demands certificates, and one agent, both started by the command."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    (fleet.directory / "shop.py").write_text(AGENTS, encoding="utf-8")
    assert fleet.run("certs", "generate").code == exits.OK
    fleet.environment |= {
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_HTTP_LISTEN": "none",
    }
    serve = ("control-plane", "start", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    with fleet.started(*serve) as control_plane:
        port = fleet.logged("control plane ready")["port"]
        fleet.environment["PARALLAX_CONTROL_PLANE"] = f"127.0.0.1:{port}"
        with fleet.started(
            *("agent", "run", "shop:Worker", "--id", "agent-1", "--name", "A worker"),
            *("--capability", "shop.work", "--label", "zone=a", "--max-concurrency", "4"),
        ) as agent:
            fleet.logged("connected")
            yield fleet
            agent.terminate()
            assert agent.wait(WITHIN_S) == exits.OK
        control_plane.terminate()
        assert control_plane.wait(WITHIN_S) == exits.OK


# agents


def test_agents_list_shows_who_is_there(fleet: Fleet) -> None:
    ended = fleet.run("agents", "list")
    assert (ended.code, ended.err) == (exits.OK, "")
    header, row = ended.out.splitlines()
    assert header.split() == [
        "AGENT",
        "IDENTITY",
        "STATE",
        "BUSY",
        "REGISTERED",
        "NAME",
        "CAPABILITIES",
        "LABELS",
    ]
    for shown in ("agent-1 ", "spiffe://parallax.local/agent/agent-1", "ready", "0/4", "A worker", "zone=a"):
        assert shown in row


def test_agents_list_with_json_writes_nothing_else(fleet: Fleet) -> None:
    ended = fleet.run("agents", "list", "--json")
    (agent,) = json.loads(ended.out)
    assert (ended.code, ended.err) == (exits.OK, "")
    expected = {
        "agent_id": "agent-1",
        "identity": "spiffe://parallax.local/agent/agent-1",
        "verified": True,
        "name": "A worker",
        "state": "ready",
        "capabilities": ["shop.work"],
        "labels": {"zone": "a"},
        "max_concurrency": 4,
        "in_flight": 0,
    }
    assert agent.items() >= expected.items()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--capability", "shop.work"], True),
        (["--capability", "shop.work", "--capability", "other"], False),
        (["--label", "zone"], True),
        (["--label", "zone=a", "--state", "ready", "--verified"], True),
        (["--label", "zone=b"], False),
        (["--label", "zone="], False),
        (["--state", "draining", "--state", "registered"], False),
        (["--state", "draining", "--state", "ready"], True),
        (["--unverified"], False),
    ],
)
def test_agents_list_shows_only_who_fulfils_every_condition(
    fleet: Fleet, arguments: list[str], *, found: bool
) -> None:
    ended = fleet.run("agents", "list", "--json", *arguments)
    assert ended.code == exits.OK, ended.err
    assert [agent["agent_id"] for agent in json.loads(ended.out)] == (["agent-1"] if found else [])


def test_agents_list_says_that_nobody_fulfils_the_conditions(fleet: Fleet) -> None:
    assert fleet.run("agents", "list", "--state", "draining") == (exits.OK, "", "no such agent\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "a=1", "--label", "a=2"], "--label 'a' is given twice: keep one"),
        (["--capability", "No Such"], "not a capability: 'No Such'"),
        (["--state", "gone"], "not a state: 'gone' (one of ready, draining, registered)"),
    ],
)
def test_a_condition_that_nobody_can_fulfil_is_one_line(
    fleet: Fleet, arguments: list[str], message: str
) -> None:
    for more in ([], ["--watch"]):
        ended = fleet.run("agents", "list", *arguments, *more)
        assert (ended.code, ended.out) == (exits.CONFIG, "")
        assert message in ended.err
        assert ended.err.count("\n") == 1


@contextmanager
def watching(fleet: Fleet, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`agents list --watch`, its output to be read line by line."""
    with subprocess.Popen(
        [*COMMAND, "agents", "list", "--watch", *arguments],
        cwd=fleet.directory,
        env=fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_agents_list_with_watch_writes_a_line_for_every_change(fleet: Fleet) -> None:
    assert fleet.run("certs", "issue", "retired", "--kind", "agent").code == exits.OK
    with (
        watching(fleet) as lines,
        watching(fleet, "--json", "--capability", "retire") as objects,
        watching(fleet) as unread,
    ):
        assert lines.stdout is not None
        assert objects.stdout is not None
        assert unread.stdout is not None
        for _ in range(2):
            unread.stdout.readline()
        unread.stdout.close()
        stamp, *rest = lines.stdout.readline().decode().split()
        assert rest == ["added", "agent-1", "ready", "capabilities=shop.work", "labels=zone=a"]
        assert stamp.endswith("Z")
        assert lines.stdout.readline().decode().split()[1:] == ["synced:", "1", "agent"]
        assert json.loads(objects.stdout.readline()) == {"event": "synced"}
        run = ("agent", "run", "shop:Worker", "--id", "retired", "--capability", "retire")
        with fleet.started(*run) as agent:
            assert lines.stdout.readline().decode().split()[1:4] == ["added", "retired", "ready"]
            added = json.loads(objects.stdout.readline())
            assert (added["event"], added["agent"]["agent_id"]) == ("added", "retired")
            removed = fleet.run("agents", "remove", "retired", "--identity", "client/admin")
            assert removed == (exits.OK, "retired removed\n", "")
            assert agent.wait(WITHIN_S) == exits.OK, "it stops, and does not come back"
            assert "taken out of the registry" in fleet.logged("stopping")["cause"]
        assert unread.wait(WITHIN_S) == READER_GONE
        assert lines.stdout.readline().decode().split()[1:3] == ["removed", "retired"]
        assert json.loads(objects.stdout.readline())["event"] == "removed"
        for process in (lines, objects):
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=WITHIN_S)
            assert (process.returncode, out, err) == (INTERRUPTED, b"", b"")


def test_agents_list_with_watch_draws_a_table_on_a_terminal(
    fleet: Fleet, terminal: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in fleet.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(fleet.directory)
    at = terminal("agents", "list", "--watch")
    at.until("spiffe://parallax.local/agent/agent-1")
    assert "IDENTITY" in at.seen
    at.interrupt()
    assert at.end() == INTERRUPTED


def test_agents_remove_takes_several_and_minds_none_that_is_not_there(fleet: Fleet) -> None:
    ended = fleet.run("agents", "remove", "nobody", "anonymous/x", "nobody", "--identity", "client/admin")
    assert ended == (exits.OK, "nobody is not registered\nanonymous/x is not registered\n", "")
    ended = fleet.run("agents", "remove", "nobody", "--json", "--identity", "client/admin")
    assert (ended.code, json.loads(ended.out)) == (exits.OK, [{"agent_id": "nobody", "removed": False}])


def test_agents_remove_is_for_the_administrator(fleet: Fleet) -> None:
    ended = fleet.run("agents", "remove", "agent-1")
    assert (ended.code, ended.out) == (exits.NO_PERMISSION, "")
    assert "act as --identity client/admin" in ended.err
    assert [agent["agent_id"] for agent in json.loads(fleet.run("agents", "list", "--json").out)] == [
        "agent-1"
    ]


@pytest.mark.parametrize("wrong", ["../x", "agent/agent-1", "spiffe://parallax.local/agent/agent-1", "", "A"])
def test_agents_remove_takes_nobody_where_one_id_is_none(fleet: Fleet, wrong: str) -> None:
    ended = fleet.run("agents", "remove", "agent-1", wrong, "--identity", "client/admin")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.count("\n") == 1
    assert [agent["agent_id"] for agent in json.loads(fleet.run("agents", "list", "--json").out)] == [
        "agent-1"
    ]


# call


@pytest.mark.parametrize("target", ["agent-1", "capability:shop.work"])
def test_call_shows_value_and_confidence(fleet: Fleet, target: str) -> None:
    assert fleet.run("call", target, "echo", '{"a": [1, null, "ü"]}') == (
        exits.OK,
        '{\n  "a": [\n    1,\n    null,\n    "ü"\n  ]\n}\nconfidence 0.75, by agent-1\n',
        "",
    )


def test_call_with_json_writes_nothing_else(fleet: Fleet) -> None:
    ended = fleet.run("call", "agent-1", "echo", "12345678901234567890", "--json")
    assert (ended.code, ended.err) == (exits.OK, "")
    assert json.loads(ended.out) == {"value": 12345678901234567890, "confidence": 0.75, "agent": "agent-1"}


def test_call_without_data_sends_null(fleet: Fleet) -> None:
    assert json.loads(fleet.run("call", "agent-1", "type", "--json").out)["value"] == "NoneType"


@pytest.mark.parametrize(
    ("arguments", "given", "value"),
    [
        (["type", "text", "--bytes"], b"", "bytes"),
        (["type", "--data-file", "-", "--bytes"], b"\x00\xff", "bytes"),
        (["echo", "--data-file", "-"], b'{"x": 1}', {"x": 1}),
        (["echo", "--data-file", "data.json"], b"", [1, 2]),
    ],
)
def test_call_takes_data_from_where_it_is_told(
    fleet: Fleet, arguments: list[str], given: bytes, value: object
) -> None:
    (fleet.directory / "data.json").write_text("[1, 2]", encoding="utf-8")
    ended = fleet.run("call", "agent-1", *arguments, "--json", given=given)
    assert ended.code == exits.OK, ended.err
    assert json.loads(ended.out)["value"] == value


def test_a_value_of_bytes_goes_to_stdout_as_it_is(fleet: Fleet) -> None:
    ended = fleet.run_raw("call", "agent-1", "bytes")
    assert ended.stdout == bytes(range(256))
    assert ended.stderr == b"confidence 0.5, by agent-1\n"
    there_and_back = fleet.run_raw(
        "call", "agent-1", "echo", "--bytes", "--data-file", "-", given=ended.stdout
    )
    assert there_and_back.stdout == ended.stdout
    assert json.loads(fleet.run("call", "agent-1", "bytes", "--json").out)["value_base64"].startswith("AAEC")


def test_a_failed_task_is_exit_code_1_with_code_and_text(fleet: Fleet) -> None:
    ended = fleet.run("call", "agent-1", "fail", "--json")
    assert ended == (exits.FAILED, "", "parallax: HANDLER_FAILED: ValueError: bad\\nluck \\x1b[31m\n")


def test_a_task_that_takes_too_long_is_a_failed_one(fleet: Fleet) -> None:
    ended = fleet.run("call", "agent-1", "hang", "--timeout", "0.3")
    assert (ended.code, ended.out) == (exits.FAILED, "")
    assert ended.err.startswith("parallax: DEADLINE_EXCEEDED: ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("target", ["nobody", "capability:nothing", "anonymous/agent-1"])
def test_no_agent_is_a_failed_task_at_once(fleet: Fleet, target: str) -> None:
    ended = fleet.run("call", target, "echo", "1")
    assert (ended.code, ended.out) == (exits.FAILED, "")
    assert ended.err.startswith("parallax: NO_AGENT: ")


def test_call_can_wait_for_an_agent(fleet: Fleet) -> None:
    """The one that its module has made already, so none of its options are given."""
    assert fleet.run("certs", "issue", "admin-agent", "--kind", "agent").code == exits.OK
    arguments = ("call", "capability:ready-made", "echo", "1", "--wait-for-agent", "15", "--json")
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=fleet.directory, env=fleet.environment, stdout=subprocess.PIPE
    ) as waiting:
        try:
            with fleet.started("agent", "run", "shop:ready_made") as agent:
                out, _ = waiting.communicate(timeout=WITHIN_S)
                agent.send_signal(signal.SIGINT)
                assert agent.wait(WITHIN_S) == exits.OK
        finally:
            waiting.kill()
    assert json.loads(out)["agent"] == "admin-agent"


def test_ctrl_c_cancels_the_task_and_ends_without_a_word(fleet: Fleet) -> None:
    for name in ("hangs", "cancelled"):
        (fleet.directory / name).unlink(missing_ok=True)
    with subprocess.Popen(
        [*COMMAND, "call", "agent-1", "hang"],
        cwd=fleet.directory,
        env=fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            until((fleet.directory / "hangs").exists)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=WITHIN_S)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (INTERRUPTED, b"", b"")
    until((fleet.directory / "cancelled").exists)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["hello"],
            """DATA is not JSON (Expecting value at character 0): a text needs its quotes, '"hello"'; """,
        ),
        (["it's"], """a text needs its quotes, '"it'"'"'s"'; """),
        (["{'a': 1}"], "DATA is not JSON"),
        (["NaN"], "DATA is not JSON"),
        ([""], "DATA is not JSON"),
        (["\udcff"], "DATA is not JSON"),
        (["1", "--data-file", "-"], "DATA and --data-file are both given"),
        (
            ["--data-file", "nowhere.json"],
            "--data-file 'nowhere.json' cannot be read: no such file or directory",
        ),
        (["--data-file", "."], "--data-file '.' cannot be read: is a directory"),
        (["--data-file", "/dev/zero"], "has more than 4194304 bytes (PARALLAX_MAX_PAYLOAD_BYTES)"),
    ],
)
def test_data_that_cannot_be_sent_is_one_line(parallax: Any, arguments: list[str], message: str) -> None:
    ended = parallax("call", "agent-1", "echo", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert message in ended.err
    assert ended.err.startswith("parallax: ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["agent\n1", "echo"], ["agent-1", "\udcff"]])
def test_a_target_or_task_that_cannot_be_shown_is_refused(parallax: Any, arguments: list[str]) -> None:
    ended = parallax("call", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert "cannot be shown" in ended.err


# call --stream


def test_call_with_stream_shows_part_by_part(fleet: Fleet) -> None:
    assert fleet.run("call", "agent-1", "count", "2", "--stream") == (
        exits.OK,
        '{\n  "number": 0\n}\nconfidence 0.5, by agent-1\n{\n  "number": 1\n}\nconfidence 0.5, by agent-1\n',
        "",
    )


def test_an_answer_of_no_parts_shows_nothing(fleet: Fleet) -> None:
    assert fleet.run("call", "agent-1", "count", "0", "--stream") == (exits.OK, "", "")


def test_call_with_stream_and_json_writes_a_line_for_each_part(fleet: Fleet) -> None:
    ended = fleet.run("call", "capability:shop.work", "count", "3", "--stream", "--json")
    assert (ended.code, ended.err) == (exits.OK, "")
    assert [json.loads(line) for line in ended.out.splitlines()] == [
        {"value": {"number": number}, "confidence": 0.5, "agent": "agent-1"} for number in range(3)
    ]
    ended = fleet.run("call", "agent-1", "bytes", "2", "--stream", "--json")
    assert [json.loads(line)["value_base64"] for line in ended.out.splitlines()] == ["AA==", "AQ=="]


def test_parts_of_bytes_go_to_stdout_as_they_are(fleet: Fleet) -> None:
    ended = fleet.run_raw("call", "agent-1", "bytes", "3", "--stream")
    assert (ended.returncode, ended.stdout) == (exits.OK, b"\x00\x01\x02")
    assert ended.stderr == b"confidence 0.5, by agent-1\n" * 3


def test_a_stream_that_fails_shows_the_parts_before_and_ends_with_1(fleet: Fleet) -> None:
    ended = fleet.run("call", "agent-1", "fail", "2", "--stream", "--json")
    assert (ended.code, ended.err) == (exits.FAILED, "parallax: HANDLER_FAILED: ValueError: no more\n")
    assert [json.loads(line)["value"]["number"] for line in ended.out.splitlines()] == [0, 1]


def test_a_stream_that_takes_too_long_is_a_failed_one(fleet: Fleet) -> None:
    ended = fleet.run("call", "agent-1", "pause", "2", "--stream", "--json", "--timeout", "5")
    assert (ended.code, len(ended.out.splitlines())) == (exits.FAILED, 1)
    assert ended.err.startswith("parallax: DEADLINE_EXCEEDED: ")


@contextmanager
def streaming(fleet: Fleet, task: str) -> Iterator[subprocess.Popen[bytes]]:
    """`call --stream` of a long answer, its output to be read line by line."""
    for name in ("closed", "made"):
        (fleet.directory / name).unlink(missing_ok=True)
    with subprocess.Popen(
        [*COMMAND, "call", "agent-1", task, "1000000", "--stream", "--json"],
        cwd=fleet.directory,
        env=fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_part_is_shown_before_the_next_is_made_and_ctrl_c_ends_the_answer(fleet: Fleet) -> None:
    with streaming(fleet, "pause") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["value"] == {"number": 0}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, out, err) == (INTERRUPTED, b"", b"")
    until((fleet.directory / "closed").exists)


def test_a_reader_who_leaves_ends_the_answer(fleet: Fleet) -> None:
    with streaming(fleet, "flood") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(WITHIN_S) == READER_GONE
    until((fleet.directory / "closed").exists)


def test_a_reader_who_pauses_holds_the_agent_back_and_ctrl_c_is_heard(fleet: Fleet) -> None:
    made = fleet.directory / "made"

    def made_so_far() -> int:
        return int(made.read_text(encoding="utf-8") or 0) if made.exists() else 0

    with streaming(fleet, "flood") as process:
        until(lambda: made_so_far() >= 16)
        assert made_so_far() < 64  # 4 MiB: what lies in pipes and on the way included
        process.send_signal(signal.SIGINT)
        until((fleet.directory / "closed").exists)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(WITHIN_S) in {INTERRUPTED, READER_GONE}


def test_an_agent_that_answers_all_at_once_gives_one_part(fleet: Fleet) -> None:
    assert fleet.run("certs", "issue", "whole", "--kind", "agent").code == exits.OK
    with fleet.started("agent", "run", "shop:Whole", "--id", "whole"):
        asked = ("call", "whole", "echo", "7", "--wait-for-agent", "15")
        assert fleet.run(*asked, "--stream") == (exits.OK, "7\nconfidence 1, by whole\n", "")


def test_an_agent_that_answers_in_parts_only_tells_the_option(fleet: Fleet) -> None:
    assert fleet.run("certs", "issue", "in-parts", "--kind", "agent").code == exits.OK
    with fleet.started("agent", "run", "shop:InParts", "--id", "in-parts"):
        asked = ("call", "in-parts", "echo", "7", "--wait-for-agent", "15")
        ended = fleet.run(*asked)
        assert (ended.code, ended.out) == (exits.FAILED, "")
        assert ended.err.startswith("parallax: INVALID_ARGUMENT: ")
        assert "`parallax call --stream`" in ended.err
        assert fleet.run(*asked, "--stream").code == exits.OK


# Who asks, and whom


def test_a_client_acts_as_the_identity_it_is_told(fleet: Fleet) -> None:
    assert fleet.run("agents", "list", "--identity", "client/admin").code == exits.OK
    ended = fleet.run("agents", "list", "--identity", "client/nobody")
    assert ended.code == exits.CONFIG
    assert "parallax certs issue nobody --kind client" in ended.err
    assert fleet.run("agents", "list", "--identity", "nobody").code == exits.CONFIG


def test_a_control_plane_of_another_ca_is_not_asked(fleet: Fleet) -> None:
    assert fleet.run("certs", "generate", "--certs-dir", "foreign").code == exits.OK
    ended = fleet.run("agents", "list", "--certs-dir", "foreign")
    assert (ended.code, ended.out) == (exits.NO_PERMISSION, "")
    assert ended.err.startswith("parallax: ")
    assert ended.err.count("\n") == 1


def test_nobody_at_the_address_is_exit_code_69(fleet: Fleet) -> None:
    ended = fleet.run("call", "agent-1", "echo", "--control-plane", "127.0.0.1:1")
    assert (ended.code, ended.out) == (exits.UNAVAILABLE, "")
    assert ended.err.startswith("parallax: cannot reach the control plane at 127.0.0.1:1")
    assert ended.err.count("\n") == 1


def test_the_configuration_file_names_everything(fleet: Fleet) -> None:
    address = fleet.environment["PARALLAX_CONTROL_PLANE"]
    general = f'control_plane = "{address}"\nidentity = "client/admin"\n'
    tls = '[tls]\nenabled = true\ncerts_dir = "certs"\n'
    (fleet.directory / "parallax.toml").write_text(general + tls, encoding="utf-8")
    elsewhere = Fleet(fleet.directory)
    assert json.loads(elsewhere.run("agents", "list", "--config", "parallax.toml", "--json").out)
    assert elsewhere.run("agents", "list").code != exits.OK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "nonsense"], "'nonsense' is not an address"),
        (
            ["--listen", "127.0.0.1:0", "--certs-dir", "nowhere"],
            "nowhere holds no certificate of control-plane",
        ),
        (["--config", "nowhere.toml"], "cannot read the configuration file nowhere.toml"),
    ],
)
def test_a_control_plane_that_cannot_start_is_one_line(
    fleet: Fleet, arguments: list[str], message: str
) -> None:
    ended = fleet.run("control-plane", "start", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_control_plane_on_a_port_that_is_taken_is_one_line(fleet: Fleet) -> None:
    address = fleet.environment["PARALLAX_CONTROL_PLANE"]
    elsewhere = Fleet(fleet.directory)
    elsewhere.environment = fleet.environment | {"PARALLAX_DATA_DIR": "other-data"}
    ended = elsewhere.run("control-plane", "start", "--listen", address, "--metrics-listen", "127.0.0.1:0")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert address in ended.err
    assert [line for line in ended.err.splitlines() if not line.startswith("{")] == [
        ended.err.splitlines()[-1]
    ]


def test_the_guides_connection_test_succeeds(fleet: Fleet, require_tool: Callable[[str], str]) -> None:
    ended = subprocess.run(
        [
            *(require_tool("openssl"), "s_client", "-connect", fleet.environment["PARALLAX_CONTROL_PLANE"]),
            *("-cert", "cli/cert.pem", "-key", "cli/key.pem", "-CAfile", "cli/ca.pem", "-alpn", "h2"),
            *("-verify_return_error", "-verify_hostname", "localhost"),
        ],
        cwd=fleet.directory / "certs",
        input=b"",
        capture_output=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert b"Verify return code: 0 (ok)" in ended.stdout
    assert b"ALPN protocol: h2" in ended.stdout
