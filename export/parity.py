"""An ONNX file must be the checkpoint's equal before its speed or accuracy counts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import LOGGER

from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.exporter import GIDExporter
from gid_yolo.export.evaluate import ten_columns
from gid_yolo.export.session import Latency, run

# Largest differences between PyTorch and onnxruntime in fp32: far under what NMS at IoU 0.5 can notice
BOX_LIMIT, SCORE_LIMIT, AP_LIMIT = 0.05, 1e-3, 0.1  # pixels, probability, points of mAP


@dataclass
class Contender:
    """A model on its way through the benchmark."""

    role: str
    path: Path
    model: GIDDetectionModel
    onnx: Path = Path()
    session: Any = None
    boxes: float | None = None
    scores: float | None = None
    ap: float | None = None
    columns: dict[str, float] | None = None
    latency: Latency | None = None
    failed: str | None = None


def export_onnx(model: GIDDetectionModel, path: Path, imgsz: list[int], batch: int) -> Path:
    """Write `model` as an ONNX file at `path` (the exporter alone would write beside the checkpoint)."""
    checkpoint, model.pt_path = model.pt_path, str(path.with_suffix(".pt"))
    try:
        overrides = {
            "imgsz": imgsz,
            "batch": batch,
            "device": "cpu",
            "format": "onnx",
            "mode": "export",
            "task": "detect",
        }
        return Path(GIDExporter(overrides=overrides)(model=model))
    finally:
        model.pt_path = checkpoint


def compare_outputs(contender: Contender, batches: Sequence[Any]) -> None:
    """First part of the parity gate: every box and score of some real images."""
    fused = deepcopy(contender.model).float().eval().fuse(verbose=False)
    outputs = [run(contender.session, images) for images in batches]
    contender.boxes, contender.scores = largest_differences(fused, outputs, batches)
    if not contender.boxes <= BOX_LIMIT:  # NaN fails too
        contender.failed = f"boxes differ from PyTorch's by up to {contender.boxes:.3g} px (limit {BOX_LIMIT})"
    elif not contender.scores <= SCORE_LIMIT:
        contender.failed = f"scores differ from PyTorch's by up to {contender.scores:.3g} (limit {SCORE_LIMIT})"


def compare_scores(contender: Contender, data: Path, split: str, loader: Any, cuda: int | None, save_dir: Path) -> None:
    """Second part: the mAP of the file against that of the checkpoint, over the whole split."""
    device = "cpu" if cuda is None else cuda
    columns = {}
    for kind, network in (("onnx", contender.onnx), ("pt", contender.model)):
        LOGGER.info(f"{contender.role} ({kind}):")
        folder = save_dir / f"{contender.role}_{kind}"
        columns[kind] = ten_columns(network, data=data, split=split, loader=loader, device=device, save_dir=folder)
    contender.ap = columns["onnx"]["mAP"] - columns["pt"]["mAP"]
    if abs(contender.ap) > AP_LIMIT:
        contender.failed = f"mAP differs from PyTorch's by {contender.ap:+.2f} (limit {AP_LIMIT})"
    else:
        contender.columns = columns["onnx"]


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
