"""What every detector offers to training, distillation and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from gid_yolo.detectors.backbone import Backbone
from gid_yolo.detectors.neck import FPN
from gid_yolo.ops.structures import RawPredictions, Targets


class Detector(nn.Module, ABC):
    """A backbone, a pyramid and a head, with the loss functions that the task and the distillation share.

    Attributes:
        family: Kind of detector; only models of one kind can distil into each other.
        backbone_strides: Pixels per cell of each map the backbone gives to the pyramid.
        end2end: True where `detections` are final, (B, N, 6); else NMS is left to the caller.
        limits: Of an `end2end` detector, the settings that Ultralytics' `conf`, `iou` and `max_det` stand for.
        strides: Pixels per cell of each pyramid level.
        backbone: The bottom-up network.
        neck: Makes the pyramid of its maps.
        fpn_channels: Channels of every pyramid level.
        num_classes: Classes C.
        other_classes: Classes that `keep_classes` has left out but that the head still needs.
    """

    family: ClassVar[str]
    backbone_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)
    end2end: ClassVar[bool] = False
    limits: ClassVar[dict[str, str]] = {}
    strides: tuple[int, ...]
    backbone: Backbone
    neck: FPN
    head: Any
    fpn_channels: int
    num_classes: int
    other_classes: int = 0

    def raw(self, images: Tensor) -> tuple[list[Tensor], RawPredictions]:
        """Map (B, 3, H, W) RGB images in [0, 1] to the pyramid and the raw predictions."""
        features = self.neck(self.backbone(images))
        return features, self.predict(features, images.shape[-2:])

    @abstractmethod
    def predict(self, features: list[Tensor], image_size: Sequence[int]) -> RawPredictions:
        """The raw predictions that the head makes of a pyramid, of images of the given (height, width)."""

    @abstractmethod
    def detections(
        self, features: list[Tensor], raw: RawPredictions, height: int | Tensor, width: int | Tensor
    ) -> Tensor:
        """Detections in Ultralytics' layout from what `raw` gave on images of the given size.

        Returns:
            Of a dense head (B, 4 + C, R), xywh in pixels and class confidences. Of an `end2end` detector (B, N, 6),
            xyxy in pixels, score and class, rows of score 0 where an image has fewer.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Detections of (B, 3, H, W) RGB images in [0, 1]: `detections` of what `raw` gives."""
        return self.detections(*self.raw(images), *images.shape[-2:])

    def keep_classes(self, index: Sequence[int]) -> None:
        """Predict only some of the classes, in the order of `index`, with unchanged probabilities."""
        layer = self.head.cls_logits  # a dense head's classes are independent of each other
        for name, value in list(layer.named_parameters()):
            rows = (
                value.detach().unflatten(0, (-1, self.num_classes))[:, list(index)].flatten(0, 1)
            )  # anchors x classes
            setattr(layer, name, nn.Parameter(rows))
        layer.out_channels = len(layer.bias)
        self.head.num_classes = self.num_classes = len(index)

    @abstractmethod
    def loss(
        self, features: list[Tensor], raw: RawPredictions, targets: Targets, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Named task losses from what `raw` gave on images of `image_size` (height, width)."""

    # What response distillation needs to know of a detector (section 3.4): three pure functions.

    @abstractmethod
    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) True for the outputs that the label assignment would give to one of the GI boxes."""

    @abstractmethod
    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """L_cls of equation 8: (B, R)."""

    @abstractmethod
    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """L_reg of equation 8: (B, R)."""
