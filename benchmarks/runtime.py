"""The runtime against stock `yolo predict`: what they find, and how long each part takes on one CPU thread.

Prints Markdown tables; `difference` is the largest over all images, and the images are read beforehand:

    python benchmarks/runtime.py --images val/*.jpg --files student.onnx [--conf 0.25 0.05]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.data.augment import LetterBox
from ultralytics.utils import LOGGER, ops
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.export.preprocess import read_image
from gid_yolo.export.session import OnnxDetector
from gid_yolo.export.timing import interleave

IMPORTS = {"gid_yolo.export.session": "import gid_yolo.export.session", "ultralytics": "from ultralytics import YOLO"}


def differences(path: Path, images: list[np.ndarray], conf: float) -> tuple[OnnxDetector, list[str]]:
    detector = OnnxDetector(path, provider="cpu", threads=1, conf=conf)
    model = YOLO(path, task="detect")
    count, other, boxes, scores = 0, 0, 0.0, 0.0
    for image, ours in zip(images, detector(images), strict=True):
        theirs = model.predict(image, conf=conf, iou=detector.iou, imgsz=list(detector.size), verbose=False)[0]
        rows = theirs.boxes.data.numpy()
        count += len(rows)
        if len(rows) != len(ours) or (rows[:, 5] != ours.classes).any():
            other += 1
        elif len(rows):
            boxes = max(boxes, float(np.abs(rows[:, :4] - ours.boxes).max()))
            scores = max(scores, float(np.abs(rows[:, 4] - ours.scores).max()))
    return detector, [path.name, f"{conf:g}", str(count), str(other), f"{boxes:.2g} px", f"{scores:.2g}"]


def times(detector: OnnxDetector, images: list[np.ndarray], runs: int) -> list[str]:
    """Medians in ms: ours and Ultralytics' preparation, the network, ours and Ultralytics' last part."""
    ready = [detector.prepare([image]) for image in images]
    outputs = {id(x): detector.run(x) for x in ready}
    shapes = {id(x): image.shape for x, image in zip(ready, images, strict=True)}

    def theirs_first(image: np.ndarray) -> Any:
        boxed = LetterBox(detector.size, auto=not detector.info.fixed_size, stride=detector.info.stride)(image=image)
        return torch.from_numpy(boxed)[None].permute(0, 3, 1, 2).contiguous().flip(1).float().div_(255)

    def theirs_last(x: np.ndarray) -> Any:
        output, final = torch.from_numpy(outputs[id(x)].copy()), detector.info.final
        rows = non_max_suppression(output, detector.conf, detector.iou, max_det=300, end2end=final)[0]
        rows[:, :4] = ops.scale_boxes(x.shape[2:], rows[:, :4], shapes[id(x)])
        return rows

    def median(calls: dict[str, Callable], inputs: list[np.ndarray]) -> list[str]:
        found = interleave(calls, inputs, warmup=3, runs=runs, rounds=5)
        return [f"{np.median(values):.2f}" for values in found.values()]

    first = median({"ours": lambda image: detector.prepare([image]), "theirs": theirs_first}, images)
    network = median({"run": detector.run}, ready)
    ours = {"ours": lambda x: detector.finish(outputs[id(x)], x.shape[2:], [shapes[id(x)]]), "theirs": theirs_last}
    return [*first, *network, *median(ours, ready)]


def seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return float(np.median([float(run.stdout.split()[-1]) for run in done]))


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", type=Path, required=True)
    parser.add_argument("--images", nargs="+", type=Path, required=True)
    parser.add_argument("--conf", nargs="+", type=float, default=[0.25, 0.05])
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    torch.set_num_threads(1)
    images = [read_image(path) for path in options.images]
    equal, timed = [], []
    for path in options.files:
        for conf in options.conf:
            start = time.perf_counter()
            detector, row = differences(path, images, conf)
            equal.append(row)
            timed.append([path.name, f"{conf:g}", *times(detector, images, options.runs)])
            print(f"{path.name} conf={conf:g}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(f"{len(images)} images, {get_cpu_info()}, 1 thread\n")
    table(["file", "conf", "detections", "images that differ", "boxes", "scores"], equal)
    table(["file", "conf", "prepare", "Ultralytics'", "run", "finish", "Ultralytics'"], timed)
    table(["import", "s"], [[name, f"{seconds(statement):.2f}"] for name, statement in IMPORTS.items()])


if __name__ == "__main__":
    main()
