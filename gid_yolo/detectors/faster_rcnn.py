"""Faster R-CNN (Ren et al. 2015) on a feature pyramid (Lin et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gid_yolo.detectors.backbone import Backbone
from gid_yolo.detectors.box_head import BoxHead, BoxSamples, box_head_losses, candidates, final_detections, sample_boxes
from gid_yolo.detectors.detector import Detector
from gid_yolo.detectors.neck import FPN
from gid_yolo.detectors.rpn import RPNHead, rpn_losses, select_proposals
from gid_yolo.ops.anchors import cell_anchors, from_fixed_point, grid_anchors, to_fixed_point
from gid_yolo.ops.assign import positive_mask
from gid_yolo.ops.boxes import decode_deltas
from gid_yolo.ops.losses import box_regression_loss, soft_bce
from gid_yolo.ops.roi_pool import pyramid_roi_align, roi_levels
from gid_yolo.ops.sample import SampleRule, random_keys
from gid_yolo.ops.structures import RawPredictions, Targets


class FasterRCNN(Detector):
    """Faster R-CNN on P2-P6: an RPN proposes boxes on all levels, a second stage classifies crops of P2-P5.

    What response distillation and the selection of general instances see of it is the RPN, with its objectness as the
    one class. Defaults are the FPN paper's and torchvision's.

    Args:
        backbone: The bottom-up network.
        num_classes: Classes C.
        strides: Pixels per cell of each level, the pooled one last.
        fpn_channels: Width of the pyramid and of the RPN.
        anchor_scale: Size of each level's anchors over its stride (8 gives 32 px on P2, the paper's).
        anchor_sizes: Sizes in pixels, a list for each level, in place of the scale.
        aspect_ratios: Heights over widths.
        whole_anchors: Round the anchors' corners to whole pixels, see `cell_anchors`.
        fit_strides: Step anchors by image size over map size, as torchvision's models do, see `grid_anchors`.
        head_norm: None or `gn`, of the convolutions of both stages.
        rpn_convs: Convolutions of the RPN.
        rpn_positive_iou: IoU from which an anchor is an object.
        rpn_negative_iou: IoU under which an anchor is background.
        rpn_samples: Anchors an image to train on.
        rpn_positive_share: Largest share of objects among them.
        rpn_before_nms: Anchors of each level that go through NMS, in training and in evaluation.
        rpn_after_nms: Proposals of an image, in training and in evaluation.
        rpn_nms_iou: Threshold of the NMS within a level.
        rpn_min_score: Objectness under which a box is no proposal.
        roi_size: Height and width of a proposal's crop.
        roi_canonical: Side of the boxes that are cropped from stride 16, in pixels.
        roi_points: Samples a bin and axis; 0 takes as many as the bin has cells.
        roi_aligned: Shift crops by half a cell, see `pyramid_roi_align`.
        roi_positive_iou: IoU from which a proposal is an object.
        roi_negative_iou: IoU under which a proposal is background.
        roi_samples: Proposals an image to train on.
        roi_positive_share: Largest share of objects among them.
        head_convs: Convolutions of the second stage.
        head_layers: Fully connected layers of the second stage.
        head_width: Their width.
        box_weights: Scale of the second stage's regression targets.
        box_beta: Turning point of smooth L1, of both stages; 0 is L1.
        box_min_score: Score over which a class of a proposal is a detection.
        box_nms_iou: Threshold of the NMS within a class.
        max_det: Detections of an image.
    """

    family = "faster_rcnn"
    backbone_strides = (4, 8, 16, 32)
    end2end = True
    limits: ClassVar = {"conf": "box_min_score", "iou": "box_nms_iou", "max_det": "max_det"}
    cells: Tensor
    box_weights: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        fpn_channels: int = 256,
        anchor_scale: float = 8.0,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        whole_anchors: bool = True,
        fit_strides: bool = False,
        head_norm: str | None = None,
        rpn_convs: int = 1,
        rpn_positive_iou: float = 0.7,
        rpn_negative_iou: float = 0.3,
        rpn_samples: int = 256,
        rpn_positive_share: float = 0.5,
        rpn_before_nms: Sequence[int] = (2000, 1000),
        rpn_after_nms: Sequence[int] = (2000, 1000),
        rpn_nms_iou: float = 0.7,
        rpn_min_score: float = 0.0,
        roi_size: int = 7,
        roi_canonical: float = 224.0,
        roi_points: int = 2,
        roi_aligned: bool = False,
        roi_positive_iou: float = 0.5,
        roi_negative_iou: float = 0.5,
        roi_samples: int = 512,
        roi_positive_share: float = 0.25,
        head_convs: int = 0,
        head_layers: int = 2,
        head_width: int = 1024,
        box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        box_beta: float = 1 / 9,
        box_min_score: float = 0.05,
        box_nms_iou: float = 0.5,
        max_det: int = 100,
    ) -> None:
        super().__init__()
        if len(strides) != len(backbone.channels) + 1:
            raise ValueError(
                f"strides={list(strides)} must be of the backbone's {len(backbone.channels)} maps and the pooled one."
            )
        if anchor_sizes is None:
            anchor_sizes = [[anchor_scale * stride] for stride in strides]
        if len({len(sizes) for sizes in anchor_sizes}) != 1 or len(anchor_sizes) != len(strides):
            raise ValueError(f"anchor_sizes={anchor_sizes} must give {len(strides)} levels the same number of sizes.")
        for name, pair in (("rpn_before_nms", rpn_before_nms), ("rpn_after_nms", rpn_after_nms)):
            if len(pair) != 2:
                raise ValueError(f"{name}={list(pair)} must be two numbers: for training and for evaluation.")
        self.num_classes, self.fpn_channels = num_classes, fpn_channels
        self.strides, self.fit_strides = tuple(strides), fit_strides
        self.rpn_rule = SampleRule(rpn_positive_iou, rpn_negative_iou, rpn_samples, rpn_positive_share)
        self.rpn_before_nms, self.rpn_after_nms = tuple(rpn_before_nms), tuple(rpn_after_nms)
        self.rpn_nms_iou, self.rpn_min_score = rpn_nms_iou, rpn_min_score
        self.roi_rule = SampleRule(roi_positive_iou, roi_negative_iou, roi_samples, roi_positive_share)
        self.roi_size, self.roi_canonical = roi_size, roi_canonical
        self.roi_points, self.roi_aligned = roi_points, roi_aligned
        self.box_beta, self.box_min_score, self.box_nms_iou = box_beta, box_min_score, box_nms_iou
        self.max_det = max_det
        cells = torch.stack([cell_anchors(sizes, aspect_ratios, whole=whole_anchors) for sizes in anchor_sizes])
        # (L, A, 4); as integers, so that the half precision of checkpoints does not round them; no part of the weights
        self.register_buffer("cells", to_fixed_point(cells), persistent=False)
        self.register_buffer("box_weights", torch.tensor(box_weights), persistent=False)
        self.backbone = backbone
        self.neck = FPN(backbone.channels, fpn_channels, p6_from="pool")
        self.rpn = RPNHead(fpn_channels, cells.shape[1], num_convs=rpn_convs, norm=head_norm)
        self.head = BoxHead(
            fpn_channels,
            num_classes,
            crop_size=roi_size,
            width=head_width,
            num_convs=head_convs,
            num_layers=head_layers,
            norm=head_norm,
        )

    def predict(self, features: list[Tensor], image_size: Sequence[int]) -> RawPredictions:
        """The RPN's predictions of the anchors of P2-P6, C = 1."""
        objectness, deltas = self.rpn(features)
        fit_to = tuple(image_size) if self.fit_strides else None
        anchors = grid_anchors(from_fixed_point(self.cells), features, self.strides, fit_to=fit_to)
        return RawPredictions(objectness, deltas, anchors, decode_deltas)

    def proposals(
        self, features: list[Tensor], raw: RawPredictions, height: int | Tensor, width: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, P, 4) boxes for the second stage and (B, P) True where there is one; more of them in training."""
        mode = 0 if self.training else 1
        return select_proposals(
            raw,
            [x.shape[-2] * x.shape[-1] * self.cells.shape[1] for x in features],
            height,
            width,
            before_nms=self.rpn_before_nms[mode],
            after_nms=self.rpn_after_nms[mode],
            nms_iou=self.rpn_nms_iou,
            min_score=self.rpn_min_score,
        )

    def samples(
        self,
        features: list[Tensor],
        raw: RawPredictions,
        targets: Targets,
        image_size: tuple[int, int],
        rule: SampleRule,
        keys: Callable[[Tensor], Tensor] = lambda boxes: random_keys(boxes[..., 0]),
    ) -> BoxSamples:
        """Proposals and objects drawn by `rule`, to train the second stage or distil its features on.

        `keys` makes of boxes (B, P, 4) the numbers (B, P) that they are drawn by.
        """
        boxes, valid = candidates(*self.proposals(features, raw, *image_size), targets)
        return sample_boxes(boxes, valid, targets, keys(boxes), rule=rule, num_classes=self.num_classes)

    def roi_levels(self, boxes: Tensor) -> Tensor:
        """(...) index of the level, of P2-P5, that the second stage crops each box (..., 4) from.

        A box that is not finite counts as (0, 0, 0, 0).
        """
        boxes = boxes.where(boxes.isfinite().all(-1, keepdim=True), 0.0)
        return roi_levels(boxes, self.strides[:-1], canonical_size=self.roi_canonical)

    def classify(self, features: list[Tensor], boxes: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, P, C + 1), the background's last, and deltas (B, P, C, 4) of boxes (B, P, 4).

        Where `valid` (B, P) is given, the others' are 0 and cost nothing.
        """
        crops = pyramid_roi_align(
            features[:-1],
            boxes,
            self.strides[:-1],
            size=self.roi_size,
            samples=self.roi_points,
            canonical_size=self.roi_canonical,
            aligned=self.roi_aligned,
            valid=valid,
        )
        logits, deltas = self.head(crops)
        if valid is not None:
            logits, deltas = (_put(x, valid) for x in (logits, deltas))
        return logits.view(*boxes.shape[:2], -1), deltas.view(*boxes.shape[:2], self.num_classes, 4)

    def detections(
        self, features: list[Tensor], raw: RawPredictions, height: int | Tensor, width: int | Tensor
    ) -> Tensor:
        """Final detections (B, D, 6): xyxy in pixels, score and class; rows of zeros where an image has fewer."""
        boxes, valid = self.proposals(features, raw, height, width)
        # At least one of each image: not every runtime takes empty tensors
        looked_at = torch.cat([torch.ones_like(valid[:, :1]), valid[:, 1:]], dim=1)
        rows = final_detections(
            *self.classify(features, boxes, looked_at),
            boxes,
            valid,
            height,
            width,
            weights=self.box_weights,
            min_score=self.box_min_score,
            nms_iou=self.box_nms_iou,
            max_det=self.max_det,
        )
        return rows.view(features[0].shape[0], self.max_det, 6)  # which an exported graph could not tell from the NMS

    def keep_classes(self, index: Sequence[int]) -> None:
        """Predict only some of the classes, in the order of `index`, with unchanged probabilities."""
        self.other_classes = self.head.keep_classes(index)
        self.num_classes = len(index)

    def loss(
        self, features: list[Tensor], raw: RawPredictions, targets: Targets, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Task losses of both stages, each a sum over the samples of the batch divided by their number.

        Returns:
            `rpn_cls_loss` and `rpn_box_loss`, see `rpn_losses`; `cls_loss` and `box_loss`, see `box_head_losses`.
        """
        first = rpn_losses(raw, targets, random_keys(raw.logits[..., 0]), rule=self.rpn_rule, beta=self.box_beta)
        samples = self.samples(features, raw, targets, image_size, self.roi_rule)
        logits, deltas = self.classify(features, samples.boxes)
        second = box_head_losses(logits, deltas, samples, weights=self.box_weights, beta=self.box_beta)
        return {**first, **second}

    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) True for the anchors that the RPN's assignment would give to one of the GI boxes."""
        return positive_mask(priors, boxes, valid, positive_iou=self.rpn_rule.positive_iou)

    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) soft-target binary cross entropy of the objectness against the teacher's probability."""
        return soft_bce(student.logits, teacher.logits)

    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """(B, R) smooth L1 between the RPN's deltas of the two models."""
        return box_regression_loss(student.regression, teacher.regression, beta=self.box_beta)


def _put(rows: Tensor, valid: Tensor) -> Tensor:
    """(B * P, N) zeros with `rows` (V, N) where `valid` (B, P) is true."""
    place = valid.flatten().nonzero()[:, 0]
    return rows.new_zeros(valid.numel(), rows.shape[1]).index_copy(0, place, rows)
