"""The region proposal network (Ren et al., Faster R-CNN, 2015, section 3.1), on a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gid_yolo.detectors.head import initialise, per_location, tower
from gid_yolo.ops.assign import BACKGROUND, match_anchors
from gid_yolo.ops.boxes import encode_deltas
from gid_yolo.ops.decode import clip_boxes
from gid_yolo.ops.losses import box_regression_loss
from gid_yolo.ops.nms import best_first, grouped_nms
from gid_yolo.ops.precision import wide
from gid_yolo.ops.processes import shared_count
from gid_yolo.ops.sample import SampleRule, balanced_sample
from gid_yolo.ops.structures import RawPredictions, Targets

MIN_SIDE = 1e-3  # pixels: torchvision's; boxes that the image's border cut away are no proposals


class RPNHead(nn.Module):
    """Objectness and deltas of every anchor, with the same weights on all levels.

    Args:
        channels: Channels of the pyramid.
        num_anchors: Anchors per cell A.
        num_convs: 3x3 convolutions before the predictions.
        norm: None or `gn`, of these convolutions.
    """

    def __init__(self, channels: int, num_anchors: int, *, num_convs: int = 1, norm: str | None = None) -> None:
        super().__init__()
        self.tower = tower(channels, num_convs, norm)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        initialise(self, norm, [self.tower])

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Map the pyramid to (B, R, 1) logits and (B, R, 4) deltas, R in the order level, row, column, anchor."""
        hidden = [self.tower(x) for x in features]
        logits = torch.cat([per_location(self.objectness(x), 1) for x in hidden], dim=1)
        return logits, torch.cat([per_location(self.deltas(x), 4) for x in hidden], dim=1)


@torch.no_grad()
def select_proposals(
    raw: RawPredictions,
    level_sizes: Sequence[int],
    height: int | Tensor,
    width: int | Tensor,
    *,
    before_nms: int,
    after_nms: int,
    nms_iou: float = 0.7,
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The boxes that the second stage looks at: the best of each level, NMS within the level, the best of those left.

    Args:
        raw: Predictions of R anchors.
        level_sizes: Anchors of each level, R in all.
        height: Of the images, in pixels; boxes are clipped to them.
        width: Likewise.
        before_nms: Anchors taken from each level.
        after_nms: Proposals of an image P, or L times `before_nms` if that is less.
        nms_iou: Threshold of the NMS.
        min_score: Objectness under which a box is no proposal.

    Returns:
        (B, P, 4) xyxy in input pixels by falling objectness, without a graph, and (B, P) True where there is one.
    """
    logits = raw.logits[..., 0].float()  # (B, R); ranked as logits, for probabilities of sure objects are all 1
    start, indices, founds = 0, [], []
    for size in level_sizes:
        level = logits[:, start : start + size]
        index, found = best_first(level, torch.ones_like(level, dtype=torch.bool), before_nms)
        indices.append(index + start)
        founds.append(found)
        start = start + size
    index, valid = torch.stack(indices, dim=1), torch.stack(founds, dim=1)  # (B, L, N)

    flat = index.flatten(1)  # (B, L*N)
    scores = logits.gather(1, flat)
    deltas = raw.regression.gather(1, flat[..., None].expand(-1, -1, 4))
    boxes = clip_boxes(raw.decoder(deltas, raw.priors[flat]), height, width)  # (B, L*N, 4)
    large = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1)
    valid = valid & (large & (scores.sigmoid() >= min_score)).view_as(valid)

    levels = index.flatten(0, 1).shape  # (B*L, N)
    keep = grouped_nms(boxes.view(*levels, 4), scores.view(levels), valid.view(levels), nms_iou).view_as(flat)
    chosen, found = best_first(scores, keep, min(after_nms, before_nms * len(level_sizes)))
    proposals = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    return proposals.masked_fill(~found[..., None], 0.0), found


def rpn_losses(
    raw: RawPredictions,
    targets: Targets,
    keys: Tensor,
    *,
    rule: SampleRule,
    beta: float,
) -> dict[str, Tensor]:
    """Losses over a sample of anchors of every image (Faster R-CNN, equation 1, with torchvision's weights).

    Args:
        raw: Predictions of R anchors.
        targets: Ground truth.
        keys: (B, R) numbers that order the sample, see `balanced_sample`.
        rule: What is positive, besides the best anchors of each object; what is background; and how many are drawn.
        beta: Turning point of smooth L1.

    Returns:
        `rpn_cls_loss`, binary cross entropy, and `rpn_box_loss`, smooth L1 of the sampled objects: both summed over
        the batch and divided by the number of sampled anchors.
    """
    matched = match_anchors(
        raw.priors, targets.boxes, targets.valid, positive_iou=rule.positive_iou, negative_iou=rule.negative_iou
    )  # (B, R)
    index, valid = balanced_sample(matched >= 0, matched == BACKGROUND, keys, rule)  # (B, N)
    matched = matched.gather(1, index)
    positive = valid & (matched >= 0)
    count = shared_count(valid.sum())

    logits = wide(raw.logits[..., 0].gather(1, index))
    entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="none")  # (B, N)

    deltas = raw.regression.gather(1, index[..., None].expand(-1, -1, 4))
    target = encode_deltas(targets.gather(matched)[1], raw.priors[index])
    box = box_regression_loss(deltas, target, beta=beta)  # (B, N)
    return {
        "rpn_cls_loss": entropy.where(valid, 0.0).sum() / count,
        "rpn_box_loss": box.where(positive, 0.0).sum() / count,
    }
