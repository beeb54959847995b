"""How long calls take, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds per batch, and images per second over all timed runs."""

    p50: float
    p95: float
    p99: float
    images_per_second: float


def interleave(
    calls: Mapping[str, Callable[[np.ndarray], Any]],
    batches: Sequence[np.ndarray],
    *,
    warmup: int,
    runs: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls in turns, so that a machine that slows down or is disturbed hits all of them alike.

    Args:
        calls: What to time, by name.
        batches: Inputs, used in turn.
        warmup: Untimed runs of each before the first round. Besides, one untimed run opens every turn: the caches
            then hold the previous model's weights.
        runs: Timed runs of each in a round.
        rounds: Rounds.
        clock: Seconds.

    Returns:
        Milliseconds of each run: `rounds * runs` numbers a name.
    """
    for call in calls.values():
        for i in range(warmup):
            call(batches[i % len(batches)])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call(batches[-1])
            for i in range(runs):
                start = clock()
                call(batches[i % len(batches)])
                times[name].append((clock() - start) * 1e3)
    return times


def latency(times: Sequence[float], batch: int) -> Latency:
    """Percentiles (linear between neighbours) of milliseconds per batch."""
    p50, p95, p99 = (float(p) for p in np.percentile(times, [50, 95, 99]))
    return Latency(p50, p95, p99, batch * len(times) * 1e3 / float(np.sum(times)))
