"""A network's output into boxes: Ultralytics' limits, class-wise NMS and scaling, in numpy, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Ultralytics' constants: candidates of an image at most, and how far classes are moved apart for one NMS over all.
# The shift rounds coordinates, which can decide a pair at the threshold: another way would differ from `yolo predict`.
MAX_CANDIDATES = 30_000
CLASS_OFFSET = 7680  # pixels
_BLOCK = 64  # boxes that the NMS decides at once: their comparison with the kept ones stays in the cache


def from_dense(output: np.ndarray, *, conf: float, iou: float, max_det: int) -> np.ndarray:
    """Detections of a dense output: the best class of each box, above `conf`, then NMS within the classes.

    Args:
        output: (4 + C, R), xywh in pixels and class scores.
        conf: Score over which a box is a detection.
        iou: Overlap over which the lower box of a class is dropped.
        max_det: Detections at most, the best.

    Returns:
        (N, 6) float32 by falling score: xyxy in pixels, score, class.

    Raises:
        FloatingPointError: A score is NaN, or a box over `conf` is not finite.
    """
    best = output[4:].max(0)  # (R,), NaN where one is
    kept = np.flatnonzero(best > conf)
    rows = output.T[kept].astype(np.float32, copy=False)  # (N, 4 + C)
    _check_finite(best, rows)
    classes = rows[:, 4:].argmax(1)
    scores = rows[np.arange(len(rows)), 4 + classes]
    if len(rows) > MAX_CANDIDATES:
        best = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
        rows, classes, scores = rows[best], classes[best], scores[best]
    half = rows[:, 2:4] / 2
    boxes = np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1)
    offset = (classes * CLASS_OFFSET).astype(np.float32)[:, None]
    best = nms(boxes + offset, scores, iou, max_det)
    return np.concatenate([boxes[best], scores[best, None], classes[best, None].astype(np.float32)], axis=1)


def from_final(output: np.ndarray, *, conf: float, max_det: int) -> np.ndarray:
    """Detections of an output whose NMS is done.

    Args:
        output: (N, 6), xyxy in pixels, score, class; filled up with score 0.
        conf: Score over which a box is a detection.
        max_det: Detections at most, the first.

    Returns:
        (M, 6) float32 by falling score.

    Raises:
        FloatingPointError: A score is NaN, or a detection is not finite.
    """
    rows = output[output[:, 4] > conf][:max_det].astype(np.float32)
    _check_finite(output[:, 4], rows)
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def _check_finite(scores: np.ndarray, rows: np.ndarray) -> None:
    """Raise an error if any score is NaN, which no comparison would find, or a value of the kept rows is not finite."""
    if np.isnan(scores).any() or not np.isfinite(rows).all():
        raise FloatingPointError("values that are not finite")


def nms(boxes: np.ndarray, scores: np.ndarray, iou: float, most: int | None = None) -> np.ndarray:
    """Greedy non-maximum suppression, equal to torchvision's.

    Args:
        boxes: (N, 4) float32 xyxy.
        scores: (N,).
        iou: Overlap over which the lower box is dropped.
        most: Stop when so many are kept.

    Returns:
        Indices of the kept boxes by falling score; of equal scores the lower index is first.
    """
    order = np.argsort(-scores, kind="stable")
    sides = boxes[order].T  # (4, N)
    kept = np.empty(0, dtype=np.int64)
    for first in range(0, len(order), _BLOCK):
        block = sides[:, first : first + _BLOCK]
        free = np.flatnonzero(~_overlap(sides[:, kept], block, iou).any(0)) + first
        apart = ~_overlap(sides[:, free], sides[:, free], iou)
        alive, chosen = np.ones(len(free), dtype=bool), []
        for i in range(len(free)):
            if alive[i]:
                chosen.append(i)
                alive &= apart[i]
        kept = np.concatenate([kept, free[chosen]])
        if most is not None and len(kept) >= most:
            break
    return order[kept[:most]]


def _overlap(first: np.ndarray, second: np.ndarray, iou: float) -> np.ndarray:
    """(K, N) whether the IoU of boxes (4, K) and (4, N) is over a threshold."""
    sides = np.minimum(first[2:, :, None], second[2:, None])  # (2, K, N)
    sides -= np.maximum(first[:2, :, None], second[:2, None])
    np.maximum(sides, 0, out=sides)
    shared = sides[0] * sides[1]
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first, second)]
    with np.errstate(invalid="ignore"):  # 0 / 0 of two empty boxes is no overlap
        shared /= areas[0][:, None] + areas[1] - shared
    return shared > np.float64(iou)  # torchvision compares in fp64


def scale_boxes(boxes: np.ndarray, letterbox: Sequence[int], image: Sequence[int]) -> np.ndarray:
    """Boxes of a letterboxed image in pixels of the image itself, clipped to it.

    Args:
        boxes: (N, 4) float32 xyxy.
        letterbox: Height and width of the network's input.
        image: Height and width of the image.

    Returns:
        (N, 4) float32 xyxy.
    """
    gain = min(letterbox[0] / image[0], letterbox[1] / image[1])
    inner = [max(round(side * gain), 1) for side in image[:2]]
    top, left = (round((outer - side) / 2 - 0.1) for outer, side in zip(letterbox, inner, strict=True))
    x, y = inner[1] / image[1], inner[0] / image[0]  # each side was rounded for itself
    scaled = (boxes - np.array([left, top] * 2, np.float32)) / np.array([x, y] * 2, np.float32)
    return scaled.clip(0, np.array([image[1], image[0]] * 2, np.float32))
