"""What users test their agents with: it works under every runner, isolates, refuses, and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import Wanted
from parallax.runtime.settings import VARIABLES
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.sdk.testing import Fleet, ThrowawayPKI, fleet
from parallax.security.config import VARIABLES as TLS_VARIABLES
from parallax.security.config import MTLSConfig
from parallax.security.errors import (
    ConfigError,
    IdentityError,
    InvalidRequest,
    NotAuthorized,
    Superseded,
    TaskFailed,
    Unavailable,
    UntrustedChain,
)
from parallax.security.identity import Identity
from parallax.security.layouts import Layout, authority_paths, save_authority
from parallax.security.provider import Mode, MTLSCredentialsProvider

ROOT: Final = Path(__file__).parents[2]
WITHIN_S: Final = 25.0
HOSTILE: Final = {
    **dict.fromkeys([*TLS_VARIABLES.values(), *VARIABLES.values()], "no such thing"),
    "PARALLAX_TLS_ENABLED": "ture",
    "PARALLAX_CONTROL_PLANE": "wrong",
}
# Well formed, and each would change what happens.
SUBTLE: Final = {
    "PARALLAX_TLS_ENABLED": "false",
    "PARALLAX_TLS_VERIFY_CLIENT": "false",
    "PARALLAX_TLS_ALLOW_INSECURE": "true",
    "PARALLAX_TRUST_DOMAIN": "elsewhere.example",
    "PARALLAX_CONTROL_PLANE": "localhost:1",
    "PARALLAX_LISTEN": "127.0.0.1:1",
    "PARALLAX_METRICS_LISTEN": "127.0.0.1:1",
    "PARALLAX_IDENTITY": "client/nobody",
    "PARALLAX_MAX_PAYLOAD_BYTES": "1",
}

CONFTEST: Final = """
import asyncio, json, os, threading
import pytest, pytest_asyncio

pytest_plugins = ["parallax.sdk.testing"]

@pytest_asyncio.fixture
async def last():
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}

def pytest_unconfigure():
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    with open("left.json", "w") as file:
        json.dump(left, file)
"""
TEST: Final = """
import os
import pytest
from sentiment import Sentiment

BEFORE = dict(os.environ)

MARK
@pytest.mark.parametrize("again", [0, 1])
async def test_sentiment(last, parallax_fleet, again):
    async with parallax_fleet.agent(Sentiment("agent-1", "My agent", ["sentiment"])):
        result = await parallax_fleet.client().analyze("agent-1", "rate", {"text": "great"})
    assert result.value == {"mood": "good"}

@pytest.fixture
def started(parallax_fleet):
    return parallax_fleet.start(Sentiment("agent-1", "My agent", ["sentiment"]))

MARK
async def test_started(started, parallax_fleet, parallax_pki):
    await started
    assert parallax_fleet.pki is parallax_pki
    result = await parallax_fleet.client().analyze("capability:sentiment", "rate", {"text": "great"})
    assert result.agent_id == "agent-1"

def test_environment_is_as_before():
    now = dict(os.environ)
    assert {k: v for k, v in now.items() if k.startswith("PARALLAX")} == {
        k: v for k, v in BEFORE.items() if k.startswith("PARALLAX")
    }
"""

OTHER_DOMAIN: Final = """
import pytest
from parallax.sdk.testing import ThrowawayPKI

@pytest.fixture(scope="session")
def parallax_pki():
    return ThrowawayPKI("acme.example")
"""


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 0.5


class Stuck(SecureAgent):
    """Never answers, and says when it has begun."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(agent_id, "stuck", ["stuck"])
        self.begun = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        self.begun.set()
        await asyncio.Event().wait()
        return None, 0


def echo(agent_id: str = "agent-1") -> Echo:
    return Echo(agent_id, "Echo", ["echo"])


@pytest.fixture
async def local() -> AsyncIterator[Fleet]:
    async with fleet() as running:
        yield running


