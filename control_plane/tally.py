"""How tasks ended and how long they took, counted at the price of two additions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from parallax.runtime.outcome import OutcomeCode

BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class TaskTally(Collector):
    """
    The control plane's tasks, for Prometheus to collect.

    The library's own counters lock and look labels up at every step, which was a fifth of
    what the control plane did for a task; here a scrape does the work.
    """

    def __init__(self) -> None:
        # At zero from the start: a rate over a series that begins at 1 misses the 1.
        self._ended = dict.fromkeys(("OK", *map(str, OutcomeCode)), 0)
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0

    def add(self, outcome: str, seconds: float) -> None:
        """Count one task: its outcome code, or "OK", and how long it took."""
        self._ended[outcome] += 1
        self._buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds += seconds

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        """What a scrape shows."""
        ended = CounterMetricFamily(
            "parallax_tasks", "Tasks ended, by outcome code; OK has a value.", labels=["outcome"]
        )
        for outcome, count in self._ended.items():
            ended.add_metric([outcome], count)
        yield ended
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(float, BUCKETS_S), float("inf")), self._buckets, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        yield HistogramMetricFamily(
            "parallax_task_duration_seconds",
            "From the arrival of a task to its outcome, waiting for an agent included.",
            buckets=buckets,
            sum_value=self._seconds,
        )
