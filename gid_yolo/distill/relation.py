"""Section 3.3: relation-based distillation, equation 6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gid_yolo.ops.precision import wide

MANY = 32  # instances from which on the product form is the faster one
COINCIDING = 1e-13  # squared distance over squared size under which float64 holds no digit of it


def distances(flat: Tensor) -> Tensor:
    """Euclidean distances of all pairs in an image: (B, K, D) to (B, K, K), of the same dtype.

    Differences cost K^2 D additions that no hardware is fast at. Of many instances |a - b|^2 = |a|^2 + |b|^2 - 2ab is
    taken, a matrix product; in float64, for in float32 it loses all digits where two instances nearly coincide.
    """
    if flat.shape[1] <= MANY or flat.device.type == "mps":  # which has no float64
        return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    x = flat.double()
    size = x.square().sum(-1)
    sizes = size[:, :, None] + size[:, None, :]  # (B, K, K)
    squared = torch.baddbmm(sizes, x, x.transpose(1, 2), alpha=-2)
    apart = squared > COINCIDING * sizes
    return squared.where(apart, 1.0).sqrt().where(apart, 0.0).to(flat.dtype)  # no infinite slope at a distance of 0


def normalised_distances(features: Tensor, pairs: Tensor) -> Tensor:
    """Euclidean distances between the instances of each image, divided by their mean phi.

    Args:
        features: (B, K, C, h, w).
        pairs: (B, K, K) bool, the pairs i != j of real instances.

    Returns:
        (B, K, K) in at least float32; 0 where not a pair.
    """
    distance = distances(wide(features).flatten(2)).where(pairs, 0.0)
    phi = distance.sum((1, 2), keepdim=True) / pairs.sum((1, 2), keepdim=True).clamp(min=1)  # (B, 1, 1)
    return distance / phi.clamp(min=1e-6)


def relation_loss(teacher: Tensor, student: Tensor, valid: Tensor, *, reduction: str = "mean") -> Tensor:
    """Equation 6: smooth L1 between the normalised distances of teacher and student.

    Args:
        teacher: (B, K, C, h, w).
        student: (B, K, C, h, w), already adapted.
        valid: (B, K).
        reduction: `sum` over pairs as the equation is written, `mean` over pairs as the authors' released code does.

    Returns:
        Scalar, the mean over images; exactly 0, with a graph, for images with fewer than 2 instances.
    """
    if reduction not in {"mean", "sum"}:
        raise ValueError(f"reduction={reduction} must be mean or sum.")
    k = valid.shape[1]
    pairs = valid[:, :, None] & valid[:, None, :] & ~torch.eye(k, dtype=torch.bool, device=valid.device)  # (B, K, K)
    with torch.autocast(student.device.type, enabled=False):  # distances are not rounded
        target = normalised_distances(teacher, pairs).detach()
        loss = F.smooth_l1_loss(normalised_distances(student, pairs), target, reduction="none").sum((1, 2))  # (B,)
    if reduction == "mean":
        loss = loss / pairs.sum((1, 2)).clamp(min=1)
    return loss.mean()
