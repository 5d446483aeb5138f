"""A CA gives way to the next one: what lies where, what is refused, and what a crash leaves."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.errors import ConfigError
from parallax.security.keys import KeyType
from parallax.security.layouts import Layout, load_authority, save_authority
from parallax.security.succession import NEXT, discard_next, prepare_next, put_in_force

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
OLD: Final = CertificateAuthority.create(now=NOW - timedelta(days=30))


def no_passphrase() -> bytes:
    raise AssertionError("nobody is to be asked")


def both(new: CertificateAuthority) -> TrustBundle:
    return TrustBundle((OLD.certificate, new.certificate))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_authority(tmp_path, Layout.PARALLAX, OLD)
    return tmp_path


def test_the_next_ca_signs_nothing_before_it_is_put_in_force(directory: Path) -> None:
    new = prepare_next(directory, OLD, no_passphrase, NOW).certificate
    assert load_authority(directory).certificate == OLD.certificate
    bundle = TrustBundle((OLD.certificate, new))
    put_in_force(directory, [OLD.certificate], bundle)
    told = load_authority(directory)
    assert (told.certificate, told.bundle.roots) == (OLD.certificate, bundle.roots)
    put_in_force(directory, [new], bundle)
    signs = load_authority(directory)
    assert (signs.certificate, set(signs.bundle.roots)) == (new, set(bundle.roots))
    put_in_force(directory, [new], TrustBundle((new,)))
    assert load_authority(directory).bundle.roots == (new,)


def test_the_ca_before_is_kept_aside_with_its_key(directory: Path) -> None:
    new = prepare_next(directory, OLD, no_passphrase, NOW).certificate
    put_in_force(directory, [new], TrustBundle((OLD.certificate, new)))
    discard_next(directory, new)
    (retired,) = (directory / "ca").glob("retired-*")
    assert not (directory / "ca" / NEXT).exists()
    shutil.copytree(retired, directory / "restored" / "ca")
    assert load_authority(directory / "restored").certificate == OLD.certificate


def test_all_keys_are_private(directory: Path) -> None:
    new = prepare_next(directory, OLD, no_passphrase, NOW).certificate
    put_in_force(directory, [new], TrustBundle((OLD.certificate, new)))
    keys = [path for path in directory.rglob("key.pem") if not path.is_symlink()]
    assert len(keys) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_the_next_key_is_encrypted_as_the_one_before(tmp_path: Path) -> None:
    save_authority(tmp_path, Layout.PARALLAX, OLD, b"secret")
    new = prepare_next(tmp_path, OLD, lambda: b"secret", NOW).certificate
    put_in_force(tmp_path, [new], TrustBundle((OLD.certificate, new)))
    assert b"ENCRYPTED" in (tmp_path / "ca" / "key.pem").read_bytes()
    assert load_authority(tmp_path, passphrase=b"secret").certificate == new


def test_the_next_key_is_of_the_same_kind(tmp_path: Path) -> None:
    old = CertificateAuthority.create(now=NOW, key_type=KeyType.RSA2048)
    save_authority(tmp_path, Layout.PARALLAX, old)
    new = prepare_next(tmp_path, old, no_passphrase, NOW).certificate
    assert new.public_key().key_size == 2048  # type: ignore[union-attr]


def test_a_flat_directory_is_refused(tmp_path: Path) -> None:
    save_authority(tmp_path, Layout.FLAT, OLD)
    with pytest.raises(ConfigError, match="move to the layout parallax first"):
        prepare_next(tmp_path, OLD, no_passphrase, NOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca-cert.pem", "ca-key.pem"]


def test_a_ca_below_a_root_that_is_elsewhere_is_refused(directory: Path) -> None:
    other = CertificateAuthority.create(now=NOW)
    below = CertificateAuthority(OLD.certificate, OLD.key, other.bundle)
    with pytest.raises(ConfigError, match=r"below a root that is elsewhere.*ca/next/cert\.pem"):
        prepare_next(directory, below, no_passphrase, NOW)
    assert not (directory / "ca" / NEXT).exists()


def test_who_is_to_sign_must_be_there(directory: Path) -> None:
    stranger = CertificateAuthority.create(now=NOW)
    with pytest.raises(ConfigError, match=r"next/cert\.pem"):
        put_in_force(directory, [stranger.certificate], both(stranger))
    prepare_next(directory, OLD, no_passphrase, NOW)
    with pytest.raises(ConfigError, match="is not the CA that is to sign"):
        put_in_force(directory, [stranger.certificate], both(stranger))
    assert load_authority(directory).certificate == OLD.certificate


def test_a_crash_at_any_moment_leaves_a_whole_ca(tmp_path: Path) -> None:
    writer = Path(__file__).with_name("torn_writer.py")
    done = subprocess.run(
        [sys.executable, str(writer), "succeed", "parallax", str(tmp_path / "certs")],
        capture_output=True,
        text=True,
        check=False,
        timeout=25,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] > 20
