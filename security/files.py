"""
Files that appear whole or not at all, and never with a wider mode than they are given.

A *set* is files that only make sense together. It lies in a versioned directory; the names that
people know are links through one more link, which a single rename points at the next version::

    cert.pem → ..data/cert.pem        ..data → ..data@41f0…        ..data@41f0…/cert.pem
    key.pem  → ..data/key.pem                                      ..data@41f0…/key.pem

That is how Kubernetes swaps mounted secrets. Everything works relative to an open directory, so
that nobody can put a link in the way between a check and the act it allowed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shlex
import shutil
import stat
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from parallax.security.errors import ConfigError, Defect

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from pathlib import Path

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644
PRIVATE_DIRECTORY: Final = 0o700
MAX_BYTES: Final = 1 << 20  # a bundle of 500 roots is half of this; a device or a log is not read for ever

_LOCK_WAIT_S: Final = 10.0  # a save takes milliseconds; whoever holds the lock longer hangs
_VERSION_MARK: Final = "@"  # no name may contain it, so one name's versions are never another's


@dataclass(frozen=True, slots=True)
class File:
    """What a file is to contain, and its mode."""

    content: bytes = field(repr=False)
    mode: int


def show(path: Path | str) -> str:
    """*path* for a message, on one line whatever it contains."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory held open; made by `writing`."""

    descriptor: int
    path: Path


def command(*words: Path | str) -> str:
    """A shell command for a message, to be copied as it stands."""
    return f"`{' '.join(shlex.quote(show(word)) for word in words)}`"


def read_file(path: Path, *, remedy: str, private: bool = False, max_bytes: int = MAX_BYTES) -> bytes:
    """
    The content of *path*, links followed, at most *max_bytes*.

    A *private* one is refused if others may read or write it. Its group may read it only if root
    owns it and we are in that group, which is how Kubernetes hands out secrets (`fsGroup`).
    *remedy* is what to do if it is missing.

    Raises:
        ConfigError: One line that names file and remedy.
    """
    try:
        # Not blocking: the open of a FIFO without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"{show(path)} is missing: {remedy}", Defect.MISSING) from None
    except PermissionError:
        us = f"this process (uid {os.geteuid()})"
        text = f"{show(path)} is not readable by {us}: {_access_remedy(path)}"
        raise ConfigError(text, Defect.UNREADABLE) from None
    except OSError as exc:
        text = f"{show(path)} cannot be opened: {_reason(exc)}: {remedy}"
        raise ConfigError(text, Defect.UNREADABLE) from None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError(f"{show(path)} is not a regular file: {remedy}", Defect.UNREADABLE)
        if private and _is_too_open(about):
            mode = f"mode {stat.S_IMODE(about.st_mode):04o}"
            text = f"{show(path)} is open to others ({mode}): {command('chmod', '600', path)}"
            raise ConfigError(text, Defect.OPEN_TO_OTHERS)
        with open(descriptor, "rb", closefd=False) as stream:
            content = stream.read(max_bytes + 1)
    except OSError as exc:
        text = f"{show(path)} cannot be read: {_reason(exc)}: {remedy}"
        raise ConfigError(text, Defect.UNREADABLE) from None
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise ConfigError(f"{show(path)} is larger than {max_bytes} bytes: {remedy}", Defect.UNREADABLE)
    return content


@contextmanager
def writing(directory: Path, inner: str | None = None) -> Generator[Place]:
    """
    *directory*, or the directory *inner* in it, made if need be, open and locked against other writers.

    The mode of one that exists is left alone. *directory* may be a link, *inner* may not.

    Raises:
        ConfigError: It cannot be made or written, as every `OSError` within the block too.
    """
    path = directory / inner if inner else directory
    try:
        with ExitStack() as stack:
            descriptor = stack.enter_context(_opened(directory))
            if inner:
                descriptor = stack.enter_context(_opened(inner, dir_fd=descriptor))
            place = Place(descriptor, path)
            _lock(place)
            yield place
    except OSError as exc:
        raise ConfigError(f"cannot write to {show(path)}: {_reason(exc)}: mend it or use another") from exc


