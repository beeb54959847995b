import math

import pytest

from gid_yolo.analysis.statistics import Gain, paired_gain, seeds_needed, spread

T_2 = 4.302653  # 97.5 % quantile of Student's t with 2 degrees of freedom, from printed tables (4.303)


def test_spread_is_mean_and_sample_deviation() -> None:
    # mean 3; squared deviations 4 + 1 + 9 = 14 over n - 1 = 2
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.std, found.count) == (3.0, pytest.approx(math.sqrt(7)), 3)


def test_spread_of_one_result_and_of_none() -> None:
    assert (spread([5.0]).mean, spread([5.0]).std) == (5.0, None)
    assert spread([]) is None


def test_gain_is_paired_by_seed() -> None:
    # the results spread by 10, their differences 1, 2, 3 by 1: mean 2, std 1, half width t / sqrt(3)
    gain = paired_gain({0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    half = T_2 * 1 / math.sqrt(3)
    assert (gain.mean, gain.std, gain.count) == (2.0, 1.0, 3)
    assert gain.low == pytest.approx(2 - half, abs=1e-5)
    assert gain.high == pytest.approx(2 + half, abs=1e-5)
    assert not gain.certain  # 2 - 2.48 < 0


def test_gain_is_certain_once_the_interval_leaves_0_out() -> None:
    baseline = {0: 10.0, 1: 20.0, 2: 30.0}
    assert paired_gain({0: 13.0, 1: 23.5, 2: 33.0}, baseline).certain
    assert paired_gain({0: 7.0, 1: 16.5, 2: 27.0}, baseline).certain


def test_gain_takes_only_the_seeds_of_both() -> None:
    gain = paired_gain({0: 3.0, 5: 9.0}, {0: 1.0, 7: 4.0})
    assert (gain.mean, gain.low, gain.high, gain.count) == (2.0, None, None, 1)
    assert not gain.certain
    assert paired_gain({1: 3.0}, {0: 1.0}) is None


def test_seeds_needed_is_the_first_number_that_would_do() -> None:
    # std 1, mean 2: 3 seeds give 4.303 / sqrt(3) = 2.48 > 2, 4 seeds 3.182 / 2 = 1.59 < 2
    assert seeds_needed(Gain(2.0, -0.5, 4.5, 1.0, 3)) == 4
    assert seeds_needed(Gain(0.0, -1.0, 1.0, 1.0, 3)) is None
    assert seeds_needed(Gain(0.001, -1.0, 1.0, 1.0, 3)) is None
    assert seeds_needed(Gain(2.0, None, None, None, 1)) is None
