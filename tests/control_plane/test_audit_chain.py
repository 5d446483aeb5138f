"""Whatever is done to a log that was written: it shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.control_plane.audit import START, Deed, Entry, Head
from parallax.control_plane.audit_chain import PRUNED, Chain
from parallax.security.errors import ChainBroken

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ADMIN = "spiffe://parallax.local/client/admin"

Kept = list[tuple[int, bytes]]


def written(deeds: Iterable[Deed], head: Head = START) -> tuple[Kept, Head]:
    """The log of *deeds*, and its head."""
    kept: Kept = []
    for deed in deeds:
        entry = Entry.behind(head, deed, NOW)
        kept.append((entry.sequence, entry.content))
        head = entry.head
    return kept, head


def read(kept: Kept, head: Head, noted: Head | None = None) -> list[Entry]:
    chain = Chain(noted)
    found = [chain.add(*each) for each in kept]
    chain.finish(head)
    return found


def log_of(count: int) -> tuple[Kept, Head]:
    return written(
        Deed(f"test/{n}", ADMIN, f"agent-{n}", "10.0.0.1", {"n": str(n)}) for n in range(1, count + 1)
    )


def changed(content: bytes, name: str, value: Any) -> bytes:
    """*content* with another *value*, written as ours is."""
    return json.dumps(json.loads(content) | {name: value}, sort_keys=True, separators=(",", ":")).encode()


FIELDS = {
    "action": "test/other",
    "at": "2026-06-01T12:00:01+00:00",
    "before": "1" * 64,
    "by": "spiffe://parallax.local/client/cli",
    "detail": {},
    "sequence": 4,
    "source": "10.0.0.2",
    "subject": "agent-9",
}

texts = st.text(max_size=20)
deeds = st.builds(Deed, texts, texts, texts, texts, st.dictionaries(texts, texts, max_size=3))


@given(st.lists(deeds, max_size=6), st.data())
def test_what_was_written_is_read_again_from_any_moment_on(done: list[Deed], data: st.DataObject) -> None:
    kept, head = written(done)
    assert [entry.deed for entry in read(kept, head)] == done
    upto = data.draw(st.integers(0, len(kept)))
    noted = Entry.decode(*kept[upto - 1]).head if upto else START
    read(kept, head, noted)


@given(st.lists(deeds, min_size=1, max_size=5), st.data())
def test_a_byte_that_is_another_is_found(done: list[Deed], data: st.DataObject) -> None:
    kept, head = written(done)
    which = data.draw(st.integers(0, len(kept) - 1))
    sequence, content = kept[which]
    where = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[where]))
    kept[which] = sequence, content[:where] + bytes([other]) + content[where + 1 :]
    with pytest.raises(ChainBroken) as raised:
        read(kept, head)
    assert raised.value.sequence in {
        sequence - 1,
        sequence,
    }  # the one before, if the link to it is what changed


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("sequence", [1, 3, 5])
def test_a_field_that_is_another_is_found(name: str, sequence: int) -> None:
    kept, head = log_of(5)
    kept[sequence - 1] = sequence, changed(kept[sequence - 1][1], name, FIELDS[name])
    with pytest.raises(ChainBroken) as raised:
        read(kept, head)
    assert raised.value.sequence in {sequence - 1, sequence}
    assert str(raised.value.sequence) in str(raised.value)


def test_every_field_is_among_those_that_are_changed() -> None:
    kept, _ = log_of(1)
    assert json.loads(kept[0][1]).keys() == FIELDS.keys()


def test_a_field_that_was_added_is_found() -> None:
    kept, head = log_of(3)
    kept[1] = 2, changed(kept[1][1], "approved", "yes")
    with pytest.raises(ChainBroken, match="entry 2 is not the one that entry 3 follows"):
        read(kept, head)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda kept: [*kept[:2], *kept[3:]], "entry 3 is missing: the next one there is 4"),
        (lambda kept: kept[1:], "begins with entry 2, and no entry tells that those before were pruned"),
        (lambda kept: kept[:-1], "the last entry is 4, where the head tells of 5"),
        (lambda _: [], "the last entry is 0, where the head tells of 5"),
        (lambda kept: [*kept[:1], (2, kept[2][1]), (3, kept[1][1]), *kept[3:]], "of entry 2 lies entry 3"),
        (lambda kept: [*kept[:2], kept[1], *kept[2:]], "entry 3 is missing: the next one there is 2"),
        (lambda kept: [*kept[:2], (3, kept[1][1]), *kept[3:]], "in the place of entry 3 lies entry 2"),
        (lambda kept: [*kept, (6, written([Deed("test/more", "")])[0][0][1])], "of entry 6 lies entry 1"),
        (
            lambda kept: [*kept, *written([Deed("test/more", "")], Entry.decode(*kept[-1]).head)[0]],
            "the last entry is 6, where the head tells of 5",
        ),
        (
            lambda kept: [*kept[:-1], (5, changed(kept[-1][1], "by", "x"))],
            "entry 5, the last, is not the one",
        ),
    ],
    ids=[
        "one taken out",
        "the first taken out",
        "the last cut off",
        "all taken out",
        "two exchanged",
        "one twice",
        "one over another",
        "one of another log",
        "one that fits added",
        "the last changed",
    ],
)
def test_what_is_taken_out_exchanged_or_added_is_found(spoil: Callable[[Kept], Kept], said: str) -> None:
    kept, head = log_of(5)
    with pytest.raises(ChainBroken, match=said):
        read(spoil(kept), head)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"sequence":1e999,"at":"2026-06-01","action":"","by":"","subject":"","source":"","detail":{},"before":""}',
        b'{"sequence":1,"at":"yesterday","action":"","by":"","subject":"","source":"","detail":{},"before":""}',
        b'{"sequence":1,"at":"2026-06-01","action":"","by":"","subject":"","source":"","detail":[],"before":""}',
    ],
)
def test_what_is_no_entry_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(ChainBroken, match="what lies in the place of entry 1 is no entry"):
        Chain().add(1, content)


# Written anew, which a chain without a key does not show by itself.


def test_a_log_that_was_written_anew_shows_only_to_who_has_noted_a_head() -> None:
    _, noted = log_of(4)
    kept, head = written(Deed("test/forged", ADMIN) for _ in range(6))
    read(kept, head)
    with pytest.raises(ChainBroken, match="entry 4 is not the one that was noted: the log was rewritten"):
        read(kept, head, noted)


def test_an_end_that_was_cut_off_with_its_head_shows_only_to_who_has_noted_one() -> None:
    kept, noted = log_of(5)
    head = Entry.decode(*kept[2]).head
    read(kept[:3], head)
    with pytest.raises(ChainBroken, match="the last entry is 3, where there was an entry 5"):
        read(kept[:3], head, noted)


def test_all_that_was_taken_out_with_its_head_shows_only_to_who_has_noted_one() -> None:
    _, noted = log_of(5)
    read([], START)
    with pytest.raises(ChainBroken, match="the last entry is 0, where there was an entry 5"):
        read([], START, noted)


# A log that was pruned.


def pruned(upto: int, until: str | None = None) -> tuple[Kept, Head]:
    """A log of ten entries, those up to *upto* taken out, and an entry that says so."""
    kept, head = log_of(10)
    until = str(Entry.decode(*kept[upto - 1]).head) if until is None else until
    last, head = written([Deed(PRUNED, ADMIN, detail={"until": until}), Deed("test/later", ADMIN)], head)
    return kept[upto:] + last, head


def test_a_pruned_log_is_read_from_where_the_entry_says_that_it_begins() -> None:
    assert [entry.sequence for entry in read(*pruned(4))] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [entry.sequence for entry in read(*pruned(10))] == [11, 12]


def test_more_than_was_pruned_is_found() -> None:
    kept, head = pruned(4)
    with pytest.raises(ChainBroken, match="the log begins with entry 6, and no entry tells"):
        read(kept[1:], head)


@pytest.mark.parametrize("until", ["", "4", f"4:{'0' * 64}", f"5:{'0' * 64}"])
def test_a_log_that_begins_elsewhere_than_its_entry_says_is_found(until: str) -> None:
    with pytest.raises(ChainBroken, match="the log begins with entry 5, and no entry tells"):
        read(*pruned(4, until))


def test_a_first_entry_put_in_front_of_a_pruned_log_is_found() -> None:
    kept, head = pruned(4)
    forged = Entry.behind(Head(4, Entry.decode(*kept[0]).before), Deed("test/forged", ADMIN), NOW)
    with pytest.raises(ChainBroken, match="entry 5 is not the one that entry 6 follows"):
        read([(5, forged.content), *kept[1:]], head)


def test_a_noted_head_is_compared_where_the_log_now_begins() -> None:
    before = Entry.decode(*log_of(4)[0][-1]).head
    read(*pruned(4), noted=before)
    with pytest.raises(ChainBroken, match="entry 4 is not the one that was noted"):
        read(*pruned(4), noted=Head(4, "0" * 64))


def test_a_head_noted_before_the_log_was_pruned_is_said_to_tell_nothing() -> None:
    noted = log_of(2)[1]
    with pytest.raises(ChainBroken, match="nothing tells any more what entry 2 was; note a newer head"):
        read(*pruned(4), noted=noted)
