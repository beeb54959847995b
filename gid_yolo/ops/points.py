"""The points of a feature pyramid: which box each answers for, how it codes a box, and how central it lies in it.

A point is the centre of a square prior whose side is its level's stride. One anchor of that size in every cell
(`grid_anchors`) so stands for the points of FCOS (Tian et al. 2019), and carries with it the scale of its level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gid_yolo.ops.assign import BACKGROUND
from gid_yolo.ops.blocks import blocks
from gid_yolo.ops.precision import wide

# Of a distance in pixels: no image is as large, and its exponential keeps boxes and their areas finite in float32
MAX_LOG_DISTANCE = math.log(1e5)


def ltrb_distances(boxes: Tensor, priors: Tensor) -> Tensor:
    """(..., 4) pixels from the priors' centres to the left, top, right and bottom of boxes, in at least float32.

    Both are (..., 4) xyxy and broadcastable; a distance is negative where the point lies beyond that side (FCOS,
    equation 1).
    """
    boxes, point = wide(boxes), _centres(wide(priors))
    return torch.cat([point - boxes[..., :2], boxes[..., 2:] - point], dim=-1)


def encode_ltrb(boxes: Tensor, priors: Tensor) -> Tensor:
    """The regression target of `boxes`: `ltrb_distances` over the sides of the priors, both (..., 4) xyxy."""
    return ltrb_distances(boxes, priors) / _sides(priors)


def decode_ltrb(ltrb: Tensor, priors: Tensor) -> Tensor:
    """Invert `encode_ltrb`: (..., R, 4) on (R, 4) priors to xyxy boxes in pixels, in at least float32."""
    distance, point = wide(ltrb) * _sides(priors), _centres(wide(priors))
    return torch.cat([point - distance[..., :2], point + distance[..., 2:]], dim=-1)


def decode_log_ltrb(logs: Tensor, priors: Tensor) -> Tensor:
    """(..., R, 4) logarithms of `ltrb_distances` (FCOS, section 3.1) on (R, 4) priors to xyxy boxes in pixels."""
    distance, point = wide(logs).clamp(max=MAX_LOG_DISTANCE).exp(), _centres(wide(priors))
    return torch.cat([point - distance[..., :2], point + distance[..., 2:]], dim=-1)


@torch.no_grad()
def centerness_target(boxes: Tensor, priors: Tensor) -> Tensor:
    """(...) sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), FCOS' equation 3, of (..., 4) boxes and priors.

    It is 1 in the middle of a box and falls to 0 at its sides, beyond them and for boxes without area.
    """
    low, high = ltrb_distances(boxes, priors).split(2, dim=-1)  # (l, t), (r, b)
    # A point in no box has distances of either sign or none at all: its target stays finite, for a NaN would pass
    # through the mask of the loss into the gradient.
    far = torch.maximum(low, high).clamp(min=torch.finfo(low.dtype).tiny)
    ratio = torch.minimum(low, high).clamp(min=0.0) / far
    return (ratio[..., 0] * ratio[..., 1]).sqrt()


def match_points(
    priors: Tensor,
    boxes: Tensor,
    valid: Tensor,
    *,
    radius: float = 1.5,
    level_ranges: Sequence[float] = (4.0, 8.0),
) -> Tensor:
    """Assign every point of every image to a box (FCOS, sections 3.1 and 3.2, with centre sampling).

    A point is a candidate of a box if it lies inside the box, nearer to its centre than `radius` strides on both
    axes, and if its largest distance to a side is in the range of its level. Of several boxes it takes the smallest
    (the first of equals).

    Args:
        priors: (R, 4) xyxy squares of the points.
        boxes: (B, M, 4) xyxy, padded; M may be 0.
        valid: (B, M) True for real boxes.
        radius: Half the side of the centre region, in strides; infinity turns centre sampling off.
        level_ranges: Bounds of max(l, t, r, b), exclusive, in strides; the finest level has no lower bound and the
            coarsest no upper one.

    Returns:
        (B, R) index into M, or BACKGROUND (-1).
    """
    if boxes.shape[1] == 0:
        return priors.new_full((boxes.shape[0], priors.shape[0]), BACKGROUND).long()
    boxes, priors = wide(boxes), wide(priors)
    stride = priors[:, 2] - priors[:, 0]  # (R,)
    # A level's stride is twice the one before; sides of shifted priors are rounded, and so are not equal
    lower = (level_ranges[0] * stride).masked_fill(stride < 1.5 * stride.amin(), 0.0)
    upper = (level_ranges[1] * stride).masked_fill(1.5 * stride > stride.amax(), math.inf)

    shape = boxes.shape[0], priors.shape[0]
    smallest, index = boxes.new_full(shape, math.inf), boxes.new_full(shape, BACKGROUND, dtype=torch.long)
    for start, some, real in blocks(boxes, valid, len(priors)):
        distance = ltrb_distances(some[:, :, None], priors)  # (B, m, R, 4)
        nearest, farthest = distance.aminmax(dim=-1)  # (B, m, R)
        off_centre = (_centres(priors) - _centres(some)[:, :, None]).abs().amax(-1)  # (B, m, R)
        candidate = (nearest > 0) & (off_centre < radius * stride) & (farthest > lower) & (farthest < upper)
        area = (some[..., 2:] - some[..., :2]).prod(-1)[..., None]  # (B, m, 1)
        value, place = area.where(candidate & real[..., None], math.inf).min(dim=1)  # (B, R)
        index = torch.where(value < smallest, place + start, index)
        smallest = torch.minimum(value, smallest)
    return index


def points_inside(priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """(B, R) True where the point of a prior (R, 4) lies inside one of `boxes` (B, M, 4), on whatever level.

    Equation 7 of GID for FCOS: neither the centre region nor the range of the level counts, for a general instance
    was predicted by a point of one level, which that range need not allow.
    """
    inside = torch.zeros(boxes.shape[0], priors.shape[0], dtype=torch.bool, device=boxes.device)
    for _, some, real in blocks(boxes, valid, len(priors)):
        inside |= ((ltrb_distances(some[:, :, None], priors).amin(-1) > 0) & real[..., None]).any(dim=1)  # (B, R)
    return inside


def _centres(boxes: Tensor) -> Tensor:
    """(..., 2) of (..., 4) xyxy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _sides(priors: Tensor) -> Tensor:
    """(..., 4) width, height, width, height."""
    priors = wide(priors)
    size = priors[..., 2:] - priors[..., :2]
    return torch.cat([size, size], dim=-1)
