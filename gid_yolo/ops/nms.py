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
        chosen = _OnnxNMS.apply(boxes.float(), scores.float().masked_fill(~valid, -math.inf), iou_threshold)  # (S, 3)
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


class _OnnxNMS(torch.autograd.Function):
    """ONNX' own operator, which knows groups: torchvision's export of `batched_nms` knows one group only."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        """(S, 3) group, 0 and index of the boxes that stay."""
        count = scores.shape[1]
        kept = _kept(boxes, scores, scores > -math.inf, iou_threshold)
        return torch.stack([kept // count, torch.zeros_like(kept), kept % count], dim=1)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float) -> Any:
        """The node in the graph."""
        most, iou, score = (
            g.op("Constant", value_t=torch.tensor([value]))
            for value in (torch.iinfo(torch.int64).max, iou_threshold, torch.finfo(torch.float32).min)
        )
        axes = g.op("Constant", value_t=torch.tensor([1]))
        return g.op("NonMaxSuppression", boxes, g.op("Unsqueeze", scores, axes), most, iou, score)
