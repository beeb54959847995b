"""Per-element losses of the task and of the response distillation, safe under fp16 and bf16 autocast."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss


def box_regression_loss(prediction: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Smooth L1 (or L1 for beta = 0) summed over the four coordinates: (..., 4) and (..., 4) to (...), in fp32."""
    prediction, target = prediction.float(), target.float()
    if beta == 0:
        return (prediction - target).abs().sum(-1)
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").sum(-1)


def giou_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019) of two (..., 4) of xyxy boxes, (...) in fp32, in [0, 2]."""
    return generalized_box_iou_loss(prediction.float(), target.float())


def mean_over_images(per_element: Tensor, weight: Tensor) -> Tensor:
    """Average a loss within each image, then over the batch.

    Every loss of the project is normalised this way: it makes the loss of a batch the mean of the losses of its
    images, whatever way they are spread over processes.

    Args:
        per_element: (B, N) losses.
        weight: (B, N) bool, the elements that count; an image where none does contributes exactly 0.
    """
    count = weight.sum(1).clamp(min=1)
    return (per_element.where(weight, 0.0).sum(1) / count).mean()
