"""A tiny data set to train on in seconds."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from gid_yolo import GID

FAST = {
    "epochs": 1,
    "imgsz": 64,
    "batch": 4,
    "plots": False,
    "verbose": False,
    "teacher_min_ap": 0,
    "distill_until": 1.0,  # every epoch has its terms
}


class Interrupted(Exception):
    """Stands for whatever ends a run before its time."""


def train_one_epoch(trainer) -> None:
    """Train until the first epoch is evaluated and saved, then break off."""

    def interrupt(_) -> None:
        raise Interrupted

    trainer.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        trainer.train()


def write_data(
    root: Path, *, train: int = 8, val: int = 4, boxes: bool = True, names: tuple[str, ...] = ("a", "b")
) -> Path:
    """Bright rectangles on noise: `names[0]` is wide, `names[1]` is tall. Returns the data yaml."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)
            label = i % 2
            width, height = (40, 16) if label == 0 else (16, 40)
            x, y = rng.integers(0, 64 - width), rng.integers(0, 64 - height)
            image[y : y + height, x : x + width] = 255
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), image)
            line = f"{label} {(x + width / 2) / 64} {(y + height / 2) / 64} {width / 64} {height / 64}\n"
            (root / "labels" / split / f"{i}.txt").write_text(line if boxes else "")
    data = {"train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def train_teachers(names: Iterable[str], data: Path, folders: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of each model, trained for one epoch."""
    files = {}
    for name in names:
        folder = folders.mktemp(name.partition(".")[0])
        GID(name).train(**FAST, data=str(data), save_dir=str(folder))
        files[name] = str(folder / "weights" / "best.pt")
    return files
