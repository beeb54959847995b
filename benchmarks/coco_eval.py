"""How long a validation waits for the ten columns: ours, beside the inference, and pycocotools and its peer after it.

    pip install faster-coco-eval
    python benchmarks/coco_eval.py --images 5000 --detections 100 --classes 80 --rate 100 500 --json out.json

- ours: `CocoAccumulator`, which has pycocotools evaluate in a process of its own while images come at `--rate` a second
  (an inference that is slept through, and so leaves a core free): `waited` is how much longer than the inference it all
  takes, `beside` the CPU time of that process, which an inference on all cores would have to share.
- pycocotools, faster-coco-eval: from arrays of all images to the ten numbers, once the inference is done. Both are
  given dicts of the detections, for they know no other way; `evaluation` is their time without that.

All begin with arrays of one image after the other, as a validation has them, and must come to the same ten numbers, to
four digits of a percentage. Objects and detections are drawn: 7.3 objects an image as in val2017, of at most three
classes; half of the detections lie near an object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.engine.coco_eval import COLUMNS, CocoAccumulator

try:
    import faster_coco_eval as peer
except ImportError:
    raise SystemExit("faster-coco-eval is not installed: pip install faster-coco-eval.") from None

OBJECTS = 7.3  # of an image: 36,781 of 5,000 in val2017
STATS = (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)  # where `summarize` puts the ten columns
WIDTH, HEIGHT = 640, 480

Image = tuple[np.ndarray, ...]  # as `CocoAccumulator.add` takes it


def draw_images(images: int, detections: int, classes: int) -> Iterator[Image]:
    """Objects, and as many detections an image, which are near them or anywhere."""
    rng = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        size = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
        corner = rng.uniform(0, 1, (count, 2)) * np.maximum(1, np.array([WIDTH, HEIGHT]) - size)
        return np.concatenate([corner, corner + size], axis=1)

    for _ in range(images):
        truth = boxes(rng.geometric(1 / (OBJECTS + 1)) - 1)
        labels = rng.integers(classes, size=3)[rng.integers(3, size=len(truth))]
        found, found_labels = boxes(detections), rng.integers(classes, size=detections)
        near = rng.random(detections) < 0.5 if len(truth) else np.zeros(detections, bool)
        of = rng.integers(max(1, len(truth)), size=near.sum())
        side = np.tile(truth[of, 2:] - truth[of, :2], 2)
        found[near] = truth[of] + 0.1 * side * rng.normal(size=side.shape)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found_labels[near] = labels[of]
        scores = rng.beta(0.5, 3, detections) + 0.1 * near
        yield truth, labels, found.astype(np.float32), scores.astype(np.float32), found_labels


def by_ours(images: list[Image], classes: int, rate: float) -> tuple[list[float], dict[str, float]]:
    """The ten columns, and seconds that are spent on them in the process of the inference, and in all."""
    accumulator, spent, before = CocoAccumulator(classes, beside=True), 0.0, children()
    began = time.perf_counter()
    for number, image in enumerate(images, 1):
        time.sleep(max(0.0, number / rate - (time.perf_counter() - began)))
        start = time.perf_counter()
        accumulator.add(*image)
        spent += time.perf_counter() - start
    columns = accumulator.columns()
    waited = time.perf_counter() - began - len(images) / rate
    return [columns[name] for name in COLUMNS], {"adding": spent, "waited": waited, "beside": children() - before}


def children() -> float:
    """CPU seconds of the processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_dicts(data: Any, evaluator: Any, images: list[Image], classes: int) -> tuple[list[float], dict[str, float]]:
    """The same by the two classes of a library with pycocotools' interface."""
    began = time.perf_counter()
    numbers, objects, detections = [], [], []
    for i, (truth, labels, found, scores, found_labels) in enumerate(images, 1):
        numbers.append({"id": i})
        for box, label in zip(ltwh(truth), labels.tolist(), strict=True):
            row = {"id": len(objects) + 1, "image_id": i, "category_id": label, "bbox": box, "iscrowd": 0}
            objects.append({**row, "area": box[2] * box[3]})
        for box, score, label in zip(ltwh(found), scores.tolist(), found_labels.tolist(), strict=True):
            detections.append({"image_id": i, "category_id": label, "bbox": box, "score": score})
    categories = [{"id": c, "name": str(c)} for c in range(classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = data()
        truth.dataset = {"info": {}, "images": numbers, "annotations": objects, "categories": categories}
        truth.createIndex()
        made = truth.loadRes(detections)
        built = time.perf_counter()
        evaluation = evaluator(truth, made, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [round(100 * float(evaluation.stats[i]), 4) for i in STATS]
    return stats, {"build": built - began, "evaluation": time.perf_counter() - built}


def ltwh(boxes: np.ndarray) -> list[list[float]]:
    """Left, top, width and height of (N, 4) xyxy boxes."""
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rate", type=float, nargs="+", default=[100.0, 500.0], help="images predicted a second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    images = list(draw_images(options.images, options.detections, options.classes))
    objects, machine = sum(len(image[0]) for image in images), get_cpu_info()
    print(f"{options.images} images, {objects} objects, {options.detections} detections an image, {machine}")
    runs = {
        **{f"ours, {rate:g}/s": partial(by_ours, rate=rate) for rate in options.rate},
        "pycocotools": partial(by_dicts, COCO, COCOeval),
        "faster-coco-eval": partial(by_dicts, peer.COCO, peer.COCOeval_faster),
    }
    columns: dict[str, list[float]] = {}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            columns[name], times = run(images, options.classes)
            seconds[name].append(times)
    for name, values in columns.items():
        print(f"  {name:<20}" + "".join(f"{value:9.4f}" for value in values))
    first = next(iter(columns.values()))
    if not all(np.allclose(values, first, rtol=0, atol=1.01e-4) for values in columns.values()):
        raise SystemExit("The ten columns differ.")
    found = {
        name: {part: spread([times[part] for times in rounds]) for part in rounds[0]}
        for name, rounds in seconds.items()
    }
    for name, parts in found.items():
        for part, values in parts.items():
            print(f"  {name:<20} {part:<12} {values['min']:8.2f} {values['median']:8.2f} {values['max']:8.2f} s")
    if options.json:
        packages = {name: version(name) for name in ("faster-coco-eval", "pycocotools", "numpy")}
        settings = {**vars(options), "json": None, "machine": machine, **packages}
        contents = {"seconds": found, "columns": columns, "settings": settings}
        options.json.write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
