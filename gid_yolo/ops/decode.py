"""Raw predictions to detections in Ultralytics' layout."""

from __future__ import annotations

import torch
from torch import Tensor

from gid_yolo.ops.boxes import xyxy_to_xywh
from gid_yolo.ops.structures import RawPredictions


def clip_boxes(boxes: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Clip (..., 4) xyxy boxes to the image; sizes may be tensors, as they are while a dynamic graph is traced."""
    height, width = (n.to(boxes) if isinstance(n, Tensor) else boxes.new_full((), n) for n in (height, width))
    limit = torch.stack([width, height, width, height])
    return boxes.clamp(min=0).minimum(limit)


def dense_detections(raw: RawPredictions, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Detections of a dense head, NMS left to the caller.

    Args:
        raw: Predictions for R boxes and C classes.
        height: Of the images, in pixels; boxes are clipped to them.
        width: Likewise.

    Returns:
        (B, 4 + C, R): centre x, centre y, width, height in input pixels, then the confidences of the classes.
    """
    boxes = clip_boxes(raw.boxes, height, width)
    return torch.cat([xyxy_to_xywh(boxes), raw.confidences.to(boxes.dtype)], dim=-1).transpose(1, 2)
