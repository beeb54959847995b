"""The second stage of Faster R-CNN: classes and boxes of proposals (Girshick, Fast R-CNN, 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from gid_yolo.detectors.head import initialise, tower
from gid_yolo.ops.boxes import decode_deltas, encode_deltas
from gid_yolo.ops.decode import clip_boxes
from gid_yolo.ops.losses import box_regression_loss
from gid_yolo.ops.nms import best_first, grouped_nms
from gid_yolo.ops.precision import wide
from gid_yolo.ops.processes import shared_count
from gid_yolo.ops.sample import SampleRule, balanced_sample
from gid_yolo.ops.structures import Targets

MIN_SIDE = 1e-2  # pixels: torchvision's, for detections


class BoxHead(nn.Module):
    """Fully connected layers on the crops, and from them the classes and a box for each class.

    Args:
        channels: Channels of the pyramid.
        num_classes: Classes C; the background is one more, the last.
        crop_size: Height and width of a crop.
        width: Width of the layers.
        num_convs: 3x3 convolutions before the layers.
        num_layers: Fully connected layers before the predictions.
        norm: None or `gn`, of the convolutions.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        crop_size: int,
        width: int,
        num_convs: int = 0,
        num_layers: int = 2,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower(channels, num_convs, norm)
        initialise(self.tower, norm, [self.tower])
        widths = [channels * crop_size**2, *[width] * num_layers]
        self.layers = nn.Sequential(nn.Flatten())
        for inputs, outputs in pairwise(widths):
            self.layers.extend([nn.Linear(inputs, outputs), nn.ReLU(inplace=True)])
        self.cls_logits: Any = nn.Linear(widths[-1], num_classes + 1)
        self.box_deltas = nn.Linear(widths[-1], num_classes * 4)
        for layer, std in ((self.cls_logits, 0.01), (self.box_deltas, 0.001)):  # Fast R-CNN, section 2.3
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, channels, h, w) to (N, C + 1) logits, the background's last, and (N, C * 4) deltas."""
        hidden = self.layers(self.tower(crops))
        return self.cls_logits(hidden), self.box_deltas(hidden)

    def keep_classes(self, index: Sequence[int]) -> int:
        """Predict only some of the classes, in the order of `index`; what the others get becomes the background's.

        Returns:
            How many others there are.
        """
        kept = isinstance(self.cls_logits, nn.Sequential)  # of a second time: the sum is made anew
        own: Any = self.cls_logits[0] if kept else self.cls_logits
        rest = [i for i in range(own.out_features) if i not in set(index)]  # the background, the last, is of them
        deltas = torch.arange(self.box_deltas.out_features).view(-1, 4)[list(index)].flatten()
        logits = _rows(own, [*index, *rest])
        self.cls_logits = logits if len(rest) == 1 else nn.Sequential(logits, _SumAsLast(len(index)))
        self.box_deltas = _rows(self.box_deltas, deltas.tolist())
        return len(rest) - 1


