"""The Dockerfile: what goes in, who runs it, and that its steps work."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.deploy.conftest import Image

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)  # the first test installs everything that the image has

SECRETS = (
    ".env",
    ".git/config",
    ".venv/bin/python",
    "ca-key.pem",
    "certs/agent-1/..data@0123456789abcdef/key.pem",
    "certs/agent-1/key.pem",
    "certs/ca/key.pem",
    "control_plane/.env",
    "data/parallax.db",
    "examples/key.pem",
    "flat/agent-1-key.pem",
    "parallax.toml",
    "passphrase",
    "sdk/cli/agent-1-key.pem",
    "security/client.key",
    "security/deep/er/key.pem",
)


def test_no_secret_is_sent_to_the_builder(unbuilt: Image) -> None:
    assert [path for path in SECRETS if unbuilt.is_sent(path)] == []


def test_what_is_sent_is_what_is_copied(unbuilt: Image) -> None:
    """The allow list has nothing that the Dockerfile does not use."""
    allowed = {line.removeprefix("!") for line in unbuilt.ignore if line.startswith("!")}
    copies = [i for i in unbuilt.instructions if i.keyword == "COPY" and "from" not in i.flags]
    assert {source for copy in copies for source in copy.words[:-1]} == allowed
    assert unbuilt.ignore[0] == "*"
    assert [i for i in unbuilt.instructions if i.keyword == "ADD"] == []


def test_its_user_is_a_number_that_is_not_root(unbuilt: Image) -> None:
    """A name could be root by another name, and `runAsNonRoot` refuses what it cannot tell."""
    uid, gid = unbuilt.last("USER").text.split(":")
    assert int(uid) >= 10_000
    assert int(gid) >= 10_000
    keywords = [i.keyword for i in unbuilt.instructions]
    after = keywords[keywords.index("USER") :]
    assert after == ["USER", "CMD"]


def test_bases_are_pinned_and_the_same(unbuilt: Image) -> None:
    bases = {i.text.split()[0] for i in unbuilt.instructions if i.keyword == "FROM"}
    (base,) = bases
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base)


def test_whatever_comes_from_an_index_is_checked_against_hashes(unbuilt: Image) -> None:
    runs = [i.text for i in unbuilt.instructions if i.keyword == "RUN"]
    installs = [text for text in runs if re.search(r"\bpip\b.* (install|wheel)\b", text)]
    assert any("-r requirements-runtime.lock" in text for text in installs)
    for text in installs:
        assert "--require-hashes" in text or "--no-deps" in text, text
        assert "--require-hashes" in text or re.search(r" (\.|dist/\*\.whl)$", text), text
    assert all("--no-build-isolation" in text for text in installs if " wheel " in text)
    assert not [text for text in runs if re.search(r"\b(curl|wget|apt|apt-get)\b|://", text)]


def test_its_steps_work_and_give_the_command(image: Image) -> None:
    done = subprocess.run(
        ["parallax", "--help"],
        env=image.environment,
        cwd=image.workdir,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "control-plane" in done.stdout
    listed = subprocess.run(
        [image.root / "python" / "bin" / "pip", "--python", image.root / "opt/parallax", "list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "parallax-mesh" in listed
    assert not re.search(r"^(pip|pytest|setuptools) ", listed, re.MULTILINE)


@pytest.mark.parametrize("name", ["certs", "data"])
def test_its_volumes_are_its_users_alone(image: Image, name: str) -> None:
    about = (image.root / name).stat()
    assert (about.st_mode & 0o7777, about.st_uid, about.st_gid) == (0o700, *image.user)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files that others cannot change")
def test_its_user_can_change_nothing_that_runs(image: Image) -> None:
    uid, _ = image.user
    for folder in (image.root / "opt", image.root / "app"):
        for path in [folder, *folder.rglob("*")]:
            about = path.lstat()
            assert about.st_uid != uid
            assert path.is_symlink() or not about.st_mode & 0o022, path


def test_it_holds_no_key(image: Image) -> None:
    places = [image.root / name for name in ("opt", "app", "certs")]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if path.suffix == ".key"]
    pem = [path for path in files if path.suffix == ".pem"]
    assert not [path for path in pem if b"PRIVATE KEY" in path.read_bytes()]
