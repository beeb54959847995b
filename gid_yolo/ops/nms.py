"""Greedy non-maximum suppression of padded batches: fixed shapes, and the same in an exported graph."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms


def best_first(scores: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` valid elements of highest score of every row, best first, of equal ones the lower index.

    Args:
        scores: (B, N), finite where valid.
        valid: (B, N) bool.
        count: Elements to return; N may be smaller.

    Returns:
        (B, count) index into N, 0 where there is none, and (B, count) True where there is one.
    """
    # Padded by `count`, so that top-k has enough to choose from whatever N is in a graph with dynamic axes
    padded = F.pad(scores.masked_fill(~valid, -math.inf), (0, count), value=-math.inf)
    if torch.onnx.is_in_onnx_export():
        values, index = padded.topk(count, dim=1)  # ONNX defines the order of equal values, PyTorch does not
    else:
        values, index = (x[:, :count] for x in padded.sort(dim=1, descending=True, stable=True))
    found = values > -math.inf
    return index.masked_fill(~found, 0), found


@torch.no_grad()
def grouped_nms(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """NMS within each of G groups, e.g. the classes or the pyramid levels of all images of a batch.

    Args:
        boxes: (G, N, 4) xyxy.
        scores: (G, N), finite where valid.
        valid: (G, N) bool; the rest neither stays nor suppresses.
        iou_threshold: Boxes that overlap a better one by more are dropped.

    Returns:
        (G, N) True for boxes that stay.
    """
    count = scores.shape[1]
    if torch.onnx.is_in_onnx_export():
        least = torch.finfo(torch.float32).min
        scores = scores.float().masked_fill(~valid, -math.inf)[:, None]  # (G, 1, N)
        chosen = _OnnxNMS.apply(boxes.float(), scores, iou_threshold, least, None)  # (S, 3)
        kept = chosen[:, 0] * count + chosen[:, 2]
    else:
        kept = _kept(boxes, scores, valid, iou_threshold)
    return torch.zeros_like(valid).flatten().scatter(0, kept, torch.ones_like(kept, dtype=torch.bool)).view_as(valid)


def _kept(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """(S,) index of the boxes that stay into the flattened groups."""
    # A host sync; torchvision's operator, whose result is of unknown length as well, has one of its own. Only valid
    # boxes are passed on, as its time is quadratic.
    index = valid.flatten().nonzero()[:, 0]
    boxes, scores = boxes.flatten(0, 1)[index], scores.flatten()[index]
    if boxes.device.type != "mps":  # which has no float64
        # torchvision moves groups apart by adding to their coordinates: in float32 a thousand groups (images times
        # classes) of 640 px would leave 1/16 px of accuracy.
        boxes, scores = boxes.double(), scores.double()
    return index[batched_nms(boxes, scores, index // valid.shape[1], iou_threshold)]


@torch.no_grad()
def class_nms(boxes: Tensor, scores: Tensor, *, min_score: float, iou_threshold: float, max_det: int) -> Tensor:
    """NMS within each class of each image of boxes that classes share, and the best of what is left.

    Args:
        boxes: (B, R, 4) xyxy.
        scores: (B, C, R); one box can be a detection of several classes.
        min_score: Scores must be over it.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped.
        max_det: Detections of an image D.

    Returns:
        (B, D, 6) box, score and class, by falling score; rows of zeros where an image has fewer.
    """
    boxes, scores = boxes.float(), scores.float()
    if torch.onnx.is_in_onnx_export():
        # A class cannot have more than `max_det` among the best `max_det` of all, so that none is lost by the limit
        chosen = _OnnxNMS.apply(boxes, scores, iou_threshold, min_score, max_det)  # (S, 3)
    else:
        chosen = _chosen(boxes, scores, iou_threshold, min_score)
    image, label, box = chosen.unbind(1)
    stable = {} if torch.onnx.is_in_onnx_export() else {"stable": True}  # as ONNX' own order of equal values is
    score, order = scores[image, label, box].sort(dim=0, descending=True, **stable)
    image, label, box = image[order], label[order], box[order]
    # The rank of a detection in its image is how many of that image have come so far
    ours = image[:, None] == torch.arange(scores.shape[0], device=image.device)  # (S, B)
    rank = ours.long().cumsum(0).gather(1, image[:, None])[:, 0] - 1
    rows = torch.cat([boxes[image, box], score[:, None], label[:, None].to(score)], dim=1)  # (S, 6)
    # What is beyond the limit goes to one slot more, which is cut off; fixed shapes, whatever S is
    slot = image * (max_det + 1) + rank.clamp(max=max_det)
    padded = scores.new_zeros(scores.shape[0] * (max_det + 1), 6)
    return padded.scatter(0, slot[:, None].expand(-1, 6), rows).view(-1, max_det + 1, 6)[:, :max_det]


def _chosen(boxes: Tensor, scores: Tensor, iou_threshold: float, min_score: float) -> Tensor:
    """(S, 3) image, class and box of what stays, in no promised order."""
    candidates = (scores > min_score).nonzero()  # (N, 3); a host sync, as in `_kept`
    image, label, box = candidates.unbind(1)
    chosen, ranks = boxes[image, box], scores[image, label, box]
    if boxes.device.type != "mps":
        chosen, ranks = chosen.double(), ranks.double()
    if len(chosen):
        chosen = chosen - chosen.amin()  # torchvision moves groups apart by the largest coordinate: from 0 on
    return candidates[batched_nms(chosen, ranks, image * scores.shape[1] + label, iou_threshold)]


class _OnnxNMS(torch.autograd.Function):
    """ONNX' own operator, which knows images and classes: torchvision's export of `batched_nms` knows one group."""

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float, min_score: float, most: int | None
    ) -> Tensor:
        """(S, 3) image, class and index of the boxes that stay."""
        return _chosen(boxes, scores, iou_threshold, min_score)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float, min_score: float, most: int | None) -> Any:
        """The node in the graph; at most `most` boxes of a class of an image stay."""
        limits = float(iou_threshold), float(min_score)  # whole numbers would be constants of another type
        values = (torch.iinfo(torch.int64).max if most is None else most, *limits)
        return g.op("NonMaxSuppression", boxes, scores, *(g.op("Constant", value_t=torch.tensor([v])) for v in values))
