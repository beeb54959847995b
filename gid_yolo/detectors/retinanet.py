"""RetinaNet (Lin et al., Focal Loss for Dense Object Detection, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gid_yolo.detectors.backbone import TimmBackbone
from gid_yolo.detectors.detector import Detector
from gid_yolo.detectors.head import initialise, per_location, prior_bias, tower
from gid_yolo.detectors.neck import FPN
from gid_yolo.ops.anchors import cell_anchors, from_fixed_point, grid_anchors, to_fixed_point
from gid_yolo.ops.assign import IGNORED, match_anchors, positive_mask
from gid_yolo.ops.boxes import decode_deltas, encode_deltas
from gid_yolo.ops.decode import dense_detections
from gid_yolo.ops.losses import box_regression_loss, focal_loss, giou_loss, soft_bce
from gid_yolo.ops.structures import RawPredictions, Targets


class RetinaNetHead(nn.Module):
    """Two towers of convolutions shared by all levels.

    Args:
        channels: Channels of the pyramid.
        num_anchors: Anchors per cell A.
        num_classes: Classes C.
        num_convs: Convolutions of each tower.
        norm: None or `gn`.
        prior: Class probability of every anchor at the start (focal loss paper, section 3.3).
    """

    def __init__(
        self, channels: int, num_anchors: int, num_classes: int, *, num_convs: int, norm: str | None, prior: float
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_tower, self.reg_tower = tower(channels, num_convs, norm), tower(channels, num_convs, norm)
        self.cls_logits = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        initialise(self, norm, [self.cls_tower, self.reg_tower])
        self.cls_logits.bias = prior_bias(num_anchors * num_classes, prior)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Map the pyramid to (B, R, C) logits and (B, R, 4) deltas, R in the order level, row, column, anchor."""
        logits = [per_location(self.cls_logits(self.cls_tower(x)), self.num_classes) for x in features]
        deltas = [per_location(self.box_deltas(self.reg_tower(x)), 4) for x in features]
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


class RetinaNet(Detector):
    """RetinaNet on P3-P7 with anchors.

    Args:
        backbone: The bottom-up network.
        num_classes: Classes C.
        fpn_channels: Width of the pyramid and of the towers.
        p6_from: `p5` or `c5`, see `FPN`.
        p7_relu: A ReLU between P6 and P7, see `FPN`.
        num_convs: Convolutions of each tower.
        head_norm: None or `gn`.
        anchor_scale: Size of the smallest anchor over its level's stride (4 gives 32 px on P3, the paper's).
        anchor_octaves: Sizes per octave.
        anchor_sizes: Sizes in pixels, a list for each level, in place of scale and octaves.
        aspect_ratios: Heights over widths.
        whole_anchors: Round the anchors' corners to whole pixels, see `cell_anchors`.
        fit_strides: Step anchors by image size over map size, as torchvision's models do, see `grid_anchors`.
        positive_iou: IoU from which an anchor is an object.
        negative_iou: IoU under which an anchor is background.
        focal_alpha: Weight of the object class.
        focal_gamma: Focusing parameter.
        box_loss: `l1` (smooth L1 on the deltas) or `giou` (on the decoded boxes).
        box_beta: Turning point of smooth L1; 0 is L1.
        prior: Class probability of every anchor at the start.
    """

    strides = (8, 16, 32, 64, 128)
    family = "retinanet"
    cells: Tensor

    def __init__(
        self,
        backbone: TimmBackbone,
        num_classes: int,
        *,
        fpn_channels: int = 256,
        p6_from: str = "p5",
        p7_relu: bool = True,
        num_convs: int = 4,
        head_norm: str | None = None,
        anchor_scale: float = 4.0,
        anchor_octaves: int = 3,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        whole_anchors: bool = True,
        fit_strides: bool = False,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_loss: str = "l1",
        box_beta: float = 0.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fpn_channels = fpn_channels
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        if box_loss not in {"l1", "giou"}:
            raise ValueError(f"box_loss={box_loss} must be l1 or giou.")
        self.box_loss, self.box_beta = box_loss, box_beta
        if anchor_sizes is None:
            octaves = [2 ** (i / anchor_octaves) for i in range(anchor_octaves)]
            anchor_sizes = [[anchor_scale * stride * o for o in octaves] for stride in self.strides]
        if len({len(sizes) for sizes in anchor_sizes}) != 1 or len(anchor_sizes) != len(self.strides):
            raise ValueError(
                f"anchor_sizes={anchor_sizes} must give {len(self.strides)} levels the same number of sizes."
            )
        cells = torch.stack([cell_anchors(sizes, aspect_ratios, whole=whole_anchors) for sizes in anchor_sizes])
        # (L, A, 4); as integers, so that the half precision of checkpoints does not round them; no part of the weights
        self.register_buffer("cells", to_fixed_point(cells), persistent=False)
        self.fit_strides = fit_strides
        self.backbone = backbone
        self.neck = FPN(backbone.channels, fpn_channels, p6_from=p6_from, p7_relu=p7_relu)
        self.head = RetinaNetHead(
            fpn_channels, self.cells.shape[1], num_classes, num_convs=num_convs, norm=head_norm, prior=prior
        )

    def predict(self, features: list[Tensor], image_size: Sequence[int]) -> RawPredictions:
        """The predictions of the anchors of P3-P7."""
        logits, deltas = self.head(features)
        fit_to = tuple(image_size) if self.fit_strides else None
        anchors = grid_anchors(from_fixed_point(self.cells), features, self.strides, fit_to=fit_to)
        return RawPredictions(logits, deltas, anchors, decode_deltas)

    def detections(
        self, features: list[Tensor], raw: RawPredictions, height: int | Tensor, width: int | Tensor
    ) -> Tensor:
        """Detections (B, 4 + C, R): xywh in pixels and class probabilities, NMS left to the caller."""
        return dense_detections(raw, height, width)

    def loss(
        self, features: list[Tensor], raw: RawPredictions, targets: Targets, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Task losses, each a mean over images of the sum over anchors divided by the image's positives (at least 1).

        Returns:
            `cls_loss`, the focal loss over all but ignored anchors, and `box_loss` over positive anchors.
        """
        matched = match_anchors(
            raw.priors, targets.boxes, targets.valid, positive_iou=self.positive_iou, negative_iou=self.negative_iou
        )  # (B, R)
        positive = matched >= 0
        count = positive.sum(1).clamp(min=1)  # (B,)
        labels, boxes = targets.gather(matched)  # (B, R), (B, R, 4)

        focal = focal_loss(raw.logits, labels, positive, alpha=self.focal_alpha, gamma=self.focal_gamma)  # (B, R)
        cls_loss = (focal.where(matched != IGNORED, 0.0).sum(1) / count).mean()

        if self.box_loss == "giou":
            box = giou_loss(raw.boxes, boxes)  # (B, R)
        else:
            box = box_regression_loss(raw.regression, encode_deltas(boxes, raw.priors), beta=self.box_beta)  # (B, R)
        box_loss = (box.where(positive, 0.0).sum(1) / count).mean()
        return {"cls_loss": cls_loss, "box_loss": box_loss}

    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) True for the anchors that the task assignment would give to one of the GI boxes."""
        return positive_mask(priors, boxes, valid, positive_iou=self.positive_iou)

    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) soft-target binary cross entropy against the teacher's probabilities, summed over classes."""
        return soft_bce(student.logits, teacher.logits)

    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) the task's box loss between the two models."""
        if self.box_loss == "giou":
            return giou_loss(student.boxes, teacher.boxes)
        return box_regression_loss(student.regression, teacher.regression, beta=self.box_beta)
