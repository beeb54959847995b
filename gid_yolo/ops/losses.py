"""Per-element losses of the task and of the response distillation, safe under fp16 and bf16 autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gid_yolo.ops.precision import wide


def box_regression_loss(prediction: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Smooth L1 (or L1 for beta = 0) summed over four coordinates: two (..., 4) to (...), in at least float32."""
    prediction, target = wide(prediction), wide(target)
    if beta == 0:
        return (prediction - target).abs().sum(-1)
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").sum(-1)


def focal_loss(logits: Tensor, labels: Tensor, positive: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5) of (..., C) logits, summed over classes to (...), in at least float32.

    Nearly all classes of all places are background: that loss is computed of all, without a target of the logits' size,
    and exchanged for the object's at the one label of a positive place.

    Args:
        logits: (..., C).
        labels: (...) class of each place; any class where it is not positive.
        positive: (...) bool.
        alpha: Weight of the object class; 1 - alpha of all others.
        gamma: Focusing parameter.
    """
    logits = wide(logits)
    own = logits.gather(-1, labels[..., None])[..., 0]
    as_object = alpha * (-own).sigmoid().pow(gamma) * F.softplus(-own)
    exchanged = as_object - (1 - alpha) * own.sigmoid().pow(gamma) * F.softplus(own)
    background = (logits.sigmoid().pow(gamma) * F.softplus(logits)).sum(-1)
    return (1 - alpha) * background + exchanged.where(positive, 0.0)


def giou_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019) of two (..., 4) of xyxy boxes.

    Returns:
        (...) in at least float32, in [0, 2]; exactly 0 for two equal boxes with an area.
    """
    # torchvision's own picks the boxes that overlap by a mask, whose size the host has to wait for
    prediction, target, eps = wide(prediction), wide(target), 1e-7
    low = torch.maximum(prediction[..., :2], target[..., :2])
    high = torch.minimum(prediction[..., 2:], target[..., 2:])
    overlap = _product(high - low).where((high > low).all(-1), 0.0)
    union = _area(prediction) + _area(target) - overlap
    outer_low = torch.minimum(prediction[..., :2], target[..., :2])
    outer_high = torch.maximum(prediction[..., 2:], target[..., 2:])
    hull = _product(outer_high - outer_low)
    return 1 - overlap / union.clamp(min=eps) + (hull - union) / hull.clamp(min=eps)


def _area(boxes: Tensor) -> Tensor:
    return _product(boxes[..., 2:] - boxes[..., :2])


def _product(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]  # the gradient of `prod` looks for zeros and has the host wait for them


def soft_bce(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Binary cross entropy of (..., C) logits with the others' probabilities, summed to (...) in at least float32."""
    target = wide(target_logits).sigmoid()
    return F.binary_cross_entropy_with_logits(wide(logits), target, reduction="none").sum(-1)


def mean_over_images(per_element: Tensor, weight: Tensor) -> Tensor:
    """Average a loss within each image, then over the batch.

    Every loss of the distillation is normalised this way: it makes the loss of a batch the mean of the losses of its
    images, whatever way they are spread over processes (of features that were standardised before, over all images of a
    process, it does not). The tasks' losses follow each detector's own definition.

    Args:
        per_element: (B, N) losses.
        weight: (B, N) bool, the elements that count; an image where none does contributes exactly 0.
    """
    count = weight.sum(1).clamp(min=1)
    return (per_element.where(weight, 0.0).sum(1) / count).mean()
