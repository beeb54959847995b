"""What distillation needs to know of a model, the same for our detectors and for Ultralytics' YOLO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gid_yolo.distill.levels import LevelRules, levels_of_outputs
from gid_yolo.distill.response import ResponseFunctions
from gid_yolo.engine.detection_model import Outputs
from gid_yolo.ops.structures import RawPredictions, Targets


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
