"""The distillation losses that a run's arguments ask for, for its student and teacher."""

from __future__ import annotations

from typing import Any

from ultralytics.nn.tasks import DetectionModel

from gid_yolo.distill import GIDLoss
from gid_yolo.distill.gid import CROPS_OF_LEVELS
from gid_yolo.distill.methods import Distillation, FineGrained, FitNet, Mimicking, parse_methods
from gid_yolo.engine.config import BEFORE, DEFAULTS
from gid_yolo.engine.distillable import Distillable, distillable, share_levels
from gid_yolo.engine.preflight import check_alignment, misalignment
from gid_yolo.errors import UserError, some

WITH_ANCHORS = ("retinanet", "faster_rcnn")


def make_projector(args: Any, student: DetectionModel, teacher: DetectionModel) -> Distillation:
    """The losses of `distill=` with their adaptation layers.

    Raises:
        UserError: A method that cannot be applied to these models.
    """
    methods = parse_methods(args.distill)
    views = distillable(student), distillable(teacher)
    own, theirs = share_levels(*views).channels(*views)
    check_methods(methods, student, teacher)
    gid = None
    if "gid" in methods:
        aligned = check_alignment(teacher, student, response=bool(args.gid_response))
        given = {**BEFORE, **vars(args)}
        level = given["gid_level"] or DEFAULTS["gid_level"]
        if level == "detector" and views[0].family == "yolo" and aligned and args.gid_types != "gt":
            level = "prediction"  # its label assignment does not go by size
        standardize = given["gid_standardize"] or DEFAULTS["gid_standardize"]
        if standardize == "crops" and not isinstance(own, int):
            raise UserError(f"gid_{CROPS_OF_LEVELS}: give gid_standardize=maps, or leave it out.")
        gid = GIDLoss(
            own,
            theirs,
            top_k=args.gid_top_k,
            iou_threshold=args.gid_iou,
            weights={
                "feature": args.gid_feature,
                "relation": args.gid_relation,
                "response": args.gid_response,
                "cross": check_cross(given["gid_cross"] or 0.0, *views),
            },
            alpha=args.gid_alpha,
            beta=args.gid_beta,
            roi_size=args.gid_roi_size,
            level=level,
            feature_normalize=args.gid_normalize,
            standardize=standardize,
            weighting=given["gid_weighting"] or DEFAULTS["gid_weighting"],
            relation_reduction=args.gid_reduction,
            adapt_kernel=args.gid_adapt_kernel,
            types=args.gid_types,
            aligned=aligned,
        )
    fitnet = FitNet(own, theirs, args.fitnet_weight) if "fitnet" in methods else None
    fine_grained = FineGrained(own, theirs, args.fine_grained_weight) if "fine_grained" in methods else None
    mimicking = None
    if "mimicking" in methods and isinstance(own, int) and isinstance(theirs, int):  # as those of Faster R-CNN are
        mimicking = Mimicking(own, theirs, args.mimicking_weight)
    return Distillation(gid, fitnet, fine_grained, mimicking)


def check_cross(weight: float, student: Distillable, teacher: Distillable) -> float:
    """The weight of the term that has the teacher's head read the student's pyramid.

    Raises:
        UserError: The student has not all levels that the head reads.
    """
    if weight and not share_levels(student, teacher).read_by_head(teacher):
        own, theirs = (some(map(str, view.strides)) for view in (student, teacher))
        raise UserError(
            f"gid_cross={weight} has the teacher's head read the student's pyramid, but that has strides {own} and the "
            f"teacher's {theirs}: give a student that has all of the teacher's levels, or set gid_cross=0."
        )
    return weight


def check_methods(methods: tuple[str, ...], student: DetectionModel, teacher: DetectionModel) -> None:
    """Refuse a method where its paper's definition does not apply (table 1 of GID leaves these cells empty).

    Raises:
        UserError: Fine-grained imitation without anchors or with others than the teacher's, mimicking without
            proposals.
    """
    families = distillable(student).family, distillable(teacher).family
    if "mimicking" in methods and families != ("faster_rcnn", "faster_rcnn"):
        raise UserError(
            f"distill=mimicking compares features of proposals, but the student is a {families[0]} and the teacher a "
            f"{families[1]}: it needs two of faster_rcnn; use gid or fitnet."
        )
    if "fine_grained" not in methods:
        return
    if families[0] not in WITH_ANCHORS:
        raise UserError(
            f"distill=fine_grained finds its places by anchors, which a {families[0]} does not have: use gid or fitnet."
        )
    if reason := misalignment(teacher, student):
        raise UserError(
            f"distill=fine_grained needs the same anchors, but {reason}: use fitnet, or gid with gid_response=0."
        )
