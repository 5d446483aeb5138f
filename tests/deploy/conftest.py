"""
The image and the fleet of docker-compose.yml without an engine for containers.

The Dockerfile's own steps run below a temporary directory that stands for `/`, and each service's own
command, environment and volumes with what they made. What is absolute in them is moved below that
directory; ports are free ones on loopback, and names of services lead to them. As root, everything that
the image's user runs has that user's uid, and may read but not write what belongs to others.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from ruamel.yaml import YAML  # comes with check-jsonschema

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
WITHIN_S: Final = 60.0  # for what should happen at once, on a machine that is busy
_ABSOLUTE: Final = re.compile(r"(?<![\w./-])/(?=(?:app|certs|data|opt|src)\b)")


def until(probe: Callable[[], T | None], within_s: float = WITHIN_S) -> T:
    """What *probe* gives, as soon as that is neither None nor False."""
    deadline = time.monotonic() + within_s
    while (found := probe()) is None or found is False:
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.05)
    return found


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile."""

    keyword: str
    flags: Mapping[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """Its arguments, split as a shell does."""
        return shlex.split(self.text)


def parse_dockerfile(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, in order; continued lines are one."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    instructions = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, _, rest = line.partition(" ")
        flags = {}
        while match := re.match(r"--([a-z]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        instructions.append(Instruction(keyword, flags, rest.strip()))
    return instructions


def is_sent(path: str, patterns: Sequence[str]) -> bool:
    """Whether *path* is in the build context: the last pattern that fits it, or a folder of it, decides."""
    folders = path.split("/")
    names = ["/".join(folders[: n + 1]) for n in range(len(folders))]
    sent = True
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        expression = "".join(
            {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
            for part in re.split(r"(\*\*/|\*\*|\*|\?)", wanted)
        )
        if any(re.fullmatch(expression, name) for name in names):
            sent = pattern.startswith("!")
    return sent


class Image:
    """What the Dockerfile makes, below a directory that stands for `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instructions = parse_dockerfile((ROOT / "Dockerfile").read_text())
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        self.ignore = [line for line in lines if line and not line.startswith("#")]
        self.environment = {"PATH": f"{root / 'python' / 'bin'}:/usr/bin:/bin"}
        self.workdir = root
        stated = self.last("USER").text
        self.user = tuple(map(int, stated.split(":"))) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        self.stated_user = stated

    def last(self, keyword: str) -> Instruction:
        """The last instruction of that kind: the one that counts."""
        return next(i for i in reversed(self.instructions) if i.keyword == keyword)

    def is_sent(self, path: str) -> bool:
        """Whether the file at *path* is in the build context."""
        return is_sent(path, self.ignore)

    def move(self, text: str, root: Path | None = None) -> str:
        """*text* with its absolute paths below *root*, by default the image's."""
        return _ABSOLUTE.sub(f"{root or self.root}/", text)

    def build(self) -> None:
        """Do what the Dockerfile says, in its order."""
        venv.create(self.root / "python", with_pip=True)  # the Python that the base image has
        for step in self.instructions:
            match step.keyword:
                case "FROM":
                    self.environment = {"PATH": f"{self.root / 'python' / 'bin'}:/usr/bin:/bin"}
                    self.workdir = self.root
                case "WORKDIR":
                    self.workdir = Path(self.move(step.text))
                    self.workdir.mkdir(parents=True)
                case "ENV":
                    name, _, value = step.text.partition("=")
                    previous = self.environment.get(name, "")
                    self.environment[name] = self.move(value).replace(f"${name}", previous)
                case "COPY":
                    self._copy(step)
                case "RUN":
                    self._run(step.text)
                case "USER" | "CMD":
                    pass
                case _:
                    pytest.fail(f"the test knows nothing about {step.keyword}")

    def _run(self, text: str) -> None:
        uid, gid = self.user
        stated_uid, stated_gid = self.stated_user.split(":")
        text = text.replace(f"-o {stated_uid}", f"-o {uid}").replace(f"-g {stated_gid}", f"-g {gid}")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PARALLAX_")}
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            inherited.pop(name, None)
        done = subprocess.run(
            ["/bin/sh", "-ec", self.move(text)],
            cwd=self.workdir,
            env=inherited | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"RUN {text}\n{done.stdout}"

    def _copy(self, step: Instruction) -> None:
        *sources, target = step.words
        if "from" in step.flags:  # the stages share one root
            assert [Path(self.move(each)) for each in sources] == [Path(self.move(target))]
            assert Path(self.move(target)).is_dir()
            return
        for source in sources:
            start = ROOT / source
            assert start.exists(), f"COPY {source}: there is no such file"
            files = [start] if start.is_file() else [path for path in start.rglob("*") if path.is_file()]
            sent = [path for path in files if self.is_sent(path.relative_to(ROOT).as_posix())]
            assert sent, f"COPY {source}: .dockerignore keeps all of it out"
            for path in sent:
                inner = path.name if start.is_file() else path.relative_to(start).as_posix()
                goal = self.workdir / target / inner
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, goal)
                goal.chmod(int(step.flags.get("chmod", "644"), 8))


@dataclass(slots=True)
class Service:
    """One service of the compose file, as a process."""

    name: str
    spec: dict[str, Any]
    root: Path
    process: subprocess.Popen[bytes] | None = None
    ports: dict[int, int] = field(default_factory=dict)
    """The port that the compose file names → the one that it has here."""

    @property
    def output(self) -> str:
        """What it has said so far."""
        return (self.root / "output").read_text(errors="replace")

    def record(self, event: str) -> dict[str, Any] | None:
        """The first log record that says *event*."""
        lines = [line for line in self.output.splitlines() if line.startswith("{") and line.endswith("}")]
        return next((record for record in map(json.loads, lines) if record["event"] == event), None)


class Stack:
    """The services of docker-compose.yml."""

    def __init__(self, image: Image, directory: Path) -> None:
        self.image = image
        self.spec: dict[str, Any] = load_yaml(ROOT / "docker-compose.yml")
        self.services: dict[str, Service] = {}
        self._directory = directory
        # A new volume looks like the directory of the image that it is first mounted on.
        self.pki = directory / "pki"
        self.data = directory / "data"
        for volume, mounted_on in ((self.pki, "certs"), (self.data, "data")):
            volume.mkdir()
            like = (image.root / mounted_on).stat()
            os.chown(volume, like.st_uid, like.st_gid)
            volume.chmod(like.st_mode)

    def up(self, *names: str) -> None:
        """Start services as `docker compose up` does: after what they depend on."""
        for name in names:
            if name in self.services:
                continue
            spec = self.spec["services"][name]
            for other, how in spec.get("depends_on", {}).items():
                self.up(other)
                self._await(self.services[other], how["condition"])
            self.start(name, spec)

    def _await(self, service: Service, condition: str) -> None:
        assert service.process is not None
        if condition == "service_completed_successfully":
            assert service.process.wait(WITHIN_S) == 0, service.output
        else:
            assert condition == "service_healthy"
            self.healthy(service)

    def healthy(self, service: Service) -> None:
        """Wait until the service's health check passes."""
        how, *argv = service.spec["healthcheck"]["test"]
        assert how == "CMD"
        process = service.process
        assert process is not None

        def passes() -> bool:
            assert process.poll() is None, service.output
            if not self._learn_ports(service):
                return False
            command = [
                re.sub(r"127\.0\.0\.1:(\d+)", lambda m: self._here(service, m[1]), each) for each in argv
            ]
            return self._run(service.root, command, service.spec).returncode == 0

        until(passes)

    def _learn_ports(self, service: Service) -> bool:
        record = service.record("control plane ready") or service.record("metrics ready")
        if record is None:
            return False
        for variable, fact in (("PARALLAX_LISTEN", "port"), ("PARALLAX_METRICS_LISTEN", "metrics_port")):
            stated = service.spec["environment"].get(variable)
            if stated is not None:
                service.ports[int(stated.rpartition(":")[2])] = record[fact]
        return True

    def reach(self, target: str) -> str:
        """Where *target*, a service's name and port, is reached here."""
        name, _, port = target.partition(":")
        return self._here(self.services[name], port)

    def _here(self, service: Service, port: str) -> str:
        return f"127.0.0.1:{service.ports[int(port)]}"

    def start(self, name: str, spec: dict[str, Any]) -> Service:
        """Start one service, and keep it."""
        service = Service(name, spec, self._root(name, spec))
        self.services[name] = service
        with (service.root / "output").open("wb") as stream:
            service.process = subprocess.Popen(
                self._argv(service.root, spec["command"]),
                stdout=stream,
                stderr=stream,
                **self._surroundings(service.root, spec),
            )
        return service

    def run(
        self, name: str, *command: str, spec: dict[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, by default its own, as `docker compose run` does, to its end."""
        spec = spec or self.spec["services"][name]
        return self._run(self._root(name, spec), command or spec["command"], spec)

    def _run(
        self, root: Path, command: Sequence[str], spec: Mapping[str, Any]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._argv(root, command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * WITHIN_S,
            check=False,
            **self._surroundings(root, spec),
        )

    def _root(self, name: str, spec: Mapping[str, Any]) -> Path:
        """A directory that stands for `/` in that service, with its volumes in it."""
        root = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._directory))
        for volume in spec["volumes"]:
            if isinstance(volume, str):
                source, target = volume.split(":")
                place = {"pki": self.pki, "data": self.data}[source]
            else:
                assert volume["source"] == "pki"
                target, place = volume["target"], self.pki / volume["volume"].get("subpath", "")
            link = Path(self.image.move(target, root))
            link.parent.mkdir(parents=True, exist_ok=True)
            assert place.exists(), f"{name}: the engine mounts no subpath that is not there"
            link.symlink_to(place)
        return root

    def _argv(self, root: Path, command: Sequence[str]) -> list[str]:
        privileges: list[str] = []
        if os.geteuid() == 0:
            uid, gid = self.image.user
            privileges = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
            privileges += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
        return [*privileges, *(self.image.move(word, root) for word in command)]

    def _surroundings(self, root: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
        environment = {name: self._outside(root, value) for name, value in spec["environment"].items()}
        return {
            "cwd": self.image.workdir,
            "env": self.image.environment | {"HOME": "/"} | environment,
            "stdin": subprocess.DEVNULL,
        }

    def _outside(self, root: Path, value: str) -> str:
        """A setting's value for a process that has no network of its own."""
        host, colon, port = value.rpartition(":")
        if not colon:
            return self.image.move(value, root)
        if host == "0.0.0.0":  # noqa: S104 - read, not listened on
            return "127.0.0.1:0"
        there = self.services.get(host)
        return self._here(there, port) if there and there.ports else value

    def tree(self) -> dict[str, tuple[object, ...]]:
        """All that is in the volume: mode, owner, time of change, and content."""
        found: dict[str, tuple[object, ...]] = {}
        for path in [self.pki, *sorted(self.pki.rglob("*"))]:
            about = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            owner = (about.st_uid, about.st_gid)
            found[str(path.relative_to(self.pki))] = (about.st_mode, owner, about.st_mtime_ns, content)
        return found

    def stop(self, name: str) -> int:
        """Stop a service as the engine does; its exit code."""
        process = self.services.pop(name).process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        return process.wait(WITHIN_S)

    def close(self) -> None:
        """End whatever still runs."""
        for service in self.services.values():
            if service.process is not None and service.process.poll() is None:
                service.process.kill()
                service.process.wait()


def load_yaml(path: Path) -> Any:
    """What a YAML file holds, as plain values."""
    return YAML(typ="safe", pure=True).load(path.read_text())


@pytest.fixture(name="until", scope="session")
def _until() -> Callable[..., Any]:
    """Polls for an event, with a limit."""
    return until


@pytest.fixture
def unbuilt(tmp_path: Path) -> Image:
    """What the Dockerfile says, before anything of it is done."""
    return Image(tmp_path)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image, built once for all tests."""
    made = Image(tmp_path_factory.mktemp("image"))
    made.build()
    return made


@pytest.fixture(scope="module")
def stack(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The fleet, up."""
    made = Stack(image, tmp_path_factory.mktemp("stack"))
    try:
        made.up("agent-1", "agent-2")
        for name in ("agent-1", "agent-2"):
            made.healthy(made.services[name])
        yield made
    finally:
        made.close()
