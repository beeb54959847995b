"""Crops of fixed size from a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from gid_yolo.ops.precision import wide

CANONICAL_LEVEL = 4  # of a box of the canonical size: stride 16, C4, where ResNet-based Faster R-CNN takes its crops


def roi_levels(boxes: Tensor, strides: Sequence[int], *, canonical_size: float = 224.0) -> Tensor:
    """(...) index of the level each box (..., 4) is cropped from, by its size (FPN paper, equation 1)."""
    first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    boxes = wide(boxes)
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    # 1e-6 is torchvision's: a box of exactly the canonical size must not fall to the finer level by rounding
    level = (CANONICAL_LEVEL + (side / canonical_size).log2() + 1e-6).floor()
    return level.clamp(first, last).long() - first


def pyramid_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    *,
    size: int = 7,
    samples: int = 2,
    canonical_size: float = 224.0,
    aligned: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Crop every box from the level of its size with RoIAlign, as torchvision's `MultiScaleRoIAlign`.

    Unlike it, this takes padded boxes, keeps no state of the images it saw first, and leaves the number of images open
    in an exported graph.

    Args:
        features: L maps (B, C, H_l, W_l).
        boxes: (B, P, 4) xyxy in input pixels; a box without area gives a crop around its place.
        strides: Pixels per cell of each level.
        size: Height and width of a crop.
        samples: Points a bin and axis; 0 takes as many as the bin has cells.
        canonical_size: Side of the boxes that are cropped from stride 16.
        aligned: Shift by half a cell, so that samples lie where the cells do; torchvision's detectors do not.
        valid: (B, P) True for the boxes to crop; all of them where None.

    Returns:
        (V, C, size, size) of the dtype of the maps, where V = B * P, or as many as are valid.
    """
    dtype = torch.promote_types(features[0].dtype, torch.float32)  # half precision cannot hold a coordinate of 500 px
    level = roi_levels(boxes, strides, canonical_size=canonical_size)  # (B, P)
    level = (level if valid is None else level.masked_fill(~valid, -1)).flatten()  # (B*P,)
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([image.to(dtype), boxes.to(dtype)], dim=-1).flatten(0, 1)  # (B*P, 5)
    crops, places = [], []
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        place = (level == i).nonzero()[:, 0]  # a host sync, as roi_align takes one map a call
        crops.append(roi_align(feature.to(dtype), rois[place], size, 1 / stride, samples, aligned))
        places.append(place)
    return torch.cat(crops).index_select(0, torch.cat(places).argsort()).to(features[0].dtype)
