"""Ultralytics' exporter for our detectors and for YOLO: one FP32 ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn
from ultralytics.engine.exporter import Exporter, ExportWrapper
from ultralytics.utils import DEFAULT_CFG

from gid_yolo._version import __version__
from gid_yolo.engine.checkpoint import no_autoinstall
from gid_yolo.engine.config import thresholds, ultralytics_args
from gid_yolo.engine.detection_model import limited
from gid_yolo.ops.boxes import xywh_to_xyxy
from gid_yolo.ops.nms import class_nms

LIMITS = ("conf", "iou", "max_det")


class GIDExporter(Exporter):
    """Writes an FP32 ONNX file in Ultralytics' layout and metadata.

    Input `images` (B, 3, H, W), RGB in [0, 1], normalised inside the graph. Output `output0`: of dense detectors
    (B, 4 + nc, R), xywh in input pixels and class confidences, NMS left to the caller; with `nms=True`, and of Faster
    R-CNN always, (B, N, 6), xyxy in input pixels, score and class, final, within the limits `conf`, `iou` and `max_det`
    that are given, else those that the model is evaluated with.

    Args:
        path: The file to write.
        cfg: As Ultralytics has it.
        overrides: Arguments, Ultralytics' and ours.
        _callbacks: As Ultralytics has it.
    """

    model: Any
    file: Path

    def __init__(
        self, path: Path, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None
    ) -> None:
        args = {**ultralytics_args(overrides or {}), "format": "onnx"}
        self.path = Path(path)
        self.nms = bool(args.get("nms"))
        self.limits = {key: args.get(key) for key in LIMITS}
        # Ultralytics' NMS in the graph goes through the images of a batch one by one, which fixes their number, and
        # gives a box one class only: the AP would not be the checkpoint's
        # False is a YOLO's own word for its head that needs none
        outside = False if args.get("nms") is False else None
        super().__init__(cfg, {**args, "nms": outside, "quantize": None}, _callbacks)

    def __call__(self, model: nn.Module) -> str:
        """Export and return the path of the file."""
        with no_autoinstall(), limited(model, **self.limits):  # what the export needs is declared
            return super().__call__(model)

    def export_onnx(self, *args: Any, **kwargs: Any) -> str:
        """Ultralytics' hook, called with the traceable model: put the NMS behind it, and write where it was asked."""
        limits = thresholds(self.model.yaml) | {key: value for key, value in self.limits.items() if value is not None}
        shapes: Any = self.output_shape
        shape: list[int | str] = list(shapes[0] if isinstance(shapes[0], tuple) else shapes)
        if self.nms and not self.metadata["end2end"]:
            self.model = WithNMS(self.model, **limits)
            self.metadata["args"]["nms"] = True  # by which Ultralytics knows that nothing is left to do
            shape = [shape[0], limits["max_det"], 6]
        elif self.args.dynamic and not self.metadata["end2end"]:
            shape[2] = "boxes"
        if self.args.dynamic:
            shape[0] = "batch"
        self.metadata |= {"gid_yolo": __version__, "limits": limits}
        checkpoint, self.file = self.file, self.path  # Ultralytics names its file by the checkpoint's
        try:
            written = super().export_onnx(*args, **kwargs)
        finally:
            self.file = checkpoint
        contents = onnx.load(written)
        _declare(contents.graph.output[0], shape)
        onnx.save(contents, self.path)
        return str(self.path)


class WithNMS(ExportWrapper):
    """A dense network followed by the NMS.

    Args:
        model: Gives (B, 4 + nc, R), xywh in pixels and class confidences, alone or as the first of several outputs.
        conf: Score over which a box is a detection.
        iou: Threshold of the NMS within a class.
        max_det: Detections of an image D.
    """

    def __init__(self, model: nn.Module, *, conf: float, iou: float, max_det: int) -> None:
        super().__init__(model)
        self.conf, self.iou, self.max_det = conf, iou, max_det

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, D, 6): xyxy in pixels, score and class, rows of zeros where an image has fewer."""
        found = self.dense(images)
        boxes = xywh_to_xyxy(found[:, :4].transpose(1, 2))
        return class_nms(boxes, found[:, 4:], min_score=self.conf, iou_threshold=self.iou, max_det=self.max_det)

    def dense(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to what goes into the NMS, (B, 4 + nc, R)."""
        found = self._model(images)
        return found if isinstance(found, Tensor) else found[0]


def _declare(output: onnx.ValueInfoProto, shape: list[int | str]) -> None:
    """Write an output's shape into the file; an axis with a name is dynamic."""
    output.type.tensor_type.ClearField("shape")
    for size in shape:
        dimension = output.type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dimension.dim_param = size
        else:
            dimension.dim_value = size
