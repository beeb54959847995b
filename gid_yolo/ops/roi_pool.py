"""Crops of fixed size from a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from gid_yolo.ops.precision import wide

CANONICAL_LEVEL = 4  # of a box of the canonical size: stride 16, C4, where ResNet-based Faster R-CNN takes its crops


def roi_crops(feature: Tensor, rois: Tensor, size: int, *, stride: int, samples: int, aligned: bool) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, 2017, section 3) of one map, as torchvision's `roi_align`.

    On a CPU torchvision's operator reads every channel of a sample on its own, from a contiguous copy of the map, and
    its backward pass has one thread. A crop is a weighted sum of cells, so there `embedding_bag` adds up whole cells of
    a map in channels_last: the same sums in another order.

    Args:
        feature: (B, C, H, W).
        rois: (N, 5) image index and xyxy in input pixels, of the dtype of the map.
        size: Height and width of a crop.
        stride: Input pixels per cell.
        samples: Points a bin and axis; 0 takes as many as the bin has cells.
        aligned: Shift by half a cell, so that samples lie where the cells do.

    Returns:
        (N, C, size, size).
    """
    if feature.device.type != "cpu" or not samples or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return roi_align(feature, rois, size, 1 / stride, samples, aligned)
    channels, height, width = feature.shape[1:]
    boxes = rois[:, 1:] / stride - (0.5 if aligned else 0.0)
    length = boxes[:, 2:] - boxes[:, :2]  # (N, 2)
    length = length if aligned else length.clamp(min=1.0)  # torchvision's: a crop of at least one cell
    columns, x_weight = _samples(boxes[:, 0], length[:, 0], size, samples, width)  # (N, size, S)
    rows, y_weight = _samples(boxes[:, 1], length[:, 1], size, samples, height)
    rows = rows + height * rois[:, 0, None, None].int()
    cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]  # (N, size, size, S, S)
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    crops = F.embedding_bag(
        cells.flatten(3).flatten(0, 2),
        feature.permute(0, 2, 3, 1).reshape(-1, channels),  # (B*H*W, C); a view of a map in channels_last
        per_sample_weights=weights.flatten(3).flatten(0, 2),
        mode="sum",
    )  # (N*size*size, C)
    return crops.view(len(rois), size, size, channels).permute(0, 3, 1, 2)


@torch.no_grad()
def _samples(start: Tensor, length: Tensor, size: int, samples: int, cells: int) -> tuple[Tensor, Tensor]:
    """Along one axis, (N, size, S) cells that each bin reads and their weights: of bilinear samples, S = 2 * samples.

    Args:
        start: (N,) of the crops, in cells.
        length: (N,) likewise.
        size: Bins of a crop.
        samples: Points of a bin.
        cells: Of the map.
    """
    bin_length = (length / size)[:, None, None]
    step = torch.arange(size, device=start.device)[:, None], torch.arange(samples, device=start.device) + 0.5
    at = start[:, None, None] + step[0] * bin_length + step[1] * bin_length / samples  # (N, size, samples)
    inside = (at >= -1) & (at <= cells)  # of NaN nowhere
    at = at.where(inside, 0.0).clamp(0, cells - 1)
    low = at.floor()
    high = (low + 1).clamp(max=cells - 1)
    weight = torch.stack([1 - (at - low), at - low], dim=-1) * (inside / samples)[..., None]
    return torch.stack([low, high], dim=-1).int().flatten(2), weight.to(start.dtype).flatten(2)


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
        crop = roi_crops(feature.to(dtype), rois[place], size, stride=stride, samples=samples, aligned=aligned)
        crops.append(crop)
        places.append(place)
    return torch.cat(crops).index_select(0, torch.cat(places).argsort()).to(features[0].dtype)
