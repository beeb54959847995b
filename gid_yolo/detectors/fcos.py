"""FCOS (Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gid_yolo.detectors.backbone import TimmBackbone
from gid_yolo.detectors.detector import Detector
from gid_yolo.detectors.head import initialise, per_location, prior_bias, tower
from gid_yolo.detectors.neck import FPN
from gid_yolo.ops.anchors import cell_anchors, grid_anchors
from gid_yolo.ops.decode import dense_detections
from gid_yolo.ops.losses import focal_loss, giou_loss, soft_bce
from gid_yolo.ops.points import centerness_target, decode_log_ltrb, decode_ltrb, match_points, points_inside
from gid_yolo.ops.precision import wide
from gid_yolo.ops.processes import shared_count
from gid_yolo.ops.structures import RawPredictions, Targets


class FCOSHead(nn.Module):
    """Two towers of convolutions shared by all levels.

    Args:
        channels: Channels of the pyramid.
        num_classes: Classes C.
        num_convs: Convolutions of each tower.
        norm: None or `gn`.
        prior: Class probability of every point at the start (focal loss paper, section 3.3).
        centerness_from: `reg` or `cls`, the tower that the centre-ness stands on.
        box_coding: `relu` or `exp`, see `FCOS`.
        num_scales: Levels whose box outputs are multiplied by a learnt number each; 0 for none.
    """

    centerness_on_cls, relu, num_scales = False, True, 0  # of heads in checkpoints that were pickled without them

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_convs: int,
        norm: str | None,
        prior: float,
        centerness_from: str = "reg",
        box_coding: str = "relu",
        num_scales: int = 0,
    ) -> None:
        super().__init__()
        if centerness_from not in {"reg", "cls"}:
            raise ValueError(f"centerness_from={centerness_from} must be reg or cls.")
        if box_coding not in {"relu", "exp"}:
            raise ValueError(f"box_coding={box_coding} must be relu or exp.")
        self.centerness_on_cls, self.relu = centerness_from == "cls", box_coding == "relu"
        self.cls_tower = tower(channels, num_convs, norm, bias=True)  # biases before a norm too, as in torchvision
        self.reg_tower = tower(channels, num_convs, norm, bias=True)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        initialise(self, norm, [self.cls_tower, self.reg_tower])
        self.cls_logits.bias = prior_bias(num_classes, prior)
        self.num_scales = num_scales
        if num_scales:
            self.scales = nn.Parameter(torch.ones(num_scales))

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Map the pyramid to (B, R, C) logits, (B, R, 4) distances and (B, R) centre-ness logits.

        R is in the order level, row, column. The distances are in strides and not negative; with the coding `exp` they
        are the logarithms of pixels.
        """
        logits, ltrb, centerness = [], [], []
        for level, x in enumerate(features):
            cls, box = self.cls_tower(x), self.reg_tower(x)
            logits.append(per_location(self.cls_logits(cls), self.cls_logits.out_channels))
            distance = self.box_ltrb(box)
            if self.num_scales:
                distance = distance * self.scales[level]
            ltrb.append(per_location(F.relu(distance) if self.relu else distance, 4))
            centerness.append(per_location(self.centerness(cls if self.centerness_on_cls else box), 1)[..., 0])
        return torch.cat(logits, dim=1), torch.cat(ltrb, dim=1), torch.cat(centerness, dim=1)