class _SumAsLast(nn.Module):
    """Logits of the first classes, and one whose probability is the sum of the others': exact under a softmax."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, logits: Tensor) -> Tensor:
        """Map (N, C) to (N, count + 1)."""
        return torch.cat([logits[:, : self.count], logits[:, self.count :].logsumexp(1, keepdim=True)], dim=1)


def _rows(layer: nn.Linear, index: Sequence[int]) -> nn.Linear:
    """The layer with only some of its outputs, in the order of `index`."""
    some = nn.Linear(layer.in_features, len(index), device=layer.weight.device, dtype=layer.weight.dtype)
    some.load_state_dict({key: value[list(index)] for key, value in layer.state_dict().items()})
    return some


@dataclass(frozen=True)
class BoxSamples:
    """The proposals that the second stage is trained on.

    Attributes:
        boxes: (B, N, 4) xyxy.
        labels: (B, N) class of each, C for background.
        targets: (B, N, 4) the object's box; finite but arbitrary for background.
        valid: (B, N) False where an image has fewer than N.
    """

    boxes: Tensor
    labels: Tensor
    targets: Tensor
    valid: Tensor


def candidates(proposals: Tensor, valid: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """(B, P + M, 4) proposals and the objects themselves, without which nothing could be learnt at first; and valid."""
    return torch.cat([proposals, targets.boxes.to(proposals)], dim=1), torch.cat([valid, targets.valid], dim=1)


@torch.no_grad()
def sample_boxes(
    boxes: Tensor,
    valid: Tensor,
    targets: Targets,
    keys: Tensor,
    *,
    rule: SampleRule,
    num_classes: int,
) -> BoxSamples:
    """Match boxes to objects and draw the ones to train on (Fast R-CNN, section 2.3).

    Args:
        boxes: (B, P, 4) xyxy, padded.
        valid: (B, P).
        targets: Ground truth.
        keys: (B, P) numbers that order the sample, see `balanced_sample`.
        rule: What is an object, what is background, and how many are drawn.
        num_classes: Classes C.
    """
    if targets.boxes.shape[1]:
        iou = box_iou(targets.boxes.to(boxes), boxes)  # (B, M, P); NaN of two without area, which are then never drawn
        best, matched = iou.masked_fill(~targets.valid[..., None], -1.0).max(dim=1)  # (B, P)
    else:
        best, matched = torch.full_like(keys, -1.0), torch.zeros_like(keys, dtype=torch.long)
    positive, negative = valid & (best >= rule.positive_iou), valid & (best < rule.negative_iou)
    index, drawn = balanced_sample(positive, negative, keys, rule)  # (B, N)
    labels, target = targets.gather(matched.gather(1, index))
    return BoxSamples(
        boxes=boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        labels=labels.where(positive.gather(1, index) & drawn, num_classes),
        targets=target,
        valid=drawn,
    )


def box_head_losses(
    logits: Tensor, deltas: Tensor, samples: BoxSamples, *, weights: Tensor, beta: float
) -> dict[str, Tensor]:
    """Losses of the second stage (Fast R-CNN, equation 1, with torchvision's weights).

    Args:
        logits: (B, N, C + 1), the background's last.
        deltas: (B, N, C, 4), times `weights`.
        samples: What they were predicted for.
        weights: (4,) scale of the regression targets.
        beta: Turning point of smooth L1.

    Returns:
        `cls_loss`, cross entropy, and `box_loss`, smooth L1 of the deltas of the object's class: both summed over the
        batch and divided by the number of samples.
    """
    num_classes = deltas.shape[2]
    count = shared_count(samples.valid.sum())
    entropy = F.cross_entropy(wide(logits).transpose(1, 2), samples.labels, reduction="none")  # (B, N)

    positive = samples.labels < num_classes
    own = samples.labels.clamp(max=num_classes - 1)[..., None, None].expand(-1, -1, 1, 4)
    # Padding has no area and so no finite target: it must not pass a NaN on
    target = (encode_deltas(samples.targets, samples.boxes) * weights).where(positive[..., None], 0.0)
    box = box_regression_loss(deltas.gather(2, own)[:, :, 0], target, beta=beta)  # (B, N)
    return {
        "cls_loss": entropy.where(samples.valid, 0.0).sum() / count,
        "box_loss": box.where(positive, 0.0).sum() / count,
    }


def final_detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    valid: Tensor,
    height: int | Tensor,
    width: int | Tensor,
    *,
    weights: Tensor,
    min_score: float,
    nms_iou: float,
    max_det: int,
) -> Tensor:
    """Every class of every proposal over the threshold, NMS within the class, the best of those left.

    Args:
        logits: (B, P, C + 1), the background's last.
        deltas: (B, P, C, 4), times `weights`.
        proposals: (B, P, 4) xyxy.
        valid: (B, P).
        height: Of the images, in pixels; boxes are clipped to them.
        width: Likewise.
        weights: (4,) scale of the deltas.
        min_score: Scores must be over it.
        nms_iou: Threshold of the NMS.
        max_det: Detections of an image D.

    Returns:
        (B, D, 6) xyxy in pixels, score and class, by falling score; rows of zeros where an image has fewer.
    """
    num_classes = deltas.shape[2]
    scores = logits.float().softmax(-1)[..., :num_classes].transpose(1, 2)  # (B, C, P)
    boxes = decode_deltas(deltas.float() / weights, proposals[:, :, None])  # (B, P, C, 4)
    boxes = clip_boxes(boxes, height, width).transpose(1, 2)  # (B, C, P, 4)
    large = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1)
    sure = (scores > min_score) & large & valid[:, None]

    keep = grouped_nms(boxes.flatten(0, 1), scores.flatten(0, 1), sure.flatten(0, 1), nms_iou)  # (B*C, P)
    keep = keep.view_as(scores).flatten(1)  # (B, C*P)
    index, found = best_first(scores.flatten(1), keep, max_det)  # (B, D)
    boxes = boxes.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4))
    label = (index // scores.shape[2]).to(boxes)
    rows = torch.cat([boxes, scores.flatten(1).gather(1, index)[..., None], label[..., None]], dim=-1)
    return rows.masked_fill(~found[..., None], 0.0)
