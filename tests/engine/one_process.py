"""One process of a training: `torchrun --nproc-per-node=2 one_process.py OVERRIDES.json [die | nan EPOCH]`."""

import json
import os
import sys
from pathlib import Path

from ultralytics.utils import RANK

from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.yolo_trainer import YOLOTrainer


def die(trainer) -> None:
    """Leave without a word, as a process does that the system kills."""
    if RANK == 1 and trainer.epoch == 1:
        os._exit(9)


def spoil(trainer, epoch: int) -> None:
    """Give the second process an image of NaN at the start of an epoch, from 0, the first time it is tried."""
    prepare = trainer.preprocess_batch

    def spoilt(batch):
        batch = prepare(batch)
        first = trainer.iteration == epoch * len(trainer.train_loader) and trainer.nan_recovery_attempts == 0
        if RANK == 1 and first:
            batch["img"][0] = float("nan")
        return batch

    trainer.preprocess_batch = spoilt


if __name__ == "__main__":
    overrides = json.loads(Path(sys.argv[1]).read_text())
    kind = YOLOTrainer if str(overrides["model"]).startswith("yolo") else GIDTrainer
    trainer = kind(overrides=overrides)
    if sys.argv[2:] == ["die"]:
        trainer.add_callback("on_train_epoch_start", die)
    if sys.argv[2:3] == ["nan"]:
        spoil(trainer, int(sys.argv[3]))
    trainer.train()
