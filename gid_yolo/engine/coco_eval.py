"""The paper's ten columns from pycocotools, for any data set."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

COLUMNS = ("mAP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "mAR", "AR_S", "AR_M", "AR_L")
# Where COCOeval.summarize() puts them in its `stats`; mAR is AR at 100 detections an image
_STATS = dict(zip(COLUMNS, (0, 1, 2, 3, 4, 5, 8, 9, 10, 11), strict=True))


@dataclass
class CocoAccumulator:
    """Collects ground truth and detections image by image, then evaluates them.

    Areas of objects are those of their boxes (labels carry no masks), in pixels of the original image; small, medium
    and large are COCO's, divided at 32 x 32 and 96 x 96 px.
    """

    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    detections: list[dict] = field(default_factory=list)

    def add(
        self,
        true_boxes: np.ndarray,
        true_classes: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        classes: np.ndarray,
    ) -> None:
        """Add one image.

        Args:
            true_boxes: (M, 4) xyxy in pixels of the original image.
            true_classes: (M,).
            boxes: (N, 4) likewise, of the detections.
            scores: (N,).
            classes: (N,).
        """
        image = len(self.images) + 1
        self.images.append({"id": image})
        for box, label in zip(_xyxy_to_ltwh(true_boxes), true_classes, strict=True):
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
        for box, score, label in zip(_xyxy_to_ltwh(boxes), scores, classes, strict=True):
            self.detections.append(
                {"image_id": image, "category_id": int(label), "bbox": box.tolist(), "score": float(score)}
            )

    @classmethod
    def merged(cls, parts: Sequence[CocoAccumulator]) -> CocoAccumulator:
        """All images of several accumulators, numbered anew."""
        whole = cls()
        for part in parts:
            first = len(whole.images)
            whole.images += [{"id": first + row["id"]} for row in part.images]
            for row in part.annotations:
                number = len(whole.annotations) + 1
                whole.annotations.append({**row, "id": number, "image_id": first + row["image_id"]})
            whole.detections += [{**row, "image_id": first + row["image_id"]} for row in part.detections]
        return whole

    def columns(self, num_classes: int) -> dict[str, float]:
        """The ten columns in percent; -1 for a size range without objects, as in pycocotools."""
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": str(i)} for i in range(num_classes)],
        }
        if not self.annotations:
            return dict.fromkeys(COLUMNS, -1.0)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
            truth.createIndex()
            found = truth.loadRes(self.detections) if self.detections else COCO()
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {name: _percent(evaluation.stats[i]) for name, i in _STATS.items()}


def _percent(value: float) -> float:
    return round(100 * float(value), 4) if value >= 0 else -1.0


def _xyxy_to_ltwh(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def format_row(columns: dict[str, float], name: str = "") -> str:
    """The ten columns as a head line and a row."""
    head = " ".join(f"{column:>6}" for column in COLUMNS)
    row = " ".join(f"{columns[column]:6.1f}" if columns[column] >= 0 else "     -" for column in COLUMNS)
    width = max(len(name), 8)
    return f"{'':{width}} {head}\n{name:{width}} {row}"