def exists(place: Place, name: str) -> bool:
    """Whether there is anything called *name*, be it a link that leads nowhere."""
    return _lstat(place.descriptor, name) is not None


def create_file(place: Place, name: str, file: File) -> None:
    """
    Make *name*, whole or not at all.

    Raises:
        ConfigError: There is something of that name already; it is left as it was.
    """
    directory, temporary = place.descriptor, _versioned(f"..{name}")
    _write(directory, temporary, file)
    try:
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        raise ConfigError(f"{show(place.path / name)} exists already and is never overwritten") from None
    finally:
        _remove_versions(directory, f"..{name}")  # those that a crash left behind too: they may hold a key
    os.fsync(directory)


def ensure_file(place: Place, name: str, file: File) -> None:
    """Make *name* as `create_file` does, unless it is there; then it is left as it is."""
    if exists(place, name):
        _remove_versions(place.descriptor, f"..{name}")  # of who was killed right after it was made
    else:
        create_file(place, name, file)


def replace_file(place: Place, name: str, file: File) -> None:
    """Put *file* where *name* is, if there is one: a reader sees the old or the new one, whole."""
    directory, temporary = place.descriptor, _versioned(f"..{name}")
    try:
        _write(directory, temporary, file)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        _remove_versions(directory, f"..{name}")  # this one, and what a crash left
    os.fsync(directory)


