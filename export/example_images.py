"""What the files of a benchmark find on some images of the split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gid_yolo.export.contenders import Contender
from gid_yolo.export.evaluate import spread
from gid_yolo.export.preprocess import read_image
from gid_yolo.export.rows import Detections, Example
from gid_yolo.export.session import OnnxDetector

EXAMPLES = 4
EXAMPLE_CONF = 0.05  # the page shows detections from 0.1 on


def make_examples(cells: Sequence[Contender], dataset: Any, names: dict[int, str]) -> tuple[Example, ...]:
    """Some images of the split with their objects and with what each model's file finds on them.

    Args:
        cells: One of each model, of one size.
        dataset: Ultralytics' data set of the split.
        names: Of the classes.
    """
    detectors = {
        cell.label: OnnxDetector(
            cell.onnx,
            provider="cpu",
            conf=EXAMPLE_CONF,
            iou=cell.limits["iou"],
            max_det=cell.limits["max_det"],
            imgsz=cell.size,
            batch=cell.batch,
            rect=False,
        )
        for cell in cells
    }
    examples = []
    for i in spread(len(dataset), EXAMPLES):
        image, label = read_image(dataset.im_files[i]), dataset.labels[i]
        height, width = image.shape[:2]
        centre, half = label["bboxes"][:, :2], label["bboxes"][:, 2:] / 2
        boxes = np.concatenate([centre - half, centre + half], axis=1) * [width, height, width, height]
        found = {}
        for name, detector in detectors.items():
            (seen,) = detector(image)
            found[name] = Detections(seen.boxes, seen.scores, seen.classes)
        examples.append(
            Example(
                name=Path(dataset.im_files[i]).name,
                image=np.ascontiguousarray(image[..., ::-1]),
                true_boxes=boxes.reshape(-1, 4),
                true_classes=label["cls"].reshape(-1).astype(np.int64),
                detections=found,
                names=names,
            )
        )
    return tuple(examples)
