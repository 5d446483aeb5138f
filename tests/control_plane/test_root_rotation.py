"""The stages of a rotation: what may follow on what, and who is waited for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from parallax.control_plane.root_rotation import (
    TRANSITIONS,
    RootRotation,
    Situation,
    Stage,
    advance,
    missing,
)
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.errors import InvalidTransition
from parallax.security.identity import Identity, Kind
from parallax.security.keys import key_id

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
OLD, NEW, OTHER = (CertificateAuthority.create(now=NOW, name=name).certificate for name in "ABC")
BELOW, BESIDE = (CertificateAuthority.create(now=NOW, name=name).certificate for name in "DE")
MEMBERS: Final = tuple(Identity("parallax.local", Kind.AGENT, f"agent-{n}") for n in range(4))
PREPARED: Final = RootRotation(Stage.PREPARED, (OLD, OTHER), (OLD,), (NEW,))
ACTIVE: Final = PREPARED.at(Stage.ACTIVE)
BELOW_ONE_ROOT: Final = RootRotation(Stage.PREPARED, (OLD, OTHER), (BELOW, OLD), (BESIDE, OLD))

some = st.frozensets(st.sampled_from(MEMBERS))
hashes = st.sampled_from([PREPARED.bundle.hash, b"another", None])
situations = st.builds(
    Situation,
    live=some,
    holders=some,
    adopted=st.dictionaries(st.sampled_from(MEMBERS), hashes),
    unreplaced=some,
)
names = st.frozensets(st.sampled_from([m.short for m in MEMBERS]))


@pytest.mark.parametrize("before", Stage)
@pytest.mark.parametrize("after", Stage)
def test_a_stage_follows_only_on_those_of_the_table(before: Stage, after: Stage) -> None:
    rotation = RootRotation(before, (OLD,), (OLD,), (NEW,))
    if after in TRANSITIONS[before]:
        assert rotation.at(after).stage is after
    else:
        with pytest.raises(InvalidTransition, match=before.value):
            rotation.at(after)


@pytest.mark.parametrize(
    ("stage", "trusted", "signs"),
    [
        (Stage.PREPARED, (OLD, OTHER, NEW), OLD),
        (Stage.ACTIVE, (OLD, OTHER, NEW), NEW),
        (Stage.RETIRING, (OTHER, NEW), NEW),
        (Stage.ABORTING, (OLD, OTHER), OLD),
    ],
)
def test_each_stage_says_what_is_trusted_and_who_signs(
    stage: Stage, trusted: tuple[object, ...], signs: object
) -> None:
    rotation = RootRotation(stage, (OLD, OTHER), (OLD,), (NEW,))
    assert (rotation.bundle.roots, rotation.signs) == (trusted, (signs,))


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage != Stage.PREPARED])
def test_there_is_no_way_back_once_the_new_root_signs(stage: Stage) -> None:
    with pytest.raises(InvalidTransition, match="while it is prepared only"):
        RootRotation(stage, (OLD,), (OLD,), (NEW,)).abort()
    assert PREPARED.abort().stage is Stage.ABORTING


@given(situations, names)
def test_the_new_root_signs_only_once_everybody_who_is_not_left_out_trusts_it(
    situation: Situation, without: frozenset[str]
) -> None:
    following = advance(PREPARED.excluding(without), situation)
    trusting = {m for m, what in situation.adopted.items() if what == PREPARED.bundle.hash}
    may = all(m in trusting or m.short in without for m in situation.live | situation.holders)
    assert (following == PREPARED.at(Stage.ACTIVE)) if may else following is None


@given(situations, names)
def test_the_old_root_goes_only_once_nobody_who_is_not_left_out_depends_on_it(
    situation: Situation, without: frozenset[str]
) -> None:
    following = advance(ACTIVE.excluding(without), situation)
    may = all(m.short in without for m in situation.unreplaced)
    assert (following == ACTIVE.at(Stage.RETIRING)) if may else following is None


@given(situations)
def test_who_was_left_out_of_one_stage_is_waited_for_in_the_next(situation: Situation) -> None:
    following = advance(PREPARED.excluding([m.short for m in MEMBERS]), situation)
    assert following is not None
    assert set(missing(following, situation)) == situation.unreplaced


@given(situations)
def test_adoption_is_complete_exactly_when_nobody_is_missing(situation: Situation) -> None:
    assert (situation.adoption(PREPARED.bundle) == 1) is (not missing(PREPARED, situation))


@given(st.sampled_from(Stage), names, st.sampled_from([PREPARED, BELOW_ONE_ROOT]))
def test_what_is_stored_is_what_is_read(stage: Stage, without: frozenset[str], kind: RootRotation) -> None:
    rotation = replace(kind, stage=stage, without=without)
    assert RootRotation.decode(rotation.encode()) == rotation


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage != Stage.IDLE])
def test_below_one_root_the_roots_stay_what_they_are(stage: Stage) -> None:
    rotation = replace(BELOW_ONE_ROOT, stage=stage)
    assert rotation.bundle.hash == TrustBundle((OLD, OTHER)).hash
    assert rotation.signs[0] == (BESIDE if stage in {Stage.ACTIVE, Stage.RETIRING} else BELOW)


@given(situations)
def test_nobody_has_to_adopt_a_root_that_all_trust(situation: Situation) -> None:
    assert advance(BELOW_ONE_ROOT, situation) == BELOW_ONE_ROOT.at(Stage.ACTIVE)


def test_a_root_that_is_there_beside_the_old_one_has_to_be_adopted_by_all_the_same() -> None:
    rotation = RootRotation(Stage.PREPARED, (OLD, OTHER), (BELOW, OLD), (BESIDE, OTHER))
    assert rotation.bundle.roots == (OLD, OTHER)
    assert missing(rotation, Situation(live=frozenset(MEMBERS))) == MEMBERS
    assert rotation.at(Stage.ACTIVE).at(Stage.RETIRING).bundle.roots == (OTHER,)


# Of whom nobody may be left with a leaf alone.


def name(certificate: x509.Certificate) -> str:
    return key_id(certificate.public_key()).hex()


def test_with_a_root_goes_every_issuer_that_is_not_known_to_be_elsewhere() -> None:
    rotation = RootRotation(Stage.ACTIVE, (OLD, OTHER), (BELOW, OLD), (BESIDE, NEW))
    known = {name(each) for each in (OLD, BELOW, NEW, BESIDE, OTHER)} | {"unknown"}
    assert rotation.going(known) == {name(OLD), name(BELOW), "unknown"}


def test_where_no_root_goes_the_old_issuer_alone_does() -> None:
    known = {name(each) for each in (OLD, BELOW, BESIDE, OTHER)} | {"unknown"}
    assert BELOW_ONE_ROOT.going(known) == {name(BELOW)}


def test_an_intermediate_of_the_new_ca_may_be_below_the_old_root_too() -> None:
    rotation = RootRotation(Stage.ACTIVE, (OLD,), (OLD,), (BESIDE, BELOW, NEW))
    assert rotation.going({name(BELOW)}) == {name(BELOW)}
