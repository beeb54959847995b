"""What the watch for values that are not finite costs, and `gradients=`: steps of one run, with and without by turns.

python benchmarks/numerics.py teacher=teacher.pt data=bccd.yaml imgsz=256 batch=8 iterations=130
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Any

from ultralytics.cfg import parse_key_value_pair

from gid_yolo.engine.trainer import GIDTrainer

MODES = ("neither", "watch", "gradients")
SKIPPED = 6  # first steps, which are slower


class Turns:
    """Gives every step another mode and takes its time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.watch: Any = None
        self.began = 0.0
        self.order, self.random = list[str](), random.Random(0)
        self.mode = ""

    def begin(self, trainer: GIDTrainer) -> None:
        """Before anything else of a step."""
        if not self.order:  # each once in three steps, in random order: what a step costs depends on the one before
            self.order = self.random.sample(MODES, len(MODES))
        self.mode = mode = self.order.pop()
        self.watch = self.watch or trainer.watch
        trainer.watch = self.watch if mode == "watch" else None
        trainer.model.asked = mode == "gradients"
        self.began = time.perf_counter()

    def end(self, trainer: GIDTrainer) -> None:
        """After everything else."""
        if trainer.iteration > SKIPPED:
            self.seconds[self.mode].append(time.perf_counter() - self.began)


def main() -> None:
    """Train and print the ratios."""
    turns = Turns()
    given = dict(parse_key_value_pair(word) for word in sys.argv[1:])
    fixed = {"teacher_min_ap": 0, "val": False, "plots": False, "verbose": False, "nbs": 8, "distill_until": 1.0}
    trainer = GIDTrainer(overrides={"model": "retina_nano", **fixed, **given})
    trainer.add_callback("on_train_batch_start", turns.begin)
    trainer.add_callback("on_train_start", lambda t: t.add_callback("on_train_batch_end", turns.end))
    trainer.train()
    alone = median(turns.seconds["neither"])
    for mode, seconds in turns.seconds.items():
        times = f"{1000 * median(seconds):8.1f} ms, x {median(seconds) / alone:.3f}"
        print(f"{mode:<10} {times} (median of {len(seconds)} steps)")


if __name__ == "__main__":
    main()
