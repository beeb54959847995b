"""Draws follow from seed, epoch and image alone."""

import contextlib
import random
from itertools import islice

import numpy as np
import pytest
import torch
from engine_helpers import FAST, write_data
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler
from ultralytics.cfg import get_cfg
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from gid_yolo.engine.config import ultralytics_args
from gid_yolo.engine.seeding import EpochBatches, mixed_seed, seed_all, seed_loader, seeded, start_epoch


def test_seeds_differ_by_every_number():
    seeds = {mixed_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert mixed_seed(1, 2) == mixed_seed(1, 2) != mixed_seed(2, 1)
    assert all(0 <= seed < 2**32 for seed in seeds)


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_leaves_the_generators_alone():
    seed_all(5)
    expected = [draws(), draws()]
    seed_all(5)
    first = draws()
    with seeded(7):
        inside = draws()
    assert [first, draws()] == expected
    seed_all(5)
    with contextlib.suppress(ValueError), seeded(7):
        assert draws() == inside
        raise ValueError
    assert [draws(), draws()] == expected


def batches(sampler, epoch, count, attempt=0):
    made = EpochBatches(BatchSampler(sampler, 4, False), seed=3)
    made.first = epoch, attempt
    return list(islice(iter(made), count))


def test_an_epoch_is_the_same_wherever_a_run_begins():
    data = list(range(10))  # 3 batches of 4, 4 and 2
    through = batches(RandomSampler(data), 0, 9)
    for epoch in range(3):
        assert batches(RandomSampler(data), epoch, 3) == through[3 * epoch : 3 * epoch + 3]
        assert sorted(i for batch in through[3 * epoch : 3 * epoch + 3] for i, _ in batch) == data
    assert len({seed for batch in through for _, seed in batch}) == 30  # of every image in every epoch
    orders = [[i for batch in through[k : k + 3] for i, _ in batch] for k in (0, 3, 6)]
    assert orders[0] != orders[1] != orders[2]


def test_an_epoch_that_is_tried_again_draws_other_numbers():
    data = list(range(10))
    first, again = batches(RandomSampler(data), 2, 6), batches(RandomSampler(data), 2, 6, attempt=1)
    assert first[:3] != again[:3]
    assert first[3:] == again[3:]  # the epochs after it are what they would have been


def test_processes_share_what_one_would_read():
    data = list(range(12))
    alone = batches(RandomSampler(data), 1, 3)
    made = []
    for rank in range(2):
        shared = EpochBatches(BatchSampler(DistributedSampler(data, 2, rank), 2, False), seed=3)
        shared.first = 1, 0
        made.append(list(islice(iter(shared), 3)))
    for one, two, both in zip(*made, alone, strict=True):
        assert sorted(one + two) == sorted(both)


def test_an_order_that_is_not_shuffled_is_kept():
    assert [i for batch in batches(SequentialSampler(range(10)), 4, 3) for i, _ in batch] == list(range(10))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = write_data(tmp_path_factory.mktemp("set"), train=6)
    contents = check_det_dataset(str(path))
    args = get_cfg(overrides={**ultralytics_args(FAST), "degrees": 10.0, "mosaic": 0.0})
    return lambda: build_yolo_dataset(args, contents["train"], 4, contents, mode="train")


def images(dataset, workers, epoch, count=2):
    loader = build_dataloader(dataset(), 4, workers, shuffle=True, device="cpu")
    seed_loader(loader, 0)
    found = []
    for k in range(count):
        start_epoch(loader, epoch + k, 0, goes_on=k > 0)
        found += [(batch["im_file"], batch["img"].clone()) for batch in loader]
    loader.close()
    return found


def test_workers_and_beginnings_change_no_pixel(dataset):
    expected = images(dataset, 0, 0, count=3)
    assert not torch.equal(expected[0][1], expected[2][1])
    for workers, epoch in ((2, 0), (2, 1), (0, 1)):
        found = images(dataset, workers, epoch)
        for (files, pixels), (names, values) in zip(found, expected[2 * epoch :], strict=False):
            assert files == names
            assert torch.equal(pixels, values)


def test_a_loader_that_gave_half_an_epoch_begins_the_next_anew(dataset):
    expected = images(dataset, 0, 1, count=1)
    loader = build_dataloader(dataset(), 4, 2, shuffle=True, device="cpu")
    seed_loader(loader, 0)
    start_epoch(loader, 0, 0, goes_on=False)
    next(iter(loader))
    start_epoch(loader, 1, 0, goes_on=False)
    assert [batch["im_file"] for batch in loader] == [files for files, _ in expected]
    loader.close()
