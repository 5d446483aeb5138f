"""`parallax certs generate` and `issue`, asked what they made by openssl."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from parallax.sdk import exits
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import parse_certificates
from parallax.security.layouts import Layout, save_authority

LEAVES = {
    "control-plane": "service",
    "agent-proxy": "service",
    "agent-1": "agent",
    "cli": "client",
    "admin": "client",
}
BAD_NAMES = [
    "",
    "a/b",
    "../a",
    "..",
    "a..b",
    ".a",
    "a.",
    "a\0b",
    "Agent",
    "x" * 300,
    "ägent",
    "агент",
    "a b",
    "a\nb",
    "*",
    "ca",
    "~",
    "$(id)",
]


def facts(parallax: Any, target: str | Path) -> Any:
    """What `certs inspect --json` says."""
    ended = parallax("certs", "inspect", target, "--json")
    assert ended.code == exits.OK, ended.err
    return json.loads(ended.out)


# The guide


def test_generate_makes_the_guides_set_in_its_structure(parallax: Any) -> None:
    assert parallax("certs", "generate").code == exits.OK
    there = {str(path) for path in Path("certs").glob("*/*.pem")}
    assert there == {"certs/ca/cert.pem", "certs/ca/key.pem"} | {
        f"certs/{name}/{part}.pem" for name in LEAVES for part in ("cert", "key", "ca")
    }
    for name, kind in LEAVES.items():
        assert facts(parallax, name)["identity"] == f"spiffe://parallax.local/{kind}/{name}"


def test_generate_respects_the_variable(
    parallax: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_CERTS_DIR", str(tmp_path / "a place" / "deep"))
    ended = parallax("certs", "generate")
    assert (tmp_path / "a place" / "deep" / "cli" / "cert.pem").exists()
    assert f"export PARALLAX_CERTS_DIR='{tmp_path}/a place/deep'" in ended.out


def test_generate_says_how_to_go_on(parallax: Any, tmp_path: Path) -> None:
    out = parallax("certs", "generate").out
    for line in (
        "export PARALLAX_TLS_ENABLED=true",
        "export PARALLAX_TLS_VERIFY_CLIENT=true",
        f"export PARALLAX_CERTS_DIR={tmp_path}/certs",
        "parallax control-plane start",
        "parallax agent run my_agent:MyAgent --id agent-1",
    ):
        assert f"  {line}\n" in out


@pytest.mark.parametrize("name", LEAVES)
def test_the_guides_openssl_commands_accept_each_leaf(parallax: Any, openssl: Any, name: str) -> None:
    parallax("certs", "generate")
    ca, cert = "certs/ca/cert.pem", f"certs/{name}/cert.pem"
    assert openssl("verify", "-CAfile", ca, cert) == f"{cert}: OK\n"
    assert openssl("verify", "-CAfile", f"certs/{name}/ca.pem", cert) == f"{cert}: OK\n"
    for purpose in ("sslserver", "sslclient"):
        openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", ca, cert)
    openssl("verify", "-verify_hostname", "localhost", "-CAfile", ca, cert)
    text = openssl("x509", "-in", cert, "-text", "-noout")
    assert "TLS Web Server Authentication" in text
    assert "TLS Web Client Authentication" in text
    assert f"URI:spiffe://parallax.local/{LEAVES[name]}/{name}, DNS:{name}." in text


def test_generate_again_keeps_the_ca_and_replaces_every_key(parallax: Any) -> None:
    parallax("certs", "generate")
    parallax("certs", "issue", "extra", "--kind", "agent")
    before = {path: path.read_bytes() for path in Path("certs").glob("*/*.pem")}
    ended = parallax("certs", "generate")
    assert ended.code == exits.OK
    assert "Kept CA" in ended.out
    assert "nothing has to be restarted" in ended.out
    after = {path: path.read_bytes() for path in Path("certs").glob("*/*.pem")}
    assert after.keys() == before.keys()
    for path, content in after.items():
        kept = path.parent.name == "ca" or path.name == "ca.pem"
        assert (content == before[path]) is kept, path


def test_generate_again_keeps_what_a_leaf_is_like(parallax: Any) -> None:
    parallax("certs", "generate")
    sans = ("--san", "cp.example.com", "--san", "10.0.0.7")
    issue = ("certs", "issue", "control-plane", "--kind", "service", "--key-type", "rsa-2048", "--days", "30")
    parallax(*issue, *sans)
    before = facts(parallax, "control-plane")
    for _ in range(3):
        parallax("certs", "generate")
    after = facts(parallax, "control-plane")
    assert after["serial"] != before["serial"]
    assert after["sans"] == before["sans"]
    assert "DNS:localhost" not in after["sans"]
    assert after["key_type"] == "rsa-2048"
    assert _lifetime(after) == _lifetime(before)
    parallax("certs", "generate", "--key-type", "p256", "--days", "60")
    assert facts(parallax, "control-plane")["key_type"] == "p256"
    assert _lifetime(facts(parallax, "control-plane")) == timedelta(days=60, minutes=5)


def _lifetime(shown: Any) -> timedelta:
    return datetime.fromisoformat(shown["not_after"]) - datetime.fromisoformat(shown["not_before"])


def test_generate_leaves_certificates_alone_that_are_not_its_own(parallax: Any, openssl: Any) -> None:
    """Copies whose key is elsewhere, those of another CA, and what is no certificate."""
    parallax("certs", "generate")
    parallax("certs", "issue", "copy", "--kind", "agent")
    Path("certs/copy/key.pem").unlink()
    parallax("ca", "init", "--certs-dir", "other")
    parallax("certs", "issue", "foreign", "--kind", "agent", "--certs-dir", "other")
    Path("other/foreign").rename("certs/foreign")
    Path("certs/junk").mkdir()
    Path("certs/junk/cert.pem").write_text("junk", encoding="ascii")
    Path("certs/junk/key.pem").write_text("junk", encoding="ascii")
    alone = [Path(f"certs/{name}/cert.pem") for name in ("copy", "foreign", "junk")]
    before = [path.read_bytes() for path in alone]
    assert parallax("certs", "generate").code == exits.OK
    assert [path.read_bytes() for path in alone] == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.write_text("junk", encoding="ascii"), "not a certificate"),
        (lambda path: path.write_bytes(Path("certs/cli/cert.pem").read_bytes()), "belongs to"),
    ],
    ids=["damaged", "somebody else's"],
)
def test_generate_changes_nothing_where_one_leaf_cannot_be_replaced(
    parallax: Any, tree: Any, prepare: Callable[[Path], object], message: str
) -> None:
    parallax("certs", "generate")
    path = Path("certs/admin/cert.pem")
    path.unlink()
    prepare(path)
    before = tree(Path())
    ended = parallax("certs", "generate")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert "certs/admin/cert.pem" in ended.err
    assert message in ended.err
    assert "move it away" in ended.err
    assert tree(Path()) == before


def test_generate_on_a_host_that_only_has_leaves_makes_no_second_ca(parallax: Any, tree: Any) -> None:
    parallax("certs", "generate")
    for part in ("cert", "key"):
        Path(f"certs/ca/{part}.pem").unlink()
    Path("certs/ca").rmdir()
    before = tree(Path())
    ended = parallax("certs", "generate")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert "no CA that could replace it" in ended.err
    assert tree(Path()) == before


def test_generate_continues_with_a_ca_that_was_made_before(parallax: Any) -> None:
    parallax("ca", "init", "--key-type", "rsa-2048")
    ca = Path("certs/ca/cert.pem").read_bytes()
    ended = parallax("certs", "generate")
    assert "parallax control-plane start" in ended.out
    assert Path("certs/ca/cert.pem").read_bytes() == ca
    assert parallax("certs", "verify", "agent-1").code == exits.OK


def test_generate_fills_a_flat_directory_where_the_ca_is_flat(parallax: Any, openssl: Any) -> None:
    parallax("ca", "init", "--layout", "flat")
    for _ in range(2):
        assert parallax("certs", "generate").code == exits.OK
        for name in LEAVES:
            openssl("verify", "-CAfile", "certs/ca-cert.pem", f"certs/{name}-cert.pem")
    assert not Path("certs/ca").exists()


def test_generate_with_json_tells_each_leaf_and_nothing_else(parallax: Any) -> None:
    first, second = (parallax("certs", "generate", "--json") for _ in range(2))
    assert first.err == second.err == ""
    made, again = json.loads(first.out), json.loads(second.out)
    assert (made["ca"]["is_new"], again["ca"]["is_new"]) == (True, False)
    assert [each["name"] for each in made["certificates"]] == [*LEAVES]
    assert {each["replaced"] for each in made["certificates"]} == {False}
    assert {each["replaced"] for each in again["certificates"]} == {True}
    assert again["certificates"][3]["files"]["certificate"] == "certs/cli/cert.pem"
    assert again["certificates"][3]["serial"] == facts(parallax, "cli")["serial"]


def test_a_new_ca_is_encrypted_where_a_passphrase_is_given(
    parallax: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_CA_PASSPHRASE", "secret")
    for _ in range(2):
        assert parallax("certs", "generate").code == exits.OK
    assert "ENCRYPTED" in Path("certs/ca/key.pem").read_text(encoding="ascii")
    assert "ENCRYPTED" not in Path("certs/cli/key.pem").read_text(encoding="ascii")


def test_an_expired_ca_issues_nothing(parallax: Any, tree: Any) -> None:
    then = datetime.now(UTC) - timedelta(days=30)
    authority = CertificateAuthority.create(now=then, lifetime=timedelta(days=10))
    save_authority(Path("certs"), Layout.PARALLAX, authority)
    before = tree(Path())
    for command in (("certs", "generate"), ("certs", "issue", "a", "--kind", "agent")):
        ended = parallax(*command)
        assert (ended.code, ended.out) == (exits.CONFIG, "")
        assert "expired at" in ended.err
        assert "parallax ca init" in ended.err
    assert tree(Path()) == before


# The flow of `generate_ca` and `generate_agent_cert <id>`


def test_the_flat_flow_ends_in_openssl_saying_ok(
    parallax: Any, require_tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("secret", encoding="ascii")
    passphrase.chmod(0o600)
    monkeypatch.setenv("PARALLAX_CERTS_DIR", ".")
    monkeypatch.setenv("PARALLAX_CA_PASSPHRASE_FILE", str(passphrase))
    assert parallax("ca", "init", "--layout", "flat").code == exits.OK
    ended = parallax("certs", "issue", "agente_py", "--kind", "agent", "--layout", "flat")
    assert ended.code == exits.OK
    assert "openssl verify -CAfile ca-cert.pem agente_py-cert.pem\n" in ended.out
    for name in ("ca-cert.pem", "ca-key.pem", "agente_py-cert.pem", "agente_py-key.pem"):
        assert (tmp_path / name).is_file()
    verify = (require_tool("openssl"), "verify", "-CAfile", "ca-cert.pem", "agente_py-cert.pem")
    assert subprocess.check_output(verify, text=True) == "agente_py-cert.pem: OK\n"
    shown = facts(parallax, "agente_py")
    assert shown["identity"] == "spiffe://parallax.local/agent/agente_py"
    assert _lifetime(shown) == timedelta(days=365, minutes=5)


def test_issue_follows_the_layout_of_the_ca(parallax: Any) -> None:
    for layout, cert in (("flat", "agent-7-cert.pem"), ("parallax", "agent-7/cert.pem")):
        parallax("ca", "init", "--layout", layout, "--certs-dir", layout)
        parallax("certs", "issue", "agent-7", "--kind", "agent", "--certs-dir", layout)
        assert (Path(layout) / cert).exists()


@pytest.mark.parametrize(("there", "asked"), [("flat", "parallax"), ("parallax", "flat")])
def test_issue_refuses_a_second_layout_in_one_directory(
    parallax: Any, tree: Any, there: str, asked: str
) -> None:
    parallax("ca", "init", "--layout", there)
    before = tree(Path())
    ended = parallax("certs", "issue", "a", "--kind", "agent", "--layout", asked)
    assert ended.code == exits.CONFIG
    assert f"has the layout {there}" in ended.err
    assert tree(Path()) == before


def test_issue_without_a_ca_names_the_command_that_makes_one(parallax: Any) -> None:
    ended = parallax("certs", "issue", "a", "--kind", "agent")
    assert ended.code == exits.CONFIG
    assert "parallax ca init" in ended.err
    assert not Path("certs").exists()


@pytest.mark.parametrize("kind", ["service", "agent", "client"])
def test_issue_again_replaces_the_certificate_of_the_same_identity(parallax: Any, kind: str) -> None:
    parallax("ca", "init")
    issue = ("certs", "issue", "it", "--kind", kind, "--json")
    first, second = (json.loads(parallax(*issue).out) for _ in range(2))
    assert (first["replaced"], second["replaced"]) == (False, True)
    assert first["serial"] != second["serial"]
    assert facts(parallax, "it")["serial"] == second["serial"]


def test_issue_never_replaces_the_certificate_of_another_identity(parallax: Any, tree: Any) -> None:
    parallax("ca", "init")
    parallax("certs", "issue", "it", "--kind", "agent")
    before = tree(Path())
    ended = parallax("certs", "issue", "it", "--kind", "client")
    assert ended.code == exits.CONFIG
    assert "spiffe://parallax.local/agent/it" in ended.err
    assert tree(Path()) == before


@pytest.mark.parametrize("kind", ["service", "agent", "client"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_issue_refuses_a_bad_name_before_it_touches_anything(
    parallax: Any, tree: Any, name: str, kind: str
) -> None:
    parallax("ca", "init")
    before = tree(Path().absolute())
    ended = parallax("certs", "issue", "--kind", kind, "--", name)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.startswith("parallax: ")
    assert ended.err.count("\n") == 1
    assert ended.err.isascii()
    assert len(ended.err) < 300
    assert tree(Path().absolute()) == before


def test_a_service_has_no_dot_in_its_name(parallax: Any) -> None:
    parallax("ca", "init")
    assert parallax("certs", "issue", "a.b", "--kind", "service").code == exits.CONFIG
    assert parallax("certs", "issue", "a.b", "--kind", "agent").code == exits.OK


@pytest.mark.parametrize(
    "san",
    ["", "a b", "*.example.com", "cli.clients.parallax.local", "control-plane.parallax.local", "256.1.1.1"],
)
def test_issue_refuses_a_bad_san_before_it_touches_anything(parallax: Any, tree: Any, san: str) -> None:
    parallax("ca", "init")
    before = tree(Path())
    ended = parallax("certs", "issue", "a", "--kind", "agent", "--san", san)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert ended.err.count("\n") == 1
    assert tree(Path()) == before


def test_issue_makes_what_was_asked_for(parallax: Any, openssl: Any) -> None:
    parallax("ca", "init")
    options = ("--days", "7", "--key-type", "rsa-2048", "--san", "web.example.com", "--san", "192.0.2.1")
    parallax("certs", "issue", "web", "--kind", "service", *options)
    shown = facts(parallax, "web")
    assert shown["sans"] == [
        "URI:spiffe://parallax.local/service/web",
        "DNS:web.parallax.local",
        "DNS:web.example.com",
        "IP:192.0.2.1",
    ]
    assert shown["key_type"] == "rsa-2048"
    assert _lifetime(shown) == timedelta(days=7, minutes=5)
    verify = ("verify", "-CAfile", "certs/ca/cert.pem")
    openssl(*verify, "-verify_hostname", "web.example.com", "certs/web/cert.pem")
    openssl(*verify, "-verify_ip", "192.0.2.1", "certs/web/cert.pem")


def test_a_leaf_does_not_outlive_its_ca(parallax: Any) -> None:
    parallax("ca", "init", "--days", "10")
    parallax("certs", "issue", "a", "--kind", "agent", "--days", "365")
    (ca,) = parse_certificates(Path("certs/ca/cert.pem").read_bytes())
    (leaf,) = parse_certificates(Path("certs/a/cert.pem").read_bytes())
    assert leaf.not_valid_after_utc == ca.not_valid_after_utc


def test_a_ca_made_by_hand_issues_just_as_well(parallax: Any, openssl: Any) -> None:
    """With the guide's commands, key of the older form included."""
    Path("certs/ca").mkdir(parents=True)
    openssl("genrsa", "-traditional", "-out", "certs/ca/key.pem", "2048")
    subject = "/C=US/ST=CA/L=San Francisco/O=Parallax/CN=Parallax Root CA"
    make = ("req", "-new", "-x509", "-days", "3650", "-key", "certs/ca/key.pem", "-out", "certs/ca/cert.pem")
    openssl(*make, "-subj", subject)
    ca = Path("certs/ca/cert.pem").read_bytes()
    assert parallax("certs", "generate").code == exits.OK
    openssl("verify", "-CAfile", "certs/ca/cert.pem", "certs/control-plane/cert.pem")
    assert Path("certs/ca/cert.pem").read_bytes() == ca


