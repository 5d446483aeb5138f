"""`parallax certs inspect`, `verify` and `list`."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from parallax.sdk import exits
from parallax.sdk.cli.render import distance
from parallax.security.authority import CertificateAuthority
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_authority, save_leaf
from parallax.security.profiles import LeafProfile

GUIDES_EXTENSIONS = """
[v3_req]
subjectAltName = @alt_names
[alt_names]
DNS.1 = control-plane.parallax.local
DNS.2 = localhost
IP.1 = 127.0.0.1
"""


@pytest.fixture
def generated(parallax: Any) -> Any:
    """The command, in a directory where `certs generate` has run."""
    assert parallax("certs", "generate").code == exits.OK
    return parallax


@pytest.fixture
def by_hand(parallax: Any, openssl: Any) -> Path:
    """What the guide's openssl commands make: a CA, and a certificate of the control plane."""
    Path("certs/ca").mkdir(parents=True)
    Path("certs/control-plane").mkdir()
    Path("extensions").write_text(GUIDES_EXTENSIONS, encoding="ascii")
    subject = "/C=US/ST=CA/L=San Francisco/O=Parallax/CN="
    ca_key, ca = "certs/ca/key.pem", "certs/ca/cert.pem"
    key, cert = "certs/control-plane/key.pem", "certs/control-plane/cert.pem"
    openssl("genrsa", "-out", ca_key, "2048")
    openssl(
        "req",
        "-new",
        "-x509",
        "-days",
        "3650",
        "-key",
        ca_key,
        "-out",
        ca,
        "-subj",
        f"{subject}Parallax Root CA",
    )
    openssl("genrsa", "-out", key, "2048")
    name = "control-plane.parallax.local"
    openssl("req", "-new", "-key", key, "-out", "csr.pem", "-subj", f"{subject}{name}")
    sign = ("x509", "-req", "-in", "csr.pem", "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-out", cert)
    openssl(*sign, "-days", "365", "-extensions", "v3_req", "-extfile", "extensions")
    Path("certs/control-plane/ca.pem").write_bytes(Path(ca).read_bytes())
    return Path(cert)


def issue(name: str, began: timedelta, lifetime: timedelta, *, kind: str = "agent") -> None:
    """A leaf whose validity began some time ago, in ./certs."""
    then = datetime.now(UTC) - began
    authority = CertificateAuthority.create(now=then)
    if not Path("certs/ca").exists():
        save_authority(Path("certs"), Layout.PARALLAX, authority)
    identity, key = Identity.parse_short(f"{kind}/{name}"), generate_key()
    issued = authority.issue(identity, key.public_key(), LeafProfile(lifetime), then)
    save_leaf(Path("certs"), Layout.PARALLAX, identity, issued.chain, key, issued.bundle)


def listed(parallax: Any) -> dict[str, Any]:
    """What `certs list --json` says, by name."""
    ended = parallax("certs", "list", "--json")
    assert (ended.code, ended.err) == (exits.OK, "")
    return {row["name"]: row for row in json.loads(ended.out)}


# inspect


@pytest.mark.parametrize("target", ["agent-1", "certs/agent-1/cert.pem"])
def test_inspect_shows_what_openssl_shows(generated: Any, openssl: Any, target: str) -> None:
    shown = json.loads(generated("certs", "inspect", target, "--json").out)
    ask = ("x509", "-in", "certs/agent-1/cert.pem", "-noout")
    serial = openssl(*ask, "-serial").strip().partition("=")[2].lower()
    fingerprint = openssl(*ask, "-fingerprint", "-sha256").strip().partition("=")[2].lower()
    assert shown["serial"] == serial.lstrip("0")
    assert shown["fingerprint"] == fingerprint.replace(":", "")
    assert shown["sans"] == [
        "URI:spiffe://parallax.local/agent/agent-1",
        "DNS:agent-1.agents.parallax.local",
        "DNS:localhost",
        "IP:127.0.0.1",
        "IP:::1",
    ]
    assert (shown["identity"], shown["issuer"]) == (
        "spiffe://parallax.local/agent/agent-1",
        "CN=Parallax Root CA,O=Parallax",
    )
    assert (shown["file"], shown["key_type"], shown["is_ca"]) == ("certs/agent-1/cert.pem", "p256", False)
    out = generated("certs", "inspect", target).out
    for each in (
        shown["serial"],
        shown["fingerprint"],
        "ends in 364 days",
        shown["not_after"],
        *shown["sans"],
    ):
        assert each in out


