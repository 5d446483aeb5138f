"""The benchmark of revocation measures what it says."""

from __future__ import annotations

from revocation import costs, measure


async def test_it_measures_each_revocation() -> None:
    took = await measure(bystanders=5, times=3)
    assert len(took) == 3
    assert took == sorted(took)


def test_it_measures_every_size() -> None:
    assert [cost.entries for cost in costs([0, 100])] == [0, 100]