def test_progress_is_shown_to_people_alone(terminal: Any, spawn: Any) -> None:
    person = terminal("certs", "generate")
    assert person.end() == exits.OK
    assert "Making certificates" in person.seen
    assert "Making certificates" not in spawn("certs", "generate").err


# The issuance policy.

POLICY = """
[[issue]]
holder = "agent"
lifetime = "2d"
longest = "7d"
keys = ["p256", "rsa-4096"]
sans = ["127.0.0.1", "*.example.com"]
"""


@pytest.fixture
def with_policy(parallax: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, with a CA and a policy."""
    Path("issuance.toml").write_text(POLICY, encoding="ascii")
    assert parallax("ca", "init").code == exits.OK
    monkeypatch.setenv("PARALLAX_ISSUANCE_FILE", "issuance.toml")
    return parallax


def test_what_is_not_asked_for_is_as_the_policy_has_it(with_policy: Any) -> None:
    ended = with_policy("certs", "issue", "agent-1", "--kind", "agent", "--json")
    assert (ended.code, ended.err) == (exits.OK, "")
    made = json.loads(ended.out)
    assert "DNS:localhost" not in made["sans"]
    assert "IP:127.0.0.1" in made["sans"]
    life = datetime.fromisoformat(made["not_after"]) - datetime.now(UTC)
    assert timedelta(days=1.9) < life <= timedelta(days=2)


def test_what_is_asked_for_within_the_policy_is_made_and_others_are_not_its_concern(with_policy: Any) -> None:
    asked = ("--days", "7", "--san", "a.example.com", "--key-type", "rsa-4096")
    assert with_policy("certs", "issue", "agent-1", "--kind", "agent", *asked).code == exits.OK
    ended = with_policy("certs", "issue", "cli", "--kind", "client", "--san", "localhost", "--days", "365")
    assert ended.code == exits.OK


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--days", "8"), "admits 1m to 7d for agent, not 8d"),
        (
            ("--key-type", "rsa-2048"),
            "no key of the sort rsa-2048 for agent: make one of p256, rsa-4096",
        ),
        (("--san", "localhost"), "admits no 'localhost' for agent: leave it out, or add it to its sans"),
    ],
)
def test_what_the_policy_does_not_admit_is_not_made(with_policy: Any, asked: Any, why: str) -> None:
    ended = with_policy("certs", "issue", "agent-1", "--kind", "agent", *asked)
    assert (ended.code, ended.out) == (exits.NO_PERMISSION, "")
    assert why in ended.err
    assert not Path("certs/agent-1").exists()


def test_a_policy_that_cannot_be_used_keeps_everything_from_being_made(with_policy: Any) -> None:
    Path("issuance.toml").write_text(f"{POLICY}\n[[issue]]\n", encoding="ascii")
    ended = with_policy("certs", "issue", "cli", "--kind", "client")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert "issuance.toml: rule 2, line 9: holder is missing" in ended.err
