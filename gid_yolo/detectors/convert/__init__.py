"""Detectors of other libraries as ours, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from gid_yolo.detectors.convert.converted import Converted
from gid_yolo.detectors.convert.torchvision_faster_rcnn import convert_faster_rcnn
from gid_yolo.detectors.convert.torchvision_fcos import convert_fcos
from gid_yolo.detectors.convert.torchvision_retinanet import convert_retinanet
from gid_yolo.detectors.detector import Detector

CONVERTERS: dict[type[nn.Module], Callable[..., Converted]] = {
    RetinaNet: convert_retinanet,
    FCOS: convert_fcos,
    FasterRCNN: convert_faster_rcnn,
}

__all__ = ["Converted", "convert_torchvision", "from_torchvision"]


def convert_torchvision(model: nn.Module) -> Converted:
    """Settings and weights of ours that make one of torchvision's detectors.

    Raises:
        ValueError: Another kind of model, or one with parts that ours does not have.
    """
    if type(model) not in CONVERTERS:
        known = ", ".join(kind.__name__ for kind in CONVERTERS)
        raise ValueError(f"a {type(model).__name__} cannot be converted: give a torchvision {known}.")
    return CONVERTERS[type(model)](model)


def from_torchvision(model: nn.Module) -> Detector:
    """Our detector with the weights, the settings and the outputs of one of torchvision's.

    The resizing and the normalisation of torchvision's `transform` are apart: ours takes images of the size they are
    to be seen at, RGB in [0, 1], and normalises them with the transform's mean and std. Scores, number of detections
    and NMS are the caller's for dense heads.

    Args:
        model: Any of torchvision's RetinaNet, FCOS or Faster R-CNN on a ResNet with a feature pyramid, or Faster R-CNN
            on MobileNetV3. Class indices stay torchvision's labels for RetinaNet and FCOS, whose class 0 is nothing's;
            of Faster R-CNN they are the labels less 1, its background being no class.

    Raises:
        ValueError: Another kind of model, or one with parts that ours does not have.
    """
    return convert_torchvision(model).build().train(model.training)
