"""Label assignment: which box each anchor answers for, and which anchors a set of boxes covers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from gid_yolo.ops.blocks import blocks
from gid_yolo.ops.boxes import Corners

BACKGROUND, IGNORED = -1, -2


def match_anchors(
    anchors: Tensor,
    boxes: Tensor,
    valid: Tensor,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: bool = True,
) -> Tensor:
    """Assign every anchor of every image to a box by IoU (RetinaNet, section 4; Faster R-CNN, section 3.1.2).

    An anchor takes the box of highest IoU (the first of equals) if that IoU is at least `positive_iou`; it is
    background under `negative_iou` and ignored between. With `low_quality`, the anchors that reach a box's own
    highest IoU are kept for their best box whatever that IoU is, so that a box no anchor fits well is still learnt.

    Args:
        anchors: (R, 4) xyxy.
        boxes: (B, M, 4) xyxy, padded; M may be 0.
        valid: (B, M) True for real boxes.
        positive_iou: IoU from which an anchor is an object.
        negative_iou: IoU under which an anchor is background.
        low_quality: Keep the best anchors of each box.

    Returns:
        (B, R) index into M, or BACKGROUND (-1), or IGNORED (-2).
    """
    if boxes.shape[1] == 0:
        return anchors.new_full((boxes.shape[0], anchors.shape[0]), BACKGROUND).long()
    shape = boxes.shape[0], anchors.shape[0]
    best, index = boxes.new_full(shape, -1.0), boxes.new_zeros(shape, dtype=torch.long)
    restored = boxes.new_zeros(shape, dtype=torch.bool)
    for start, some, real in blocks(boxes, valid, len(anchors)):
        iou = box_iou(some, anchors[None].to(boxes)).nan_to_num(0.0)  # (B, m, R)
        iou = iou.masked_fill(~real[..., None], -1.0)  # a padded box never wins
        value, place = iou.max(dim=1)  # (B, R)
        index = torch.where(value > best, place + start, index)
        best = torch.maximum(value, best)
        if low_quality:
            highest = iou.amax(dim=2, keepdim=True)  # (B, m, 1)
            # A box that touches no anchor has a highest IoU of 0 with all of them: without the second test it, and
            # every padded box, would make the whole image positive.
            restored |= ((iou == highest) & (highest > 0)).any(dim=1)  # (B, R)
    matched = index.masked_fill(best < positive_iou, IGNORED).masked_fill(best < negative_iou, BACKGROUND)
    return matched.where(~restored, index)


def positive_mask(
    anchors: Tensor, boxes: Tensor, valid: Tensor, *, positive_iou: float = 0.5, low_quality: bool = True
) -> Tensor:
    """(B, R) True where an anchor would be a positive of one of `boxes`: equation 7 for anchor-based detectors.

    The same as where `match_anchors` with one threshold gives a box, found box by box: a few boxes need no (B, M, R).
    """
    mask = torch.zeros(boxes.shape[0], anchors.shape[0], dtype=torch.bool, device=boxes.device)
    corners = Corners.of(anchors.to(boxes))
    for m in range(boxes.shape[1]):
        box, real = boxes[:, m : m + 1], valid[:, m : m + 1]  # (B, 1, 4), (B, 1)
        iou = corners.iou(Corners.of(box)).nan_to_num_(0.0)  # (B, R)
        positive = iou >= positive_iou
        if low_quality:
            highest = iou.amax(dim=1, keepdim=True)
            positive |= (iou == highest) & (highest > 0)
        mask |= positive & real
    return mask
