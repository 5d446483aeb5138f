"""`parallax certs renew`: every identity in the directory asks the control plane for itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509

from parallax.sdk import exits
from parallax.security.identity import Identity, Kind
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, load_authority, save_leaf
from parallax.security.profiles import LeafProfile

WITHIN_S: Final = 20.0
NAMES: Final = ("admin", "agent-1", "agent-proxy", "cli", "control-plane")

Serve = Callable[..., None]


def serial(name: str) -> str:
    leaf = x509.load_pem_x509_certificate(Path("certs", name, "cert.pem").read_bytes())
    return f"{leaf.serial_number:x}"


def expire(name: str) -> None:
    """Put a certificate there that ended yesterday."""
    authority, key = load_authority(Path("certs")), generate_key()
    identity, profile = Identity("parallax.local", Kind.AGENT, name), LeafProfile(timedelta(seconds=1))
    issued = authority.issue(identity, key.public_key(), profile, datetime.now(UTC))
    save_leaf(Path("certs"), Layout.PARALLAX, identity, issued.chain, key, issued.bundle)
    time.sleep(2)


def test_all_in_the_directory_are_renewed_and_shown_with_both_serials(serve: Serve, spawn: Any) -> None:
    serve()
    before = {name: serial(name) for name in NAMES}
    ended = spawn("certs", "renew")
    assert (ended.code, ended.err) == (exits.OK, "")
    header, *rows = ended.out.splitlines()
    assert header.split() == ["IDENTITY", "OLD", "SERIAL", "NEW", "SERIAL", "BEGINS", "ENDS"]
    shown = {row.split()[0].partition("/")[2]: row.split() for row in rows}
    assert sorted(shown) == sorted(NAMES)
    for name, cells in shown.items():
        assert cells[1:3] == [before[name], serial(name)]
        assert cells[1] != cells[2]


def test_with_json_those_named_are_renewed_and_no_others(serve: Serve, spawn: Any) -> None:
    serve()
    before = {name: serial(name) for name in NAMES}
    ended = spawn("certs", "renew", "agent-1", "cli", "agent-1", "--json")
    assert (ended.code, ended.err) == (exits.OK, "")
    first, second = json.loads(ended.out)
    assert (first["name"], second["name"]) == ("agent-1", "cli")
    assert first["identity"] == "spiffe://parallax.local/agent/agent-1"
    assert first["old"]["serial"] == before["agent-1"]
    assert first["new"]["serial"] == serial("agent-1") != before["agent-1"]
    assert first["problem"] is None
    assert serial("admin") == before["admin"]


def test_one_that_has_expired_is_named_with_the_way_back_and_the_others_are_renewed(
    serve: Serve, spawn: Any
) -> None:
    serve()
    expire("agent-1")
    before = {name: serial(name) for name in NAMES}
    ended = spawn("certs", "renew", "--json")
    assert ended.code == exits.CONFIG
    assert "parallax: agent-1: " in ended.err
    assert "parallax certs issue agent-1 --kind agent" in ended.err
    problems = {each["name"]: each["problem"] for each in json.loads(ended.out)}
    assert [name for name, problem in problems.items() if problem] == ["agent-1"]
    assert [name for name in NAMES if serial(name) == before[name]] == ["agent-1"]


def test_where_nobody_answers_nothing_more_is_asked_for(serve: Serve, spawn: Any) -> None:
    os.environ["PARALLAX_CONTROL_PLANE"] = "127.0.0.1:1"
    ended = spawn("certs", "renew")
    assert ended.code == exits.UNAVAILABLE
    first, second = ended.err.splitlines()
    assert "Connection refused" in first
    assert "parallax control-plane start" in first
    assert second == "parallax: 4 more not asked for, since nobody answers"


def test_a_control_plane_without_the_key_of_its_ca_says_so(serve: Serve, spawn: Any) -> None:
    Path("certs", "ca", "key.pem").rename("key.pem")
    serve()
    ended = spawn("certs", "renew", "agent-1")
    assert ended.code == exits.CONFIG
    assert "to renew certificates with" in ended.err


def test_a_control_plane_that_authenticates_nobody_names_the_variable(serve: Serve, spawn: Any) -> None:
    serve(PARALLAX_TLS_VERIFY_CLIENT="false")
    ended = spawn("certs", "renew", "agent-1")
    assert ended.code == exits.CONFIG
    assert "PARALLAX_TLS_VERIFY_CLIENT=true" in ended.err


@pytest.mark.parametrize(
    ("arguments", "environment", "text"),
    [
        (["agent-9"], {}, "holds no certificate of agent-9"),
        (["../agent-1"], {}, "not a name"),
        (["--certs-dir", "elsewhere"], {}, "elsewhere holds no certificate with its key"),
        ([], {"PARALLAX_CONTROL_PLANE": "none"}, "PARALLAX_CONTROL_PLANE is none"),
        (
            [],
            {f"PARALLAX_TLS_{part}_FILE": "x.pem" for part in ("CA", "CERT", "KEY")},
            "whoever put it there renews it",
        ),
    ],
)
def test_what_cannot_be_renewed_is_one_line(
    serve: Serve, parallax: Any, arguments: list[str], environment: dict[str, str], text: str
) -> None:
    os.environ.update(environment)
    ended = parallax("certs", "renew", *arguments)
    assert (ended.code, ended.out) == (exits.CONFIG, "")
    assert text in ended.err
    assert len(ended.err.splitlines()) == 1
