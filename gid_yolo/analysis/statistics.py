"""What a handful of seeds say: spread, gain, and how certain the gain is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gid_yolo.engine.resample import CONFIDENCE, OverImages


@dataclass(frozen=True)
class Spread:
    """Results of one cell over its seeds.

    Attributes:
        mean: In the unit of the results.
        std: Sample standard deviation (over n - 1); None of a single result.
        count: Results n.
    """

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Gain:
    """Differences from the baseline, seed by seed.

    Attributes:
        mean: In the unit of the results.
        low: Lower end of the confidence interval of the mean difference; None of a single seed.
        high: Upper end, likewise.
        std: Sample standard deviation of the differences; None of a single seed.
        count: Seeds that both have.
        images: The interval over images; None where it is not known.
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    count: int
    images: OverImages | None = None

    @property
    def certain(self) -> bool:
        """True where the interval over seeds leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def joint(self) -> tuple[float, float] | None:
        """The interval over seeds and images, None of a single seed; over seeds alone where images are not known.

        The two errors are independent, so that their variances add up, and with them the squares of what the intervals
        reach from the mean to either side. Each alone leaves the other's error out.
        """
        if self.low is None or self.high is None or self.images is None:
            return None if self.low is None or self.high is None else (self.low, self.high)
        below = math.hypot(self.mean - self.low, max(0.0, self.mean - self.images.low))
        above = math.hypot(self.high - self.mean, max(0.0, self.images.high - self.mean))
        return self.mean - below, self.mean + above


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None of no results."""
    if not values:
        return None
    return Spread(float(np.mean(values)), _std(values), len(values))


def paired_gain(values: Mapping[int, float], baseline: Mapping[int, float]) -> Gain | None:
    """The gain over the seeds that both have, with the interval of Student's t on the differences.

    Runs of one seed start from the same weights and see the same batches, so that their difference holds less noise
    than the results do; where it does not, pairing still gives a valid interval, only a wider one.

    Args:
        values: Result of each seed.
        baseline: Likewise, of what it is compared with.

    Returns:
        The gain, or None where they have no seed in common.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    mean, n = float(np.mean(differences)), len(differences)
    if (std := _std(differences)) is None:
        return Gain(mean, None, None, None, n)
    half = _t(n) * std / math.sqrt(n)
    return Gain(mean, mean - half, mean + half, std, n)


def seeds_needed(gain: Gain, most: int = 1000) -> int | None:
    """How many seeds would make a gain of this size and spread certain; None over `most`, or where it is 0.

    A forecast, since more seeds move the mean and the spread too.
    """
    if gain.std is None or gain.mean == 0:
        return None
    return next((n for n in range(2, most + 1) if _t(n) * gain.std / math.sqrt(n) < abs(gain.mean)), None)


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _t(count: int) -> float:
    """Quantile of Student's t for `count` differences, which leave count - 1 degrees of freedom."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
