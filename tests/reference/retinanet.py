"""The loss of torchvision's RetinaNet head for the same logits, deltas and anchors."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou


def torchvision_matches(anchors, boxes, high=0.5, low=0.4):
    """(R,) torchvision's assignment of one image, boxes without padding; no object means background everywhere."""
    if len(boxes) == 0:
        return torch.full((len(anchors),), -1, dtype=torch.long)
    return Matcher(high, low, allow_low_quality_matches=True)(box_iou(boxes, anchors))


def torchvision_loss(logits, deltas, anchors, objects):
    """(class loss, box loss); `objects` is a list of (boxes, labels) per image."""
    head = RetinaNetHead(in_channels=8, num_anchors=9, num_classes=logits.shape[-1])  # its convolutions stay unused
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in objects]
    matched = [torchvision_matches(anchors, boxes) for boxes, _ in objects]
    outputs = {"cls_logits": logits, "bbox_regression": deltas}
    losses = head.compute_loss(targets, outputs, [anchors] * len(objects), matched)
    return losses["classification"], losses["bbox_regression"]
