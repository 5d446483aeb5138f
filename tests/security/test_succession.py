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
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.errors import ConfigError
from parallax.security.keys import KeyType, generate_key, key_to_pem
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


def certified(above: CertificateAuthority, name: str, *, depth: int = 0) -> CertificateAuthority:
    """Another CA below *above*, with so many more below it."""
    key = generate_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(above.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(minutes=5))
        .not_valid_after(NOW + timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=True, path_length=depth), critical=True)
        .sign(above.key, hashes.SHA256())
    )
    roots = above.bundle.roots
    between = () if above.certificate in roots else (above.certificate, *above.intermediates)
    return CertificateAuthority(certificate, key, above.bundle, between)


TOP: Final = CertificateAuthority.create(now=NOW - timedelta(days=1), name="Top")
MIDDLE: Final = certified(TOP, "Middle", depth=1)
PREPARED: Final = certified(MIDDLE, "Next")
PREPARED_PATH: Final = (PREPARED.certificate, MIDDLE.certificate, TOP.certificate)


def lay_next(directory: Path, passphrase: bytes | None = None) -> Path:
    """What an operator does, with plain files."""
    place = directory / "ca" / NEXT
    place.mkdir(mode=0o700)
    (place / "cert.pem").write_bytes(certificates_to_pem(PREPARED_PATH))
    (place / "key.pem").touch(0o600)
    (place / "key.pem").write_bytes(key_to_pem(PREPARED.key, passphrase))
    return place


def test_what_an_operator_has_put_there_is_taken_with_its_intermediates(directory: Path) -> None:
    place = lay_next(directory)
    assert prepare_next(directory, OLD, no_passphrase, NOW).certificate == PREPARED.certificate
    put_in_force(directory, PREPARED_PATH, TrustBundle((OLD.certificate, TOP.certificate)))
    signs = load_authority(directory)
    assert (signs.certificate, signs.intermediates) == (PREPARED.certificate, (MIDDLE.certificate,))
    assert set(signs.bundle.roots) == {OLD.certificate, TOP.certificate}
    put_in_force(directory, PREPARED_PATH, TOP.bundle)
    assert load_authority(directory).bundle == TOP.bundle
    (place / "notes").touch()
    discard_next(directory, PREPARED.certificate)
    assert [path.name for path in place.iterdir()] == ["notes"]


def test_another_ca_that_lies_there_by_then_is_not_removed(directory: Path) -> None:
    place = lay_next(directory)
    discard_next(directory, OLD.certificate)
    assert sorted(path.name for path in place.iterdir()) == ["cert.pem", "key.pem"]
    (place / "cert.pem").unlink()  # which is still to come
    discard_next(directory, OLD.certificate)
    assert [path.name for path in place.iterdir()] == ["key.pem"]


def test_one_that_was_never_finished_is_made_again(directory: Path) -> None:
    left = prepare_next(directory, OLD, no_passphrase, NOW).certificate
    assert prepare_next(directory, OLD, no_passphrase, NOW).certificate == left
    (directory / "ca" / NEXT / "..data").unlink()  # as a crash leaves it: links that lead nowhere yet
    assert prepare_next(directory, OLD, no_passphrase, NOW).certificate != left


def test_what_we_may_not_look_at_is_not_taken_for_nothing(directory: Path) -> None:
    (directory / "ca" / NEXT).touch()
    with pytest.raises(ConfigError, match=r"next/cert\.pem cannot be opened"):
        prepare_next(directory, OLD, no_passphrase, NOW)


def test_the_prepared_key_is_encrypted_where_that_in_force_is(tmp_path: Path) -> None:
    save_authority(tmp_path, Layout.PARALLAX, OLD, b"secret")
    place = lay_next(tmp_path)
    with pytest.raises(ConfigError, match=r"next/key\.pem is not encrypted"):
        prepare_next(tmp_path, OLD, lambda: b"secret", NOW)
    shutil.rmtree(place)
    lay_next(tmp_path, b"another")
    with pytest.raises(ConfigError, match=r"next/key\.pem: wrong passphrase"):
        prepare_next(tmp_path, OLD, lambda: b"secret", NOW)
    shutil.rmtree(place)
    lay_next(tmp_path, b"secret")
    prepare_next(tmp_path, OLD, lambda: b"secret", NOW)
    put_in_force(tmp_path, PREPARED_PATH, TOP.bundle)
    assert load_authority(tmp_path, passphrase=b"secret").certificate == PREPARED.certificate


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