class FCOS(Detector):
    """FCOS on P3-P7 with improvements that its authors published since: centre sampling, GIoU, GroupNorm.

    As in torchvision's, and not in mmdetection's, the box loss of a point is not weighed by its centre-ness.

    Args:
        backbone: The bottom-up network.
        num_classes: Classes C.
        fpn_channels: Width of the pyramid and of the towers.
        p6_from: `p5` or `c5`, see `FPN`.
        p7_relu: A ReLU between P6 and P7, see `FPN`.
        num_convs: Convolutions of each tower.
        head_norm: None or `gn`.
        fit_strides: Step points by image size over map size, as torchvision's models do, see `grid_anchors`.
        point_offset: Place of a cell's point, in strides right of and below the cell's index times the stride: 0 is
            torchvision's, 0.5 the paper's and mmdetection's.
        box_coding: `relu` (distances in strides) or `exp` (the exponential gives pixels, as in the paper).
        level_scales: A learnt number for each level that its box outputs are multiplied by, as in the paper.
        centerness_from: `reg` or `cls`, the tower that the centre-ness stands on; the paper's is `cls`.
        sqrt_score: Score detections by sqrt(probability * centre-ness); False takes the product, as mmdetection does.
        center_radius: Half the side of the region around a box's centre whose points are positive, in strides.
        level_ranges: Bounds of max(l, t, r, b) on a level, in strides; None is the paper's (4, 8): P3 up to 64 px, P4
            from there to 128 px, and so on to P7 over 512 px. Half of it suits images of half the usual 800 px.
        focal_alpha: Weight of the object class.
        focal_gamma: Focusing parameter.
        prior: Class probability of every point at the start.
    """

    strides = (8, 16, 32, 64, 128)
    family = "fcos"
    cells: Tensor
    exp_coding, sqrt_score = False, True  # of detectors in checkpoints that were pickled without them

    def __init__(
        self,
        backbone: TimmBackbone,
        num_classes: int,
        *,
        fpn_channels: int = 256,
        p6_from: str = "p5",
        p7_relu: bool = True,
        num_convs: int = 4,
        head_norm: str | None = "gn",
        fit_strides: bool = False,
        point_offset: float = 0.0,
        box_coding: str = "relu",
        level_scales: bool = False,
        centerness_from: str = "reg",
        sqrt_score: bool = True,
        center_radius: float = 1.5,
        level_ranges: Sequence[float] | None = None,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fpn_channels = fpn_channels
        self.fit_strides = fit_strides
        self.center_radius = center_radius
        self.level_ranges = (4.0, 8.0) if level_ranges is None else tuple(level_ranges)
        if len(self.level_ranges) != 2 or not 0 <= self.level_ranges[0] < self.level_ranges[1]:
            raise ValueError(f"level_ranges={level_ranges} must be two rising numbers of strides, or null for [4, 8].")
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        # (L, 1, 4) a square of one stride for every point, see ops.points; no part of the weights
        cells = [cell_anchors([stride], [1.0]) + point_offset * stride for stride in self.strides]
        self.register_buffer("cells", torch.stack(cells), persistent=False)
        self.backbone = backbone
        self.neck = FPN(backbone.channels, fpn_channels, p6_from=p6_from, p7_relu=p7_relu)
        self.exp_coding, self.sqrt_score = box_coding == "exp", sqrt_score
        self.head = FCOSHead(
            fpn_channels,
            num_classes,
            num_convs=num_convs,
            norm=head_norm,
            prior=prior,
            centerness_from=centerness_from,
            box_coding=box_coding,
            num_scales=len(self.strides) if level_scales else 0,
        )

    def predict(self, features: list[Tensor], image_size: Sequence[int]) -> RawPredictions:
        """The predictions of the points of P3-P7."""
        logits, ltrb, centerness = self.head(features)
        fit_to = tuple(image_size) if self.fit_strides else None
        points = grid_anchors(self.cells, features, self.strides, fit_to=fit_to)
        decoder = decode_log_ltrb if self.exp_coding else decode_ltrb
        return RawPredictions(logits, ltrb, points, decoder, centerness, self.sqrt_score)

    def detections(
        self, features: list[Tensor], raw: RawPredictions, height: int | Tensor, width: int | Tensor
    ) -> Tensor:
        """Detections (B, 4 + C, R): xywh in pixels and confidences (see `sqrt_score`), NMS left to the caller."""
        return dense_detections(raw, height, width)

    def loss(
        self, features: list[Tensor], raw: RawPredictions, targets: Targets, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Task losses, each a sum over the batch's points divided by its positive ones, at least 1 (FCOS, equation 2).

        Returns:
            `cls_loss`, the focal loss over all points, and over positive ones `box_loss`, GIoU, and `ctr_loss`, the
            cross entropy of the centre-ness.
        """
        matched = match_points(
            raw.priors, targets.boxes, targets.valid, radius=self.center_radius, level_ranges=self.level_ranges
        )  # (B, R)
        positive = matched >= 0
        count = shared_count(positive.sum())
        labels, boxes = targets.gather(matched)  # (B, R), (B, R, 4)

        focal = focal_loss(raw.logits, labels, positive, alpha=self.focal_alpha, gamma=self.focal_gamma)  # (B, R)
        box = giou_loss(raw.boxes, boxes)  # (B, R)
        centerness = F.binary_cross_entropy_with_logits(
            wide(_centerness(raw)), centerness_target(boxes, raw.priors), reduction="none"
        )  # (B, R)
        return {
            "cls_loss": focal.sum() / count,
            "box_loss": box.where(positive, 0.0).sum() / count,
            "ctr_loss": centerness.where(positive, 0.0).sum() / count,
        }

    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) True for the points inside the GI boxes, on every level."""
        return points_inside(priors, boxes, valid)

    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) soft-target binary cross entropy against the teacher's probabilities, summed over classes."""
        return soft_bce(student.logits, teacher.logits)

    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) GIoU between the boxes, and the cross entropy of the centre-ness against the teacher's."""
        # Centre-ness rates the box (FCOS, section 3.3) and comes from the same tower, so it is taught with the box; the
        # teacher's probability is a soft target in place of equation 3, which would need the teacher's box to be true.
        centerness = soft_bce(_centerness(student)[..., None], _centerness(teacher)[..., None])
        target = teacher.boxes
        # ReLU makes distances of 0: a box without area says nothing of where its sides are, and GIoU is steep there
        has_area = (target[..., 2:] > target[..., :2]).all(-1)  # (B, R)
        return giou_loss(student.boxes, target).where(has_area, 0.0) + centerness


def _centerness(raw: RawPredictions) -> Tensor:
    """(B, R) logits, which every prediction of an FCOS has."""
    return cast(Tensor, raw.centerness)
