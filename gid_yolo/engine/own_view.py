"""One of our detectors as the distillation sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.distill.levels import LevelRules
from gid_yolo.engine.detection_model import GIDDetectionModel, Outputs, raw_outputs
from gid_yolo.engine.distillable import Distillable
from gid_yolo.ops.sample import SampleRule, keys_of_boxes
from gid_yolo.ops.structures import RawPredictions, Targets

# What mimicking compares at: the proportion that Faster R-CNN trains with, in a number that whole crops allow
MIMIC_RULE = SampleRule(positive_iou=0.5, negative_iou=0.5, count=64, positive_share=0.25)


class OwnDetector(Distillable):
    """One of our detectors."""

    def __init__(self, model: GIDDetectionModel) -> None:
        detector = model.detector
        self.model = model
        self.family, self.strides, self.channels = detector.family, detector.strides, detector.fpn_channels
        self.num_classes, self.end2end = detector.num_classes, detector.end2end
        self.functions = detector

    def raw(self, images: Tensor) -> Outputs:
        """Pyramid and raw predictions."""
        return self.model.raw(images)

    def predict(self, features: list[Tensor], image_size: tuple[int, int]) -> RawPredictions:
        """What the head makes of a pyramid."""
        return self.model.detector.predict(features, image_size)

    def outputs(self, preds: Any) -> Outputs:
        """Pyramid and raw predictions out of the model's return value."""
        return raw_outputs(preds)

    def detections(self, images: Tensor) -> Tensor:
        """Detections of the detector."""
        return self.model.detector(images)

    def level_rules(self, features: list[Tensor], raw: RawPredictions) -> LevelRules:
        """Those of every detector, and of Faster R-CNN what its second stage goes by."""
        rules, detector = super().level_rules(features, raw), self.model.detector
        return replace(rules, of_boxes=detector.roi_levels) if isinstance(detector, FasterRCNN) else rules

    @torch.no_grad()
    def proposals(
        self, features: list[Tensor], raw: RawPredictions, targets: Targets, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Of Faster R-CNN: positives and negatives in the proportion of its own training, but fewer.

        They are drawn without a generator of numbers, so that its own training draws what its plain twin's does.
        """
        if not isinstance(self.model.detector, FasterRCNN):
            return super().proposals(features, raw, targets, image_size)
        samples = self.model.detector.samples(features, raw.detach(), targets, image_size, MIMIC_RULE, keys_of_boxes)
        return samples.boxes, samples.valid

    def loss_scale(self, batch: dict[str, Any]) -> float:
        """B / nbs, see `GIDDetectionModel.loss`."""
        return self.model.loss_scale(batch)

    def describe(self) -> str:
        """Kind and backbone."""
        return f"{self.family} on {self.model.yaml['backbone']}"
