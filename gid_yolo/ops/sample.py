"""Choosing a few of many anchors or proposals to train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gid_yolo.ops.precision import wide

_SCATTER = 1.618, 2.236, 2.646, 3.317  # as if irrational, so that neighbouring boxes have keys far apart


@dataclass(frozen=True)
class SampleRule:
    """Which anchors or proposals of an image are trained on.

    Attributes:
        positive_iou: IoU with an object from which one is positive.
        negative_iou: IoU with all objects under which one is background; between the two it is left out.
        count: How many to draw from an image.
        positive_share: Largest share of positives among them.
    """

    positive_iou: float
    negative_iou: float
    count: int
    positive_share: float


def random_keys(like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) of the shape of `like`: what `balanced_sample` draws its order from."""
    return torch.rand(like.shape, device=like.device)


def keys_of_boxes(boxes: Tensor) -> Tensor:
    """(B, R) numbers in [0, 1) that follow from boxes (B, R, 4), xyxy in pixels: as `random_keys`, without a draw."""
    # Four products: a tensor of the factors would be copied to a GPU, which waits for it
    products = (corner * factor for corner, factor in zip(wide(boxes).unbind(-1), _SCATTER, strict=True))
    return sum(products, start=boxes.new_zeros(())).frac().abs()


def balanced_sample(positive: Tensor, negative: Tensor, keys: Tensor, rule: SampleRule) -> tuple[Tensor, Tensor]:
    """Draw up to `rule.count` elements of every image, positives first (Faster R-CNN, section 3.1.3).

    At most `rule.positive_share` of that number are positives; negatives fill up what is left. Where there are too few
    of either, fewer are drawn. The elements of highest key are drawn, so that random keys make a random sample without
    a loop over images or a host sync.

    Args:
        positive: (B, R) bool.
        negative: (B, R) bool, nowhere true where `positive` is; elements that are neither are never drawn.
        keys: (B, R) numbers in [0, 1), e.g. `random_keys`.
        rule: How many to draw.

    Returns:
        (B, N) index into R and (B, N) True where it counts, N = min(rule.count, R), positives first.
    """
    total = keys.shape[1]
    allowed = min(int(rule.count * rule.positive_share), total)
    best = keys.masked_fill(~positive, -1.0).topk(allowed, dim=1)
    chosen = torch.zeros_like(positive).scatter(1, best.indices, best.values >= 0)  # (B, R)
    rank = (keys + 1.0).where(chosen, keys.masked_fill(~negative, -1.0))
    drawn = rank.topk(min(rule.count, total), dim=1)
    return drawn.indices, drawn.values >= 0
