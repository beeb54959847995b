"""Crops of fixed size from a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401 - adds its operators to torch.ops
from torch import Tensor

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
    if not _by_cells(feature, samples):
        return _roi_align(feature, rois, size, stride=stride, samples=samples, aligned=aligned)
    level = torch.zeros(len(rois), dtype=torch.long)
    return _sums_of_cells([feature], rois, level, size, strides=[stride], samples=samples, aligned=aligned)


def _roi_align(feature: Tensor, rois: Tensor, size: int, *, stride: int, samples: int, aligned: bool) -> Tensor:
    """The operator of torchvision; arguments as of `roi_crops`.

    Its function of the same name would not call it on a GPU where deterministic algorithms are asked for, as
    Ultralytics does, but compile a version in Python: one with other values across the border of the map, that
    computes crops outside it, and with `samples` 0 as many points a bin as the map has cells. The operator's backward
    pass adds up in no fixed order there, so that a run on a GPU is not repeated to the last bit.
    """
    return torch.ops.torchvision.roi_align(feature, rois, 1 / stride, size, size, samples, aligned)


def _by_cells(feature: Tensor, samples: int) -> bool:
    """Whether RoIAlign is computed by `_sums_of_cells`; an exported graph has its operator."""
    exported = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    return feature.device.type == "cpu" and samples > 0 and not exported


def _sums_of_cells(
    features: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    size: int,
    *,
    strides: Sequence[int],
    samples: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of several maps, whose cells stand behind each other in one table; arguments as of `roi_crops`.

    Args:
        features: L maps (B, C, H_l, W_l).
        rois: (N, 5).
        level: (N,) index of the map of each.
        size: Height and width of a crop.
        strides: Of each map.
        samples: Points a bin and axis.
        aligned: Shift by half a cell.
    """
    cells = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in features]  # (B*H*W, C): views in channels_last
    first = list(accumulate((len(x) for x in cells[:-1]), initial=0))  # row of each map's first cell
    shapes = [(start, *x.shape[-2:]) for start, x in zip(first, features, strict=True)]
    start, height, width = torch.tensor(shapes, dtype=torch.int32)[level][..., None, None].unbind(1)  # (N, 1, 1)
    boxes = rois[:, 1:] / torch.tensor(strides, dtype=rois.dtype)[level, None] - (0.5 if aligned else 0.0)
    length = boxes[:, 2:] - boxes[:, :2]  # (N, 2)
    length = length if aligned else length.clamp(min=1.0)  # torchvision's: a crop of at least one cell
    columns, x_weight = _samples(boxes[:, 0], length[:, 0], size, samples, width)  # (N, size, S)
    rows, y_weight = _samples(boxes[:, 1], length[:, 1], size, samples, height)
    rows = start + (rois[:, 0, None, None].int() * height + rows) * width
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (N, size, size, S, S)
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    crops = F.embedding_bag(
        index.flatten(3).flatten(0, 2),
        torch.cat(cells) if len(cells) > 1 else cells[0],
        per_sample_weights=weights.flatten(3).flatten(0, 2),
        mode="sum",
    )  # (N*size*size, C)
    return crops.view(len(rois), size, size, crops.shape[1]).permute(0, 3, 1, 2)


@torch.no_grad()
def _samples(start: Tensor, length: Tensor, size: int, samples: int, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis, (N, size, S) cells that each bin reads and their weights: of bilinear samples, S = 2 * samples.

    Args:
        start: (N,) of the crops, in cells.
        length: (N,) likewise.
        size: Bins of a crop.
        samples: Points of a bin.
        cells: (N, 1, 1) of the map.
    """
    bin_length = (length / size)[:, None, None]
    step, part = torch.arange(size)[:, None], torch.arange(samples) + 0.5
    at = start[:, None, None] + step * bin_length + part * bin_length / samples  # (N, size, samples)
    inside = (at >= -1) & (at <= cells)  # of NaN nowhere
    at = at.where(inside, 0.0).clamp(min=0).minimum((cells - 1).to(at))
    low = at.floor()
    high = (low + 1).minimum((cells - 1).to(at))
    weight = torch.stack([1 - (at - low), at - low], dim=-1) * (inside.to(at) / samples)[..., None]
    return torch.stack([low, high], dim=-1).int().flatten(2), weight.flatten(2)


def roi_levels(boxes: Tensor, strides: Sequence[int], *, canonical_size: float = 224.0) -> Tensor:
    """(...) index of the level each box (..., 4) is cropped from, by its size (FPN paper, equation 1)."""
    first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    boxes = wide(boxes)
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).clamp(min=0).sqrt()
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
    if _by_cells(features[0], samples):
        maps, chosen = [x.to(dtype) for x in features], (level >= 0) & (level < len(features))  # none of NaN
        rois, level = rois[chosen], level[chosen]
        found = _sums_of_cells(maps, rois, level, size, strides=strides, samples=samples, aligned=aligned)
        return found.to(features[0].dtype)
    crops, places = [], []
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        place = (level == i).nonzero()[:, 0]  # a host sync, as roi_align takes one map a call
        crops.append(_roi_align(feature.to(dtype), rois[place], size, stride=stride, samples=samples, aligned=aligned))
        places.append(place)
    return torch.cat(crops).index_select(0, torch.cat(places).argsort()).to(features[0].dtype)
