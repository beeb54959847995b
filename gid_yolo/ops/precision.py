"""What must not be computed in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in at least float32; float64 stays float64.

    float16 ends at 65504, under the area of a box of 256 px a side or the square of a feature of 256, and bfloat16
    keeps 8 bits, so that a coordinate of 500 px is off by 1 px: sums of squares, areas, coordinates, and differences of
    probabilities are computed wide. The numbers that come in have been rounded already; that error remains.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