def listing(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def others() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


# Isolation.


@pytest.mark.parametrize("environment", [HOSTILE, SUBTLE], ids=["hostile", "subtle"])
async def test_the_environment_has_no_say(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    async with fleet() as local, local.agent(echo()):
        (seen,) = await local.client().agents()
        result = await local.client().analyze("capability:echo", "x", "more than one byte")
    assert (seen.identity, seen.verified) == ("spiffe://parallax.local/agent/agent-1", True)
    assert result.value == "more than one byte"
    assert dict(os.environ) == before
    assert listing(tmp_path) == []


async def test_what_the_constructor_was_told_is_put_aside(local: Fleet) -> None:
    agent = Echo("agent-1", "x", ["echo"], tls=MTLSConfig(enabled=False), control_plane="localhost:1")
    async with local.agent(agent) as same:
        assert same is agent
        assert [each.verified for each in await local.client().agents()] == [True]


async def test_address_and_certificate_can_be_passed_by_hand(local: Fleet) -> None:
    async with (
        Echo("agent-1", "x", ["echo"], tls=local.pki.issue("agent-1"), control_plane=local.address),
        ParallaxClient(local.address, local.pki.issue("client/me"), identity="client/me") as client,
    ):
        assert (await client.analyze("agent-1", "x", 1)).value == 1


async def test_two_fleets_know_nothing_of_each_other(local: Fleet) -> None:
    async with fleet(local.pki) as other, other.agent(echo()):
        assert await local.client().agents() == []


# Nothing is left.


async def test_nothing_is_left_when_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with fleet() as warm, warm.agent(echo()):  # gRPC keeps threads of its own from its first use on
        await warm.client().analyze("agent-1", "x")
    threads = set(threading.enumerate())
    async with fleet() as local:
        await local.start(echo("agent-1"), echo("agent-2"))
        async with local.agent(echo("agent-3")):
            await local.client().analyze("agent-3", "x")
    assert others() == set()
    left = set(threading.enumerate()) - threads
    assert not [
        each for each in left if not each.name.startswith("asyncio_")
    ]  # the loop's own, as it needs them
    assert listing(tmp_path) == []
    for port in (local.port, local.metrics_port):
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", port)


async def test_a_handler_that_never_ends_does_not_hold_it_up() -> None:
    agent = Stuck("agent-1")
    async with asyncio.timeout(WITHIN_S), fleet(drain_seconds=0.1) as local, local.agent(agent):
        call = asyncio.create_task(local.client().analyze("agent-1", "x"))
        await agent.begun.wait()
    with pytest.raises(TaskFailed):
        await call
    assert others() == set()


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with fleet() as local, local.agent(echo()):
            raise ZeroDivisionError
    assert others() == set()


async def test_cancelling_while_it_connects_leaves_nothing(local: Fleet) -> None:
    before = others()
    refused = local.agent(echo(), tls=local.pki.foreign("agent-1"))
    task = asyncio.create_task(refused.__aenter__())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert others() <= before  # what it was still beginning may have ended


async def test_it_can_be_left_in_another_task_than_it_was_entered_in() -> None:
    """As test runners do with fixtures."""
    running = fleet()
    local = await asyncio.create_task(running.__aenter__())
    await asyncio.create_task(local.start(echo()))
    assert (await local.client().analyze("agent-1", "x", 2)).value == 2
    await asyncio.create_task(running.__aexit__(None, None, None))
    assert others() == set()


async def test_an_agent_that_was_taken_over_says_so_at_the_end(local: Fleet) -> None:
    with pytest.raises(Superseded):
        async with local.agent(echo()), local.agent(echo()):
            assert (await local.client().analyze("agent-1", "x", 1)).value == 1


async def test_another_event_loop_is_refused(local: Fleet) -> None:
    async def elsewhere() -> None:
        local.client()

    with pytest.raises(RuntimeError, match="loop_scope"):
        await asyncio.to_thread(asyncio.run, elsewhere())


# Renewal.


async def issued_to(local: Fleet, identity: str, number: int) -> list[IssuedCertificate]:
    """What the ledger has of *identity*, once it is so many; the one that ends last comes last."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            found, _ = await local.control_plane.ledger.page(Wanted(f"parallax.local/{identity}"))
            if len(found) >= number:
                return found
            await asyncio.sleep(0.01)


async def test_an_agent_has_its_certificate_renewed_and_works_with_it(local: Fleet) -> None:
    aged = local.pki.issue("agent-1", now=datetime.now(UTC) - timedelta(hours=1))
    async with local.agent(echo(), tls=aged) as agent:
        assert (await local.client().analyze("agent-1", "x", 1)).value == 1
        await agent.rotate_certificates()
        assert (await local.client().analyze("agent-1", "x", 2)).value == 2
        first, second = await issued_to(local, "agent/agent-1", 2)
    assert first.serial != second.serial
    assert second.requested_by == "spiffe://parallax.local/agent/agent-1"


async def test_a_client_that_stays_has_its_certificate_renewed(local: Fleet) -> None:
    minute = timedelta(minutes=1)
    aged = local.pki.issue("client/cli", lifetime=minute, now=datetime.now(UTC) - minute * 0.8)
    async with ParallaxClient(local.address, aged) as client:
        _, renewed = await issued_to(local, "client/cli", 2)
        assert await client.agents() == []
    assert renewed.requested_by == "spiffe://parallax.local/client/cli"


async def test_the_control_plane_renews_its_own_certificate(local: Fleet) -> None:
    (renewer,) = local.control_plane.renewers
    await renewer.renew()
    async with local.agent(echo()):
        assert (await local.client().analyze("agent-1", "x", 1)).value == 1
    assert len(await issued_to(local, "service/control-plane", 1)) == 1


async def test_an_agent_that_is_dialled_has_its_certificate_renewed(tmp_path: Path) -> None:
    """The control plane's own come from files then, and who dials agents has one there."""
    pki = ThrowawayPKI()
    own = pki.save(tmp_path, "service/control-plane", "service/agent-proxy")
    agent = Echo("agent-1", "Echo", ["echo"], session=False, listen="127.0.0.1:0")
    async with fleet(pki, tls=own) as local, local.agent(agent):
        await agent.rotate_certificates()
        assert (await local.client().analyze("agent-1", "x", 1, wait_for_agent=WITHIN_S)).value == 1
        for renewer in local.control_plane.renewers:
            await renewer.renew()
        assert (await local.client().analyze("agent-1", "x", 2, wait_for_agent=WITHIN_S)).value == 2


async def test_a_ca_among_the_files_of_the_control_plane_renews_instead(tmp_path: Path) -> None:
    pki = ThrowawayPKI()
    own = pki.save(tmp_path, "service/control-plane")
    save_authority(tmp_path, Layout.PARALLAX, pki.authority)
    key = authority_paths(tmp_path, Layout.PARALLAX).key
    async with fleet(pki, tls=own) as local, local.agent(echo()) as agent:
        await agent.rotate_certificates()
        key.unlink()
        with pytest.raises(ConfigError, match=r"there is no .*key\.pem to renew certificates with"):
            await agent.rotate_certificates()


async def test_what_renewing_leaves_on_the_disk_holds_no_key_and_is_for_its_owner_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    previous = os.umask(0)
    try:
        async with fleet() as local, local.agent(echo()) as agent:
            await agent.rotate_certificates()
            files = files_below(tmp_path)
            assert files
            for file in files:
                is_public = file.parent.name == "crl"  # for whoever is let into the directory
                assert stat.S_IMODE(file.stat().st_mode) == (0o644 if is_public else 0o600)
                assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
                assert b"PRIVATE KEY" not in file.read_bytes()
    finally:
        os.umask(previous)


async def test_a_child_process_renews_its_files(local: Fleet, tmp_path: Path) -> None:
    environment = os.environ | local.environment(tmp_path, "agent-1")
    files = tmp_path / "agent-1"
    before = (files / "cert.pem").read_bytes()
    command = [sys.executable, "-m", "parallax.sdk.cli", "certs", "renew", "agent-1"]
    await asyncio.to_thread(subprocess.run, command, env=environment, check=True)
    assert (files / "cert.pem").read_bytes() != before
    assert stat.S_IMODE((files / "key.pem").stat().st_mode) == 0o600


async def test_a_control_plane_that_does_not_trust_the_ca_renews_nothing() -> None:
    other = ThrowawayPKI()
    own, agents = other.issue("service/control-plane"), other.issue("agent-1")
    async with fleet(tls=own) as local, local.agent(echo(), tls=agents) as agent:
        with pytest.raises(ConfigError, match="none of those that this control plane trusts"):
            await agent.rotate_certificates()


# Refusals, each beside a good twin above.


async def test_a_foreign_client_is_refused(local: Fleet) -> None:
    with pytest.raises(Unavailable):
        await local.client(tls=local.pki.foreign("client/cli")).agents()


async def test_a_foreign_agent_is_refused_in_time(local: Fleet) -> None:
    with pytest.raises(Unavailable, match=r"^agent-1 was not let in within 0\.5 s: "):
        async with local.agent(echo(), tls=local.pki.foreign("agent-1"), timeout=0.5):
            pass
    assert await local.client().agents() == []


async def test_a_foreign_control_plane_is_refused() -> None:
    pki = ThrowawayPKI()
    async with fleet(pki, tls=pki.foreign("service/control-plane")) as impostor:
        with pytest.raises(UntrustedChain):
            await impostor.client().agents()


@pytest.mark.parametrize(
    ("identity", "make", "says"),
    [
        ("agent-1", ThrowawayPKI.expired, "expired"),
        ("agent-2", ThrowawayPKI.issue, "agent/agent-2"),
        ("client/agent-1", ThrowawayPKI.issue, "client/agent-1"),
    ],
)
async def test_an_agent_does_not_start_with_a_bad_certificate(
    local: Fleet, identity: str, make: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        async with local.agent(echo(), tls=make(local.pki, identity)):
            pass


async def test_a_control_plane_does_not_start_with_an_expired_certificate() -> None:
    pki = ThrowawayPKI()
    with pytest.raises(ConfigError, match="expired"):
        async with fleet(pki, tls=pki.expired("service/control-plane")):
            pass
    assert others() == set()


async def test_an_agents_certificate_gives_no_tasks(local: Fleet) -> None:
    with pytest.raises(NotAuthorized):
        await local.client("agent-1").analyze("agent-2", "x")


# Limits.


async def test_limits_are_in_force() -> None:
    async with fleet(max_payload_bytes=10) as local, local.agent(echo()):
        with pytest.raises(InvalidRequest):
            await local.client().analyze("agent-1", "x", b"x" * 11)
        assert (await local.client().analyze("agent-1", "x", b"x" * 10)).value == b"x" * 10


@pytest.mark.parametrize(
    ("name", "value"), [("lease_seconds", 0), ("queue_limit", "many"), ("lease", 3), ("identity", "")]
)
async def test_a_bad_limit_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        async with fleet(**{name: value}):  # type: ignore[arg-type]
            pass


# The PKI.


@pytest.mark.parametrize("text", ["agent-1", "agent/agent-1", "client/cli", "service/control-plane"])
def test_an_issued_certificate_is_of_that_identity(text: str) -> None:
    pki = ThrowawayPKI("acme.example")
    identity = Identity.parse_short(text if "/" in text else f"agent/{text}", "acme.example")
    provider = MTLSCredentialsProvider(pki.issue(text), identity=identity)
    assert provider.mode is Mode.MUTUAL
    assert pki.identity(text) == identity


def test_a_certificate_can_be_of_another_time() -> None:
    pki = ThrowawayPKI()
    later = datetime.now(UTC) + timedelta(hours=1)
    with pytest.raises(ConfigError, match="not valid before"):
        MTLSCredentialsProvider(pki.issue("agent-1", now=later), identity=pki.identity("agent-1"))
    earlier = datetime.now(UTC) - timedelta(days=6)
    tls = pki.issue("agent-1", now=earlier, lifetime=timedelta(days=7))
    assert MTLSCredentialsProvider(tls, identity=pki.identity("agent-1")).mode is Mode.MUTUAL


@pytest.mark.parametrize("text", ["", "Agent", "a/b/c", "user/x", "../x", "ca"])
def test_what_is_no_identity_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        ThrowawayPKI().issue(text)


def test_each_certificate_has_a_key_of_its_own_and_no_repr_shows_it() -> None:
    pki = ThrowawayPKI()
    first, second = pki.issue("agent-1"), pki.issue("agent-1")
    assert first.key_pem
    assert first.key_pem != second.key_pem
    assert "PRIVATE" in first.key_pem.get_secret_value()
    for shown in (repr(first), str(first), repr(pki), first.model_dump_json()):
        assert "PRIVATE" not in shown


def test_saved_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        tls = ThrowawayPKI().save(tmp_path / "certs", "agent-1", "client/cli")
    finally:
        os.umask(previous)
    for name in ("agent-1", "cli"):
        assert stat.S_IMODE((tls.certs_dir / name / "key.pem").stat().st_mode) == 0o600
        assert stat.S_IMODE((tls.certs_dir / name).stat().st_mode) == 0o700
    assert MTLSCredentialsProvider(tls, identity=ThrowawayPKI().identity("agent-1")).mode is Mode.MUTUAL


def test_a_place_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    pki = ThrowawayPKI()
    pki.save(tmp_path, "agent/one")
    with pytest.raises(ConfigError, match="belongs to"):
        pki.save(tmp_path, "client/one")


async def test_saved_certificates_are_good_in_the_fleet(local: Fleet, tmp_path: Path) -> None:
    async with local.agent(echo(), tls=local.pki.save(tmp_path / "certs", "agent-1")):
        assert (await local.client().analyze("agent-1", "x", 3)).value == 3


async def test_a_child_process_takes_part(
    local: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    environment = local.environment(tmp_path / "certs", "client/cli")
    assert HOSTILE.keys() <= environment.keys()
    async with local.agent(echo()):
        listed = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "parallax.sdk.cli", "agents", "list", "--json"],
            env=os.environ | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
    assert listed.returncode == 0, listed.stderr
    assert '"agent-1"' in listed.stdout


# As a plugin.


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("parallax.sdk.testing", ["pytest", "pytest_asyncio"]),
        ("parallax.sdk", ["parallax.sdk.testing", "grpc"]),
        ("parallax.sdk.agent, parallax.sdk.client", ["parallax.sdk.testing"]),
    ],
)
def test_importing_one_does_not_import_the_other(imported: str, absent: list[str]) -> None:
    script = f"import sys, {imported}; print(*(name for name in {absent} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def run_project(directory: Path, *options: str) -> str:
    """What pytest says of the tests in *directory*, which must pass, in the worst of environments."""
    shutil.copy(ROOT / "examples" / "sentiment.py", directory)
    temporary = directory / "temporary"
    temporary.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    hostile = HOSTILE | {"TMPDIR": str(temporary), "HOME": str(temporary)}
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--strict-markers"]
    scope = "asyncio_default_fixture_loop_scope=function"
    done = subprocess.run(
        [*command, "-o", scope, "--basetemp", directory / "base", *options],
        cwd=directory,
        env=inherited | hostile | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(temporary.iterdir()) == []
    return done.stdout


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_users_project_passes_and_leaves_nothing(mode: str, tmp_path: Path) -> None:
    mark = "@pytest.mark.asyncio" if mode == "strict" else ""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_x.py").write_text(TEST.replace("MARK", mark))
    assert "4 passed" in run_project(tmp_path, f"--asyncio-mode={mode}")
    made = {"conftest.py", "test_x.py", "sentiment.py", "temporary", "left.json", "base"}
    assert {path.name for path in tmp_path.iterdir()} <= made
    assert json.loads((tmp_path / "left.json").read_text()) == []


def test_a_project_under_anyio_passes(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    test = TEST.replace("MARK", "@pytest.mark.anyio").replace("last, ", "")
    (tmp_path / "test_x.py").write_text(test)
    assert "4 passed" in run_project(tmp_path)


def test_what_is_documented_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    conftest, *tests = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "conftest.py").write_text(conftest)
    for number, test in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(test)
    assert "7 passed" in run_project(tmp_path, "--asyncio-mode=auto")


def test_a_conftest_below_the_root_can_change_the_pki(tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (below / "conftest.py").write_text(OTHER_DOMAIN)
    (below / "test_x.py").write_text(TEST.replace("MARK", "").replace("last, ", ""))
    assert "4 passed" in run_project(tmp_path, "--asyncio-mode=auto", "-p", "parallax.sdk.testing")
