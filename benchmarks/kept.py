"""Every optimisation of a distilled step that was kept, against what it replaced: by turns, in one run.

    python benchmarks/kept.py --imgsz 320 --batch 8 --rounds 5 --json out.json

Each pair computes the same numbers, up to rounding, which is checked first; a ratio is of a round's two times, before
over after. What was tried and dropped stands there too, where it can still be written in a line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from step import Step
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import roi_align, sigmoid_focal_loss
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.detectors.frozen_norm import freeze_norms
from gid_yolo.distill.gism import compare, gi_scores
from gid_yolo.distill.response import mean_of_all, mean_of_masked
from gid_yolo.ops.losses import focal_loss
from gid_yolo.ops.roi_pool import roi_crops
from gid_yolo.ops.structures import probabilities

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Change:
    """Two ways to the same number.

    Attributes:
        name: What was changed.
        before: As it was.
        after: As it is.
        kept: False of what was tried and dropped; `after` is then what was tried.
    """

    name: str
    before: Run
    after: Run
    kept: bool = True


def backward(loss: Tensor, *leaves: Tensor) -> Tensor:
    """The loss, after its gradients with respect to the leaves were computed."""
    torch.autograd.grad(loss, leaves)
    return loss.detach()


def crops(batch: int, size: int) -> Change:
    """RoIAlign of ten instances an image, forth and back."""
    feature = torch.randn(batch, 256, size // 8, size // 8).to(memory_format=torch.channels_last).requires_grad_()
    corner = torch.rand(batch * 10, 2) * size / 2
    boxes = torch.cat([corner, corner + torch.rand(batch * 10, 2) * size / 2], 1)
    rois = torch.cat([torch.arange(batch).repeat_interleave(10)[:, None].float(), boxes], 1)
    before = lambda: backward(roi_align(feature, rois, 10, 1 / 8, 2, True).square().sum(), feature)  # noqa: E731
    after = lambda: backward(  # noqa: E731
        roi_crops(feature, rois, 10, stride=8, samples=2, aligned=True).square().sum(), feature
    )
    return Change("crops as sums of cells", before, after)


def focal(batch: int, size: int) -> Change:
    """The focal loss of RetinaNet's anchors, 80 classes, forth and back."""
    places = batch * 9 * sum((size // s) ** 2 for s in (8, 16, 32, 64, 128))
    logits = (torch.randn(places, 80) - 4).requires_grad_()
    labels, positive = torch.randint(80, (places,)), torch.rand(places) < 0.01

    def before() -> Tensor:
        target = F.one_hot(labels, 80).float() * positive[:, None]
        return backward(sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0, reduction="sum"), logits)

    after = lambda: backward(focal_loss(logits, labels, positive, alpha=0.25, gamma=2.0).sum(), logits)  # noqa: E731
    return Change("focal loss without one-hot targets", before, after)


def norms(batch: int, size: int) -> Change:
    """A ResNet-50 with frozen batch norms, forth and back."""
    body = timm.create_model("resnet50", features_only=True, pretrained=False)
    bodies = [freeze(deepcopy(body)).to(memory_format=torch.channels_last) for freeze in (_separate, freeze_norms)]
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)

    def run(network: nn.Module) -> Tensor:
        loss = network(images)[-1].square().mean()
        return backward(loss, *[p for p in network.parameters() if p.requires_grad])

    return Change("frozen norms inside convolutions", lambda: run(bodies[0]), lambda: run(bodies[1]))


def _separate(body: nn.Module) -> nn.Module:
    return freeze_batch_norm_2d(body)


