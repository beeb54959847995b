"""An ONNX file must be the checkpoint's equal before its speed or accuracy counts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.engine.detection_model import limited
from gid_yolo.engine.yolo_view import is_yolo
from gid_yolo.export.check import BOX_LIMIT, SCORE_LIMIT
from gid_yolo.export.contenders import Contender
from gid_yolo.export.providers import run, start
from gid_yolo.export.session import OnnxDetector
from gid_yolo.export.to_onnx import export

AP_LIMIT = 0.1  # points of mAP between PyTorch and onnxruntime


def export_onnx(model: DetectionModel, path: Path, imgsz: list[int], batch: int, **limits: Any) -> Path:
    """Write `model` as an FP32 ONNX file at `path`."""
    return export(model, {"imgsz": imgsz, "batch": batch, "device": "cpu", **limits}, path)


def compare_outputs(cell: Contender, batches: Sequence[Any]) -> None:
    """First part of the parity gate: every box and score of some real images.

    Raises:
        UserError: The file does not run on its provider.
    """
    fused = deepcopy(cell.network).float().eval().fuse(verbose=False)
    if is_yolo(fused):
        fused.end2end = False
    detector = OnnxDetector(cell.onnx, provider=cell.provider, imgsz=cell.size, batch=cell.batch)
    outputs = [detector.run(images) for images in batches]
    if not getattr(fused, "end2end", False):
        cell.boxes, cell.scores = largest_differences(fused, outputs, batches)
    else:
        found = final_differences(fused, outputs, batches, least=cell.limits["conf"])
        found = found or _differences_of_the_best(cell, fused, batches)
        cell.compared = found is not None
        cell.boxes, cell.scores = found or (None, None)
    if cell.boxes is None or cell.scores is None:
        return
    if not cell.boxes <= BOX_LIMIT:  # NaN fails too
        cell.failed = f"boxes differ from PyTorch's by up to {cell.boxes:.3g} px (limit {BOX_LIMIT})"
    elif not cell.scores <= SCORE_LIMIT:
        cell.failed = f"scores differ from PyTorch's by up to {cell.scores:.3g} (limit {SCORE_LIMIT})"


def _differences_of_the_best(
    cell: Contender, model: nn.Module, batches: Sequence[np.ndarray], most: int = 10
) -> tuple[float, float] | None:
    """`final_differences` of a model that detects nothing: the best rows, of a second file without the threshold."""
    limits: dict[str, Any] = {"conf": 0.0, "max_det": 10 * most}  # enough that the other's best are among them
    batch, _, *imgsz = batches[0].shape
    with TemporaryDirectory() as folder:
        path = export_onnx(cell.network, Path(folder) / "all.onnx", imgsz, batch, **limits)
        session = start(path, cell.provider)
        outputs = [run(session, images) for images in batches]
    with limited(model, **limits):
        return final_differences(model, outputs, batches, most=most)


def compare_scores(cell: Contender, expected: dict[str, float], columns: dict[str, float]) -> None:
    """Second part: the mAP of the file against that of the checkpoint, over the whole split.

    Args:
        cell: Its columns are set if the two agree, else `failed`.
        expected: The ten columns of the checkpoint.
        columns: Those of the file.
    """
    cell.ap = columns["mAP"] - expected["mAP"]
    if not abs(cell.ap) <= AP_LIMIT:  # NaN fails too
        cell.failed = f"mAP differs from PyTorch's by {cell.ap:+.2f} (limit {AP_LIMIT})"
    else:
        cell.columns = columns


@torch.no_grad()
def largest_differences(
    model: nn.Module, outputs: Sequence[np.ndarray], batches: Sequence[np.ndarray]
) -> tuple[float, float]:
    """How far an ONNX file's outputs are from the network's, over every box of every image.

    Args:
        model: The network in evaluation mode and fp32, on the CPU.
        outputs: What the ONNX file made of `batches`, each (B, 4 + C, R), xywh in pixels and class probabilities.
        batches: The inputs.

    Returns:
        The largest difference of box values in pixels and that of scores; infinity for outputs of another shape.
    """
    boxes = scores = 0.0
    for found, images in zip(outputs, batches, strict=True):
        expected = model(torch.from_numpy(images))[0].numpy()
        if expected.shape != found.shape:
            return float("inf"), float("inf")
        difference = np.abs(expected.astype(np.float64) - found)
        # np.maximum keeps NaN, which then fails every limit
        boxes = float(np.maximum(boxes, difference[:, :4].max()))
        scores = float(np.maximum(scores, difference[:, 4:].max()))
    return boxes, scores


@torch.no_grad()
def final_differences(
    model: nn.Module,
    outputs: Sequence[np.ndarray],
    batches: Sequence[np.ndarray],
    *,
    least: float = 0.05,
    most: int | None = None,
) -> tuple[float, float] | None:
    """Like `largest_differences` for detections that are final, whose rows have no fixed order.

    Every detection is compared with the nearest of its class in the other's, each with another; one that has none
    differs by infinity.

    Args:
        model: The network in evaluation mode and fp32, on the CPU.
        outputs: What the ONNX file made of `batches`, each (B, N, 6): xyxy in pixels, score, class; score 0 is none.
        batches: The inputs.
        least: Score over which a box is a detection; those at it, or at the end of a full list, may be on either side.
        most: Compare only so many of an image, the best, whatever their scores.

    Returns:
        None where there is nothing to compare.
    """
    boxes, scores, compared = 0.0, 0.0, 0
    for found, images in zip(outputs, batches, strict=True):
        expected = model(torch.from_numpy(images))[0].numpy()
        if expected.shape != found.shape:
            return float("inf"), float("inf")
        for pair in zip(expected.astype(np.float64), found.astype(np.float64), strict=True):
            for one, other in (pair, pair[::-1]):
                if most is None:
                    end = max(least, other[:, 4].min())  # 0 of a list that is not full
                    wanted = one[one[:, 4] >= end + SCORE_LIMIT]
                else:
                    wanted = one[one[:, 4] > 0]
                    wanted = wanted[np.argsort(-wanted[:, 4], kind="stable")][:most]
                left = other[other[:, 4] > 0]
                for row in wanted:
                    compared += 1
                    distance = np.abs(left[:, :4] - row[:4]).max(1) + np.where(left[:, 5] == row[5], 0, np.inf)
                    if not len(left) or distance.min() == np.inf:
                        return float("inf"), float("inf")
                    nearest = int(distance.argmin())
                    boxes = float(np.maximum(boxes, distance[nearest]))
                    scores = float(np.maximum(scores, abs(left[nearest, 4] - row[4])))
                    left = np.delete(left, nearest, axis=0)  # one to one
    return (boxes, scores) if compared else None
