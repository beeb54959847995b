"""Fine-grained feature imitation (Wang et al., CVPR 2019), for detectors with anchors: what the paper compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from gid_yolo.ops.blocks import blocks
from gid_yolo.ops.losses import mean_over_images
from gid_yolo.ops.precision import wide
from gid_yolo.ops.structures import Targets

PSI = 0.5  # their threshold factor


@torch.no_grad()
def imitation_mask(anchors: Tensor, targets: Targets, locations: int, *, psi: float = PSI) -> Tensor:
    """Section 3.1 there: locations with an anchor near an object.

    An anchor is near an object if their IoU is over psi times the largest that any anchor has with that object.

    Args:
        anchors: (R, 4) xyxy in the order level, row, column, anchor.
        targets: Ground truth.
        locations: Cells N of all levels; every cell has R / N anchors.
        psi: 0 takes every anchor that overlaps an object, 1 none.

    Returns:
        (B, N) bool.
    """
    boxes = targets.boxes
    near = torch.zeros(boxes.shape[0], len(anchors), dtype=torch.bool, device=boxes.device)
    for _, some, real in blocks(boxes, targets.valid, len(anchors)):
        overlap = box_iou(some, anchors[None].to(boxes)).nan_to_num(0.0)  # (B, m, R)
        near |= ((overlap > psi * overlap.amax(-1, keepdim=True)) & real[..., None]).any(1)  # (B, R)
    return near.unflatten(1, (locations, -1)).any(-1)


def fine_grained_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The imitation loss: half the squared distance over the channels, averaged over an image's masked locations.

    Args:
        teacher: L maps (B, C, H_l, W_l), without a graph.
        student: L maps of the same shape, adapted.
        mask: (B, N) bool, N = sum of H_l W_l, from `imitation_mask`.

    Returns:
        Scalar in at least float32, the mean over images; 0 for an image without a masked location.
    """
    distances = [
        (wide(t) - wide(s)).square().sum(1).flatten(1) / 2  # (B, H_l W_l)
        for t, s in zip(teacher, student, strict=True)
    ]
    return mean_over_images(torch.cat(distances, dim=1), mask)
