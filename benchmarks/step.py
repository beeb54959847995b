"""The price of a distilled training step, in one run and by turns: the student's step, the teacher's pass, both by GID.

    python benchmarks/step.py --imgsz 320 --batch 4 --rounds 5 --json out.json

- student: forward pass, loss, backward pass and SGD of the student alone.
- teacher: forward pass of the teacher as its file has it, in evaluation mode, without gradients; raw predictions.
- frozen teacher: the same of the teacher as a distillation keeps it (`freeze_teacher`).
- terms: GISM and the losses of GID with their backward pass, of features and predictions that are there.
- gid: a distilled step, as the trainer makes it.

Each round has every one of them `--steps` times, in random order; a ratio is of a round's times, and what is written is
its least, median and largest value over the rounds. The weights are random, the images noise with objects: neither
changes what is computed, but for the number of an image's outputs in the mask of equation 7. With `--profile gid` (or
another) the operators that one of them is made of follow, by their own time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel, batch_targets, count_objects
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.teacher_student import PRECISIONS, TeacherStudentModel
from gid_yolo.engine.views import distillable

OBJECTS = 8  # of an image


class Step:
    """Student, teacher and a batch, and what can be done with them.

    Args:
        student: Name of a model.
        teacher: Likewise.
        classes: Of both.
        batch: Images.
        size: Their height and width.
        device: Where all is.
        amp: Under autocast in this precision.
        precision: Of the teacher's pass in a distillation.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        *,
        classes: int,
        batch: int,
        size: int,
        device: str,
        amp: str | None,
        precision: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.amp = device, getattr(torch, amp) if amp else None
        args = SimpleNamespace(**{**DEFAULTS, "nbs": batch})
        self.student, self.teacher = (GIDDetectionModel(name, nc=classes, verbose=False) for name in (student, teacher))
        self.student.args = self.teacher.args = args
        if device == "cpu":  # as `GIDTrainer` has it
            self.student.to(memory_format=torch.channels_last)
        self.teacher.to(device).eval()
        projector = make_projector(args, self.student, self.teacher)
        self.model = TeacherStudentModel(
            self.student, self.teacher, projector, precision=PRECISIONS.get(precision or "")
        ).to(device)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
        centres, sizes = torch.rand(batch * OBJECTS, 2) * 0.6 + 0.2, torch.rand(batch * OBJECTS, 2) * 0.3 + 0.05
        self.batch: dict[str, Any] = {
            "img": torch.rand(batch, 3, size, size, device=device),
            "batch_idx": torch.arange(batch, device=device).repeat_interleave(OBJECTS).float(),
            "cls": torch.randint(classes, (batch * OBJECTS, 1), device=device).float(),
            "bboxes": torch.cat([centres, sizes], 1).to(device),
        }
        count_objects(self.batch)  # as the trainer does before a batch goes to the device
        self.made: Any = None

    def update(self, loss: Tensor) -> None:
        """Backward pass and step."""
        loss.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run_student(self) -> None:
        """A plain step."""
        with self.precision():
            loss, _ = self.student.loss(self.batch)
        self.update(loss)

    @torch.no_grad()
    def run_teacher(self) -> None:
        """The teacher's pass."""
        with self.precision():
            self.teacher.raw(self.batch["img"])

    @torch.no_grad()
    def run_frozen_teacher(self) -> None:
        """The teacher's pass in a distillation."""
        with self.precision():
            self.model.taught(self.batch["img"])

    def run_gid(self) -> None:
        """A distilled step."""
        with self.precision():
            loss, _ = self.model.loss(self.batch)
        self.update(loss)

    def run_terms(self) -> None:
        """GISM and the losses, forward and backward, up to the student's features and predictions."""
        if self.made is None:
            with torch.no_grad(), self.precision():
                self.made = self.student.raw(self.batch["img"]), self.model.taught(self.batch["img"])
        (features, raw), (teacher_features, teacher_raw) = self.made
        leaves = [x.detach().requires_grad_() for x in (*features, raw.logits, raw.regression)]
        centerness = None if raw.centerness is None else raw.centerness.detach().requires_grad_()
        raw = replace(raw, logits=leaves[-2], regression=leaves[-1], centerness=centerness)
        with self.precision():
            terms, _ = self.model.projector(
                [teacher_features[i] for i in self.model.levels.teacher],
                [leaves[i] for i in self.model.levels.student],
                teacher_raw,
                raw,
                functions=distillable(self.student).functions,
                strides=self.model.levels.strides,
                image_size=tuple(self.batch["img"].shape[-2:]),
                targets=batch_targets(self.batch),
                proposals=lambda: None,
            )
        sum(terms.values()).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def precision(self) -> Any:
        """Autocast, where one is asked for."""
        return torch.autocast(self.device.split(":")[0], dtype=self.amp, enabled=self.amp is not None)

    def seconds(self, run: Callable[[], None], steps: int) -> float:
        """Of one of them."""
        self.wait()
        began = time.perf_counter()
        for _ in range(steps):
            run()
        self.wait()
        return (time.perf_counter() - began) / steps

    def wait(self) -> None:
        """For the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()


RUNS = ("student", "teacher", "frozen_teacher", "terms", "gid")
RATIOS = {
    "gid_step_over_student_plus_teacher": (("gid",), ("student", "teacher")),
    "gid_step_over_student_plus_frozen_teacher": (("gid",), ("student", "frozen_teacher")),
    "frozen_teacher_over_teacher": (("frozen_teacher",), ("teacher",)),
    "terms_over_gid_step": (("terms",), ("gid",)),
    "gid_step_over_student": (("gid",), ("student",)),
}


def measure(step: Step, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds by name, one value a round."""
    runs = {name: getattr(step, f"run_{name}") for name in RUNS}
    for run in runs.values():  # the first is slower
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in random.Random(number).sample(sorted(runs), len(runs)):
            found[name].append(step.seconds(runs[name], steps))
    return found


