"""What distillation needs to know of a model, the same for our detectors and for Ultralytics' YOLO."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Detect, v10Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.ops import xyxy2xywh

from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.distill.levels import LevelRules, levels_of_outputs
from gid_yolo.distill.response import ResponseFunctions
from gid_yolo.engine.detection_model import GIDDetectionModel, Outputs, raw_outputs
from gid_yolo.errors import UserError, some
from gid_yolo.ops.anchors import grid_anchors
from gid_yolo.ops.dfl import decode_dfl
from gid_yolo.ops.losses import soft_bce
from gid_yolo.ops.points import points_inside
from gid_yolo.ops.sample import SampleRule, keys_of_boxes
from gid_yolo.ops.structures import RawPredictions, Targets

# What mimicking compares at: the proportion that Faster R-CNN trains with, in a number that whole crops allow
MIMIC_RULE = SampleRule(positive_iou=0.5, negative_iou=0.5, count=64, positive_share=0.25)
YOLO_HEADS = (Detect, v10Detect)  # not their subclasses, which do more than detect


class Distillable(ABC):
    """A model seen by the distillation; it holds no weights of its own.

    Attributes:
        family: Kind of detector; only models of one kind can compare their responses.
        strides: Pixels per cell of each pyramid level.
        channels: Channels of the pyramid, one number a level where they differ.
        num_classes: Classes C.
        end2end: True where `detections` are final; else NMS is to follow.
        functions: Mask and losses of response distillation.
    """

    family: str
    strides: Sequence[int]
    channels: int | Sequence[int]
    num_classes: int
    end2end: bool
    functions: ResponseFunctions

    @abstractmethod
    def raw(self, images: Tensor) -> Outputs:
        """Pyramid features and raw predictions of (B, 3, H, W) images in [0, 1]."""

    @abstractmethod
    def predict(self, features: list[Tensor], image_size: tuple[int, int]) -> RawPredictions:
        """What the head makes of a pyramid, of images of (height, width)."""

    @abstractmethod
    def outputs(self, preds: Any) -> Outputs:
        """Pyramid features and raw predictions out of what the model returned in training or in evaluation mode."""

    @abstractmethod
    def detections(self, images: Tensor) -> Tensor:
        """Detections in Ultralytics' layout, of a model in evaluation mode."""

    def level_rules(self, features: list[Tensor], raw: RawPredictions) -> LevelRules:
        """Which levels of the pyramid a batch's predictions are made from, and a second stage's boxes cropped from."""
        cells, outputs = [x.shape[-2] * x.shape[-1] for x in features], raw.logits.shape[1]
        return LevelRules(lambda indices: levels_of_outputs(indices, cells, outputs))

    def proposals(
        self, features: list[Tensor], raw: RawPredictions, targets: Targets, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """A sample of proposals of a two-stage model, (B, N, 4) without a graph, and (B, N) True for real ones."""
        raise NotImplementedError(f"a {self.family} has no proposals.")

    @abstractmethod
    def loss_scale(self, batch: dict[str, Any]) -> float:
        """What the model's own training loss of a batch is multiplied by."""

    @abstractmethod
    def describe(self) -> str:
        """The model in a few words."""


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


@dataclass(frozen=True)
class SharedLevels:
    """The pyramid levels that teacher and student have in common: features are compared on these alone.

    Attributes:
        student: Indices of the student's levels.
        teacher: The teacher's level for each of them.
        strides: Their pixels per cell.
    """

    student: list[int]
    teacher: list[int]
    strides: list[int]

    def rules(self, own: LevelRules, strides: Sequence[int]) -> LevelRules:
        """The student's rules, of a pyramid of these strides, as rules of the shared levels alone.

        A level that is not shared gives way to the nearest in stride, of equal ones the first.
        """
        # (L,) of each of the student's levels
        places = [
            self.student.index(i)
            if i in self.student
            else min(range(len(self.strides)), key=lambda at: abs(math.log2(self.strides[at] / stride)))
            for i, stride in enumerate(strides)
        ]

        def shared(level: Tensor) -> Tensor:
            found = torch.zeros_like(level)
            for i, place in enumerate(places):  # one number at a time: a tensor of them would have to be copied
                found = torch.where(level == i, place, found)
            return found

        of_boxes = own.of_boxes
        return LevelRules(
            lambda indices: shared(own.of_predictions(indices)),
            None if of_boxes is None else lambda boxes: shared(of_boxes(boxes)),
        )

    def read_by_head(self, teacher: Distillable) -> bool:
        """Whether these are all that the teacher's head reads."""
        return self.teacher == list(range(len(teacher.strides)))

    def channels(self, student: Distillable, teacher: Distillable) -> tuple[int, int] | tuple[list[int], list[int]]:
        """Channels of both pyramids: one number each, or one a level each where a pyramid's levels differ."""
        if isinstance(student.channels, int) and isinstance(teacher.channels, int):
            return student.channels, teacher.channels
        return _channels(student, self.student), _channels(teacher, self.teacher)


def share_levels(student: Distillable, teacher: Distillable) -> SharedLevels:
    """The levels of equal stride, finest first; of levels that share a stride, the first goes with the first.

    Raises:
        UserError: There are none.
    """
    free, pairs = list(enumerate(teacher.strides)), []
    for i, stride in enumerate(student.strides):
        if match := next(((j, s) for j, s in free if s == stride), None):
            free.remove(match)
            pairs.append((i, match[0], stride))
    if not pairs:
        own, theirs = (some(map(str, view.strides)) for view in (student, teacher))
        raise UserError(
            f"the student's pyramid has strides {own} and the teacher's {theirs}: they have no level in common to "
            "compare features on."
        )
    return SharedLevels(*(list(column) for column in zip(*pairs, strict=True)))


def _channels(view: Distillable, levels: list[int]) -> list[int]:
    return [view.channels if isinstance(view.channels, int) else view.channels[i] for i in levels]


def is_yolo(model: Any) -> bool:
    """True for Ultralytics' own detection models with a YOLO head."""
    return isinstance(model, DetectionModel) and type(model.model[-1]) in YOLO_HEADS


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
