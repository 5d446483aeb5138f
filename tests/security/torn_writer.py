"""
Saves credentials in children that die in the middle, and reads all the while.

A program of its own, because it forks, kills and sets umasks; `test_layouts.py` runs it. It prints
one line of JSON; any broken promise ends it with a traceback instead.

    torn_writer.py killed   LAYOUT DIRECTORY ROUNDS    SIGKILL at random moments
    torn_writer.py stepwise LAYOUT DIRECTORY           SIGKILL before each file system call in turn
    torn_writer.py modes    LAYOUT DIRECTORY           looks at every file before each call, umask 0
    torn_writer.py full     LAYOUT DIRECTORY           the disk takes no more bytes
    torn_writer.py succeed  LAYOUT DIRECTORY           as stepwise, while a CA gives way to another
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography.x509 import Certificate

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, leaf_paths, load_authority, save_authority, save_leaf
from parallax.security.material import load_credentials
from parallax.security.profiles import LeafProfile
from parallax.security.succession import discard_next, prepare_next, put_in_force

NOW = datetime.now(UTC)
AGENT = Identity.parse_short("agent/agent-1")
CALLS = frozenset(
    {
        "open",
        "os.chmod",
        "os.link",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.symlink",
    }
)


def issue(authority: CertificateAuthority) -> Credentials:
    key = generate_key()
    issued = authority.issue(AGENT, key.public_key(), LeafProfile(), NOW)
    return Credentials(issued.chain, key, issued.bundle)


def save(directory: Path, layout: Layout, credentials: Credentials) -> None:
    save_leaf(directory, layout, AGENT, credentials.chain, credentials.key, credentials.bundle)


def serial(directory: Path, layout: Layout) -> int:
    """The serial of the whole set that is there; a torn one is a ConfigError."""
    return load_credentials(leaf_paths(directory, layout, AGENT.name), AGENT, NOW).leaf.serial_number


def lay_by_hand(directory: Path, layout: Layout, credentials: Credentials) -> None:
    """Plain files, as openssl or a person would leave them."""
    shutil.rmtree(directory, ignore_errors=True)
    paths = leaf_paths(directory, layout, AGENT.name)
    paths.cert.parent.mkdir(parents=True)
    paths.cert.write_bytes(credentials.chain_pem)
    paths.key.write_bytes(credentials.key_pem)
    paths.key.chmod(0o600)
    paths.ca.write_bytes(credentials.bundle_pem)


def in_child(act: Callable[[], None]) -> int:
    """The pid of a child that does *act*."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        act()
        code = 0
    finally:
        os._exit(code)


def before_each_call(act: Callable[[str], None]) -> None:
    """Do *act* before every call to the file system that this process makes from here on."""
    busy = False

    def hook(event: str, _: object) -> None:
        nonlocal busy
        if event in CALLS and not busy:
            busy = True
            act(event)
            busy = False

    sys.addaudithook(hook)


def killed(layout: Layout, directory: Path, rounds: int) -> dict[str, int]:
    os.fsync = lambda fd: None  # noqa: ARG005 - a killed process loses nothing that it has written; it only takes time here
    authority = CertificateAuthority.create(now=NOW)
    sets = [issue(authority) for _ in range(3)]
    known = {each.leaf.serial_number for each in sets}
    dice = random.Random(20)  # noqa: S311
    reads, new = 0, 0
    for number in range(rounds):
        if number % 2:  # in every other round the files begin as plain ones
            lay_by_hand(directory, layout, sets[0])
        else:
            save(directory, layout, sets[0])

        def write_on() -> None:
            while True:
                for credentials in sets[::-1]:
                    save(directory, layout, credentials)

        child = in_child(write_on)
        deadline = time.monotonic() + dice.uniform(0.0, 0.05)
        while time.monotonic() < deadline:
            assert serial(directory, layout) in known
            reads += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = serial(directory, layout)
        assert found in known
        new += found != sets[0].leaf.serial_number
    save(directory, layout, sets[1])
    assert serial(directory, layout) == sets[1].leaf.serial_number
    return {"reads": reads, "new": new, "left": left_over(directory)}


def stepwise(layout: Layout, directory: Path) -> dict[str, int]:
    os.fsync = lambda fd: None  # noqa: ARG005 - as above
    authority = CertificateAuthority.create(now=NOW)
    old, new = issue(authority), issue(authority)
    known = [old.leaf.serial_number, new.leaf.serial_number]
    steps = 0
    for by_hand in (True, False):
        for step in range(1, 1000):
            if by_hand:
                lay_by_hand(directory, layout, old)
            else:
                shutil.rmtree(directory)
                save(directory, layout, old)

            def write_until_killed(step: int = step) -> None:
                left = step

                def count(_: str) -> None:
                    nonlocal left
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)

                before_each_call(count)
                save(directory, layout, new)

            _, status = os.waitpid(in_child(write_until_killed), 0)
            assert serial(directory, layout) in known
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                assert serial(directory, layout) == known[1]
                break
            save(directory, layout, new)  # the next save tidies up, whatever the crash left
            assert serial(directory, layout) == known[1]
            assert left_over(directory) == 1
            steps += 1
    return {"steps": steps}


