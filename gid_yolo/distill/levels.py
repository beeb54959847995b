"""Section 3.2: the pyramid level that an instance is cropped from, which the paper calls the matching one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torchvision.ops import box_iou

from gid_yolo.ops.blocks import blocks
from gid_yolo.ops.precision import wide

# The level rule of the FPN paper: a 224 px instance is cropped from P4, in images of 800 x 1333 px.
CANONICAL_SIZE, CANONICAL_LEVEL, CANONICAL_AREA = 224.0, 4, 800 * 1333

LEVELS = ("detector", "prediction", "size")


@dataclass(frozen=True)
class LevelRules:
    """How a student finds the level of an instance, besides by its size; levels are (B, K) indices into its pyramid.

    Attributes:
        of_predictions: Of indices (B, K) into its predictions the levels that made them.
        of_boxes: Of boxes (B, K, 4) the levels that its second stage crops them from; None where it has none.
    """

    of_predictions: Callable[[Tensor], Tensor]
    of_boxes: Callable[[Tensor], Tensor] | None = None


@torch.no_grad()
def levels_by_size(boxes: Tensor, strides: Sequence[int], image_size: tuple[int, int]) -> Tensor:
    """The level of each instance by its size (FPN paper, equation 1).

    The rule k = 4 + log2(sqrt(w h) / 224) is for images of 800 x 1333 px; 224 is scaled with the square root of the
    image's area, so that small inputs do not crop everything from the finest level.

    Args:
        boxes: (..., 4) xyxy in input pixels.
        strides: Pixels per cell of each level; the level nearest to the wanted one is taken, of equal ones the first.
        image_size: (height, width) of the input.

    Returns:
        (...) index of the level.
    """
    boxes = wide(boxes)
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=1.0)
    canonical = CANONICAL_SIZE * math.sqrt(image_size[0] * image_size[1] / CANONICAL_AREA)
    wanted = torch.floor(CANONICAL_LEVEL + torch.log2(area.sqrt() / canonical))  # level k has stride 2^k
    # One number at a time: a tensor of them would have to wait for its copy to the device
    return torch.stack([(wanted - math.log2(stride)).abs() for stride in strides]).argmin(dim=0)


@torch.no_grad()
def overlapping_predictions(instances: Tensor, predictions: Tensor) -> Tensor:
    """For instances that no prediction stands behind: of each the one that overlaps it most, of equal ones the first.

    Args:
        instances: (B, K, 4) xyxy.
        predictions: (B, R, 4) likewise.

    Returns:
        (B, K) indices into R.
    """
    found = [torch.zeros_like(instances[:, :0, 0], dtype=torch.long)]
    every = torch.ones_like(instances[..., 0], dtype=torch.bool)
    for _, some, _ in blocks(wide(instances), every, predictions.shape[1]):
        found.append(box_iou(some, wide(predictions)).nan_to_num(0.0).argmax(dim=-1))  # nan of two empty boxes
    return torch.cat(found, dim=1)


def levels_of_outputs(indices: Tensor, cells: Sequence[int], outputs: int) -> Tensor:
    """The level that made each prediction, where every cell of every level makes as many.

    Args:
        indices: Of predictions, into R, which are ordered by level.
        cells: H_l * W_l of each level.
        outputs: R.
    """
    ends = list(accumulate(count * (outputs // sum(cells)) for count in cells))
    level = torch.zeros_like(indices)
    for end in ends[:-1]:
        level = level + (indices >= end)
    return level
