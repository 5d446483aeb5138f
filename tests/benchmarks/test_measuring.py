"""What the numbers of a benchmark come to, decided without any benchmark."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from measuring import LINK, RAW, TARGETS, Cell, Spread, Target, Verdict, findings, percentile, summarize
from report import Report, to_json, to_markdown
from subject import NAMES, load

CELL = Cell(RAW, 64, 1, seconds=2.0, tasks=1000, p50_ms=1.0, p99_ms=2.0, cpu_s=0.5, rss_bytes=1024)
LEAST = Target("tasks/s", LINK, RAW, 64, lambda cell: cell.rate, 4.0, at_least=True)
MOST = Target("CPU", LINK, RAW, 64, lambda cell: cell.cpu_per_1000, 0.2)


def test_cell_gives_rate_and_cpu_time_per_1000_tasks() -> None:
    assert CELL.rate == 500
    assert CELL.cpu_per_1000 == 0.5


def test_cell_without_an_answer_has_no_cpu_time_per_task() -> None:
    assert math.isnan(replace(CELL, tasks=0).cpu_per_1000)


@pytest.mark.parametrize(
    ("numbers", "fraction", "expected"),
    [([7.0], 0.5, 7.0), ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0), (list(map(float, range(1, 101))), 0.99, 99.0)],
)
def test_percentile_is_the_nearest_rank(numbers: list[float], fraction: float, expected: float) -> None:
    assert percentile(numbers, fraction) == expected


def test_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 0.5))


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.floats(0, 1))
def test_percentile_is_one_of_the_numbers_and_exceeds_few_enough(
    numbers: list[float], fraction: float
) -> None:
    found = percentile(sorted(numbers), fraction)
    assert found in numbers
    assert sum(number <= found for number in numbers) >= fraction * len(numbers) - 1e-9


def test_spread_leaves_out_what_is_no_number() -> None:
    assert Spread.of([3.0, math.nan, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("target", "ratio", "verdict"),
    [
        (LEAST, 4.0, Verdict.MET),
        (LEAST, 3.99, Verdict.MISSED),
        (MOST, 0.2, Verdict.MET),
        (MOST, 0.21, Verdict.MISSED),
        (MOST, math.nan, Verdict.UNKNOWN),
    ],
)
def test_target_is_met_at_its_limit_and_on_the_right_side_of_it(
    target: Target, ratio: float, verdict: Verdict
) -> None:
    assert target.verdict(ratio) is verdict


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    """Not the ratio of medians: the machine of round 3 was ten times slower, for both."""
    cells = []
    for number, (raw, link) in enumerate([(100, 500), (100, 300), (10, 40)], 1):
        cells.append(replace(CELL, round=number, tasks=raw))
        cells.append(replace(CELL, subject=LINK, round=number, tasks=link))
    (found,) = findings(cells, [LEAST])
    assert found.ratio == Spread(4.0, 3.0, 5.0)
    assert found.verdict is Verdict.MET


def test_round_without_one_of_the_two_does_not_count() -> None:
    cells = [CELL, replace(CELL, round=2), replace(CELL, subject=LINK, round=2, tasks=5000)]
    (found,) = findings(cells, [LEAST])
    assert found.ratio == Spread(5.0, 5.0, 5.0)


def test_ratio_by_zero_is_not_measured() -> None:
    cells = [replace(CELL, cpu_s=0.0), replace(CELL, subject=LINK)]
    (found,) = findings(cells, [MOST])
    assert found.verdict is Verdict.UNKNOWN


def test_cells_are_grouped_by_subject_and_number_in_flight() -> None:
    again, other = replace(CELL, round=2), replace(CELL, in_flight=1)
    assert summarize([CELL, other, again]) == {(RAW, 64): [CELL, again], (RAW, 1): [other]}


def test_targets_compare_subjects_that_exist() -> None:
    assert {name for target in TARGETS for name in (target.subject, target.baseline)} <= set(NAMES)


def test_every_subject_says_what_it_measures() -> None:
    subjects = [load(name) for name in NAMES]
    assert all(subject.about for subject in subjects)
    assert len({subject.title for subject in subjects}) == len(NAMES)


def test_report_writes_what_could_not_be_computed_as_null_and_names_who_was_missing() -> None:
    settings = {"rounds": 1}
    subjects = {RAW: load(RAW), LINK: load(LINK)}
    report = Report({}, settings, subjects, {LINK: "not there"}, [replace(CELL, tasks=0, p50_ms=math.nan)])
    (cell,) = json.loads(to_json(report))["cells"]
    assert cell["p50_ms"] is None
    assert cell["cpu_per_1000"] is None
    assert "Not measured: Parallax link: not there." in to_markdown(report)