def test_inspect_knows_the_flat_layout_and_the_ca(parallax: Any) -> None:
    parallax("ca", "init", "--layout", "flat")
    parallax("certs", "issue", "agente_py", "--kind", "agent")
    shown = [json.loads(parallax("certs", "inspect", name, "--json").out) for name in ("agente_py", "ca")]
    assert [each["file"] for each in shown] == ["certs/agente_py-cert.pem", "certs/ca-cert.pem"]
    assert [each["is_ca"] for each in shown] == [False, True]
    assert shown[1]["identity_problem"] is None


def test_inspect_shows_every_certificate_of_a_file(generated: Any) -> None:
    chain = Path("chain.pem")
    chain.write_bytes(Path("certs/cli/cert.pem").read_bytes() + Path("certs/ca/cert.pem").read_bytes())
    shown = json.loads(generated("certs", "inspect", chain, "--json").out)
    assert shown["identity"] == "spiffe://parallax.local/client/cli"
    assert [each["is_ca"] for each in shown["others"]] == [True]
    assert "chain.pem, certificate 2" in generated("certs", "inspect", chain).out


def test_inspect_shows_a_certificate_made_by_hand(parallax: Any, by_hand: Path) -> None:
    shown = json.loads(parallax("certs", "inspect", by_hand, "--json").out)
    assert shown["identity"] == "spiffe://parallax.local/service/control-plane"
    assert shown["key_type"] == "rsa-2048"
    assert "ST=CA" in shown["subject"]


def test_inspect_shows_a_certificate_that_names_nobody(parallax: Any, openssl: Any) -> None:
    make = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "web.pem")
    openssl(*make, "-subj", "/CN=web.example.com", "-addext", "basicConstraints=critical,CA:FALSE")
    shown = json.loads(parallax("certs", "inspect", "web.pem", "--json").out)
    assert shown["identity"] is None
    assert "web.example.com" in shown["identity_problem"]
    assert "none: names no identity" in parallax("certs", "inspect", "web.pem").out


def test_what_a_certificate_says_does_not_steer_the_terminal(parallax: Any, openssl: Any) -> None:
    make = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "evil.pem")
    openssl(*make, "-utf8", "-subj", "/CN=\x1b[31m[red]evil\u202e")
    ended = parallax("certs", "inspect", "evil.pem")
    assert ended.code == exits.OK
    assert r"\x1b[31m[red]evil\u202e" in ended.out
    assert "\x1b" not in ended.out
    assert "\x1b" not in parallax("certs", "inspect", "evil.pem", "--json").out


@pytest.mark.parametrize(
    "target",
    ["nobody", "no/such.pem", "../cli", "Cli", "x" * 300, "a\0b", "ü", "certs/cli/key.pem", "", "certs"],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_certificate_is_one_line(generated: Any, command: str, target: str) -> None:
    ended = generated("certs", command, target)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith("parallax: ")
    assert ended.err.count("\n") == 1


# verify


@pytest.mark.parametrize("target", ["cli", "certs/cli/cert.pem"])
def test_verify_says_ok_for_each_purpose(generated: Any, target: str) -> None:
    ended = generated("certs", "verify", target)
    assert (ended.code, ended.err) == (exits.OK, "")
    assert ended.out.splitlines()[:2] == [
        "certs/cli/cert.pem: client: OK",
        "certs/cli/cert.pem: server: OK",
    ]
    assert "spiffe://parallax.local/client/cli" in ended.out
    report = json.loads(generated("certs", "verify", target, "--json").out)
    assert report["ok"] is True
    assert report["purposes"] == {name: {"ok": True, "cause": None} for name in ("client", "server")}


def test_verify_accepts_what_the_guides_commands_make(parallax: Any, by_hand: Path) -> None:
    assert parallax("certs", "verify", "control-plane").code == exits.OK
    assert parallax("certs", "verify", by_hand, "--ca", "certs/ca/cert.pem").code == exits.OK


def test_verify_names_the_cause_and_fails(generated: Any) -> None:
    generated("ca", "init", "--certs-dir", "other")
    ended = generated("certs", "verify", "cli", "--ca", "other/ca/cert.pem")
    assert (ended.code, ended.err) == (exits.FAILED, "")
    assert ended.out.startswith("certs/cli/cert.pem: client: not issued by a CA of the trust bundle")
    report = json.loads(generated("certs", "verify", "cli", "--ca", "other/ca/cert.pem", "--json").out)
    assert (report["ok"], report["identity"]) == (False, None)


def test_verify_fails_for_an_expired_certificate(parallax: Any) -> None:
    issue("old", timedelta(days=30), timedelta(days=10))
    ended = parallax("certs", "verify", "old")
    assert ended.code == exits.FAILED
    assert "client: expired at 20" in ended.out


def test_verify_tells_the_purposes_apart(parallax: Any, openssl: Any) -> None:
    parallax("ca", "init")
    Path("server.cnf").write_text(
        "extendedKeyUsage = serverAuth\nsubjectAltName = DNS:web.parallax.local\n", encoding="ascii"
    )
    openssl("genrsa", "-out", "web-key.pem", "2048")
    openssl("req", "-new", "-key", "web-key.pem", "-out", "web.csr", "-subj", "/CN=web.parallax.local")
    sign = ("x509", "-req", "-in", "web.csr", "-CA", "certs/ca/cert.pem", "-CAkey", "certs/ca/key.pem")
    openssl(*sign, "-CAcreateserial", "-days", "9", "-extfile", "server.cnf", "-out", "web.pem")
    ended = parallax("certs", "verify", "web.pem")
    assert ended.code == exits.FAILED
    assert "web.pem: client: extended key usage lacks clientAuth\nweb.pem: server: OK\n" in ended.out
    assert parallax("certs", "verify", "web.pem", "--purpose", "server").code == exits.OK
    assert parallax("certs", "verify", "web.pem", "--purpose", "client").code == exits.FAILED


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_verify_without_a_usable_ca_gives_no_verdict(generated: Any, content: bytes | None) -> None:
    if content is not None:
        Path("ca-file.pem").write_bytes(content)
    ended = generated("certs", "verify", "cli", "--ca", "ca-file.pem")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith("parallax: ca-file.pem")
    assert "--ca" in ended.err


# list


def test_list_shows_all_of_either_layout(parallax: Any) -> None:
    for layout in ("parallax", "flat"):
        parallax("ca", "init", "--layout", layout, "--certs-dir", layout)
        parallax("certs", "generate", "--certs-dir", layout)
        ended = parallax("certs", "list", "--certs-dir", layout, "--json")
        rows = json.loads(ended.out)
        assert [row["name"] for row in rows] == [
            "ca",
            "admin",
            "agent-1",
            "agent-proxy",
            "cli",
            "control-plane",
        ]
        assert {row["layout"] for row in rows} == {layout}
        assert {row["status"] for row in rows} == {"valid"}
        assert {row["problem"] for row in rows} == {None}


def test_what_kubernetes_mounts_is_listed_and_found_by_any_name(parallax: Any) -> None:
    parallax("certs", "generate")
    Path("mounted").mkdir()
    for ours, theirs in (("cert.pem", "tls.crt"), ("key.pem", "tls.key"), ("ca.pem", "ca.crt")):
        (Path("mounted") / theirs).write_bytes((Path("certs/agent-1") / ours).read_bytes())
    ended = parallax("certs", "list", "--certs-dir", "mounted", "--json")
    (row,) = json.loads(ended.out)
    assert (row["name"], row["layout"], row["file"]) == ("tls", "kubernetes", "mounted/tls.crt")
    assert row["identity"] == "spiffe://parallax.local/agent/agent-1"
    assert parallax("certs", "verify", "agent-1", "--certs-dir", "mounted").code == exits.OK
    assert parallax("certs", "verify", "mounted/tls.crt", "--certs-dir", "elsewhere").code == exits.OK


def test_what_lies_in_a_home_is_not_taken_for_somebody_in_the_directory(parallax: Any) -> None:
    parallax("certs", "generate")
    home = Path("~/.mtls").expanduser()
    home.mkdir()
    (home / "client.crt").write_bytes(Path("certs/cli/cert.pem").read_bytes())
    ended = parallax("certs", "inspect", "agent-7")
    assert ended.code == exits.CONFIG
    assert "certs holds no certificate of agent-7" in ended.err


def test_list_tells_what_ended_and_what_ends_soon(parallax: Any) -> None:
    day = timedelta(days=1)
    issue("fresh", 0 * day, 31 * day)
    issue("soon", 0 * day, 29 * day)
    issue("old", 30 * day, 10 * day)
    issue("early", -10 * day, 60 * day)
    statuses = {name: row["status"] for name, row in listed(parallax).items()}
    assert statuses == {
        "ca": "valid",
        "early": "not yet valid",
        "fresh": "valid",
        "old": "expired",
        "soon": "ends soon",
    }
    out = parallax("certs", "list").out
    assert "20 days ago" in out
    assert "in 28 days" in out


def test_a_terminal_shows_the_ended_in_colour_and_a_pipe_never(terminal: Any, parallax: Any) -> None:
    issue("old", timedelta(days=30), timedelta(days=10))
    person = terminal("certs", "list")
    assert person.end() == exits.OK
    assert "\x1b[31magent/old" in person.seen
    assert "\x1b" not in parallax("certs", "list").out


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [_empty, _torn, _loop, _directory, _pipe, Path.unlink])
@pytest.mark.parametrize("layout", ["parallax", "flat"])
def test_list_shows_what_cannot_be_read_as_a_row_of_its_own(
    parallax: Any, layout: str, harm: Callable[[Path], None]
) -> None:
    parallax("ca", "init", "--layout", layout)
    parallax("certs", "generate")
    path = Path("certs/cli/cert.pem" if layout == "parallax" else "certs/cli-cert.pem")
    harm(path)
    rows = listed(parallax)
    assert str(path) in rows["cli"]["problem"]
    assert rows["admin"]["problem"] is None
    ended = parallax("certs", "list")
    assert (ended.code, ended.err) == (exits.OK, "")
    assert "unreadable" in ended.out
    assert len(ended.out.splitlines()) == 1 + 6


