"""Section 4.4.2: positive, semi-positive and negative general instances, equations 10 and 11."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_iou

from gid_yolo.ops.precision import wide
from gid_yolo.ops.structures import GeneralInstances, Targets

TYPES = ("pos", "semi", "neg")
GROUND_TRUTH = "gt"
POSITIVE_IOU, SEMI_IOP, NEGATIVE_IOP = 0.5, 0.7, 0.3


@torch.no_grad()
def classify(instances: GeneralInstances, targets: Targets) -> GeneralInstances:
    """Equation 11: the instances with their `types`, by their largest IoU and IoP with an object of their image."""
    boxes, valid = wide(instances.boxes), targets.valid[:, None]  # (B, K, 4), (B, 1, M)
    truth = targets.boxes.to(boxes)
    iou, iop = (
        F.pad(overlap.nan_to_num(0.0).masked_fill(~valid, 0.0), (0, 1)).amax(-1)  # (B, K); 0 without objects
        for overlap in (box_iou(boxes, truth), intersection_over_proposal(boxes, truth))
    )
    types = torch.full_like(instances.indices, -1)
    types = types.masked_fill(iop > SEMI_IOP, TYPES.index("semi"))
    types = types.masked_fill(iop < NEGATIVE_IOP, TYPES.index("neg"))
    types = types.masked_fill(iou > POSITIVE_IOU, TYPES.index("pos"))
    return replace(instances, types=types.masked_fill(~instances.valid, -1))


def intersection_over_proposal(boxes: Tensor, truth: Tensor) -> Tensor:
    """Equation 10: (B, K, M) the share of (B, K, 4) GI boxes that (B, M, 4) ground truth covers; 0 without area."""
    low = torch.maximum(boxes[:, :, None, :2], truth[:, None, :, :2])  # (B, K, M, 2)
    high = torch.minimum(boxes[:, :, None, 2:], truth[:, None, :, 2:])
    area = box_area(boxes.flatten(0, 1)).unflatten(0, boxes.shape[:2])[..., None]  # (B, K, 1)
    return ((high - low).clamp(min=0).prod(-1) / area).nan_to_num(0.0, posinf=0.0)


def keep_types(instances: GeneralInstances, kept: Collection[str]) -> GeneralInstances:
    """The classified instances of the types in `kept`; the others are no longer valid."""
    types = cast(Tensor, instances.types)
    wanted = [types.eq(TYPES.index(name)) & instances.valid for name in kept]
    valid = torch.stack(wanted).any(0)  # (B, K)
    return replace(
        instances,
        boxes=instances.boxes.where(valid[..., None], 0.0),
        scores=instances.scores.where(valid, 0.0),
        indices=instances.indices.where(valid, 0),
        valid=valid,
    )


def ground_truth_instances(targets: Targets) -> GeneralInstances:
    """Table 5's first column: the ground truth in place of general instances, with a score of 1."""
    return GeneralInstances(
        boxes=targets.boxes,
        scores=targets.valid.to(targets.boxes.dtype),
        indices=torch.zeros_like(targets.labels),  # no prediction stands behind them
        valid=targets.valid,
    )


def count_types(instances: GeneralInstances) -> dict[str, Tensor]:
    """How many classified instances of each type GISM found in an image, on average, before `keep_types`."""
    types = cast(Tensor, instances.types)
    return {name: types.eq(i).sum(1).float().mean() for i, name in enumerate(TYPES)}


def parse_types(text: str) -> tuple[str, ...] | None:
    """The types of a setting such as `pos+semi`, or (`gt`,); None for `all`.

    Raises:
        ValueError: A type that does not exist.
    """
    if text == "all":
        return None
    names = tuple(dict.fromkeys(text.split("+")))
    if names == (GROUND_TRUTH,):
        return names
    if unknown := [name for name in names if name not in TYPES]:
        raise ValueError(
            f"gid_types={text} names {', '.join(unknown) or 'nothing'}: give all, gt, or some of {', '.join(TYPES)} "
            "joined by +."
        )
    return names
