"""A YOLO detector of Ultralytics as the distillation sees it, with its mask and losses of equations 7 and 8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Detect, v10Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.ops import xyxy2xywh

from gid_yolo.distill.response import ResponseFunctions
from gid_yolo.engine.detection_model import Outputs
from gid_yolo.engine.distillable import Distillable
from gid_yolo.ops.anchors import grid_anchors
from gid_yolo.ops.dfl import decode_dfl
from gid_yolo.ops.losses import soft_bce
from gid_yolo.ops.points import points_inside
from gid_yolo.ops.structures import RawPredictions

YOLO_HEADS = (Detect, v10Detect)  # not their subclasses, which do more than detect


def is_yolo(model: Any) -> bool:
    """True for Ultralytics' own detection models with a YOLO head."""
    return isinstance(model, DetectionModel) and type(model.model[-1]) in YOLO_HEADS


class YOLODetector(Distillable):
    """A YOLO detector of Ultralytics: its head's inputs are the pyramid, its one-to-many branch the predictions.

    The grid of all its families is the same: a point in the middle of every cell. A general instance is masked where
    points lie inside its box (equation 7), classes are compared by BCE and boxes by CIoU, the losses of its task.
    """

    family = "yolo"
    end2end = False  # of the one-to-many branch, which is what is compared

    def __init__(self, model: DetectionModel) -> None:
        head = model.model[-1]
        self.model = model
        self.strides = [int(s) for s in head.stride.tolist()]
        self.num_classes: int = head.nc
        self.cells = torch.tensor([[[0.0, 0, s, s]] for s in self.strides])  # (L, 1, 4)
        training, weight = model.training, next(model.parameters())
        with torch.no_grad():
            blank = weight.new_zeros(1, 3, 2 * max(self.strides), 2 * max(self.strides))
            self.channels = [x.shape[1] for x in self.outputs(model.eval()(blank))[0]]
        model.train(training)
        self.functions: ResponseFunctions = self

    def raw(self, images: Tensor) -> Outputs:
        """Inputs of the head and raw predictions."""
        with self._undecoded():
            return self.outputs(self.model(images))

    def predict(self, features: list[Tensor], image_size: tuple[int, int]) -> RawPredictions:
        """What the head makes of its inputs."""
        with self._undecoded() as head:
            return self.outputs(head(list(features)))[1]  # a list of its own: some heads write into it

    @contextmanager
    def _undecoded(self) -> Iterator[nn.Module]:
        """The head, in training mode for itself alone while its parts stay as they are: it decodes nothing."""
        head = self.model.model[-1]
        training, head.training = head.training, True
        try:
            yield head
        finally:
            head.training = training

    def outputs(self, preds: Any) -> Outputs:
        """Inputs of the head and raw predictions out of the model's return value."""
        parts = preds[1] if isinstance(preds, tuple) else preds
        parts = parts.get("one2many", parts)
        pyramid: list[Tensor] = list(parts["feats"])
        self.cells = self.cells.to(pyramid[0].device)  # once: the model may have moved since
        priors = grid_anchors(self.cells, pyramid, self.strides)
        return pyramid, RawPredictions(parts["scores"].mT, parts["boxes"].mT, priors, decode_dfl)

    def detections(self, images: Tensor) -> Tensor:
        """Detections of the one-to-many branch, (B, 4 + C, R); boxes are decoded wide, as those it teaches."""
        raw = self.raw(images)[1]
        return torch.cat([xyxy2xywh(raw.boxes), raw.scores], -1).mT

    def loss_scale(self, batch: dict[str, Any]) -> float:
        """B: Ultralytics' own loss of a batch is that of an image times the batch size.

        Of a model with two branches (v10, 26) times the weight of the one-to-many branch, whose loss alone reaches the
        pyramid: it falls over a run, from 0.8 to 0.1, and the distillation would outgrow it.
        """
        criterion = getattr(self.model, "criterion", None)  # which Ultralytics makes with the first loss
        return float(batch["img"].shape[0]) * getattr(criterion, "o2m", 1.0)

    def describe(self) -> str:
        """Family and size."""
        return f"{self.family} {self.model.yaml.get('yaml_file', '')}".strip()

    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) True for points inside a GI box."""
        return points_inside(priors, boxes, valid)

    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) soft-target binary cross entropy, summed over classes."""
        return soft_bce(student.logits, teacher.logits)

    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) 1 - CIoU of the decoded boxes; 0 where the teacher's has no area.

        YOLO26's sides are not bounded by 0: around a box that is reversed CIoU's hull can vanish, and the loss explode.
        """
        has_area = (teacher.boxes[..., 2:] > teacher.boxes[..., :2]).all(-1)  # (B, R)
        loss = 1 - bbox_iou(student.boxes, teacher.boxes, xywh=False, CIoU=True).squeeze(-1)
        return loss.where(has_area, 0.0)