def test_list_shows_a_malformed_certificate_as_a_row(generated: Any) -> None:
    """Well-formed PEM, but one byte of the DER, in an extension, is wrong."""
    path = Path("certs/cli/cert.pem")
    pem = path.read_text(encoding="ascii")
    der = bytearray(base64.b64decode("".join(pem.splitlines()[1:-1])))
    der[der.index(b"spiffe://") - 1] = 0xFF  # the length of the URI
    path.write_text(
        f"-----BEGIN CERTIFICATE-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE-----\n",
        encoding="ascii",
    )
    assert listed(generated)["cli"]["problem"]
    assert generated("certs", "inspect", "cli").code == exits.CONFIG


def test_list_where_nothing_is_says_how_to_make_some(parallax: Any) -> None:
    ended = parallax("certs", "list")
    assert (ended.code, ended.out) == (exits.OK, "")
    assert "parallax certs generate" in ended.err
    assert json.loads(parallax("certs", "list", "--json").out) == []


def test_list_of_what_is_no_directory_is_an_error(parallax: Any) -> None:
    Path("certs").write_text("", encoding="ascii")
    ended = parallax("certs", "list")
    assert ended.code == exits.CONFIG
    assert "certs cannot be listed: not a directory" in ended.err


@pytest.mark.parametrize("columns", ["40", "80"])
def test_identities_are_never_cut(
    terminal: Any, parallax: Any, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "n" * 63
    parallax("ca", "init")
    parallax("certs", "issue", name, "--kind", "agent")
    monkeypatch.setenv("COLUMNS", columns)
    person = terminal("certs", "list")
    assert person.end() == exits.OK
    assert f"agent/{name}" in person.seen
    assert f"agent/{name}" in parallax("certs", "list").out


def test_a_directory_that_cannot_be_entered_is_a_row(generated: Any) -> None:
    """Root may enter all: where the tests run as root, the command becomes somebody else."""
    Path().chmod(0o755)
    Path("certs").chmod(0o755)
    Path("certs/cli").chmod(0o700 if os.geteuid() == 0 else 0)
    try:
        out = subprocess.check_output([sys.executable, "-c", _AS_SOMEBODY_ELSE], text=True)
    finally:
        Path("certs/cli").chmod(0o700)
    rows = {row["name"]: row for row in json.loads(out)}
    assert "certs/cli/cert.pem is not readable" in rows["cli"]["problem"]
    assert rows["ca"]["problem"] is not None or os.geteuid() != 0


# Everything is imported before the change, as Python itself may lie where only root can read.
_AS_SOMEBODY_ELSE = """
import contextlib, io, os, sys
from parallax.sdk.cli.app import run
with contextlib.redirect_stdout(io.StringIO()):
    run(["certs", "list", "--json"])
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(12345), os.setuid(12345)
sys.exit(run(["certs", "list", "--json"]))
"""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (364 * 86_400 + 5, "in 364 days"),
        (86_400, "in 1 day"),
        (86_399, "in 23 hours"),
        (120, "in 2 minutes"),
        (59, "in less than a minute"),
        (-59, "less than a minute ago"),
        (-90_000, "1 day ago"),
    ],
)
def test_times_are_told_from_now(seconds: int, text: str) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert distance(now + timedelta(seconds=seconds), now) == text
