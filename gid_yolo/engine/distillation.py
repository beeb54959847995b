"""The distillation losses that a run's arguments ask for, for its student and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.nn.tasks import DetectionModel

from gid_yolo.cfg import model_names
from gid_yolo.detectors.build import model_config
from gid_yolo.distill import GIDLoss
from gid_yolo.distill.methods import Distillation, FineGrained, FitNet, Mimicking, parse_methods
from gid_yolo.engine.config import BEFORE, DEFAULTS
from gid_yolo.engine.distillable import Distillable
from gid_yolo.engine.preflight import UNALIGNED, check_alignment, misalignment
from gid_yolo.engine.shared_levels import share_levels
from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError, some

WITH_ANCHORS = ("retinanet", "faster_rcnn")
CROPS_OF_LEVELS = (  # narrow levels are filled up with zeros, which would have a mean and a variance
    "gid_standardize=crops takes means and variances over all levels, but those of a YOLO differ in channels: give "
    "gid_standardize=maps, or leave it out."
)
NO_COMMON_ANCHORS = "distill=fine_grained needs the same anchors, but {reason}: use fitnet, or gid with gid_response=0."


def make_projector(args: Any, student: DetectionModel, teacher: DetectionModel) -> Distillation:
    """The losses of `distill=` with their adaptation layers.

    Raises:
        UserError: A method that cannot be applied to these models.
    """
    methods = parse_methods(args.distill)
    views = distillable(student), distillable(teacher)
    own, theirs = share_levels(*views).channels(*views)
    check_families(methods, views[0].family, views[1].family, response=bool(args.gid_response))
    if "fine_grained" in methods and (reason := misalignment(teacher, student)):
        raise UserError(NO_COMMON_ANCHORS.format(reason=reason))
    gid = None
    if "gid" in methods:
        aligned = check_alignment(teacher, student, response=bool(args.gid_response))
        given = {**BEFORE, **vars(args)}
        level = given["gid_level"] or DEFAULTS["gid_level"]
        if level == "detector" and views[0].family == "yolo" and aligned and args.gid_types != "gt":
            level = "prediction"  # its label assignment does not go by size
        standardize = given["gid_standardize"] or DEFAULTS["gid_standardize"]
        if standardize == "crops" and not isinstance(own, int) and not given.get("resume"):
            raise UserError(CROPS_OF_LEVELS)
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


def check_families(methods: tuple[str, ...], student: str, teacher: str, *, response: bool) -> None:
    """Refuse a method where its paper's definition does not apply (table 1 of GID leaves these cells empty).

    Args:
        methods: Of `distill=`.
        student: Kind of detector.
        teacher: Likewise.
        response: Whether responses are to be compared.

    Raises:
        UserError: Responses or anchors of two kinds, fine-grained imitation without anchors, mimicking without
            proposals.
    """
    reason = f"the teacher is a {teacher} and the student a {student}"
    if "mimicking" in methods and (student, teacher) != ("faster_rcnn", "faster_rcnn"):
        raise UserError(
            f"distill=mimicking compares features of proposals, but the student is a {student} and the teacher a "
            f"{teacher}: it needs two of faster_rcnn; use gid or fitnet."
        )
    if "fine_grained" in methods and student not in WITH_ANCHORS:
        raise UserError(
            f"distill=fine_grained finds its places by anchors, which a {student} does not have: use gid or fitnet."
        )
    if student != teacher and "gid" in methods and response:
        raise UserError(UNALIGNED.format(reason=reason))
    if student != teacher and "fine_grained" in methods:
        raise UserError(NO_COMMON_ANCHORS.format(reason=reason))


def check_named_teacher(args: Mapping[str, Any], student: str) -> None:
    """`check_families` of a teacher by name, before it is trained for a pair that will be refused.

    Args:
        args: Of the run.
        student: Kind of detector.

    Raises:
        UserError: See there.
    """
    name = args.get("teacher")
    if name in model_names():
        theirs = model_config(name)["detector"]
        check_families(parse_methods(args["distill"]), student, theirs, response=bool(args["gid_response"]))
