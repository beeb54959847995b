"""How many general instances of each type a training distils: `gi_types.csv`, and figure 5 of the paper from it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from ultralytics.utils import plt_settings

from gid_yolo.distill.types import TYPES
from gid_yolo.engine.side_files import read_or_set_aside
from gid_yolo.files import replaced

if TYPE_CHECKING:
    from gid_yolo.engine.distillation_trainer import DistillationTrainer

COUNT_NAMES = tuple(f"gi_{name}" for name in TYPES)  # as they are logged beside the losses
SMOOTHING = 0.9  # figure 5's alpha
LABELS = {"pos": ("positive", "red"), "semi": ("semi-positive", "gold"), "neg": ("negative", "darkcyan")}  # figure 4's


class InstanceCounts:
    """Writes the counts of every iteration, an epoch at a time: each value is read from the device only then.

    With several processes they are those of the first one's images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Tensor] = []  # (3,) each

    def start(self, trainer: DistillationTrainer) -> None:
        """Begin an epoch, which may be one that is tried again."""
        self.rows = []

    def add(self, trainer: DistillationTrainer) -> None:
        """Note the counts of the batch just trained."""
        self.rows.append(torch.stack([trainer.loss_items[name] for name in COUNT_NAMES]))

    def write(self, trainer: DistillationTrainer) -> None:
        """Append the epoch's rows to the file, which a resumed run goes on with."""
        if not self.rows:
            return
        values, self.rows = torch.stack(self.rows).tolist(), []  # (iterations, 3)
        first = trainer.epoch * len(trainer.train_loader)
        rows = read_or_set_aside(self.path, read_counts) or []
        old = [row for row in rows if row[0] <= first]  # not what an interrupted epoch left
        with replaced(self.path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("iteration", *TYPES))
            writer.writerows(old)
            writer.writerows((first + i, *(round(x, 4) for x in row)) for i, row in enumerate(values, 1))


def read_counts(path: Path) -> list[tuple[float, ...]]:
    """Rows (iteration, positive, semi-positive, negative) of a `gi_types.csv`; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    if header != ["iteration", *TYPES]:
        raise ValueError(f"its first line is {','.join(header)}")
    return [(int(it), float(a), float(b), float(c)) for it, a, b, c in rows]


def smooth(values: Sequence[float], alpha: float = SMOOTHING) -> list[float]:
    """Exponential smoothing s_i = alpha s_(i-1) + (1 - alpha) x_i, from s_0 = x_0."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(alpha * smoothed[-1] + (1 - alpha) * value if smoothed else value)
    return smoothed


@plt_settings()
def draw_counts(path: Path) -> Path | None:
    """Figure 5: the smoothed number of instances of each type over the iterations, beside the file at `path`.

    Returns:
        The picture, or None where nothing was counted.
    """
    import matplotlib.pyplot as plt

    rows = read_or_set_aside(path, read_counts)
    if not rows:
        return None
    iterations, *counts = zip(*rows, strict=True)
    figure, axes = plt.subplots(figsize=(6, 4), tight_layout=True)
    for name, values in zip(TYPES, counts, strict=True):
        label, colour = LABELS[name]
        axes.plot(iterations, values, color=colour, alpha=0.15, linewidth=0.8)
        axes.plot(iterations, smooth(values), color=colour, label=label)
    axes.set(xlabel="iteration", ylabel=f"general instances an image (smoothed, α = {SMOOTHING})", ylim=(0, None))
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=200)
    plt.close(figure)
    return path.with_suffix(".png")
