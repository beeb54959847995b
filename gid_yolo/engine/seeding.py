"""Random numbers that depend on the seed, the epoch and the image alone: not on workers, processes or interruptions."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DistributedSampler, Sampler
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits out of several numbers of at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of all GPUs included; there, without waiting for them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from generators of the CPU that begin with `seed`, and leave them afterwards as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededDataset(YOLODataset):
    """Ultralytics' data set, in which the augmentation of an image is drawn from the seed that comes with its index."""

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """An image by its index, or by index and seed as `EpochBatches` gives them."""
        if not isinstance(index, tuple):
            return super().__getitem__(index)
        index, seed = index
        with seeded(seed):
            return super().__getitem__(index)


class EpochBatches:
    """Batches of (index, seed) without end, an epoch after the other, in place of Ultralytics' repeating sampler.

    Order and seeds of an epoch follow from its number, so that a run which begins with epoch e sees what one that
    came from epoch 0 sees; and those of an image do not depend on the process that reads it.

    Args:
        sampler: Ultralytics' batches of indices.
        seed: Of the run.

    Attributes:
        sampler: The batches of an epoch; Ultralytics' loader reads their number here.
    """

    def __init__(self, sampler: BatchSampler, seed: int) -> None:
        self.sampler = BatchSampler(_ordered(sampler.sampler, seed), sampler.batch_size, sampler.drop_last)
        self.seed, self.first = seed, (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Go on from the epoch that `start` named; the loader asks once, whenever it starts its workers."""
        first, attempt = self.first
        for epoch in itertools.count(first):
            key = (self.seed, epoch, attempt if epoch == first else 0)
            if isinstance(self.sampler.sampler, DistributedSampler):
                self.sampler.sampler.set_epoch(mixed_seed(*key))
            for batch in self.sampler:
                yield [(index, mixed_seed(*key, index)) for index in batch]


def _ordered(sampler: Any, seed: int) -> Sampler[int]:
    """The sampler of an epoch; one that shuffles does so by the epoch's number, as PyTorch's for processes does."""
    if isinstance(sampler, DistributedSampler):
        replicas, rank = sampler.num_replicas, sampler.rank
    elif isinstance(sampler, torch.utils.data.RandomSampler):
        replicas, rank = 1, 0
    else:
        return sampler
    data: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
    return DistributedSampler(data, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)


def seed_loader(loader: InfiniteDataLoader, seed: int) -> None:
    """Let a training loader draw by seed, epoch and image."""
    if type(loader.dataset) is YOLODataset:  # it is Ultralytics that chooses the class
        loader.dataset.__class__ = SeededDataset
    object.__setattr__(loader, "batch_sampler", EpochBatches(loader.batch_sampler.sampler, seed))  # as Ultralytics does


def start_epoch(loader: InfiniteDataLoader, epoch: int, attempt: int, goes_on: bool) -> None:
    """Let a loader give an epoch next.

    Args:
        loader: `seed_loader`'s.
        epoch: From 0.
        attempt: 0, and one more whenever the epoch is tried again, which then draws other numbers.
        goes_on: The last epoch given was the one before, so that workers may have begun with this one.
    """
    loader.batch_sampler.first = epoch, attempt
    if loader.iterator is not None and not goes_on:
        loader.reset()
