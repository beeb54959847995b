"""Section 3.5: the distillation part of the overall loss, equation 9."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gid_yolo.distill.feature import (
    Adaptation,
    PyramidAdaptation,
    RoIPlan,
    adaptation_settings,
    feature_loss,
    plan_rois,
    roi_features,
)
from gid_yolo.distill.gism import general_instances, select_general_instances
from gid_yolo.distill.levels import LEVELS, LevelRules, overlapping_predictions
from gid_yolo.distill.pairing import pair_predictions
from gid_yolo.distill.relation import relation_loss
from gid_yolo.distill.response import ResponseFunctions, TeachersHead, response_loss
from gid_yolo.distill.standardize import STANDARDIZE, standardized_crops, standardized_maps
from gid_yolo.distill.types import GROUND_TRUTH, classify, ground_truth_instances, keep_types, parse_types
from gid_yolo.ops.structures import GeneralInstances, RawPredictions, Targets

WEIGHTINGS = ("uniform", "score")


class GIDLoss(nn.Module):
    """lambda1 L_Feature + lambda2 L_Relation + lambda3 L_Response, with the adaptation layer of equation 5.

    Beyond the paper, off unless given a weight: the term `cross`, the response loss of what the teacher's own head
    makes of the student's adapted pyramid. It asks of the student's features what that head reads out of them, by the
    teacher's label assignment and losses, also in pairs that are not aligned. The idea is CrossKD's (Wang et al., CVPR
    2024), which compares densely and from within the head.

    Args:
        student_channels: Channels of the student's pyramid; one number a level where they differ.
        teacher_channels: Likewise of the teacher's.
        top_k: General instances K per image.
        iou_threshold: NMS threshold of equation 3.
        weights: lambda1, lambda2, lambda3 by the names `feature`, `relation`, `response`, and that of `cross`; a term
            of weight 0 is not computed.
        alpha: Class weight of equation 8.
        beta: Box weight of equation 8.
        roi_size: Height and width of the RoIAlign crops.
        level: The pyramid level that an instance is cropped from: the one that the second stage of the student's
            `detector` crops it from, where it has one; that of its `prediction`, or where none stands behind it (not
            `aligned`, ground truth) of the student's that overlaps it most; else by its `size` alone (FPN paper,
            equation 1).
        feature_normalize: `instance` or `pixel`, see `feature_loss`.
        standardize: What has mean 0 and variance 1 before features are compared: nothing (`raw`), the `crops` of both,
            their `maps`, or those of the `teacher` alone.
        weighting: Factors of the instances' distances in the feature loss: 1 (`uniform`), or their GI `score`, so that
            the loss fades where the student comes to predict what the teacher does. Weights made of predictions are
            PGD's idea (Yang et al., ECCV 2022); these are not its weights.
        relation_reduction: `mean` or `sum`, see `relation_loss`.
        adapt_kernel: Kernel size of the adaptation layer.
        aligned: Predictions of teacher and student correspond one to one. If not, they are paired by overlap, and
            responses cannot be compared.
        types: Which instances are distilled: `all`, types of equation 11 such as `pos+semi`, or `gt` for the ground
            truth in their place (table 5).
    """

    def __init__(
        self,
        student_channels: int | Sequence[int],
        teacher_channels: int | Sequence[int],
        *,
        top_k: int = 10,
        iou_threshold: float = 0.3,
        weights: dict[str, float] | None = None,
        alpha: float = 0.1,
        beta: float = 1.0,
        roi_size: int = 10,
        level: str = "detector",
        feature_normalize: str = "instance",
        standardize: str = "raw",
        weighting: str = "uniform",
        relation_reduction: str = "mean",
        adapt_kernel: int = 1,
        aligned: bool = True,
        types: str = "all",
    ) -> None:
        super().__init__()
        self.aligned = aligned
        self.types = parse_types(types)
        self.top_k, self.iou_threshold = top_k, iou_threshold
        self.weights = {"feature": 5e-4, "relation": 40.0, "response": 1.0, "cross": 0.0}
        if unknown := set(weights or {}) - set(self.weights):
            raise ValueError(f"weights has unknown terms {sorted(unknown)}: choose from {', '.join(self.weights)}.")
        self.weights.update(weights or {})
        if not aligned and self.weights["response"]:
            raise ValueError("predictions that do not correspond one to one cannot be compared: response must be 0.")
        self.alpha, self.beta, self.roi_size = alpha, beta, roi_size
        self.feature_normalize, self.relation_reduction = feature_normalize, relation_reduction
        if level not in LEVELS:
            raise ValueError(f"level={level} must be one of {', '.join(LEVELS)}.")
        self.level = level
        if standardize not in STANDARDIZE:
            raise ValueError(f"standardize={standardize} must be one of {', '.join(STANDARDIZE)}.")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={weighting} must be one of {', '.join(WEIGHTINGS)}.")
        self.standardize, self.weighting = standardize, weighting
        self.adapt: Adaptation | PyramidAdaptation
        self.adapt_kernel = adapt_kernel
        if isinstance(student_channels, int) and isinstance(teacher_channels, int):
            self.adapt = Adaptation(student_channels, teacher_channels, adapt_kernel)
        elif isinstance(student_channels, Sequence) and isinstance(teacher_channels, Sequence):
            self.adapt = PyramidAdaptation(student_channels, teacher_channels, adapt_kernel)
        else:
            raise ValueError("channels of student and teacher must both be one number, or both one number a level.")

    def forward(
        self,
        teacher_pyramid: Sequence[Tensor],
        student_pyramid: Sequence[Tensor],
        teacher: RawPredictions,
        student: RawPredictions,
        *,
        functions: ResponseFunctions,
        strides: Sequence[int],
        image_size: tuple[int, int],
        levels: LevelRules | None = None,
        targets: Targets | None = None,
        head: TeachersHead | None = None,
    ) -> tuple[dict[str, Tensor], GeneralInstances]:
        """Select general instances and compute the weighted terms.

        Args:
            teacher_pyramid: L maps (B, C_t, H_l, W_l), without a graph.
            student_pyramid: L maps (B, C_s, H_l, W_l).
            teacher: Predictions without a graph.
            student: Predictions, aligned one to one with the teacher's unless `aligned` is off.
            functions: The detector's mask and losses.
            strides: Pixels per cell of each level.
            image_size: (height, width) of the input.
            levels: The student's; needed for `level` prediction. Without them, or without a second stage among them,
                `detector` goes by size.
            targets: Ground truth, to tell the instances' types; needed unless `types` is `all`.
            head: The teacher's; needed for the term `cross`.

        Returns:
            The terms `feat_loss`, `rel_loss`, `resp_loss`, `cross_loss`, already weighted, as far as their weight is
            not 0; and the instances.

        Raises:
            ValueError: What is needed is not given.
        """
        if head is None and self.weights["cross"]:
            raise ValueError("the term cross needs the teacher's head.")
        instances = self.select(teacher, student.detach(), targets)
        terms: dict[str, Tensor] = {}
        valid, weights = instances.valid, self.weights
        if weights["feature"] or weights["relation"]:
            plan = plan_rois(instances.boxes, strides, image_size, self._levels(instances, student, levels))
            compared = student_pyramid
            if self.standardize in {"maps", "teacher"}:
                teacher_pyramid = standardized_maps(teacher_pyramid)
            if self.standardize == "maps":
                compared = standardized_maps(student_pyramid)
            crops_t = roi_features(teacher_pyramid, plan, strides, size=self.roi_size)  # (B, K, C_t, h, w)
            crops_s = self._adapted(compared, plan, strides)
            if self.standardize == "crops":
                crops_t, crops_s = standardized_crops(crops_t, valid), standardized_crops(crops_s, valid)
            if weights["feature"]:
                weight = instances.scores if self.weighting == "score" else None
                loss = feature_loss(crops_t, crops_s, valid, normalize=self.feature_normalize, weight=weight)
                terms["feat_loss"] = weights["feature"] * loss
            if weights["relation"]:
                loss = relation_loss(crops_t, crops_s, valid, reduction=self.relation_reduction)
                terms["rel_loss"] = weights["relation"] * loss
        if weights["response"]:
            mask = functions.response_mask(student.priors, instances.boxes, valid)  # (B, R)
            loss = response_loss(teacher, student, mask, functions=functions, alpha=self.alpha, beta=self.beta)
            terms["resp_loss"] = weights["response"] * loss
        if head is not None and weights["cross"]:
            crossed = head.predict(self.adapt.maps(student_pyramid))  # one head made both
            mask = head.functions.response_mask(teacher.priors, instances.boxes, valid)
            loss = response_loss(teacher, crossed, mask, functions=head.functions, alpha=self.alpha, beta=self.beta)
            terms["cross_loss"] = weights["cross"] * loss
        return terms, instances

    def select(self, teacher: RawPredictions, student: RawPredictions, targets: Targets | None) -> GeneralInstances:
        """The instances that are distilled, of predictions without a graph.

        Raises:
            ValueError: `types` are asked for and `targets` are not given.
        """
        if targets is None and self.types is not None:
            raise ValueError("the types of general instances need targets to compare them with.")
        if targets is not None and self.types == (GROUND_TRUTH,):
            return classify(ground_truth_instances(targets), targets)
        limits: dict[str, Any] = {"top_k": self.top_k, "iou_threshold": self.iou_threshold}
        if self.aligned:
            instances = general_instances(teacher, student, **limits)
        else:
            pairs = pair_predictions(teacher.scores, student.scores, teacher.boxes, student.boxes)
            instances = select_general_instances(*pairs, **limits)
        if targets is None:
            return instances
        instances = classify(instances, targets)
        return instances if self.types is None else keep_types(instances, self.types)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make another of the same kind."""
        return {
            **adaptation_settings(self.adapt),
            "top_k": self.top_k,
            "iou_threshold": self.iou_threshold,
            "weights": dict(self.weights),
            "alpha": self.alpha,
            "beta": self.beta,
            "roi_size": self.roi_size,
            "level": self.level,
            "feature_normalize": self.feature_normalize,
            "standardize": self.standardize,
            "weighting": self.weighting,
            "relation_reduction": self.relation_reduction,
            "aligned": self.aligned,
            "types": "all" if self.types is None else "+".join(self.types),
        }

    @property
    def term_names(self) -> list[str]:
        """Names of the terms that are on."""
        names = {"feature": "feat_loss", "relation": "rel_loss", "response": "resp_loss", "cross": "cross_loss"}
        return [names[key] for key, weight in self.weights.items() if weight]

    def _levels(self, instances: GeneralInstances, student: RawPredictions, rules: LevelRules | None) -> Tensor | None:
        """(B, K) the level of each instance; None for by its size."""
        if self.level == "prediction":
            if rules is None:
                raise ValueError("level=prediction needs the levels of the student's predictions.")
            if self.aligned and self.types != (GROUND_TRUTH,):
                return rules.of_predictions(instances.indices)
            return rules.of_predictions(overlapping_predictions(instances.boxes, student.boxes))
        if self.level == "size" or rules is None or rules.of_boxes is None:
            return None
        return rules.of_boxes(instances.boxes)

    def _adapted(self, pyramid: Sequence[Tensor], plan: RoIPlan, strides: Sequence[int]) -> Tensor:
        """The student's crops, (B, K, C_t, h, w)."""
        if self.adapt_kernel > 1:  # does not commute with the crop
            return roi_features(self.adapt.maps(pyramid), plan, strides, size=self.roi_size)
        if isinstance(self.adapt, PyramidAdaptation):
            return roi_features(pyramid, plan, strides, size=self.roi_size, adapt=self.adapt)
        return self.adapt(roi_features(pyramid, plan, strides, size=self.roi_size))
