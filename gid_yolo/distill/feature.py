"""Section 3.2: feature-based distillation, equations 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gid_yolo.distill.levels import levels_by_size
from gid_yolo.ops.losses import mean_over_images
from gid_yolo.ops.precision import wide
from gid_yolo.ops.roi_pool import roi_crops

OUTSIDE = -1e6  # pixels; RoIAlign neither reads nor writes for a sample over one cell outside its map
MOST_EVERYWHERE = 1024  # instances of a batch; of more, each is cropped on its own level alone


@dataclass(frozen=True)
class RoIPlan:
    """Which instance is cropped from which pyramid level; teacher and student share it.

    Attributes:
        rois: Per level, (N_l, 5): image index and xyxy in input pixels; the level's own instances. On a GPU, up to
            `MOST_EVERYWHERE`, all of them, those of other levels outside the image, where a crop is 0.
        restore: (B * K,) position of each instance in the concatenation of all levels.
        shape: (B, K).
    """

    rois: tuple[Tensor, ...]
    restore: Tensor
    shape: tuple[int, int]


@torch.no_grad()
def plan_rois(
    boxes: Tensor, strides: Sequence[int], image_size: tuple[int, int], level: Tensor | None = None
) -> RoIPlan:
    """What is cropped from which level.

    Args:
        boxes: (B, K, 4) xyxy in input pixels; one that is not finite counts as (0, 0, 0, 0).
        strides: Pixels per cell of each level.
        image_size: (height, width) of the input.
        level: (B, K) index of each instance's level; by its size where None, see `levels_by_size`.
    """
    batch, k = boxes.shape[:2]
    boxes = wide(boxes)
    # At a NaN or an infinite corner RoIAlign reads outside its map, which ends the process without a word
    boxes = boxes.where(boxes.isfinite().all(-1, keepdim=True), 0.0)
    image = torch.arange(batch, device=boxes.device, dtype=boxes.dtype).repeat_interleave(k)  # (B*K,)
    flat = boxes.reshape(-1, 4)
    level = (levels_by_size(boxes, strides, image_size) if level is None else level).flatten()  # (B*K,)
    # roi_align takes one map a call; how many of the instances are a level's own, a GPU's host would have to wait for
    wait = boxes.device.type == "cpu" or len(flat) > MOST_EVERYWHERE
    spread = own_level if wait else every_level
    rois, restore = spread(torch.cat([image[:, None], flat], dim=1), level, len(strides))
    return RoIPlan(rois, restore, shape=(batch, k))


def own_level(rois: Tensor, level: Tensor, levels: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every (N, 5) instance on its (N,) level alone; the host knows how many are where. See `RoIPlan`."""
    order = level.argsort(stable=True)
    counts = torch.bincount(level, minlength=levels).tolist()
    return rois[order].split(counts), order.argsort()


