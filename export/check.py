"""A file that was just written against the network that it was written from, before anybody gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.engine.detection_model import limited
from gid_yolo.engine.exporter import WithNMS
from gid_yolo.errors import UserError
from gid_yolo.export.session import open_session, run

# What PyTorch and onnxruntime may differ by in fp32, in pixels and probability: far under what an NMS could notice
BOX_LIMIT, SCORE_LIMIT = 0.05, 1e-3
# Likewise on noise, which no network was trained for and which an ill-conditioned one makes more of
NOISE_BOX_LIMIT, NOISE_SCORE_LIMIT = 0.5, 0.01
# Where rounding decides a tie, the second stage of Faster R-CNN may get another proposal here than there: that does not
# change so large a share of so many detections
TIES, ENOUGH = 0.04, 100
_OVERLAP = 0.02  # of IoU at the threshold of an NMS
_CANDIDATES = 1000  # boxes over the lowered score, of which an NMS leaves enough


def check_file(
    path: Path, network: nn.Module, images: np.ndarray | None, lowered: Callable[[float], tuple[Path, nn.Module]]
) -> str:
    """Run a file beside the network, and say how far they are from each other.

    Args:
        path: The file.
        network: What was traced, in evaluation mode and fp32, on the CPU.
        images: (B, 3, H, W) in [0, 1] as the file takes them; noise where None.
        lowered: Writes the same file with a lower `conf`, for detections that are final where there are too few to
            compare, as on noise; gives it with its network.

    Returns:
        A clause for the log.

    Raises:
        UserError: They differ by more than rounding.
    """
    session, kind = open_session(path), "noise" if images is None else "images of data="
    images = noise_of(session) if images is None else images
    found, expected = run(session, images), network_output(network, images)
    if found.shape != expected.shape:
        raise _refusal(f"its output is {found.shape}, not {expected.shape}")
    if found.shape[-1] != 6:
        difference = np.abs(expected.astype(np.float64) - found)
        boxes, scores = float(difference[:, :4].max()), float(difference[:, 4:].max())
        if not (boxes <= NOISE_BOX_LIMIT and scores <= NOISE_SCORE_LIMIT):  # NaN fails too
            raise _refusal(
                f"boxes differ by up to {boxes:.3g} px (limit {NOISE_BOX_LIMIT}), scores by {scores:.3g} "
                f"(limit {NOISE_SCORE_LIMIT})"
            )
    else:
        if (expected[..., 4] > 0).sum() < ENOUGH:
            path, network = lowered(_low_score(network, images))
            found, expected = run(open_session(path), images), network_output(network, images)
        compared, wrong, boxes, scores = wrong_detections(found, expected, *_candidates(network, images))
        if wrong > TIES * max(compared, ENOUGH):
            raise _refusal(f"{wrong} of {compared} detections on {kind} are not those of PyTorch")
        if not compared:
            return f"; not compared with PyTorch: it detects nothing on {kind}"
    return f"; on {kind} within {boxes:.1g} px and {scores:.1g} of PyTorch"


def noise_of(session: Any) -> np.ndarray:
    """Noise in [0, 1] of the shape that a file takes."""
    declared, least = session.get_inputs()[0].shape, (2, 3, 64, 128)  # of axes that are dynamic; none is like another
    shape = [size if isinstance(size, int) else some for size, some in zip(declared, least, strict=True)]
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def network_output(network: Callable[[torch.Tensor], Any], images: np.ndarray) -> np.ndarray:
    """What a network in evaluation mode gives for (B, 3, H, W) images, with the NMS if it has one."""
    with torch.no_grad():
        found = network(torch.from_numpy(images))
    return (found if isinstance(found, torch.Tensor) else found[0]).numpy()


def wrong_detections(
    found: np.ndarray, expected: np.ndarray, candidates: Sequence[np.ndarray], iou: float, conf: float
) -> tuple[int, int, float, float]:
    """How many detections are wrong; where a tie makes two lists differ, both are right.

    A greedy NMS gives boxes that it was given, none that overlaps a better one too much, and leaves out only those that
    overlap a better one, are at the limit of scores, or have no room in a full list. This is asked of the file's list,
    with tolerances, and it holds whatever way rounding decides.

    Args:
        found: (B, N, 6), xyxy in pixels, score, class; score 0 is none.
        expected: Likewise, of PyTorch.
        candidates: What PyTorch's NMS was given, (M, 6) of each image.
        iou: Threshold of the NMS; 1 for none.
        conf: Score over which a box is a detection.

    Returns:
        How many detections were looked at; how many of `found` are no candidates or overlap a better one, and of
        `expected` are left out without a reason; and the largest differences of detections from their candidates, in
        pixels and probability.
    """
    compared, wrong, boxes, scores = 0, 0, 0.0, 0.0
    for one, other, given in zip(found.astype(np.float64), expected.astype(np.float64), candidates, strict=True):
        one, other = (rows[~(rows[:, 4] <= 0)] for rows in (one, other))  # NaN is looked at, and wrong
        one = one[np.argsort(-one[:, 4], kind="stable")]
        compared += len(one) + len(other)
        limit = NOISE_SCORE_LIMIT * np.max(given[:, 4], initial=0)  # where all scores are small, so is this
        full = len(one) == found.shape[1]
        for i, row in enumerate(one):
            distance, difference = _nearest(given, row, limit)
            better = one[:i][one[:i, 5] == row[5]]
            if not distance <= NOISE_BOX_LIMIT or (_overlaps(better, row) > iou + _OVERLAP).any():
                wrong += 1
            else:
                boxes, scores = max(boxes, distance), max(scores, difference)
        for row in other[~(other[:, 4] <= conf + limit)]:
            better = one[(one[:, 5] == row[5]) & (one[:, 4] >= row[4] - limit)]
            no_room = full and one[-1, 4] >= row[4] - limit
            if not (no_room or (_overlaps(better, row) >= iou - _OVERLAP).any()):
                wrong += not _nearest(one, row, limit)[0] <= NOISE_BOX_LIMIT
    return compared, wrong, boxes, scores


def _nearest(rows: np.ndarray, row: np.ndarray, limit: float) -> tuple[float, float]:
    """How far the boxes and scores are of a row and the nearest of its class whose score is within the limit."""
    difference = np.abs(rows[:, :5] - row[:5])
    like = (rows[:, 5] == row[5]) & (difference[:, 4] <= limit)
    if not like.any():
        return float("inf"), float("inf")
    distance = difference[like, :4].max(1)
    return float(distance.min()), float(difference[like, 4][distance.argmin()])


def _overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(N,) IoU of boxes (N, 4+) and one."""
    sides = np.minimum(boxes[:, 2:4], box[2:4]) - np.maximum(boxes[:, :2], box[:2])
    shared = sides.clip(0).prod(1)
    return shared / ((boxes[:, 2:4] - boxes[:, :2]).prod(1) + (box[2:4] - box[:2]).prod() - shared).clip(1e-9)