def succeed(layout: Layout, directory: Path) -> dict[str, int]:
    """There is a whole CA at any moment: the one before or the next; and the next try gets to the end."""
    os.fsync = lambda fd: None  # noqa: ARG005 - as above
    old = CertificateAuthority.create(now=NOW)
    before = directory.with_name("before")
    save_authority(before, layout, old)
    new = prepare_next(before, old, bytes, NOW).certificate
    put_in_force(before, [old.certificate], TrustBundle((old.certificate, new)))
    steps = 0
    for by_hand in (False, True):
        if by_hand:
            laid = before / "ca" / "next"
            contents = {name: (laid / name).read_bytes() for name in ("cert.pem", "key.pem")}
            shutil.rmtree(laid)
            laid.mkdir()
            for name, content in contents.items():
                (laid / name).write_bytes(content)
                (laid / name).chmod(0o600)
        steps += give_way_stepwise(layout, directory, before, old.certificate, new)
    return {"steps": steps}


def give_way_stepwise(
    layout: Layout, directory: Path, before: Path, old: Certificate, new: Certificate
) -> int:
    """From a copy of *before* as often as there are calls that a crash can come before; how many."""

    def give_way(place: Path) -> None:
        put_in_force(place, [new], TrustBundle((old, new)))
        discard_next(place, new)

    for step in range(1, 1000):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(before, directory, symlinks=True)

        def write_until_killed(step: int = step) -> None:
            left = step

            def count(_: str) -> None:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

            before_each_call(count)
            give_way(directory)

        _, status = os.waitpid(in_child(write_until_killed), 0)
        assert load_authority(directory, layout).certificate in {old, new}
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return step - 1
        give_way(directory)
        assert load_authority(directory, layout).certificate == new
        assert not (directory / "ca" / "next").exists()
        (kept,) = (directory / "ca").glob("retired-*")
        assert (kept / "key.pem").read_bytes() == (before / "ca" / "key.pem").read_bytes()
    raise AssertionError("it never ended")


def modes(layout: Layout, directory: Path) -> dict[str, int]:
    """Keys are never wider than 0600, private directories never wider than 0700; not for an instant."""
    os.umask(0)
    authority = CertificateAuthority.create(now=NOW)
    seen = 0

    def look(_: str) -> None:
        nonlocal seen
        for path in directory.rglob("*"):
            mode = stat.S_IMODE(path.lstat().st_mode)
            if path.is_symlink():
                continue
            if path.is_dir():
                assert mode == 0o700, (path, oct(mode))
            elif b"PRIVATE KEY" in path.read_bytes():
                assert mode == 0o600, (path, oct(mode))
                seen += 1
            else:
                assert mode in {0o600, 0o644}, (path, oct(mode))

    before_each_call(look)
    save_authority(directory, layout, authority)
    for _ in range(3):
        save(directory, layout, issue(authority))
    look("")
    return {"seen": seen}


def full(layout: Layout, directory: Path) -> dict[str, int]:
    """A write that fails leaves the old set in force, and nothing of the new one."""
    authority = CertificateAuthority.create(now=NOW)
    old, new = issue(authority), issue(authority)
    refused = 0
    for by_hand in (True, False):
        lay_by_hand(directory, layout, old)
        if not by_hand:
            save(directory, layout, old)
        before = sorted(directory.rglob("*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            save(directory, layout, new)
        except ConfigError as exc:
            refused += "cannot write to" in str(exc)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert sorted(directory.rglob("*")) == before
        assert serial(directory, layout) == old.leaf.serial_number
    return {"refused": refused}


def left_over(directory: Path) -> int:
    """How many versions lie there; one is in force."""
    return len([path for path in directory.rglob("*@*") if path.parent.name.count("@") == 0])


if __name__ == "__main__":
    mode, layout, directory, *rest = sys.argv[1:]
    act = {"killed": killed, "stepwise": stepwise, "modes": modes, "full": full, "succeed": succeed}[mode]
    try:
        print(json.dumps(act(Layout(layout), Path(directory), *map(int, rest))))  # type: ignore[operator]  # noqa: T201
    except ConfigError as exc:
        sys.exit(f"a reader saw: {exc}")
