from types import SimpleNamespace

import pytest
import torch

from gid_yolo.engine.instance_counts import COUNT_NAMES, InstanceCounts, draw_counts, read_counts, smooth


def batch(*counts: float) -> SimpleNamespace:
    return SimpleNamespace(loss_items=dict(zip(COUNT_NAMES, torch.tensor(counts), strict=True)))


def epoch(number: int) -> SimpleNamespace:
    return SimpleNamespace(epoch=number, train_loader=[None] * 2)


def test_an_epoch_that_is_trained_again_replaces_what_was_counted(tmp_path) -> None:
    counts = InstanceCounts(tmp_path / "gi_types.csv")
    for number in (0, 1):
        counts.add(batch(number, 0, 1))
        counts.add(batch(number, 2, 3))
        counts.write(epoch(number))
    resumed = InstanceCounts(tmp_path / "gi_types.csv")
    resumed.add(batch(9, 9, 9))  # of an attempt that ran out of memory
    resumed.start(epoch(1))
    resumed.add(batch(5, 6, 7))
    resumed.add(batch(5, 6, 8))
    resumed.write(epoch(1))
    assert read_counts(resumed.path) == [(1, 0, 0, 1), (2, 0, 2, 3), (3, 5, 6, 7), (4, 5, 6, 8)]


def test_smoothing() -> None:
    # s = 10, then 0.9 * 10 + 0.1 * 0 = 9, then 0.9 * 9 + 0.1 * 20 = 10.1
    assert smooth([10.0, 0.0, 20.0]) == pytest.approx([10.0, 9.0, 10.1])
    assert smooth([]) == []


def test_nothing_counted_is_nothing_drawn(tmp_path) -> None:
    assert draw_counts(tmp_path / "gi_types.csv") is None
    assert list(tmp_path.iterdir()) == []