def _candidates(network: Any, images: np.ndarray) -> tuple[list[np.ndarray], float, float]:
    """Rows of each image that PyTorch's detections are chosen from, and `iou` and `conf` of the NMS that does it."""
    if isinstance(network, WithNMS):
        dense = network_output(network.dense, images)
        dense[:, :2], dense[:, 2:4] = dense[:, :2] - dense[:, 2:4] / 2, dense[:, :2] + dense[:, 2:4] / 2
        return _pairs(dense, network.conf * (1 - NOISE_SCORE_LIMIT)), network.iou, network.conf
    head = network.model[-1]
    if isinstance(head, FasterRCNN):  # two stages; what is at the end of its list in the file may come after it here
        with limited(network, max_det=2 * head.max_det):
            return list(network_output(network, images).astype(np.float64)), head.box_nms_iou, head.box_min_score
    head.postprocess = lambda rows: rows.transpose(1, 2)  # leave out the choice of a head that needs no NMS
    dense = network_output(network, images)
    del head.postprocess
    return _pairs(dense, 0.0), 1.0, 0.0


def _pairs(dense: np.ndarray, least: float) -> list[np.ndarray]:
    """A row for each box and class of a score over the least, of (B, 4 + C, R) xyxy and class scores."""
    found = []
    for one in dense.astype(np.float64):
        label, place = np.nonzero(one[4:] > least)
        found.append(np.concatenate([one[:4, place], [one[4 + label, place]], [label]]).T)
    return found


def _low_score(network: nn.Module, images: np.ndarray) -> float:
    """A score that leaves an NMS behind the network enough to do, and not all there is; 0 for a detector's own NMS."""
    if not isinstance(network, WithNMS):
        return 0.0
    scores = network_output(network.dense, images)[:, 4:].ravel()
    count = min(_CANDIDATES, len(scores))
    return min(network.conf, float(np.partition(scores, -count)[-count]))


def _refusal(why: str) -> UserError:
    return UserError(
        f"the ONNX file does not answer as the checkpoint does: {why}; it was not written. Try another opset=, or "
        "simplify=False."
    )
