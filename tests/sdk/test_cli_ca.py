"""`parallax ca`, asked what it made by openssl."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallax.sdk import exits
from parallax.sdk.cli import INTERRUPTED

SECRET = "correct horse"
KEYS = {"parallax": Path("certs/ca/key.pem"), "flat": Path("certs/ca-key.pem")}
CERTS = {"parallax": Path("certs/ca/cert.pem"), "flat": Path("certs/ca-cert.pem")}


@pytest.fixture
def passphrase_file(empty_environment: Path) -> Path:
    path = empty_environment / "passphrase"
    path.write_text(f"{SECRET}\n", encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("layout", KEYS)
def test_init_makes_a_root_that_openssl_takes_for_one(parallax: Any, openssl: Any, layout: str) -> None:
    assert parallax("ca", "init", "--layout", layout).code == exits.OK
    openssl("verify", "-x509_strict", "-CAfile", CERTS[layout], CERTS[layout])
    text = openssl("x509", "-in", CERTS[layout], "-noout", "-text")
    assert "CA:TRUE" in text
    assert "Certificate Sign, CRL Sign" in text
    assert "BEGIN PRIVATE KEY" in KEYS[layout].read_text(encoding="ascii")


@pytest.mark.parametrize(
    ("key_type", "shown"), [("p256", "(256 bit)"), ("rsa-2048", "(2048 bit)"), ("rsa-4096", "(4096 bit)")]
)
def test_init_makes_the_kind_of_key_that_was_asked_for(
    parallax: Any, openssl: Any, key_type: str, shown: str
) -> None:
    assert parallax("ca", "init", "--key-type", key_type).code == exits.OK
    assert shown in openssl("x509", "-in", CERTS["parallax"], "-noout", "-text")
    assert json.loads(parallax("ca", "show", "--json").out)["key_type"] == key_type


def test_init_makes_it_valid_for_as_long_as_was_asked_for(parallax: Any, openssl: Any) -> None:
    assert parallax("ca", "init", "--days", "10").code == exits.OK
    day = 86_400
    openssl("x509", "-in", CERTS["parallax"], "-noout", "-checkend", str(10 * day - 3600))
    with pytest.raises(AssertionError):
        openssl("x509", "-in", CERTS["parallax"], "-noout", "-checkend", str(10 * day + 3600))


def test_init_says_what_it_made_and_warns_of_the_key(parallax: Any) -> None:
    ended = parallax("ca", "init")
    assert "CN=Parallax Root CA,O=Parallax" in ended.out
    assert "not encrypted" in ended.out
    assert "certs/ca/key.pem" in ended.err


def test_init_with_json_writes_nothing_else(parallax: Any) -> None:
    ended = parallax("ca", "init", "--json")
    made = json.loads(ended.out)
    assert (ended.err, made["key_encrypted"], made["status"]) == ("", False, "valid")
    assert made == json.loads(parallax("ca", "show", "--json").out)


@pytest.mark.parametrize("present", ["both", "certificate", "key"])
@pytest.mark.parametrize("asked", KEYS)
@pytest.mark.parametrize("there", KEYS)
def test_init_never_replaces_a_ca_nor_a_part_of_one(
    parallax: Any, tree: Any, there: str, asked: str, present: str
) -> None:
    parallax("ca", "init", "--layout", there)
    if present != "both":
        (KEYS if present == "certificate" else CERTS)[there].unlink()
    before = tree(Path("certs"))
    ended = parallax("ca", "init", "--layout", asked, "--encrypt")
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert "never replaced" in ended.err
    assert ended.err.count("\n") == 1
    assert tree(Path("certs")) == before


def test_keys_are_private_whatever_the_umask(parallax: Any) -> None:
    before = os.umask(0)
    try:
        parallax("certs", "generate")
        parallax("certs", "generate", "--certs-dir", "again")
        parallax("ca", "init", "--layout", "flat", "--certs-dir", "flat")
        parallax("certs", "issue", "a", "--kind", "agent", "--certs-dir", "flat")
    finally:
        os.umask(before)
    keys = [path for path in Path().rglob("*key.pem") if not path.is_symlink()]
    assert len(keys) == 6 + 6 + 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    directories = [Path("certs"), Path("flat"), Path("certs/ca"), Path("certs/agent-1")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o700}


# Passphrases


def test_a_passphrase_from_a_file_encrypts_the_key(
    parallax: Any, openssl: Any, passphrase_file: Path
) -> None:
    ended = parallax("ca", "init", "--layout", "flat", "--passphrase-file", passphrase_file)
    assert ended.code == exits.OK
    assert "encrypted with a passphrase" in ended.out
    assert "BEGIN ENCRYPTED PRIVATE KEY" in KEYS["flat"].read_text(encoding="ascii")
    openssl("pkey", "-in", KEYS["flat"], "-passin", f"file:{passphrase_file}", "-noout")


@pytest.mark.parametrize("variable", ["PARALLAX_CA_PASSPHRASE", "PARALLAX_CA_PASSPHRASE_FILE"])
def test_a_passphrase_from_a_variable_encrypts_and_decrypts(
    parallax: Any, passphrase_file: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(passphrase_file) if variable.endswith("FILE") else SECRET)
    parallax("ca", "init", "--encrypt")  # nobody is asked, since it is given
    assert json.loads(parallax("ca", "show", "--json").out)["key_encrypted"] is True
    assert parallax("certs", "issue", "a", "--kind", "agent").code == exits.OK
    monkeypatch.delenv(variable)
    assert parallax("certs", "issue", "a", "--kind", "agent").code == exits.CONFIG


def test_a_configuration_file_names_the_passphrase_file(parallax: Any, passphrase_file: Path) -> None:
    Path("parallax.toml").write_text(f'ca_passphrase_file = "{passphrase_file}"\n', encoding="utf-8")
    parallax("ca", "init", "--config", "parallax.toml")
    assert parallax("certs", "generate", "--config", "parallax.toml").code == exits.OK
    assert parallax("certs", "generate").code == exits.CONFIG


def test_the_passphrase_file_of_the_command_wins_over_the_variables(
    parallax: Any, passphrase_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallax("ca", "init", "--passphrase-file", passphrase_file)
    monkeypatch.setenv("PARALLAX_CA_PASSPHRASE", "another")
    issue = ("certs", "issue", "a", "--kind", "agent")
    assert parallax(*issue).code == exits.CONFIG
    assert parallax(*issue, "--passphrase-file", passphrase_file).code == exits.OK


def test_two_variables_with_a_passphrase_are_one_too_many(
    parallax: Any, passphrase_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_CA_PASSPHRASE", SECRET)
    monkeypatch.setenv("PARALLAX_CA_PASSPHRASE_FILE", str(passphrase_file))
    ended = parallax("ca", "init")
    assert ended.code == exits.CONFIG
    assert "PARALLAX_CA_PASSPHRASE and PARALLAX_CA_PASSPHRASE_FILE are both set" in ended.err
    assert not Path("certs").exists()


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (SECRET, 0o644, "chmod 600"),
        (SECRET, 0o620, "chmod 600"),
        ("", 0o600, "empty passphrase"),
        ("\nsecond line", 0o600, "empty passphrase"),
        ("x" * 1024, 0o600, "more than 1023 bytes"),
        (None, 0o600, "is missing"),
    ],
)
def test_an_unusable_passphrase_file_is_refused_and_nothing_made(
    parallax: Any, tmp_path: Path, content: str | None, mode: int, message: str
) -> None:
    path = tmp_path / "unusable"
    if content is not None:
        path.write_text(content, encoding="utf-8")
        path.chmod(mode)
    ended = parallax("ca", "init", "--passphrase-file", path)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert message in ended.err
    assert str(path) in ended.err
    assert ended.err.count("\n") == 1
    assert SECRET not in ended.err
    assert not Path("certs").exists()


def test_only_the_first_line_of_the_file_counts_as_for_openssl(
    parallax: Any, openssl: Any, passphrase_file: Path
) -> None:
    passphrase_file.write_text(f"{SECRET}\nanything else\n", encoding="utf-8")
    parallax("ca", "init", "--passphrase-file", passphrase_file)
    openssl("pkey", "-in", KEYS["parallax"], "-passin", f"pass:{SECRET}", "-noout")
    openssl("pkey", "-in", KEYS["parallax"], "-passin", f"file:{passphrase_file}", "-noout")


def test_the_longest_passphrase_works(parallax: Any, tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_text("x" * 1023, encoding="utf-8")
    path.chmod(0o600)
    assert parallax("ca", "init", "--passphrase-file", path).code == exits.OK
    assert parallax("certs", "generate", "--passphrase-file", path).code == exits.OK


@pytest.mark.parametrize("command", [("ca", "init", "--encrypt"), ("certs", "issue", "a", "--kind", "agent")])
def test_without_a_terminal_the_error_names_the_variables(
    parallax: Any, tree: Any, passphrase_file: Path, command: tuple[str, ...]
) -> None:
    if command[0] == "certs":
        parallax("ca", "init", "--passphrase-file", passphrase_file)
    before = tree(Path())
    ended = parallax(*command)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    for name in ("--passphrase-file", "PARALLAX_CA_PASSPHRASE_FILE", "PARALLAX_CA_PASSPHRASE", "ca/key.pem"):
        assert name in ended.err
    assert ended.err.count("\n") == 1
    assert tree(Path()) == before


def test_at_a_terminal_a_new_passphrase_is_typed_twice_and_not_shown(terminal: Any, openssl: Any) -> None:
    person = terminal("ca", "init", "--encrypt", "--layout", "flat")
    person.answer("Passphrase for certs/ca-key.pem: ", f"{SECRET}\n")
    person.answer("The same again: ", f"{SECRET}\n")
    assert person.end() == exits.OK
    assert SECRET not in person.seen
    openssl("pkey", "-in", KEYS["flat"], "-passin", f"pass:{SECRET}", "-noout")


def test_at_a_terminal_the_passphrase_of_a_ca_is_typed_once(
    terminal: Any, parallax: Any, passphrase_file: Path
) -> None:
    parallax("ca", "init", "--layout", "flat", "--passphrase-file", passphrase_file)
    person = terminal("certs", "issue", "agente_py", "--kind", "agent")
    person.answer("Passphrase for certs/ca-key.pem: ", f"{SECRET}\n")
    assert person.end() == exits.OK
    assert Path("certs/agente_py-cert.pem").exists()


@pytest.mark.parametrize(
    ("first", "second", "code", "message"),
    [
        (f"{SECRET}\n", "another\n", exits.CONFIG, "parallax: the two passphrases differ"),
        ("\n", None, exits.CONFIG, "parallax: empty passphrase"),
        ("\x04", None, exits.CONFIG, "parallax: no passphrase for certs/ca/key.pem was typed"),
        ("\x03", None, INTERRUPTED, ""),
        (f"{SECRET}\n", "\x03", INTERRUPTED, ""),
    ],
    ids=["differs", "empty", "end of file", "Ctrl-C", "Ctrl-C at the second"],
)
def test_a_passphrase_that_is_not_settled_makes_nothing(
    terminal: Any, first: str, second: str | None, code: int, message: str
) -> None:
    person = terminal("ca", "init", "--encrypt")
    person.answer("Passphrase for certs/ca/key.pem: ", first)
    if second is not None:
        person.answer("The same again: ", second)
    assert person.end() == code
    assert message in person.seen
    assert "Traceback" not in person.seen
    assert not Path("certs").exists()


def test_a_wrong_passphrase_changes_nothing(
    parallax: Any, tree: Any, passphrase_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallax("ca", "init", "--passphrase-file", passphrase_file)
    parallax("certs", "generate", "--passphrase-file", passphrase_file)
    before = tree(Path())
    monkeypatch.setenv("PARALLAX_CA_PASSPHRASE", "wrong")
    for command in (("certs", "generate"), ("certs", "issue", "a", "--kind", "agent")):
        ended = parallax(*command)
        assert (ended.code, ended.out) == (exits.CONFIG, "")
        assert ended.err.startswith("parallax: certs/ca/key.pem: wrong passphrase")
        assert ended.err.count("\n") == 1
        assert tree(Path()) == before


# A CA that is damaged


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [Path.unlink, _truncate, _empty], ids=["missing", "torn", "empty"])
@pytest.mark.parametrize("part", ["certificate", "key"])
@pytest.mark.parametrize("layout", KEYS)
def test_a_damaged_ca_is_an_error_and_stays_as_it_is(
    parallax: Any, tree: Any, layout: str, part: str, harm: Callable[[Path], None]
) -> None:
    parallax("ca", "init", "--layout", layout)
    parallax("certs", "generate")
    path = (KEYS if part == "key" else CERTS)[layout]
    harm(path)
    before = tree(Path())
    for command in (
        ("certs", "generate"),
        ("certs", "issue", "a", "--kind", "agent"),
        ("ca", "init"),
        ("ca", "init", "--layout", "flat"),
    ):
        ended = parallax(*command)
        assert (ended.code, ended.out) == (exits.CONFIG, "")
        assert ended.err.count("\n") == 1
        assert tree(Path()) == before
    assert str(path) in parallax("certs", "issue", "a", "--kind", "agent").err


def test_a_key_of_another_ca_is_an_error(parallax: Any, tree: Any) -> None:
    parallax("ca", "init")
    parallax("ca", "init", "--certs-dir", "other")
    KEYS["parallax"].write_bytes(Path("other/ca/key.pem").read_bytes())
    before = tree(Path())
    ended = parallax("certs", "generate")
    assert ended.code == exits.CONFIG
    assert "certs/ca/key.pem does not fit certs/ca/cert.pem" in ended.err
    assert tree(Path()) == before


def test_a_ca_key_that_others_can_read_is_refused(parallax: Any) -> None:
    parallax("ca", "init")
    KEYS["parallax"].chmod(0o644)
    ended = parallax("certs", "generate")
    assert ended.code == exits.CONFIG
    assert "chmod 600 certs/ca/key.pem" in ended.err
    assert "open to others" in parallax("ca", "show").out


def test_show_says_where_the_ca_lies_and_what_it_signed(parallax: Any) -> None:
    parallax("certs", "generate")
    ended = parallax("ca", "show")
    assert (ended.code, ended.err) == (exits.OK, "")
    for shown in ("CN=Parallax Root CA,O=Parallax", "p256, not encrypted", "ends in 3649 days"):
        assert shown in ended.out
    assert "spiffe://parallax.local/service/control-plane: ends in 364 days" in ended.out
    assert json.loads(parallax("ca", "show", "--json").out)["fingerprint"] in ended.out


def test_show_agrees_with_openssl(parallax: Any, openssl: Any) -> None:
    parallax("ca", "init")
    shown = json.loads(parallax("ca", "show", "--json").out)
    answer = openssl("x509", "-in", CERTS["parallax"], "-noout", "-serial", "-fingerprint", "-sha256")
    serial, fingerprint = (line.partition("=")[2].lower() for line in answer.splitlines())
    assert shown["serial"] == serial.lstrip("0")
    assert shown["fingerprint"] == fingerprint.replace(":", "")


def test_show_works_where_the_key_is_kept_elsewhere(parallax: Any) -> None:
    parallax("ca", "init")
    KEYS["parallax"].unlink()
    assert "p256, not here" in parallax("ca", "show").out
    assert json.loads(parallax("ca", "show", "--json").out)["key_encrypted"] is None


def test_show_without_a_ca_names_the_command_that_makes_one(parallax: Any) -> None:
    ended = parallax("ca", "show")
    assert ended.code == exits.CONFIG
    assert "parallax ca init" in ended.err
