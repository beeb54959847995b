"""Anchor boxes on the cells of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gid_yolo.ops.precision import wide

FIXED_POINT = 2**16  # parts of a pixel


def to_fixed_point(cells: Tensor) -> Tensor:
    """Anchors as int32 in 1 / 65536 px, which no conversion of a model to half precision touches.

    Raises:
        ValueError: A corner that int32 cannot hold.
    """
    if cells.abs().max() >= 2**31 // FIXED_POINT:
        raise ValueError(f"anchors reach {float(cells.abs().max()):g} px from their cell, which must be under 32768.")
    return (cells.double() * FIXED_POINT).round().int()


def from_fixed_point(cells: Tensor) -> Tensor:
    """Invert `to_fixed_point`, in float32."""
    return cells.float() / FIXED_POINT


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], *, whole: bool = True) -> Tensor:
    """Anchors of one cell, centred at the origin: (len(aspect_ratios) * len(sizes), 4) xyxy pixels.

    The order is ratio-major, as in torchvision's `AnchorGenerator`, so that its weights mean the same here.

    Args:
        sizes: Square roots of the anchor areas, in pixels.
        aspect_ratios: Height over width.
        whole: Round the corners to whole pixels, as torchvision does; detectron2 and mmdetection do not.

    Raises:
        ValueError: Anchors without an area, to which no box can be compared.
    """
    size = torch.as_tensor(sizes, dtype=torch.float32)
    height_scale = torch.as_tensor(aspect_ratios, dtype=torch.float32).sqrt()
    width = ((1 / height_scale)[:, None] * size[None, :]).flatten()  # (ratios * sizes,)
    height = (height_scale[:, None] * size[None, :]).flatten()
    corners = torch.stack([-width, -height, width, height], dim=1) / 2
    corners = corners.round() if whole else corners
    if not bool((corners[:, 2:] > corners[:, :2]).all()):
        raise ValueError(f"anchors of sizes {list(sizes)} and aspect ratios {list(aspect_ratios)} have no area.")
    return corners


def grid_anchors(
    cells: Tensor, features: Sequence[Tensor], strides: Sequence[int], *, fit_to: Sequence[int] | None = None
) -> Tensor:
    """Place each level's cell anchors on every cell of its feature map.

    The top-left cell of each level is centred at (0, 0), the convention of Faster R-CNN's and RetinaNet's released
    code (and of torchvision).

    Args:
        cells: (L, A, 4) cell anchors per level, xyxy pixels.
        features: L maps (B, C, H, W); their sizes stay symbolic in an exported graph with dynamic axes.
        strides: Pixels per cell of each level.
        fit_to: (height, width) of the image, to step by image size over map size rounded down instead: torchvision's
            models are trained so. It differs from the stride where that does not divide the image (P7 of 320 px: 106).

    Returns:
        (R, 4) xyxy pixels, R = sum of H * W * A over levels, in the order level, row, column, anchor.
    """
    levels = []
    cells = wide(cells)  # a model in half precision has its buffers in it too, which no coordinate fits
    for cell, feature, stride in zip(cells, features, strides, strict=True):
        height, width = feature.shape[-2:]
        step_y, step_x = (fit_to[0] // height, fit_to[1] // width) if fit_to else (stride, stride)
        y = torch.arange(height, device=cell.device) * step_y
        x = torch.arange(width, device=cell.device) * step_x
        y, x = torch.meshgrid(y, x, indexing="ij")
        shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4).to(cell.dtype)  # (H*W, 1, 4)
        levels.append((shift + cell).reshape(-1, 4))  # (H*W*A, 4)
    return torch.cat(levels)
