"""`parallax ca crl`: what the control plane has published, checked before anybody is given it."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from parallax.control_plane.crl import FOLDER
from parallax.sdk import exits
from parallax.security.authority import CertificateAuthority
from parallax.security.crl import CRL, RevokedSerial, issue_crl
from parallax.security.keys import key_id
from parallax.security.layouts import load_authority

DAY = timedelta(days=1)


def publish(crl: CRL, authority: CertificateAuthority) -> str:
    """Put *crl* where the control plane would put that of *authority*; the issuer's name."""
    issuer = key_id(authority.certificate.public_key()).hex()
    path = Path("data") / FOLDER / f"{issuer}.crl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(crl.der)
    return issuer


@pytest.fixture
def authority(parallax: Any) -> CertificateAuthority:
    assert parallax("ca", "init").code == exits.OK
    return load_authority(Path("certs"))


@pytest.fixture
def published(authority: CertificateAuthority) -> CRL:
    now = datetime.now(UTC)
    crl = issue_crl(authority, 4711, [RevokedSerial(5, now), RevokedSerial(7, now)], now)
    publish(crl, authority)
    return crl


def test_it_is_shown(parallax: Any, published: CRL) -> None:
    ended = parallax("ca", "crl")
    assert (ended.code, ended.err) == (exits.OK, "")
    for words in ("4711", "revoked  2", f"{published.next_update:%Y-%m-%dT%H:%M:%SZ}"):
        assert words in ended.out


def test_json_has_all_of_it(parallax: Any, published: CRL, authority: CertificateAuthority) -> None:
    shown = json.loads(parallax("ca", "crl", "--json").out)
    assert shown["issuer"] == key_id(authority.certificate.public_key()).hex()
    assert (shown["number"], shown["entries"]) == (4711, 2)
    assert CRL.parse(Path(shown["file"]).read_bytes()) == published


def test_it_is_written_in_the_form_asked_for_and_openssl_reads_it(
    parallax: Any, openssl: Any, published: CRL
) -> None:
    assert parallax("ca", "crl", "--out", "list.der").out == ""
    assert parallax("ca", "crl", "--pem", "--out", "list.pem").out == ""
    assert Path("list.der").read_bytes() == published.der
    assert stat.S_IMODE(Path("list.pem").stat().st_mode) == 0o644
    assert "4711" in openssl("crl", "-in", "list.pem", "-CAfile", "certs/ca/cert.pem", "-noout", "-text")
    assert parallax("ca", "crl", "--pem").out.encode() == published.pem


def test_a_stale_one_ends_with_1_and_replaces_nothing(parallax: Any, authority: CertificateAuthority) -> None:
    publish(
        issue_crl(authority, 1, [], datetime.now(UTC) - timedelta(minutes=4), timedelta(minutes=1)), authority
    )
    Path("list.pem").write_text("older")
    ended = parallax("ca", "crl", "--pem", "--out", "list.pem")
    assert (ended.code, ended.out) == (exits.FAILED, "")
    assert "stale since" in ended.err
    assert Path("list.pem").read_text() == "older"


def test_that_of_another_ca_ends_with_1(parallax: Any, authority: CertificateAuthority) -> None:
    now = datetime.now(UTC)
    publish(issue_crl(CertificateAuthority.create(now=now), 1, [], now), authority)
    ended = parallax("ca", "crl")
    assert (ended.code, ended.out) == (exits.FAILED, "")
    assert "not signed by" in ended.err


def test_where_there_is_none_it_says_what_to_do(parallax: Any) -> None:
    without_ca = parallax("ca", "crl")
    assert (without_ca.code, "parallax ca init" in without_ca.err) == (exits.CONFIG, True)
    assert parallax("ca", "init").code == exits.OK
    without_list = parallax("ca", "crl")
    assert (without_list.code, without_list.err.count("\n")) == (exits.CONFIG, 1)
    assert "start the control plane" in without_list.err


def test_what_is_no_list_is_named(parallax: Any, published: CRL) -> None:
    (path,) = Path("data").glob("crl/*.crl")
    path.write_bytes(b"torn")
    ended = parallax("ca", "crl")
    assert ended.code == exits.CONFIG
    assert "data/crl/" in ended.err
