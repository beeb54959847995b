"""One process of a training: `torchrun --nproc-per-node=2 one_process.py OVERRIDES.json [die]`."""

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


if __name__ == "__main__":
    overrides = json.loads(Path(sys.argv[1]).read_text())
    kind = YOLOTrainer if str(overrides["model"]).startswith("yolo") else GIDTrainer
    trainer = kind(overrides=overrides)
    if sys.argv[2:] == ["die"]:
        trainer.add_callback("on_train_epoch_start", die)
    trainer.train()
