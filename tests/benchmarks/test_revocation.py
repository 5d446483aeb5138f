"""The benchmark of revocation measures what it says."""

from __future__ import annotations

from parallax.runtime.watches import MAX_WATCHES
from revocation import costs, measure


async def test_it_measures_each_revocation_beside_more_streams_than_one_may_have() -> None:
    took = await measure(bystanders=MAX_WATCHES + 1, times=3)
    assert len(took) == 3
    assert took == sorted(took)


def test_it_measures_every_size() -> None:
    assert [cost.entries for cost in costs([0, 100])] == [0, 100]
