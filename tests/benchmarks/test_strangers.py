"""Strangers take what they are told to take."""

from __future__ import annotations

import resource

import pytest

from strangers import Strangers


def _taken_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.timeout(120)
def test_strangers_take_the_processor_time_that_they_are_told_and_end() -> None:
    with Strangers(2):
        pass
    before = _taken_by_children()
    with Strangers(2):
        pass
    starting = _taken_by_children() - before
    with Strangers(2) as strangers:
        for _ in range(3):  # more often than there are pairs
            strangers.take(0.6)
    taken = _taken_by_children() - before - 2 * starting
    assert 1.2 <= taken <= 3.6
