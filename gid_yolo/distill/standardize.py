"""Features of mean 0 and variance 1 in every channel before they are compared, as PKD has them (Cao et al. 2022).

A pyramid without normalisation has features of any size: those of our teachers have a standard deviation of 5 on one
level and of 35 on another. Squared, one level then drowns the others, and the feature term all others; the paper's
weights are for features of about 1. The distance of two standardised features is 2 (1 - r), r being Pearson's
correlation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gid_yolo.ops.precision import wide

# As they are; crops of both over all levels together; maps of both, or of the teacher alone, each level for itself
STANDARDIZE = ("raw", "crops", "maps", "teacher")
_SMALLEST = 1e-6  # of a variance


def standardized_maps(pyramid: Sequence[Tensor]) -> list[Tensor]:
    """Each level for itself, over all places of all images of the batch.

    Args:
        pyramid: L maps (B, C_l, H_l, W_l).

    Returns:
        The same shapes in at least float32; 0 for a channel that does not vary.
    """
    found = []
    for level in pyramid:
        x = wide(level)
        centred = x - x.mean((0, 2, 3), keepdim=True)  # (B, C, H, W) - (1, C, 1, 1)
        variance = centred.square().mean((0, 2, 3), keepdim=True)
        found.append(centred * (variance + _SMALLEST).rsqrt())
    return found


def standardized_crops(crops: Tensor, valid: Tensor) -> Tensor:
    """Over all places of all instances of the batch.

    Args:
        crops: (B, K, C, h, w).
        valid: (B, K).

    Returns:
        (B, K, C, h, w) in at least float32; 0 for a channel that does not vary, and without instances.
    """
    x, mask = wide(crops), valid[:, :, None, None, None].to(torch.promote_types(crops.dtype, torch.float32))
    count = (valid.sum() * crops.shape[-2] * crops.shape[-1]).clamp(min=1)
    mean = (x * mask).sum((0, 1, 3, 4), keepdim=True) / count  # (1, 1, C, 1, 1)
    centred = (x - mean) * mask
    variance = centred.square().sum((0, 1, 3, 4), keepdim=True) / count
    return centred * (variance + _SMALLEST).rsqrt()
