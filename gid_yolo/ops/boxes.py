"""Box coordinates: conversion, the R-CNN delta coding, and its inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gid_yolo.ops.precision import wide

# The decoded width may grow at most from a 16 px anchor to a 1000 px image: it keeps exp() finite early in training
# (the constant of Detectron and torchvision).
MAX_LOG_SCALE = math.log(1000.0 / 16)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners to centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def encode_deltas(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The regression target (dx, dy, dw, dh) of `boxes` against `anchors`, both (..., 4) xyxy and broadcastable.

    dx = (x - xa) / wa, dw = log(w / wa) and likewise for y and h (Faster R-CNN, equation 2). Boxes without area are
    taken as one thousandth of a pixel wide, so that the target of a padded box is finite.
    """
    box, anchor = xyxy_to_xywh(wide(boxes)), xyxy_to_xywh(wide(anchors))
    offset = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:]
    scale = (box[..., 2:].clamp(min=1e-3) / anchor[..., 2:]).log()
    return torch.cat([offset, scale], dim=-1)


def decode_deltas(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Invert `encode_deltas`: (..., R, 4) deltas on (R, 4) anchors to xyxy boxes in pixels, in at least float32."""
    anchor, deltas = xyxy_to_xywh(wide(anchors)), wide(deltas)
    centre = anchor[..., :2] + deltas[..., :2] * anchor[..., 2:]
    half = anchor[..., 2:] * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


@dataclass(frozen=True)
class Corners:
    """Boxes as four planes, to compare many of them with one after the other: each step stays in a CPU's cache.

    Attributes:
        planes: x1, y1, x2, y2, each (..., R).
        area: (..., R).
    """

    planes: tuple[Tensor, ...]
    area: Tensor

    @classmethod
    def of(cls, boxes: Tensor) -> Corners:
        """(..., R, 4) xyxy, in at least float32."""
        x1, y1, x2, y2 = (x.contiguous() for x in wide(boxes).unbind(-1))
        return cls((x1, y1, x2, y2), (x2 - x1) * (y2 - y1))

    def gather(self, index: Tensor) -> Corners:
        """Those at `index` (B, N) into R, of (B, R)."""
        return Corners(tuple(x.gather(1, index) for x in self.planes), self.area.gather(1, index))

    def iou(self, others: Corners) -> Tensor:
        """The IoU with boxes that broadcast with these, as torchvision's `box_iou` computes it: NaN of two empty."""
        (x1, y1, x2, y2), (u1, v1, u2, v2) = self.planes, others.planes
        width = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)
        height = torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0)
        overlap = width.mul_(height)
        return overlap / (others.area + self.area).sub_(overlap)
