"""Rows and examples for the tests of the report."""

from typing import Any

import numpy as np

from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.export.rows import Detections, Example, Row

CUDA = "CUDAExecutionProvider"
LABELS = {"model": "distilled", "baseline": "plain", "teacher": "teacher"}


def make_row(role: str, ap: float = 30.0, p50: float = 10.0, failed: str | None = None, **others: Any) -> Row:
    fixed: dict[str, Any] = {"role": role, "label": LABELS.get(role, role), "name": "retina_nano"}
    fixed |= {"backbone": "mobilenetv2_035", "parameters": 0.62, "gflops": 1.23, "file_size": 2.94}
    fixed |= {"height": 256, "width": 320}
    if failed:
        return Row(**{**fixed, "box_difference": 3.0, "score_difference": 0.0, "failed": failed, **others})
    fixed |= {"p50": p50, "p95": p50 * 1.1, "p99": p50 * 1.2, "images_per_second": 1e3 / p50}
    fixed |= {"box_difference": 0.001, "score_difference": 1e-6, "ap_difference": 0.0}
    return Row(**{**fixed, "columns": {**dict.fromkeys(COLUMNS, ap), "AP_S": -1.0}, **others})


def make_matrix() -> tuple[Row, ...]:
    """Three models in three precisions and two sizes; one failed."""
    rows = []
    for role, ap, p50 in (("model", 40.0, 10.0), ("baseline", 30.0, 10.1), ("teacher", 50.0, 40.0)):
        for size, (height, width) in enumerate(((256, 320), (320, 416))):
            for precision, lost, speed in (("fp32", None, 1.0), ("fp16", -0.0, 0.9), ("int8", 0.5, 2.0)):
                bad = role == "baseline" and precision == "int8" and size == 1
                times = {"preprocess": 1.0, "postprocess": 0.5, "memory": 80.0 + p50}
                rows.append(
                    make_row(
                        role,
                        ap + 2 * size - (lost or 0),
                        (1 + size) * p50 / speed,
                        "mAP fell by 6.0 (limit 2.0)" if bad else None,
                        precision=precision,
                        height=height,
                        width=width,
                        ap_drop=lost,
                        **({} if bad else times),
                    )
                )
    return tuple(rows)


def make_example(name: str = "a.jpg", names: dict[int, str] | None = None) -> Example:
    """Two objects; `distilled` finds both, `plain` one and a false one, `teacher` nothing."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (300, 600, 3), dtype=np.uint8)
    true_boxes = np.array([[10.0, 10, 110, 110], [300, 100, 400, 250]])
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    found = {
        "distilled": Detections(true_boxes + 2, np.array([0.9, 0.5]), np.array([0, 1])),
        "plain": Detections(np.vstack([true_boxes[1], [500, 0, 560, 60]]), np.array([0.4, 0.35]), np.array([1, 0])),
        "teacher": none,
    }
    return Example(name, image, true_boxes, np.array([0, 1]), found, names or {0: "cat", 1: "dog"})
