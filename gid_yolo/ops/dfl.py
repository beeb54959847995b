"""Box coding of YOLO's heads: distances from a point to the four sides, each as a distribution over bins."""

from __future__ import annotations

import torch
from torch import Tensor

from gid_yolo.ops.points import decode_ltrb
from gid_yolo.ops.precision import wide


def decode_dfl(regression: Tensor, priors: Tensor) -> Tensor:
    """Boxes from the distances' distributions (Generalized Focal Loss, Li et al. 2020, equation 5).

    Args:
        regression: (..., R, 4 * n), for each side the logits of the distances 0 to n - 1 in sides of the prior; for
            n = 1 the distances themselves.
        priors: (R, 4) xyxy squares of the points.

    Returns:
        (..., R, 4) xyxy in pixels, in at least float32.
    """
    bins = regression.shape[-1] // 4
    if bins == 1:
        return decode_ltrb(regression, priors)
    logits = wide(regression).unflatten(-1, (4, bins))
    distance = torch.arange(bins, device=logits.device, dtype=logits.dtype)
    # Not a matrix product: autocast would round it to half precision, by 1 px of a distance of 400
    return decode_ltrb((logits.softmax(-1) * distance).sum(-1), priors)