def every_level(rois: Tensor, level: Tensor, levels: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every (N, 5) instance on all levels, outside the image where the (N,) level is another. See `RoIPlan`."""
    outside = torch.cat([rois[:, :1], torch.full_like(rois[:, 1:], OUTSIDE)], dim=1)  # (N, 5)
    spread = tuple(torch.where((level == i)[:, None], rois, outside) for i in range(levels))
    return spread, level * len(rois) + torch.arange(len(rois), device=rois.device)


def roi_features(
    pyramid: Sequence[Tensor],
    plan: RoIPlan,
    strides: Sequence[int],
    *,
    size: int = 10,
    adapt: PyramidAdaptation | None = None,
) -> Tensor:
    """Crop every instance from its level with RoIAlign (aligned, 2 x 2 samples a bin).

    Args:
        pyramid: L maps (B, C_l, H_l, W_l).
        plan: From `plan_rois`.
        strides: Pixels per cell of each level.
        size: Height h and width w of a crop.
        adapt: Equation 5 for a pyramid whose levels differ in channels.

    Returns:
        (B, K, C, h, w) with C the largest C_l; narrower levels are filled up with zeros, which change no distance.
    """
    dtype = torch.promote_types(pyramid[0].dtype, torch.float32)  # half precision cannot hold a coordinate of 500 px
    crops = [
        roi_crops(feature.to(dtype), rois.to(dtype), size, stride=stride, samples=2, aligned=True)
        for feature, rois, stride in zip(pyramid, plan.rois, strides, strict=True)
    ]
    if adapt is not None:
        crops = adapt(crops)
    channels = max(x.shape[1] for x in crops)
    filled = [x if x.shape[1] == channels else F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1])) for x in crops]
    return torch.cat(filled).index_select(0, plan.restore).unflatten(0, plan.shape)


class Adaptation(nn.Module):
    """Equation 5: a linear map of the student's features to the teacher's channels.

    A 1x1 convolution commutes with RoIAlign (both are linear, one over channels, one over space), so it is applied to
    K crops an image instead of whole maps. A larger one does not, and would read zeros around every crop.
    """

    def __init__(self, student_channels: int, teacher_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, crops: Tensor) -> Tensor:
        """Map (B, K, C_s, h, w) to (B, K, C_t, h, w)."""
        return self.conv(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])

    def maps(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Map L levels (B, C_s, H_l, W_l) to (B, C_t, H_l, W_l)."""
        return [self.conv(x) for x in pyramid]


class PyramidAdaptation(nn.Module):
    """A linear map of levels to the teacher's channels: for the methods that compare maps, and for YOLO's pyramids.

    One for all levels where their channels are equal, else one a level; channels as `GIDLoss` takes them. Equation 5
    where it is given the crops of each level, (N_l, C_s, h, w), see `Adaptation`.
    """

    def __init__(
        self, student_channels: int | Sequence[int], teacher_channels: int | Sequence[int], kernel_size: int = 1
    ) -> None:
        super().__init__()
        widths = [x if isinstance(x, Sequence) else [x] for x in (student_channels, teacher_channels)]
        self.convs = nn.ModuleList(
            nn.Conv2d(s, t, kernel_size, padding=kernel_size // 2) for s, t in zip(*widths, strict=True)
        )

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Map L levels (B, C_s, H_l, W_l) to (B, C_t, H_l, W_l)."""
        convs = list(self.convs) if len(self.convs) > 1 else [self.convs[0]] * len(pyramid)
        return [conv(x) for conv, x in zip(convs, pyramid, strict=True)]

    def maps(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Itself, under the name that `Adaptation` has for it."""
        return self(pyramid)


def adaptation_settings(adapt: Adaptation | PyramidAdaptation) -> dict[str, Any]:
    """`student_channels`, `teacher_channels` and `adapt_kernel` of an adaptation, by which another is made."""
    convs: list[Any] = [adapt.conv] if isinstance(adapt, Adaptation) else list(adapt.convs)
    student, teacher = [conv.in_channels for conv in convs], [conv.out_channels for conv in convs]
    one = isinstance(adapt, Adaptation)
    return {
        "student_channels": student[0] if one else student,
        "teacher_channels": teacher[0] if one else teacher,
        "adapt_kernel": convs[0].kernel_size[0],
    }


def feature_loss(
    teacher: Tensor, student: Tensor, valid: Tensor, *, normalize: str = "instance", weight: Tensor | None = None
) -> Tensor:
    """Equation 4: the mean over an image's instances of the squared L2 distance of their features.

    Args:
        teacher: (B, K, C, h, w), which gets no gradient.
        student: (B, K, C, h, w), already adapted.
        valid: (B, K).
        normalize: `instance` sums over C, h and w as the equation is written; `pixel` divides by h * w as the authors'
            released code does.
        weight: (B, K) factors of the instances' distances; None for 1. The mean is still over their number.

    Returns:
        Scalar in at least float32, the mean over images; 0 for an image without instances.
    """
    if normalize not in {"instance", "pixel"}:
        raise ValueError(f"normalize={normalize} must be instance or pixel.")
    squared = (wide(teacher.detach()) - wide(student)).square().flatten(2).sum(-1)  # (B, K); overflows float16
    if normalize == "pixel":
        squared = squared / (teacher.shape[-2] * teacher.shape[-1])
    return mean_over_images(squared if weight is None else squared * weight, valid)