def remove_file(place: Place, name: str) -> None:
    """Remove what `replace_file` has put there, if anything."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=place.descriptor)
    _remove_versions(place.descriptor, f"..{name}")
    os.fsync(place.descriptor)


def publish_set(place: Place, link: str, files: Mapping[str, tuple[str, File]]) -> None:
    """
    Replace the set behind *link* by *files* in one rename.

    A reader sees the old set or the new one whole. Plain files in place of our links, made by
    hand, first become a version of their own with the same content and are replaced by links one
    by one, which changes nothing for a reader; only then comes the one rename. So whatever the
    moment of a crash, the old or the new set is there; left-over versions go with the next
    successful call.

    *files* are visible name → (name within the version, file).

    Raises:
        ConfigError: A link or something else that is not ours is in the way; nothing was changed.
    """
    _check_link(place, link)
    directory = place.descriptor
    others = [name for name, (inner, _) in files.items() if not _is_our_link(place, name, f"{link}/{inner}")]
    try:
        if any(exists(place, name) for name in others):
            _swap(directory, link, _as_it_is(directory, files))
        for name in others:
            _place_link(directory, name, f"{link}/{files[name][0]}", temporary=_versioned(link))
        _swap(directory, link, dict(files.values()))
    finally:
        in_force = os.readlink(link, dir_fd=directory) if exists(place, link) else ""
        _remove_versions(directory, link, keep=in_force)


def is_published(path: Path, link: str) -> bool:
    """Whether *path* leads into a set that `publish_set` has put behind *link*."""
    version = os.path.dirname(os.path.realpath(path))  # noqa: PTH120
    return os.path.basename(version).startswith(f"{link}{_VERSION_MARK}")  # noqa: PTH119


def remove_set(place: Place, link: str, names: Iterable[str]) -> None:
    """Remove *names*, in this order, be they links or files made by hand, then the set behind *link*."""
    for name in (*names, link):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place.descriptor)
    _remove_versions(place.descriptor, link)
    os.fsync(place.descriptor)


def _check_link(place: Place, link: str) -> None:
    about = _lstat(place.descriptor, link)
    if about is None:
        return
    target = os.readlink(link, dir_fd=place.descriptor) if stat.S_ISLNK(about.st_mode) else ""
    if not target.startswith(f"{link}{_VERSION_MARK}") or "/" in target:
        raise ConfigError(f"{show(place.path / link)} was not made by this program: use another directory")


def _is_our_link(place: Place, name: str, target: str) -> bool:
    """Whether *name* is the link to *target*; it may also be a plain file or absent, nothing else."""
    about = _lstat(place.descriptor, name)
    if about is None or stat.S_ISREG(about.st_mode):
        return False
    if stat.S_ISLNK(about.st_mode) and os.readlink(name, dir_fd=place.descriptor) == target:
        return True
    raise ConfigError(f"{show(place.path / name)} is neither a file nor our own link: remove it first")


def _as_it_is(directory: int, files: Mapping[str, tuple[str, File]]) -> dict[str, File]:
    """What the visible names give a reader now; those that give nothing are left out."""
    present = {}
    for name, (inner, file) in files.items():
        with suppress(FileNotFoundError):
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            with open(descriptor, "rb") as stream:  # noqa: PTH123
                present[inner] = File(stream.read(), file.mode)
    return present


def _swap(directory: int, link: str, files: Mapping[str, File]) -> None:
    """Write *files* as a version and point *link* at it."""
    version = _versioned(link)
    # As open as the directory it lies in, where the files would otherwise lie themselves.
    mode = stat.S_IMODE(os.fstat(directory).st_mode) & 0o755 | PRIVATE_DIRECTORY
    with _opened(version, dir_fd=directory) as inside:
        for name, file in files.items():
            _write(inside, name, file)
        os.fchmod(inside, mode)
        os.fsync(inside)
    _place_link(directory, link, version, temporary=_versioned(link))


def _place_link(directory: int, name: str, target: str, *, temporary: str) -> None:
    os.symlink(target, temporary, dir_fd=directory)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def _write(directory: int, name: str, file: File) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, PRIVATE, dir_fd=directory)
    with open(descriptor, "wb") as stream:  # noqa: PTH123
        stream.write(file.content)
        stream.flush()
        os.fchmod(descriptor, file.mode)  # exactly, whatever the umask
        os.fsync(descriptor)


def _remove_versions(directory: int, link: str, keep: str = "") -> None:
    """Remove what this call and earlier ones left, finished or not; what counts is in place already."""
    for name in os.listdir(directory):
        if name.startswith(f"{link}{_VERSION_MARK}") and name != keep:
            about = _lstat(directory, name)
            if about is not None and stat.S_ISDIR(about.st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=directory)
            else:
                with suppress(OSError):
                    os.unlink(name, dir_fd=directory)


def _versioned(link: str) -> str:
    return f"{link}{_VERSION_MARK}{secrets.token_hex(8)}"


@contextmanager
def _opened(path: Path | str, *, dir_fd: int | None = None) -> Generator[int]:
    """The directory *path*, made if need be; within *dir_fd* it must not be a link."""
    if dir_fd is None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # noqa: PTH103, PTH120 - also for str
    with suppress(FileExistsError):
        os.mkdir(path, PRIVATE_DIRECTORY, dir_fd=dir_fd)
        os.chmod(path, PRIVATE_DIRECTORY, dir_fd=dir_fd)  # a umask may have taken our own rights too
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if dir_fd is None else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(place: Place) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(place.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(f"another process keeps writing to {show(place.path)}: end it") from None
            time.sleep(0.01)
        except OSError:
            return  # some network file systems have no locks; the swap itself is atomic without one
        else:
            return


def _lstat(directory: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_too_open(about: os.stat_result) -> bool:
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o077 == stat.S_IRGRP:
        return about.st_uid != 0 or about.st_gid not in {os.getegid(), *os.getgroups()}
    return mode & 0o077 != 0


def _access_remedy(path: Path) -> str:
    try:
        owner = path.stat().st_uid
    except OSError:
        return f"let it enter {show(path.parent)}"
    uid = os.geteuid()
    return command("chmod", "u+r", path) if owner == uid else command("chown", str(uid), path)


def _reason(exc: OSError) -> str:
    if exc.errno in {errno.ELOOP, errno.ENOTDIR}:
        return "not a directory, or a link"
    return (exc.strerror or type(exc).__name__).lower()
