"""`parallax certs self-sign`, `pin`, `unpin`, `pins`: a certificate that a device makes itself."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.sdk import exits
from parallax.security.identity import Identity
from parallax.security.pinned import check_self_signed

pytestmark = pytest.mark.timeout(60)  # a control plane starts, and many commands

DEVICE = "agent/07048933"
ADMIN = ("--identity", "client/admin", "--certs-dir", "certs")

Serve = Callable[..., None]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the device keeps what is its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "device"))
    return tmp_path / "device" / ".mtls"


def leaf_in(home: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((home / "client.crt").read_bytes())


def enable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_TLS_ENABLED", "true")
    monkeypatch.setenv("PARALLAX_TLS_VERIFY_CLIENT", "true")


def test_a_device_makes_its_own_certificate_and_only_it_can_read_the_key(parallax: Any, home: Path) -> None:
    assert parallax("certs", "generate").code == exits.OK
    ended = parallax(
        "certs", "self-sign", DEVICE, "--ca", "certs/ca/cert.pem", "--key-type", "rsa-4096", "--json"
    )
    assert (ended.code, ended.err) == (exits.OK, "")
    made, leaf = json.loads(ended.out), leaf_in(home)
    assert made["identity"] == "spiffe://parallax.local/agent/07048933"
    assert made["files"]["certificate"] == str(home / "client.crt")
    assert leaf.subject.rfc4514_string() == "CN=07048933"
    assert leaf.public_key().key_size == 4096  # type: ignore[union-attr]
    named = check_self_signed(leaf, "parallax.local", leaf.not_valid_before_utc)
    assert named == Identity.parse_short(DEVICE)
    modes = {
        name: stat.S_IMODE((home / name).stat().st_mode) for name in ("client.crt", "client.key", "ca.crt")
    }
    assert modes == {"client.crt": 0o644, "client.key": 0o600, "ca.crt": 0o644}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert (home / "ca.crt").read_bytes() == Path("certs/ca/cert.pem").read_bytes()


def test_what_a_device_has_is_never_replaced(parallax: Any, home: Path, tree: Any) -> None:
    assert parallax("certs", "generate").code == exits.OK
    arguments = ("certs", "self-sign", DEVICE, "--ca", "certs/ca/cert.pem")
    assert parallax(*arguments).code == exits.OK
    before = tree(home)
    ended = parallax(*arguments)
    assert ended.code == exits.CONFIG
    assert "exists already and is never replaced" in ended.err
    assert tree(home) == before


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("service/control-plane", "--ca", "certs/ca/cert.pem"), "is a service"),
        ((DEVICE, "--ca", "nothing"), "nothing is missing: give the file with the roots"),
        ((DEVICE, "--ca", "certs/agent-1/cert.pem"), "not a CA"),
        (("07048933", "--ca", "certs/ca/cert.pem"), "not <kind>/<name>"),
    ],
)
def test_nothing_is_made_that_could_not_be_used(
    parallax: Any, home: Path, arguments: tuple[str, ...], why: str
) -> None:
    assert parallax("certs", "generate").code == exits.OK
    ended = parallax("certs", "self-sign", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert why in ended.err
    assert not home.exists()


def pin_own(parallax: Any, home: Path) -> tuple[str, ...]:
    """Make the device a certificate of its own and pin it; the command that pinned it."""
    assert parallax("certs", "self-sign", DEVICE, "--ca", "certs/ca/cert.pem").code == exits.OK
    pinning = ("certs", "pin", DEVICE, "--file", str(home / "client.crt"), *ADMIN)
    assert parallax(*pinning).code == exits.OK
    return pinning


def renew_once_in_force(parallax: Any, *who: str) -> Any:
    """A pin is in force on the port within a second, not at once."""
    deadline = monotonic() + 20
    while (done := parallax("certs", "renew", *who)).code != exits.OK:
        assert monotonic() < deadline, done.err
        sleep(0.1)
    return done


def test_from_its_making_to_its_exchange(
    serve: Serve, parallax: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(PARALLAX_DRAIN_SECONDS="0")
    enable(monkeypatch)
    assert parallax("certs", "self-sign", DEVICE, "--ca", "certs/ca/cert.pem").code == exits.OK
    device = ("--certs-dir", "nowhere")  # so the home counts
    refused = parallax("certs", "renew", "07048933", *device)
    assert refused.code == exits.UNAVAILABLE
    fingerprint = leaf_in(home).fingerprint(hashes.SHA256()).hex()

    pinned = parallax("certs", "pin", DEVICE, "--file", str(home / "client.crt"), *ADMIN)
    assert (pinned.code, pinned.err) == (exits.OK, "")
    assert fingerprint in pinned.out
    listed = parallax("certs", "pins", *ADMIN)
    assert [cell in listed.out for cell in (DEVICE, "let in", fingerprint)] == [True] * 3

    renewed = renew_once_in_force(parallax, "07048933", *device)
    assert (renewed.code, renewed.err) == (exits.OK, "")
    assert leaf_in(home).issuer != leaf_in(home).subject
    while rows := json.loads(parallax("certs", "pins", "--json", *ADMIN).out):
        assert [row["exchanged"] for row in rows] == [True]
    assert parallax("certs", "renew", "07048933", *device).code == exits.OK


def test_one_that_is_revoked_is_not_said_to_be_let_in(
    serve: Serve, parallax: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    enable(monkeypatch)
    pin_own(parallax, home)
    assert parallax("certs", "revoke", DEVICE, *ADMIN).code == exits.OK
    listed = parallax("certs", "pins", *ADMIN)
    assert ("revoked" in listed.out, "let in" in listed.out) == (True, False)
    [row] = json.loads(parallax("certs", "pins", "--json", *ADMIN).out)
    assert (row["revoked"], row["on_port"]) == (True, True)


def test_taking_out_what_was_exchanged_says_what_is_left(
    serve: Serve, parallax: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    enable(monkeypatch)
    pinning = pin_own(parallax, home)
    unused = parallax("certs", "unpin", DEVICE, *ADMIN)
    assert (unused.code, unused.err) == (exits.OK, "")
    assert parallax(*pinning).code == exits.OK
    renew_once_in_force(parallax, "07048933", "--certs-dir", "nowhere")
    exchanged = parallax("certs", "unpin", DEVICE, *ADMIN)
    assert exchanged.code == exits.OK
    assert f"parallax certs revoke {DEVICE}" in exchanged.err


def test_a_third_pin_names_the_two_and_one_that_is_taken_out_makes_room(
    serve: Serve, parallax: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    enable(monkeypatch)
    prints = []
    for number in range(3):
        where = ("--layout", "parallax", "--certs-dir", f"device-{number}")
        assert parallax("certs", "self-sign", DEVICE, "--ca", "certs/ca/cert.pem", *where).code == exits.OK
        pem = Path(f"device-{number}/07048933/cert.pem").read_bytes()
        prints.append(x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex())
    files = [f"device-{number}/07048933/cert.pem" for number in range(3)]
    assert [parallax("certs", "pin", DEVICE, "--file", file, *ADMIN).code for file in files[:2]] == [
        exits.OK
    ] * 2
    third = parallax("certs", "pin", DEVICE, "--file", files[2], *ADMIN)
    assert third.code != exits.OK
    assert [each in third.err for each in prints] == [True, True, False]
    colons = ":".join(prints[0][at : at + 2] for at in range(0, 64, 2)).upper()  # as openssl writes it
    gone = parallax("certs", "unpin", DEVICE, "--fingerprint", colons, *ADMIN)
    assert (gone.code, prints[0] in gone.out) == (exits.OK, True)
    assert parallax("certs", "pin", DEVICE, "--file", files[2], "--json", *ADMIN).code == exits.OK
    assert parallax("certs", "unpin", DEVICE, *ADMIN).code == exits.OK
    assert parallax("certs", "unpin", DEVICE, *ADMIN).code == exits.CONFIG
    empty = parallax("certs", "pins", *ADMIN)
    assert (empty.code, empty.out) == (exits.OK, "")
    assert "nothing is pinned" in empty.err


def test_only_the_administrator_may_and_only_with_the_certificate(
    serve: Serve, parallax: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    enable(monkeypatch)
    cert = x509.load_pem_x509_certificate(Path("certs/agent-1/cert.pem").read_bytes())
    Path("leaf.der").write_bytes(cert.public_bytes(Encoding.DER))
    for arguments, code, why in (
        (("pins", "--certs-dir", "certs"), exits.NO_PERMISSION, "act as --identity client/admin"),
        (("pin", "agent/agent-1", *ADMIN), exits.CONFIG, "'--file'"),
        (("pin", "agent/agent-1", "--file", "leaf.der", *ADMIN), exits.CONFIG, "not a certificate"),
        (
            ("pin", "agent/agent-1", "--file", "certs/agent-1/cert.pem", *ADMIN),
            exits.CONFIG,
            "not self-signed",
        ),
    ):
        ended = parallax("certs", *arguments)
        assert (ended.code, ended.out) == (code, "")
        assert why in ended.err
