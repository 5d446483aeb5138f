"""A ledger that is killed while it writes: nothing acknowledged is lost, nothing is there by half."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest

from crashes import Outcome, crash, look
from crashes_faults import Found, Story
from parallax.control_plane.audit import START, Head

AUDIT: Final = Path(__file__).parents[2] / "docs" / "audit.md"
ROUNDS: Final = 20  # after which all kinds of writes had their turn; `make crashes` has two hundred
ALONE: Final = {
    "agent/refused",
    "agent/removed",
    "audit/read",
    "handshake/refused",
}  # as `call/refused`: with such entries nothing is written
AREAS: Final = {
    "approvals",
    "audit",
    "audit-head",
    "certificates",
    "crls",
    "deeds",
    "grants",
    "holders",
    "keys",
    "lookups",
    "revocations",
    "tokens",
}

pytestmark = pytest.mark.timeout(120)  # the first test of a worker, whichever it is, waits for the crashes


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crashes")


@pytest.fixture(scope="module")
def outcome(directory: Path) -> Outcome:
    return crash(directory, ROUNDS)


@pytest.fixture(scope="module")
def found(outcome: Outcome, directory: Path) -> Found:
    return look(directory)


def faults(
    outcome: Outcome,
    found: Found,
    acknowledged: Head = START,
    there: Iterable[str] = (),
    told: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """What is wrong with *found*, where the log has *told* this, too."""
    story: Story = deepcopy(outcome.story)
    story.told |= told
    return story.find_faults(found, acknowledged, there)


def test_whenever_it_is_killed_all_that_was_acknowledged_is_there_and_whole(outcome: Outcome) -> None:
    assert outcome.faults == ()
    assert outcome.acknowledged > 100
    assert outcome.certificates > 20
    assert outcome.refused >= ROUNDS // 4, "no disk was full"


def test_it_is_killed_in_every_kind_of_writes_that_is_audited(outcome: Outcome) -> None:
    rows = [line.split("|")[1] for line in AUDIT.read_text().splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`([a-z]+/[a-z]+)`", "".join(rows)))
    assert "certificate/renewed" in documented
    assert documented - ALONE <= outcome.story.actions.keys()


# The twins: what is missing, there by half, or told of nowhere is found.


def test_each_record_that_is_taken_away_is_missed(outcome: Outcome, found: Found) -> None:
    assert not faults(outcome, found, outcome.story.head, found.records)
    by_area = {key.partition("/")[0]: key for key in found.records}
    assert by_area.keys() >= AREAS
    for gone in by_area.values():
        rest = replace(found, records={key: each for key, each in found.records.items() if key != gone})
        assert faults(outcome, rest) or gone.startswith("roots/adopted/"), gone
        assert faults(outcome, rest, there=[gone])


@pytest.mark.parametrize("area", ["approvals", "deeds", "grants", "tokens"])
def test_a_record_that_no_entry_tells_of_is_found(outcome: Outcome, found: Found, area: str) -> None:
    record = next(each for key, each in found.records.items() if key.startswith(f"{area}/"))
    more = replace(
        found, records={**found.records, f"{area}/another": replace(record, key=f"{area}/another")}
    )
    assert any(each.endswith("told of nowhere") for each in faults(outcome, more))


@pytest.mark.parametrize(
    "what", ["root", "pin spiffe://parallax.local/agent/a/b", "identity a", "revoked a/b"]
)
def test_an_entry_without_its_record_is_found(outcome: Outcome, found: Found, what: str) -> None:
    assert len(faults(outcome, found, told={what: "as nothing is"})) == 1


def test_what_stands_otherwise_than_the_log_tells_is_found(outcome: Outcome, found: Found) -> None:
    token = next(what for what in outcome.story.told if what.startswith("token "))
    assert len(faults(outcome, found, told={token: "somebody=else"})) == 1


def test_an_entry_that_was_acknowledged_and_is_not_there_is_missed(outcome: Outcome, found: Found) -> None:
    last = outcome.story.head.sequence
    (fault,) = faults(outcome, found, Head(last + 1, "0" * 64))
    assert fault == f"entry {last + 1} was acknowledged; the last is {last}"


def test_a_list_that_is_shown_and_has_no_number_is_found(outcome: Outcome, found: Found) -> None:
    shown = {issuer: number + 1_000_000 for issuer, number in found.lists.items()}
    assert shown
    assert len(faults(outcome, replace(found, lists=shown))) == len(shown)
