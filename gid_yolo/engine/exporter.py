"""Ultralytics' exporter for our detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import _handle_deprecation
from ultralytics.engine.exporter import Exporter
from ultralytics.utils import DEFAULT_CFG, LOGGER

from gid_yolo.engine.checkpoint import no_autoinstall
from gid_yolo.engine.config import ultralytics_args
from gid_yolo.engine.detection_model import limited
from gid_yolo.errors import UserError


class GIDExporter(Exporter):
    """Writes ONNX files in Ultralytics' layout and metadata.

    Input `images` (B, 3, H, W), RGB in [0, 1], normalised inside the graph. Output `output0`: of dense detectors
    (B, 4 + nc, R), xywh in input pixels and class confidences, NMS left to the caller; of Faster R-CNN (B, N, 6), xyxy
    in input pixels, score and class, final, within the limits `conf`, `iou` and `max_det` that are given, else the
    model's own.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        overrides = _handle_deprecation(ultralytics_args(overrides or {}))  # half= and int8= become quantize=
        if str(overrides.get("format", "onnx")).lower() != "onnx":
            raise UserError(f"format={overrides['format']} is not supported: gid-yolo exports format=onnx.")
        if overrides.get("nms"):
            raise UserError("nms=True is not supported yet: the file's boxes go through NMS outside the graph.")
        if overrides.get("quantize") not in (None, 32, "32", "fp32"):
            raise UserError(f"quantize={overrides['quantize']} is not supported yet: gid-yolo exports FP32.")
        super().__init__(cfg, {**overrides, "format": "onnx"}, _callbacks)
        self.limits = {key: overrides.get(key) for key in ("conf", "iou", "max_det")}

    def __call__(self, model: torch.nn.Module) -> str:
        """Export and return the path of the file."""
        with no_autoinstall(), limited(model, **self.limits):  # what the export needs is declared
            path = super().__call__(model)
        names: Any = model.names
        final = "(batch, detections, 6): x1, y1, x2, y2, score, class; NMS inside"
        layout = final if getattr(model, "end2end", False) else f"(batch, 4 + {len(names)}, boxes), NMS left outside"
        LOGGER.info(f"ONNX file: {Path(path).resolve()}, output0 {layout}")
        return path