def profile_of(run: Callable[[], None], device: str) -> str:
    """The operators that most of the time of a call goes to, by the time that is their own."""
    activities = [ProfilerActivity.CPU, *([] if device == "cpu" else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as found:
        run()
    by = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50)


def ratios_of(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Least, median and largest value of every ratio over the rounds."""
    found = {}
    for name, (over, under) in RATIOS.items():
        rounds = zip(*(seconds[part] for part in (*over, *under)), strict=True)
        values = [sum(times[: len(over)]) / sum(times[len(over) :]) for times in rounds]
        found[name] = {"min": min(values), "median": median(values), "max": max(values)}
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="retina_mbv2")
    parser.add_argument("--teacher", default="retina_r50")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of each kind in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("float16", "bfloat16"), default=None)
    parser.add_argument("--teacher-precision", choices=tuple(PRECISIONS), default=None)
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; all cores where it is not given")
    parser.add_argument("--profile", choices=RUNS, nargs="+", default=(), help="print the operators of one of these")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    if options.threads:
        torch.set_num_threads(options.threads)
    models = {"classes": options.classes, "batch": options.batch, "size": options.imgsz}
    precisions = {"amp": options.amp, "precision": options.teacher_precision}
    step = Step(options.student, options.teacher, **models, device=options.device, **precisions)
    seconds = measure(step, options.rounds, options.steps)
    ratios = ratios_of(seconds)
    machine = get_cpu_info() if options.device == "cpu" else torch.cuda.get_device_name()
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    settings |= {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{options.student} under {options.teacher}, {options.batch} x {options.imgsz} px, {machine}")
    for name, values in seconds.items():
        print(f"  {name:<42} {1000 * min(values):9.1f} {1000 * median(values):9.1f} {1000 * max(values):9.1f} ms")
    for name, found in ratios.items():
        print(f"  {name:<42} {found['min']:9.3f} {found['median']:9.3f} {found['max']:9.3f}")
    for name in options.profile:
        print(name, profile_of(getattr(step, f"run_{name}"), options.device), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({**ratios, "seconds": seconds, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
