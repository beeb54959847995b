"""FitNet (Romero et al., FitNets: Hints for Thin Deep Nets, 2014) on feature pyramids: what the paper compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gid_yolo.ops.precision import wide


def fitnet_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Hint loss: half the squared distance of whole maps, averaged over each map's elements.

    Levels count alike: in a plain mean the finest would make up three quarters.

    Args:
        teacher: L maps (B, C, H_l, W_l), without a graph.
        student: L maps of the same shape, adapted.

    Returns:
        Scalar in at least float32.
    """
    levels = [(wide(t) - wide(s)).square().mean() / 2 for t, s in zip(teacher, student, strict=True)]
    return torch.stack(levels).mean()
