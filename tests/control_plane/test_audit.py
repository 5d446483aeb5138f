"""The audit log: what is recorded with what, in which order, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import json
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from parallax.control_plane.audit import (
    HEAD,
    MAX_DEED,
    MAX_OWN_WRITES,
    START,
    AuditLog,
    Deed,
    Head,
    key_of,
    read_head,
)
from parallax.control_plane.engines.engine import ABSENT, MAX_WRITES, Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.security.errors import Conflict, Fault, StorageFailed
from tests.control_plane.audit_log import Recorder, verified
from tests.control_plane.clock import NOW

ADMIN = "spiffe://parallax.local/client/admin"
HAPPENED = Event("tests/happened")


@pytest.fixture
def engine(engine: SqliteEngine) -> Recorder:
    return Recorder(engine)


@pytest.fixture
def log(engine: Recorder) -> AuditLog:
    return AuditLog(engine, lambda: NOW)


def deed(subject: object = "", action: str = "test/done") -> Deed:
    return Deed(action, ADMIN, str(subject))


async def subjects(engine: SqliteEngine | Recorder) -> list[str]:
    return [entry.deed.subject for entry in await verified(engine)]


# What an entry holds.


async def test_an_entry_tells_who_did_what_to_whom_and_when(log: AuditLog, engine: Recorder) -> None:
    done = Deed("certificate/revoked", ADMIN, "agent-1", "10.0.0.1", {"reason": "ünter\nzwei"})
    await log.commit(done)
    [entry] = await verified(engine)
    assert (entry.sequence, entry.at, entry.deed, entry.before) == (1, NOW, done, START.hash)


async def test_what_is_kept_is_what_is_hashed_and_plain_json(log: AuditLog, engine: Recorder) -> None:
    await log.commit(deed("a"))
    await log.commit(deed("b"))
    record = await engine.get(key_of(2))
    assert record is not None
    told = json.loads(record.value or b"")
    assert told == {
        "action": "test/done",
        "at": "2026-06-01T12:00:00+00:00",
        "before": (await verified(engine))[0].head.hash,
        "by": ADMIN,
        "detail": {},
        "sequence": 2,
        "source": "",
        "subject": "b",
    }
    assert (record.value or b"").isascii()


async def test_what_does_not_say_where_it_came_from_came_from_the_call(engine: Recorder) -> None:
    log = AuditLog(engine, lambda: NOW, lambda: "10.0.0.7")
    await log.commit(Deed("test/done", ADMIN))
    await log.commit(Deed("test/done", ADMIN, source="10.0.0.2"))
    assert [entry.deed.source for entry in await verified(engine)] == ["10.0.0.7", "10.0.0.2"]


def test_a_head_is_read_as_it_is_spelled() -> None:
    head = Head(12, "0a" * 32)
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1:",
        ":" + "0" * 64,
        "1:" + "0" * 63,
        "1:" + "A" * 64,
        "01:" + "0" * 64,
        "-1:" + "0" * 64,
        "1:" + "0" * 64 + "\n",
        "\u0661:" + "0" * 64,
    ],
)
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not <sequence>:<SHA-256"):
        Head.parse(text)


async def test_the_hash_is_that_of_the_sha256sum_of_the_entry(log: AuditLog, engine: Recorder) -> None:
    """Whoever has only the records and common tools can follow the chain."""
    await log.commit(deed())
    record = await engine.get(key_of(1))
    assert record is not None
    process = await asyncio.create_subprocess_exec(
        "sha256sum", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate(record.value)
    assert Head(1, out.split()[0].decode()) == (await read_head(engine))[0]


# Together with what it changes.


async def test_the_revisions_are_those_of_the_writes(log: AuditLog, engine: Recorder) -> None:
    found = await asyncio.gather(
        log.commit(deed(), [Write("a", b"1"), Write("b", b"2")]),
        log.commit(deed()),
        log.commit(deed(), [Write("c", b"3")]),
    )
    assert [len(revisions) for revisions in found] == [2, 0, 1]
    for key, revision in zip("abc", [*found[0], *found[2]], strict=True):
        record = await engine.get(key)
        assert record is not None
        assert record.revision == revision


async def test_where_a_record_is_not_as_expected_nothing_is_recorded(log: AuditLog, engine: Recorder) -> None:
    await log.commit(deed("first"), [Write("a", b"1", ABSENT)])
    with pytest.raises(Conflict):
        await log.commit(deed("second"), [Write("a", b"2", ABSENT), Write("b", b"2")])
    await log.commit(deed("third"))
    assert await subjects(engine) == ["first", "third"]
    assert await engine.get("b") is None


async def test_what_comes_at_once_shares_a_commit(log: AuditLog, engine: Recorder) -> None:
    await asyncio.gather(*(log.commit(deed(n), [Write(f"n/{n}", b"")]) for n in range(200)))
    assert await subjects(engine) == [str(n) for n in range(200)]
    assert len(engine.commits) <= 1 + -(-200 * 2 // (MAX_WRITES - 1)) + 1
    assert max(engine.commits) <= MAX_WRITES


async def test_only_the_one_that_conflicts_fails(log: AuditLog, engine: Recorder) -> None:
    await log.commit(deed("before"), [Write("n/7", b"")])
    outcomes = await asyncio.gather(
        *(log.commit(deed(n), [Write(f"n/{n}", b"", ABSENT)]) for n in range(20)), return_exceptions=True
    )
    assert [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Conflict)] == [7]
    assert await subjects(engine) == ["before", *(str(n) for n in range(20) if n != 7)]


async def test_one_that_conflicts_costs_the_others_few_commits(log: AuditLog, engine: Recorder) -> None:
    """Whoever makes conflicts on purpose does not make each of the others wait for a commit of its own."""
    await log.commit(deed("before"), [Write("n/30", b"")])
    engine.commits.clear()
    await asyncio.gather(
        *(log.commit(deed(n), [Write(f"n/{n}", b"", ABSENT)]) for n in range(49)), return_exceptions=True
    )
    assert len(await verified(engine)) == 49
    assert len(engine.commits) <= 2 + 2 * 6


async def test_of_two_that_want_the_same_record_the_first_gets_it(log: AuditLog, engine: Recorder) -> None:
    outcomes = await asyncio.gather(
        *(log.commit(deed(n), [Write("one", str(n).encode(), ABSENT)]) for n in range(5)),
        return_exceptions=True,
    )
    assert [isinstance(outcome, Conflict) for outcome in outcomes] == [False, True, True, True, True]
    assert await subjects(engine) == ["0"]
    record = await engine.get("one")
    assert record is not None
    assert record.value == b"0"


async def test_a_full_number_of_writes_fits(log: AuditLog, engine: Recorder) -> None:
    many = [[Write(f"{name}/{n}", b"") for n in range(MAX_OWN_WRITES)] for name in "ab"]
    await asyncio.gather(*(log.commit(deed(), writes) for writes in many), log.commit(deed()))
    assert len(await verified(engine)) == 3


@pytest.mark.parametrize(
    ("what", "writes"),
    [
        (deed(), [Write(f"n/{n}", b"") for n in range(MAX_OWN_WRITES + 1)]),
        (deed(), [Write("a", b"1"), Write("a", b"2")]),
        (deed("x" * MAX_DEED), []),
        (Deed("test/done", ADMIN, detail={"x": "y" * MAX_DEED}), []),
    ],
    ids=["too many", "twice", "long subject", "long detail"],
)
async def test_what_fits_into_no_commit_is_refused_and_harms_nobody(
    log: AuditLog, engine: Recorder, what: Deed, writes: list[Write]
) -> None:
    with pytest.raises(ValueError, match=r"writes|more to tell"):
        await log.commit(what, writes)
    await log.commit(deed("next"))
    assert await subjects(engine) == ["next"]


async def test_the_largest_deed_fits_into_a_record_however_it_is_escaped(
    log: AuditLog, engine: Recorder
) -> None:
    await log.commit(Deed("", "", "\U0001f600" * MAX_DEED))
    assert len((await subjects(engine))[0]) == MAX_DEED


# Whoever goes away.


async def test_who_is_cancelled_while_waiting_tears_nothing(log: AuditLog, engine: Recorder) -> None:
    engine.may_go_on.clear()
    tasks = [asyncio.create_task(log.commit(deed(n), [Write(f"n/{n}", b"")])) for n in range(100)]
    await asyncio.sleep(0)
    for number in range(0, 100, 3):
        tasks[number].cancel()
    await asyncio.sleep(0)
    engine.may_go_on.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    found = await subjects(engine)
    told = [str(n) for n, outcome in enumerate(outcomes) if not isinstance(outcome, BaseException)]
    assert len(told) == 66
    assert set(told) <= set(found)
    assert len(set(found)) == len(found)
    for number in range(100):
        assert (await engine.get(f"n/{number}") is not None) is (str(number) in found)


async def test_who_waits_when_the_process_ends_is_told(log: AuditLog, engine: Recorder) -> None:
    engine.may_go_on.clear()
    tasks = [asyncio.create_task(log.commit(deed(n))) for n in range(200)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert log._writing is not None
    log._writing.cancel()  # as the loop does with what it finds at its end
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, StorageFailed) for outcome in outcomes)
    engine.may_go_on.set()
    await log.commit(deed("after"))
    assert await subjects(engine) == ["after"]


async def test_a_log_on_an_engine_that_closes_finishes_or_tells(tmp_path: Path) -> None:
    async with SqliteEngine(tmp_path / "closing") as engine:
        log = AuditLog(engine, lambda: NOW)
        tasks = [asyncio.create_task(log.commit(deed(n))) for n in range(500)]
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    told = [str(n) for n, outcome in enumerate(outcomes) if not isinstance(outcome, StorageFailed)]
    async with SqliteEngine(tmp_path / "closing") as engine:
        assert await subjects(engine) == told


# What the medium does.


async def test_a_failure_is_told_to_all_who_wait_and_leaves_no_gap(log: AuditLog, engine: Recorder) -> None:
    await log.commit(deed("before"))
    engine.fails = StorageFailed("the disk is full", Fault.FULL)
    outcomes = await asyncio.gather(*(log.commit(deed()) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(outcome, StorageFailed) and outcome.fault is Fault.FULL for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 10  # each with a traceback of its own
    engine.fails = None
    await log.commit(deed("after"))
    assert await subjects(engine) == ["before", "after"]


async def test_what_was_written_though_nobody_was_told_is_part_of_the_chain(
    log: AuditLog, engine: Recorder
) -> None:
    engine.fails_after = StorageFailed("nobody knows")
    with pytest.raises(StorageFailed):
        await log.commit(deed("unknown"))
    engine.fails_after = None
    await log.commit(deed("after"))
    assert await subjects(engine) == ["unknown", "after"]


async def test_two_logs_on_one_engine_make_one_chain(log: AuditLog, engine: Recorder) -> None:
    other = AuditLog(engine, lambda: NOW)
    for number in range(3):
        await asyncio.gather(log.commit(deed(f"a{number}")), other.commit(deed(f"b{number}")))
    assert len(await subjects(engine)) == 6


async def test_too_many_that_wait_are_refused_at_once(log: AuditLog, engine: Recorder) -> None:
    engine.may_go_on.clear()
    tasks = [asyncio.create_task(log.commit(deed())) for _ in range(10_200)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    refused = [task for task in tasks if task.done()]
    assert 0 < len(refused) <= 200
    assert all(isinstance(task.exception(), StorageFailed) for task in refused)
    engine.may_go_on.set()
    await asyncio.wait(tasks)
    assert len(await verified(engine)) == len(tasks) - len(refused)


async def test_an_entry_behind_the_head_is_told_and_not_overwritten(log: AuditLog, engine: Recorder) -> None:
    """No conflict that ends when it is tried again: whoever does that would do it for ever."""
    await log.commit(deed("a"))
    await engine.commit(HAPPENED, [Write(HEAD, None)])
    with pytest.raises(StorageFailed, match="has an entry 1 behind its head") as raised:
        await AuditLog(engine, lambda: NOW).commit(deed("b"))
    assert raised.value.fault is Fault.DAMAGED
    record = await engine.get(key_of(1))
    assert record is not None
    assert b'"subject":"a"' in (record.value or b"")


async def test_a_damaged_head_is_told(engine: Recorder, log: AuditLog) -> None:
    await engine.commit(HAPPENED, [Write(HEAD, b"\xff")])
    with pytest.raises(StorageFailed, match="the head of the audit log is damaged"):
        await log.commit(deed())


# Everything at once.


class Model(RuleBasedStateMachine):
    """A log and a list are told the same, with conflicts, failures, cancellations and restarts among it."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.now = NOW
        self.number = 0
        self.told: list[str] = []
        self.unsure: set[str] = set()
        self.taken: set[str] = set()
        self.heads: list[Head] = []
        self._open()

    def teardown(self) -> None:
        self._close()
        self.loop.close()
        self.scratch.cleanup()

    def _open(self) -> None:
        self.context = SqliteEngine(Path(self.scratch.name) / "data")
        self.engine = Recorder(self.loop.run_until_complete(self.context.__aenter__()))
        self.log = AuditLog(self.engine, lambda: self.now)

    def _close(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))

    @rule()
    def restart(self) -> None:
        self._close()
        self._open()

    @rule(seconds=st.integers(-3_600, 3_600))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(
        keys=st.lists(st.sampled_from([None, *"abcdef"]), min_size=1, max_size=8),
        cancelled=st.sets(st.integers(0, 7)),
        failing=st.sampled_from(["", "", "", "before", "after"]),
    )
    def commit(self, keys: list[str | None], cancelled: set[int], failing: str) -> None:
        self.loop.run_until_complete(self._commit(keys, cancelled, failing))

    async def _commit(self, keys: list[str | None], cancelled: set[int], failing: str) -> None:
        self.engine.fails = StorageFailed("full", Fault.FULL) if failing == "before" else None
        self.engine.fails_after = StorageFailed("unknown") if failing == "after" else None
        names, tasks = [], []
        for key in keys:
            names.append(str(self.number))
            self.number += 1
            writes = [Write(f"taken/{key}", b"", ABSENT)] if key else []
            tasks.append(self.loop.create_task(self.log.commit(deed(names[-1]), writes)))
        await asyncio.sleep(0)
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        self.engine.fails = self.engine.fails_after = None
        while self.log._writing is not None:
            await asyncio.sleep(0)
        for name, key, outcome in zip(names, keys, outcomes, strict=True):
            match outcome:
                case Conflict():
                    assert key is not None
                case StorageFailed():
                    assert failing
                    if failing == "after":
                        self.unsure.add(name)
                case asyncio.CancelledError():
                    self.unsure.add(name)
                case tuple():
                    assert not failing
                    self.told.append(name)
                case _:
                    raise AssertionError(outcome)

    @invariant()
    def the_chain_is_whole_and_holds_what_was_told(self) -> None:
        found = self.loop.run_until_complete(verified(self.engine))
        subjects = [entry.deed.subject for entry in found]
        assert len(set(subjects)) == len(subjects)
        assert set(self.told) <= set(subjects) <= set(self.told) | self.unsure
        assert [name for name in subjects if name in set(self.told)] == self.told
        head, _ = self.loop.run_until_complete(read_head(self.engine))
        assert head.sequence == len(found)
        self.heads.append(head)

    @invariant()
    def no_head_that_once_was_is_contradicted(self) -> None:
        for head in self.heads[:: max(1, len(self.heads) // 3)]:
            self.loop.run_until_complete(verified(self.engine, head))


@pytest.mark.timeout(120)
def test_a_log_holds_what_a_list_holds_whatever_happens_to_it() -> None:
    run_state_machine_as_test(
        Model, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )
