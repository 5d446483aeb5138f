"""docker-compose.yml: what it says, and what its services do with exactly that."""

from __future__ import annotations

import copy
import json
import re
import shlex
import stat
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from ruamel.yaml import YAML

from parallax.runtime.settings import load_settings
from parallax.sdk.agent import LAST_RESORT

if TYPE_CHECKING:
    from tests.deploy.conftest import Image, Stack

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = YAML(typ="safe", pure=True).load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: spec for name, spec in SERVICES.items() if "build" in spec}
LASTING = {name: spec for name, spec in OURS.items() if "PARALLAX_METRICS_LISTEN" in spec["environment"]}
GREAT = ("rate", '{"text": "This is great"}')
TARGET = re.compile(r"[a-z0-9-]+:\d+")

pytestmark = pytest.mark.timeout(600)  # the first test to need it builds the image


class TestFile:
    def test_fits_the_schema_of_compose_files(self) -> None:
        checker = Path(sys.executable).with_name("check-jsonschema")
        done = subprocess.run(
            [checker, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    def test_means_what_it_says(self) -> None:
        """Nothing in it comes from the environment of whoever starts it."""
        assert "$" not in (ROOT / "docker-compose.yml").read_text()

    @pytest.mark.parametrize("name", OURS)
    def test_every_process_speaks_mutual_tls(self, name: str) -> None:
        environment = OURS[name]["environment"]
        assert environment["PARALLAX_TLS_ENABLED"] == "true"
        assert environment["PARALLAX_TLS_VERIFY_CLIENT"] == "true"
        assert "PARALLAX_TLS_ALLOW_INSECURE" not in environment
        assert all(isinstance(value, str) for value in environment.values())

    @pytest.mark.parametrize("name", SERVICES)
    def test_no_service_has_a_privilege(self, name: str) -> None:
        spec = SERVICES[name]
        assert spec["cap_drop"] == ["ALL"]
        assert spec["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "user", "pid", "ipc", "devices"} & spec.keys()
        assert spec.get("network_mode") in {None, "none"}
        if name in OURS:
            assert spec["read_only"] is True

    def test_one_service_has_the_ca_and_no_network(self) -> None:
        whole = [name for name, spec in OURS.items() if "pki:/certs" in spec["volumes"]]
        assert whole == ["certificates"]
        assert OURS["certificates"]["network_mode"] == "none"

    @pytest.mark.parametrize("name", [name for name in OURS if name != "certificates"])
    def test_every_other_sees_one_identity_and_cannot_write_it(self, name: str) -> None:
        volume, *others = OURS[name]["volumes"]
        assert others == (["data:/data"] if name == "control-plane" else [])
        own = {"client": "cli"}.get(name, name)
        assert volume == {
            "type": "volume",
            "source": "pki",
            "target": f"/certs/{own}",
            "read_only": True,
            "volume": {"subpath": own, "nocopy": True},
        }

    def test_what_others_publish_is_pinned_and_comes_from_the_public_registry(self) -> None:
        images = [spec["image"] for spec in SERVICES.values() if "image" in spec]
        assert images
        assert all(re.fullmatch(r"[a-z]+/[a-z]+:v\d+\.\d+\.\d+", image) for image in images)
        assert all(spec["build"] == "." for spec in OURS.values())  # and with no name that could be pulled

    def test_nothing_is_published_beyond_this_host(self) -> None:
        ports = [port for spec in SERVICES.values() for port in spec.get("ports", [])]
        assert ports == ["127.0.0.1:9090:9090"]

    @pytest.mark.parametrize("name", LASTING)
    def test_who_holds_tasks_is_given_the_time_to_finish_them(self, name: str) -> None:
        allowed = int(LASTING[name]["stop_grace_period"].removesuffix("s"))
        assert allowed > load_settings().drain.total_seconds() + LAST_RESORT.total_seconds()

    def test_an_agent_that_was_superseded_is_not_started_again(self) -> None:
        assert [name for name, spec in OURS.items() if "restart" in spec] == ["control-plane"]

    def test_prometheus_names_every_process_that_lasts(self) -> None:
        listening = {
            f"{name}:{spec['environment']['PARALLAX_METRICS_LISTEN'].rpartition(':')[2]}"
            for name, spec in LASTING.items()
        }
        assert listening == set(targets())
        assert listening == {"control-plane:9464", "agent-1:9464", "agent-2:9464"}


def targets() -> list[str]:
    """What deploy/prometheus.yml scrapes."""
    config = YAML(typ="safe", pure=True).load((ROOT / "deploy" / "prometheus.yml").read_text())
    return [
        target
        for job in config["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - our own
        return str(response.read().decode())


def series(stack: Stack, target: str) -> dict[str, float]:
    """What a target of deploy/prometheus.yml answers."""
    lines = get(f"http://{stack.reach(target)}/metrics").splitlines()
    return {
        name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))
    }


class TestFleet:
    def test_its_keys_are_their_owners_alone(self, stack: Stack, image: Image) -> None:
        keys = [path for path in stack.pki.rglob("key.pem") if not path.is_symlink()]
        assert {path.parents[1].name for path in keys} >= {"control-plane", "agent-1", "agent-2", "cli"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
        everything = [stack.pki, *stack.pki.rglob("*")]
        assert {(about.st_uid, about.st_gid) for about in map(Path.lstat, everything)} == {image.user}
        assert stat.S_IMODE(stack.pki.stat().st_mode) == 0o700

    def test_its_ledger_is_the_control_planes_alone(self, stack: Stack, image: Image) -> None:
        about = (stack.data / "parallax.db").stat()
        assert (about.st_mode & 0o777, about.st_uid, about.st_gid) == (0o600, *image.user)

    def test_a_client_sees_both_agents(self, stack: Stack) -> None:
        listed = stack.run("client")
        assert listed.returncode == 0, listed.stdout
        assert "agent-1" in listed.stdout
        assert "agent-2" in listed.stdout
        assert listed.stdout.count("ready") == 2

    @pytest.mark.parametrize("target", ["capability:sentiment", "agent-1", "agent-2"])
    def test_a_client_gets_an_answer(self, stack: Stack, target: str) -> None:
        done = stack.run("client", "parallax", "call", target, *GREAT, "--json")
        assert done.returncode == 0, done.stdout
        answer = json.loads(done.stdout)
        assert (answer["value"], answer["confidence"]) == ({"mood": "good"}, 0.9)

    @pytest.mark.parametrize("target", targets())
    def test_its_metrics_are_where_prometheus_looks(self, stack: Stack, target: str) -> None:
        name = target.partition(":")[0]
        found = series(stack, target)
        assert found["parallax_insecure_mode"] == 0
        assert found[f'parallax_certificate_not_after_timestamp_seconds{{name="{name}"}}'] > 0
        if name == "control-plane":
            assert found["parallax_agents"] == found["parallax_sessions"] == 2
        else:
            assert found["parallax_agent_connected"] == 1

    def test_no_service_writes_where_it_may_not(self, stack: Stack) -> None:
        before = stack.tree()
        for name in ("agent-1", "agent-2"):
            assert stack.run("client", "parallax", "call", name, *GREAT).returncode == 0
        assert stack.tree() == before

    def test_certificates_again_change_nothing(self, stack: Stack) -> None:
        """`docker compose up` runs that service each time."""
        before = stack.tree()
        again = stack.run("certificates")
        assert (again.returncode, again.stdout) == (0, "")
        assert stack.tree() == before

    def test_a_service_does_not_start_with_the_directory_of_another(self, stack: Stack) -> None:
        spec = copy.deepcopy(SERVICES["agent-1"])
        spec["volumes"][0]["volume"]["subpath"] = "agent-2"
        done = stack.run("agent-1", spec=spec)
        assert done.returncode == 2
        assert "is not for spiffe://parallax.local/agent/agent-1" in done.stdout

    def test_a_service_does_not_start_where_subpath_has_no_effect(self, stack: Stack) -> None:
        """Older engines mount the whole volume then, the CA's key too: better nothing runs."""
        spec = copy.deepcopy(SERVICES["agent-1"])
        spec["volumes"][0]["volume"].pop("subpath")
        done = stack.run("agent-1", spec=spec)
        assert done.returncode == 2
        assert "cert.pem is missing" in done.stdout

    def test_it_stops_in_order(self, image: Image, new_stack: Callable[[], Stack]) -> None:
        stack = new_stack()
        stack.up("agent-1")
        stack.healthy(stack.services["agent-1"])
        assert stack.stop("agent-1") == 0
        assert stack.stop("control-plane") == 0


class TestCertificates:
    def test_cut_short_are_completed_with_the_same_ca(self, new_stack: Callable[[], Stack]) -> None:
        stack = new_stack()
        first = stack.run("certificates", "parallax", "certs", "generate")
        assert first.returncode == 0, first.stdout
        authority = (stack.pki / "ca" / "cert.pem").read_bytes()
        second = stack.run("certificates")
        assert second.returncode == 0, second.stdout
        assert (stack.pki / "ca" / "cert.pem").read_bytes() == authority
        root = x509.load_pem_x509_certificate(authority)
        for name in ("control-plane", "agent-1", "agent-2", "cli"):
            leaf = x509.load_pem_x509_certificate((stack.pki / name / "cert.pem").read_bytes())
            leaf.verify_directly_issued_by(root)

    def test_in_the_way_of_something_else_end_the_start(self, new_stack: Callable[[], Stack]) -> None:
        """A CA that lost its key is never replaced, and nothing is started with what is left."""
        stack = new_stack()
        assert stack.run("certificates", "parallax", "certs", "generate").returncode == 0
        (stack.pki / "ca" / "key.pem").unlink()
        done = stack.run("certificates")
        assert done.returncode != 0
        assert "restore it from the backup" in done.stdout
        assert not (stack.pki / "agent-2").exists()


@pytest.fixture
def new_stack(image: Image, stack: Stack, tmp_path: Path) -> Iterator[Callable[[], Stack]]:
    """A stack of its own, nothing of it running."""
    made: list[Stack] = []

    def make() -> Stack:
        made.append(type(stack)(image, tmp_path))
        return made[-1]

    yield make
    for each in made:
        each.close()


class TestDocument:
    """docs/deployment.md: what can run without an engine does."""

    TEXT = (ROOT / "docs" / "deployment.md").read_text()
    LINES = re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE)

    def test_names_only_services_that_exist(self) -> None:
        for line in self.LINES:
            words = shlex.split(line)
            assert words[:2] == ["docker", "compose"], line
            named = {word for word in words if word in {*SERVICES, "agent-3"}}
            if words[2] in {"run", "restart", "logs", "stop"}:
                assert named, line

    def test_its_commands_run_as_written(self, new_stack: Callable[[], Stack]) -> None:
        stack = new_stack()
        stack.up("agent-1", "agent-2")
        ran = []
        for line in self.LINES:
            words = shlex.split(line)
            if words[2:4] == ["run", "--rm"]:
                name, *command = words[4:]
                done = stack.run(name, *command)
                assert done.returncode == 0, f"{line}\n{done.stdout}"
                ran.append((line, done.stdout))
        assert [output for line, output in ran if "parallax call" in line and "good" in output]
        assert [output for line, output in ran if "certs issue agent-3" in line]
        # The block that the document tells to copy.
        spec = json.loads(json.dumps(SERVICES["agent-2"]).replace("agent-2", "agent-3"))
        stack.healthy(stack.start("agent-3", spec))
        assert "agent-3" in stack.run("client").stdout

    def test_its_table_has_every_service(self) -> None:
        assert set(re.findall(r"^\| `([a-z0-9-]+)`", self.TEXT, re.MULTILINE)) == set(SERVICES)


class TestPrometheus:
    def test_accepts_its_configuration(self, require_tool: Callable[[str], str]) -> None:
        done = subprocess.run(
            [require_tool("promtool"), "check", "config", ROOT / "deploy" / "prometheus.yml"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_mounts_it(self) -> None:
        assert SERVICES["prometheus"]["volumes"] == [
            "./deploy/prometheus.yml:/etc/prometheus/prometheus.yml:ro"
        ]

    def test_finds_every_target_up(
        self, stack: Stack, tmp_path: Path, require_tool: Callable[[str], str], until: Callable[..., Any]
    ) -> None:
        config = TARGET.sub(lambda m: stack.reach(m[0]), (ROOT / "deploy" / "prometheus.yml").read_text())
        path, log = tmp_path / "prometheus.yml", tmp_path / "log"
        path.write_text(config)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [
                    require_tool("prometheus"),
                    f"--config.file={path}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdout=stream,
                stderr=stream,
                cwd=tmp_path,
            )
        try:

            def listening() -> str | None:
                assert process.poll() is None, log.read_text()
                said = log.read_text()
                found = re.search(r"address=(127\.0\.0\.1:[1-9]\d*)", said)
                return found and found[1] if "Server is ready to receive web requests" in said else None

            server = until(listening)

            def ask(query: str) -> dict[str, str]:
                url = f"http://{server}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
                rows = json.loads(get(url))["data"]["result"]
                return {row["metric"]["instance"]: row["value"][1] for row in rows}

            def all_scraped() -> dict[str, str] | None:
                found = ask("up")
                return found if len(found) == len(targets()) and "0" not in found.values() else None

            everyone = {stack.reach(target) for target in targets()}
            assert until(all_scraped) == dict.fromkeys(everyone, "1")
            assert ask("parallax_insecure_mode") == dict.fromkeys(everyone, "0")
            assert ask("parallax_agents") == {stack.reach("control-plane:9464"): "2"}
            assert set(ask("parallax_agent_connected").values()) == {"1"}
        finally:
            process.terminate()
            process.wait()
