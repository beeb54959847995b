"""The time of choosing general instances: against NMS over all predictions, and as these and the classes grow.

    python benchmarks/gism.py --imgsz 1024 --classes 80 --batch 8 --rounds 5 --json out.json

- gism: sigmoid of the logits of teacher and student, and equations 1 to 3.
- nms: the same by `torchvision.ops.nms` over all boxes of an image, one image after the other, and the first K.

The boxes are RetinaNet's anchors, moved at random: how many overlap decides the time of NMS. Both choose the same
instances, which is checked. Each round has every one of them once; ratios are of a round's times.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.detectors import build_detector, model_config
from gid_yolo.distill.gism import compare, general_instances, gi_boxes, gi_scores, select_general_instances
from gid_yolo.ops.structures import RawPredictions

K, IOU = 10, 0.3


def anchors_of(size: int, device: str) -> Tensor:
    """(R, 4) of an image of this height and width."""
    detector = build_detector(model_config("retina_nano"), 1)
    with torch.no_grad():
        return detector.eval().raw(torch.zeros(1, 3, size, size))[1].priors.to(device)


def predictions(anchors: Tensor, batch: int, classes: int) -> tuple[Tensor, ...]:
    """Logits of two models (B, R, C), and boxes (B, R, 4)."""
    shape = (batch, len(anchors))
    side = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)  # (R, 4)
    boxes = [anchors + 0.1 * side * torch.randn(*shape, 4, device=anchors.device) for _ in range(2)]
    logits = [torch.randn(*shape, classes, device=anchors.device) - 4 for _ in range(2)]
    return (*logits, *boxes)


def by_gism(teacher: Tensor, student: Tensor, *boxes: Tensor) -> Tensor:
    """(B, K) index, as a training finds them."""
    raws = (raw_of(logits, x) for logits, x in zip((teacher, student), boxes, strict=True))
    return general_instances(*raws, top_k=K, iou_threshold=IOU).indices


def raw_of(logits: Tensor, boxes: Tensor) -> RawPredictions:
    """Predictions that need no decoding."""
    return RawPredictions(logits, boxes, boxes[0], lambda regression, _: regression)


def by_nms(teacher: Tensor, student: Tensor, *boxes: Tensor) -> Tensor:
    """(B, K) index."""
    scores = teacher.sigmoid(), student.sigmoid()
    chosen, differences = gi_boxes(*scores, *boxes), gi_scores(*scores)
    return torch.stack([nms(b, s, IOU)[:K] for b, s in zip(chosen, differences, strict=True)])


def seconds(run: Callable[..., Any], given: tuple[Tensor, ...]) -> float:
    """Of a call."""
    wait = torch.cuda.synchronize if given[0].is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    run(*given)
    wait()
    return time.perf_counter() - began


def read(teacher: Tensor, student: Tensor, *boxes: Tensor) -> tuple[Tensor, Tensor]:
    """All that looks at the scores of classes, equations 1 and 2."""
    return compare(teacher, student)


def choose(teacher: Tensor, student: Tensor, *boxes: Tensor) -> Any:
    """Equations 1 to 3."""
    return select_general_instances(teacher, student, *boxes, top_k=K, iou_threshold=IOU)


def growth(anchors: Tensor, sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of one image by predictions R and classes C: of reading the scores, and of all that follows."""
    rows = []
    for count, classes in sizes:
        teacher, student, *boxes = predictions(anchors[torch.randperm(len(anchors))[:count]], 1, classes)
        given = teacher.sigmoid(), student.sigmoid(), *boxes
        choose(*given)
        times = [(seconds(read, given), seconds(choose, given)) for _ in range(rounds)]
        reading, whole = (1000 * median(x) for x in zip(*times, strict=True))
        rows.append({"R": count, "C": classes, "read_ms": reading, "rest_ms": whole - reading})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=1024, help="1024 px have 196,416 anchors")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    torch.manual_seed(0)
    anchors = anchors_of(options.imgsz, options.device)
    given = predictions(anchors, options.batch, options.classes)
    if not torch.equal(by_gism(*given), by_nms(*given)):
        raise SystemExit("GISM and NMS choose different instances.")
    rounds = [(seconds(by_gism, given), seconds(by_nms, given)) for _ in range(options.rounds)]
    ratios = [slow / fast for fast, slow in rounds]
    found = {"min": min(ratios), "median": median(ratios), "max": max(ratios)}
    machine = get_cpu_info() if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"R = {len(anchors)}, C = {options.classes}, batch {options.batch}, {machine}")
    for name, times in zip(("gism", "nms"), zip(*rounds, strict=True), strict=True):
        print(f"  {name:<12} {1000 * min(times):9.1f} {1000 * median(times):9.1f} {1000 * max(times):9.1f} ms")
    print(f"  {'nms / gism':<12} {found['min']:9.2f} {found['median']:9.2f} {found['max']:9.2f}")
    half = len(anchors) // 2
    sizes = [(half // 4, 80), (half // 2, 80), (half, 80), (2 * half, 80), (half, 1), (half, 20), (half, 320)]
    rows = growth(anchors, sizes, options.rounds)
    print("       R    C   read ms   rest ms")
    for row in rows:
        print(f"{row['R']:8} {row['C']:4} {row['read_ms']:9.1f} {row['rest_ms']:9.1f}")
    if options.json:
        settings = {**vars(options), "json": None, "machine": machine, "threads": torch.get_num_threads()}
        contents = {"nms_over_gism": found, "seconds": rounds, "growth": rows, "settings": settings}
        options.json.write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
