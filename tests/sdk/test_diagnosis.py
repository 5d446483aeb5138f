"""What `parallax doctor` concludes from facts, without a file or a socket."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from hypothesis import given
from hypothesis import strategies as st

from parallax.sdk import exits
from parallax.sdk.cli.case import (
    Answers,
    Case,
    Finding,
    Material,
    Part,
    Served,
    Setup,
    Speech,
    Status,
    Way,
    split,
)
from parallax.sdk.cli.diagnosis import CHECKS, diagnose, first_failed
from parallax.security.authority import CertificateAuthority
from parallax.security.config import MTLSConfig
from parallax.security.errors import NotAuthorized, Revoked, Unavailable
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile, self_signed_template

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CLI = Identity.parse_short("client/cli")
AUTHORITY = CertificateAuthority.create(now=NOW)
KNOWN = frozenset({"PARALLAX_TLS_ENABLED", "PARALLAX_CONTROL_PLANE", "PARALLAX_CERTS_DIR"})


def material_of(short: str) -> Material:
    key = generate_key()
    chain = AUTHORITY.issue(Identity.parse_short(short), key.public_key(), LeafProfile(), NOW).chain
    cert, private, ca = (
        Part(f"certs/cli/{name}.pem", Path(f"certs/cli/{name}.pem")) for name in ("cert", "key", "ca")
    )
    return Material(cert=cert, key=private, ca=ca, chain=chain, private=key, bundle=AUTHORITY.bundle)


OWN, PLANES = material_of("client/cli"), material_of("service/control-plane")
SOUND = Case(
    NOW,
    Setup(known=KNOWN, tls=MTLSConfig(enabled=True), identity=CLI, address="localhost:50051"),
    OWN,
    Way(("127.0.0.1",), reached="127.0.0.1"),
    Served(Speech.TLS, version="TLSv1.3", alpn="h2", chain=PLANES.chain, asks=True, presented=True),
    Answers(agents=(("ready", True),)),
)


def walk(case: Case) -> list[Finding]:
    return [finding for section in CHECKS for finding in diagnose(case, section)]


def first(case: Case) -> Finding:
    found = first_failed(walk(case))
    assert found is not None
    return found


def served(**changes: object) -> Case:
    assert SOUND.served is not None
    return replace(SOUND, served=replace(SOUND.served, **changes))  # type: ignore[arg-type]


def with_variables(*names: str) -> Case:
    return replace(SOUND, setup=replace(SOUND.setup, variables=frozenset(names)))


def test_a_sound_case_passes_every_check() -> None:
    assert {finding.status for finding in walk(SOUND)} == {Status.OK}


def test_names_of_checks_are_unique() -> None:
    names = [finding.name for finding in walk(SOUND)]
    assert len(names) == len(set(names))


@given(
    way=st.sampled_from([None, Way(name_problem="x"), Way(("::1",), port_problem="x"), SOUND.way]),
    material=st.sampled_from([None, Material(problem="x: y"), Material(), Material(chain=OWN.chain), OWN]),
    peer=st.sampled_from([None, *(Served(speech) for speech in Speech), SOUND.served]),
    answers=st.sampled_from([None, Answers(), Answers(health=Unavailable("x")), SOUND.answers]),
    tls=st.sampled_from([None, MTLSConfig(enabled=False), MTLSConfig(enabled=True)]),
    who=st.sampled_from([None, CLI, Identity.parse_short("agent/agent-1")]),
    address=st.sampled_from([None, "localhost:1", "192.0.2.1:1"]),
)
def test_whatever_is_known_every_check_has_something_to_say(
    way: Way | None,
    material: Material | None,
    peer: Served | None,
    answers: Answers | None,
    tls: MTLSConfig | None,
    who: Identity | None,
    address: str | None,
) -> None:
    setup = Setup(known=KNOWN, tls=tls, identity=who, address=address)
    for finding in walk(Case(NOW, setup, material, way, peer, answers)):
        assert finding.detail
        assert finding.status is not Status.FAILED or (finding.remedy or finding.name == "files")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (
            "PARALLAX_TLS_ENABLE",
            'export PARALLAX_TLS_ENABLED="$PARALLAX_TLS_ENABLE"; unset PARALLAX_TLS_ENABLE',
        ),
        ("PARALLAX_CERT_DIR", 'export PARALLAX_CERTS_DIR="$PARALLAX_CERT_DIR"; unset PARALLAX_CERT_DIR'),
        ("PARALLAX_TLS_VERSION", "unset PARALLAX_TLS_VERSION"),
    ],
)
def test_a_misspelt_variable_is_put_right(name: str, command: str) -> None:
    assert (first(with_variables(name)).name, first(with_variables(name)).command) == ("variables", command)


@pytest.mark.parametrize(
    "name", ["PARALLAX_TEST_PORT", "PARALLAX_CONTROL_PLANE_PORT", "PARALLAX_CONTROL_PLANE_SERVICE_HOST"]
)
def test_a_variable_of_somebody_else_is_not_held_against_us(name: str) -> None:
    assert first_failed(walk(with_variables(name))) is None


def test_a_clock_that_is_behind_is_the_clocks_fault_and_one_ahead_the_certificates() -> None:
    assert first(replace(SOUND, now=NOW - timedelta(days=1))).name == "clock"
    assert first(replace(SOUND, now=NOW + timedelta(days=366))).name == "validity"


@pytest.mark.parametrize(("short", "found"), [("client/cli", None), ("service/cli", "chain")])
def test_a_certificate_of_the_own_making_is_good_unless_it_is_a_services(
    short: str, found: str | None
) -> None:
    key, who = generate_key(), Identity.parse_short(short)
    template = self_signed_template(who, key.public_key(), LeafProfile(sans=()), NOW, 1)
    own = replace(OWN, chain=(template.sign(key, hashes.SHA256()),), private=key)
    failure = first_failed(walk(replace(SOUND, material=own, setup=replace(SOUND.setup, identity=who))))
    assert (failure.name if failure else None) == found


def test_a_ca_that_expired_is_named_as_such() -> None:
    old = CertificateAuthority.create(now=NOW, lifetime=timedelta(days=1))
    key = generate_key()
    chain = old.issue(CLI, key.public_key(), LeafProfile(), NOW).chain
    case = replace(
        SOUND, material=replace(OWN, chain=chain, private=key, bundle=old.bundle), now=NOW + timedelta(days=2)
    )
    assert first(case).name == "validity"


@pytest.mark.parametrize(
    ("case", "name", "code"),
    [
        (served(speech=Speech.OTHER, heard=b"\x1b[31mHTTP"), "protocol", exits.UNAVAILABLE),
        (served(problem="protocol version", chain=()), "handshake", exits.UNAVAILABLE),
        (served(chain=OWN.chain), "server identity", exits.NO_PERMISSION),
        (served(asks=False), "authentication", exits.NO_PERMISSION),
        (served(refusal="it is revoked"), "authentication", exits.NO_PERMISSION),
        (
            replace(SOUND, answers=Answers(health=Revoked("it is revoked"))),
            "authentication",
            exits.NO_PERMISSION,
        ),
        (
            replace(SOUND, answers=Answers(health=Unavailable("draining"))),
            "authentication",
            exits.UNAVAILABLE,
        ),
        (replace(SOUND, answers=Answers(listing=NotAuthorized("no"))), "authorization", exits.NO_PERMISSION),
        (replace(SOUND, answers=Answers(agents=(("registered", True),))), "authorization", exits.UNAVAILABLE),
    ],
)
def test_what_the_other_end_does_wrong_has_a_name_and_a_code(case: Case, name: str, code: int) -> None:
    assert (first(case).name, first(case).code) == (name, code)


def test_what_a_peer_says_cannot_steer_a_terminal() -> None:
    assert first(served(speech=Speech.OTHER, heard=b"\x1b[31mHTTP")).detail.isprintable()


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("k is open: `chmod 600 'a: b'`", ("k is open", "'chmod 600 'a: b''", "chmod 600 'a: b'")),
        ("a: b: c", ("a: b", "c", "")),
        ("nothing to do", ("nothing to do", "", "")),
    ],
)
def test_our_messages_come_apart_into_cause_remedy_and_command(
    message: str, parts: tuple[str, str, str]
) -> None:
    assert split(message) == parts