def distilled(batch: int, size: int) -> list[Change]:
    """Parts of a distilled step of retina_mbv2 under retina_r50."""
    step = Step("retina_mbv2", "retina_r50", classes=80, batch=batch, size=size, device="cpu", amp=None)
    images = step.batch["img"]
    with torch.no_grad():
        teacher, student = step.model.taught(images)[1], step.student.raw(images)[1]
    functions = step.model.views[1].functions
    corner = torch.rand(batch, 10, 2) * size / 2
    boxes = torch.cat([corner, corner + size / 8 + torch.rand(batch, 10, 2) * size / 8], 2)
    mask = functions.response_mask(student.priors, boxes, torch.ones(batch, 10, dtype=torch.bool))
    losses = lambda t, s: 0.1 * functions.response_cls_loss(t, s) + functions.response_reg_loss(t, s)  # noqa: E731

    def responses(mean: Any) -> Tensor:
        logits, deltas = student.logits.requires_grad_(), student.regression.requires_grad_()
        return backward(mean(losses, teacher, student, mask), logits, deltas)

    @torch.no_grad()
    def own_pass(network: Any) -> Tensor:
        features, raw = network.raw(images)
        return raw.logits.mean() + features[0].mean()

    @torch.no_grad()
    def whole_scores() -> Tensor:
        t, s = teacher.scores, student.detach().scores
        return gi_scores(t, s).sum() + (t.amax(-1) > s.amax(-1)).sum()

    @torch.no_grad()
    def scores_in_parts() -> Tensor:
        difference, wins = compare(teacher.logits, student.logits.detach(), probabilities)
        return difference.sum() + wins.sum()

    @torch.no_grad()
    def extremes() -> Tensor:
        low, high = torch.aminmax(teacher.scores - student.detach().scores, dim=-1)
        wins = teacher.scores.amax(-1) > student.detach().scores.amax(-1)
        return torch.maximum(-low, high).sum() + wins.sum()

    frozen = step.model.views[0]
    crops_of = torch.randn(batch, 10, 25600)
    return [
        Change("teacher's pass, norms folded, channels_last", lambda: own_pass(step.teacher), lambda: own_pass(frozen)),
        Change("scores read in parts", whole_scores, scores_in_parts),
        Change("responses at masked outputs alone", lambda: responses(mean_of_all), lambda: responses(mean_of_masked)),
        Change("equation 1 by aminmax", whole_scores, extremes, kept=False),
        Change(
            "distances as a float64 product",
            lambda: torch.cdist(crops_of, crops_of, compute_mode="donot_use_mm_for_euclid_dist").sum(),
            lambda: _product(crops_of.double()).sum(),
            kept=False,
        ),
    ]


def _product(x: Tensor) -> Tensor:
    size = x.square().sum(-1)
    squared = torch.baddbmm(size[:, :, None] + size[:, None, :], x, x.transpose(1, 2), alpha=-2)
    return squared.clamp(min=0).sqrt()


def measure(change: Change, rounds: int, steps: int) -> list[tuple[float, float]]:
    """Seconds before and after, one pair a round.

    Raises:
        SystemExit: The two compute different numbers.
    """
    values = [float(run()) for run in (change.before, change.after)]  # the first is slower
    if not torch.allclose(*(torch.tensor(x, dtype=torch.float64) for x in values), rtol=1e-3):
        raise SystemExit(f"{change.name}: {values[0]} before, {values[1]} after.")
    found = []
    for number in range(rounds):
        times = {}
        for name in random.Random(number).sample(("before", "after"), 2):
            began = time.perf_counter()
            for _ in range(steps):
                getattr(change, name)()
            times[name] = (time.perf_counter() - began) / steps
        found.append((times["before"], times["after"]))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each in a round")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    torch.manual_seed(0)
    size = options.batch, options.imgsz
    contents: dict[str, Any] = {}
    print(f"{options.batch} x {options.imgsz} px, {get_cpu_info()}, {torch.get_num_threads()} threads; before / after")
    for change in (crops(*size), focal(*size), norms(*size), *distilled(*size)):
        pairs = measure(change, options.rounds, options.steps)
        ratios = [before / after for before, after in pairs]
        before, after = (1000 * median(times) for times in zip(*pairs, strict=True))
        values = f"{min(ratios):7.2f} {median(ratios):7.2f} {max(ratios):7.2f}"
        print(
            f"  {'kept   ' if change.kept else 'dropped'} {change.name:<44} {values}  {before:7.1f} to {after:.1f} ms"
        )
        found = {"min": min(ratios), "median": median(ratios), "max": max(ratios)}
        contents[change.name] = {"before_over_after": found, "kept": change.kept, "seconds": pairs}
    if options.json:
        settings = {**vars(options), "json": None, "machine": get_cpu_info(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**contents, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
