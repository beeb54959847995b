"""The view that the distillation has of a model, and the parts of a detector behind its pyramid."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.distillable import Distillable
from gid_yolo.engine.own_view import OwnDetector
from gid_yolo.engine.yolo_view import YOLODetector, is_yolo
from gid_yolo.errors import UserError


def distillable(model: nn.Module) -> Distillable:
    """The view of a model.

    Raises:
        UserError: A model that is neither ours nor a YOLO detector.
    """
    if isinstance(model, GIDDetectionModel):
        return OwnDetector(model)
    if is_yolo(model):
        return YOLODetector(model)
    raise UserError(f"a {type(model).__name__} cannot be distilled: give a detector of gid-yolo or a YOLO detector.")


def dense_head(model: nn.Module) -> nn.Module:
    """The part of a detector that is given the pyramid and makes the dense predictions."""
    if not isinstance(model, GIDDetectionModel):
        return cast(nn.Module, cast(Any, model).model[-1])
    detector = model.detector
    return detector.rpn if isinstance(detector, FasterRCNN) else detector.head


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a detector that are given the pyramid, a second stage among them."""
    if isinstance(model, GIDDetectionModel) and isinstance(model.detector, FasterRCNN):
        return [model.detector.rpn, model.detector.head]
    return [dense_head(model)]
