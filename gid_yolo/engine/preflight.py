"""What is checked before the first step: a distillation must not fail silently."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, ops
from ultralytics.utils.torch_utils import autocast, unwrap_model

from gid_yolo.data.convert import CONVERTED_FROM
from gid_yolo.distill.gid import GIDLoss
from gid_yolo.distill.types import GROUND_TRUTH
from gid_yolo.engine.classes import SharedClasses
from gid_yolo.engine.coco_eval import CocoAccumulator
from gid_yolo.engine.config import thresholds
from gid_yolo.engine.fade import told
from gid_yolo.engine.provenance import changed_since, data_of
from gid_yolo.engine.teacher import best_finished_run, loaded_share
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.unusable import tell_unusable
from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError, some

if TYPE_CHECKING:
    from gid_yolo.engine.distillation_trainer import DistillationTrainer


UNALIGNED = (
    "{reason}: their responses cannot be compared one to one; give both the same kind of detector and the same anchor "
    "settings, or set gid_response=0 to distil features and relations, which need only boxes."
)
LEAD = 3.0  # mAP by which a teacher has to be ahead of its plain student to be worth it


def misalignment(teacher: DetectionModel, student: DetectionModel, size: int = 128) -> str | None:
    """Why the predictions of two models for an image of `size` px do not correspond one to one; None if they do."""
    kinds = [distillable(model).family for model in (teacher, student)]
    if kinds[0] != kinds[1]:
        return f"the teacher is a {kinds[0]} and the student a {kinds[1]}"
    priors = [_priors(model, size) for model in (teacher, student)]
    if priors[0].shape != priors[1].shape:
        return f"teacher and student predict {len(priors[0])} and {len(priors[1])} boxes for one image"
    return None if torch.equal(*priors) else "teacher and student have different anchors"


@torch.no_grad()
def _priors(model: DetectionModel, size: int) -> Tensor:
    """The (R, 4) anchors or points of a model on a blank image."""
    training, weight = model.training, next(model.parameters())
    priors = distillable(model.eval()).raw(weight.new_zeros(1, 3, size, size))[1].priors
    model.train(training)
    return priors.cpu()


def check_alignment(teacher: DetectionModel, student: DetectionModel, *, response: bool) -> bool:
    """Whether predictions correspond one to one, without which responses cannot be compared.

    Raises:
        UserError: They do not, and `response` is asked for.
    """
    reason = misalignment(teacher, student)
    if reason and response:
        raise UserError(UNALIGNED.format(reason=reason))
    return reason is None


def report(trainer: DistillationTrainer) -> None:
    """Log the table of what is about to happen.

    Raises:
        UserError: The teacher cannot teach.
    """
    model = unwrap_model(trainer.model)
    student = model.student_model if isinstance(model, TeacherStudentModel) else model
    rows = [("student", _describe(student)), ("student weights", trainer.initialised_from(student))]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    rows.append(("trained", f"{trained / 1e6:.2f} M parameters; {frozen / 1e6:.2f} M of the student's are frozen"))
    rows.append(("data", f"{trainer.args.data}, {student.nc} classes"))
    rows += [(f"{split} images", _counted(trainer, split)) for split in ("train", "val")]
    if isinstance(model, TeacherStudentModel):
        rows += _teacher_rows(trainer, model)
    else:
        rows.append(("teacher", "none: plain training"))
    width = max(len(name) for name, _ in rows)
    LOGGER.info("\nPreflight\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows) + "\n")


def _counted(trainer: DistillationTrainer, split: str) -> str:
    """How many images a split gives, and how many of its files Ultralytics skipped."""
    images = (trainer.train_loader if split == "train" else trainer.test_loader).dataset
    used, left = len(images.im_files), tell_unusable(images, None if trainer.args.single_cls else trainer.data["nc"])
    text = f"{used} of {used + left}: {left} COULD NOT BE USED, each is named above" if left else str(used)
    return text if any(len(label["cls"]) for label in images.labels) else f"{text}, WITHOUT OBJECTS"


def _describe(model: DetectionModel) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{distillable(model).describe()}, {millions:.2f} M parameters"


def _teacher_rows(trainer: DistillationTrainer, model: TeacherStudentModel) -> list[tuple[str, str]]:
    teacher, student, args = model.teacher_model, model.student_model, trainer.args
    original = trainer.load_teacher()  # the one in use has its batch norms folded
    loaded, wanted = loaded_share(original)
    if loaded < wanted:
        raise UserError(
            f"teacher={args.teacher} holds only {loaded} of the {wanted} tensors its settings call for: "
            "it was written by another version; train it again."
        )
    if teacher.training or any(p.requires_grad for p in teacher.parameters()):
        raise UserError("the teacher is not frozen: something put it back into training mode.")
    columns, images = teacher_columns(trainer, model)
    data = data_of(trainer)
    unmeasured = columns["mAP"] < 0  # pycocotools' word for it
    if unmeasured and args.teacher_min_ap > 0:
        raise UserError(
            f"teacher={args.teacher} cannot be measured: none of {images} validation images shows an object of a class "
            "that it knows; raise teacher_sample=, or set teacher_min_ap=0 to trust it."
        )
    if not unmeasured and columns["mAP"] < args.teacher_min_ap:
        half = "; its numbers may be too large for half precision, which teacher_precision=fp32 keeps it from"
        raise UserError(
            f"teacher={args.teacher} reaches mAP {columns['mAP']:.1f} on {images} validation images, under "
            f"teacher_min_ap={args.teacher_min_ap}: it has nothing to teach; train it longer, or set teacher_min_ap=0"
            f"{half if trainer.teacher_in_float16 else ''}."
        )
    accuracy = f"mAP {columns['mAP']:.1f}, AP50 {columns['AP50']:.1f}"
    if unmeasured:
        accuracy = "NOT MEASURED: no object of a class that it knows"
    elif warning := _too_weak(trainer, columns["mAP"], data):
        LOGGER.warning(warning)
    if warning := _of_other_data(args, data):
        LOGGER.warning(warning)
    classes = (
        f"{teacher.nc} classes, the student's" if model.shared is None else _mapping(teacher, student, model.shared)
    )
    return [
        ("teacher", f"{_describe(original)}, {args.teacher}"),
        ("teacher tensors", f"{loaded} of {wanted} loaded; frozen, evaluation mode{_precision(model)}"),
        ("teacher accuracy", f"{accuracy} on {images} validation images"),
        ("teacher classes", classes),
        ("aligned", _alignment(trainer, model)),
        ("distillation", _methods(model)),
        ("clipped", "the features' gradient by itself, then all" if trainer.clips_apart else "all gradients together"),
        ("taught", told(trainer)),
    ]


def _too_weak(trainer: DistillationTrainer, ap: float, data: Mapping[str, Any]) -> str | None:
    """What to say where a plain run of this student on `data`, finished before, comes near to its teacher."""
    args = trainer.args
    found = best_finished_run(
        str(args.model),
        args.data,
        args.project,
        single_cls=bool(args.single_cls),
        usable=lambda best: "val" not in changed_since(best, data, args),
    )
    if found is None or ap - found[0] >= LEAD:
        return None
    return (
        f"teacher={trainer.args.teacher} reaches mAP {ap:.1f}, and a plain run of this student {found[0]:.1f} "
        f"({found[1]}): a teacher that is not at least {LEAD:g} ahead has little to teach and may hold a student back; "
        "train the teacher longer, take a larger one, or let it go earlier by distill_until=."
    )


def _of_other_data(args: Any, data: Mapping[str, Any]) -> str | None:
    """What to say where `data` were others when the teacher was trained on them."""
    changed = changed_since(args.teacher, data, args)
    if not changed:
        return None
    seen = ": it may have been trained on images that now measure it and the student" if "val" in changed else ""
    return (
        f"data={data.get(CONVERTED_FROM, args.data)} has other {' and '.join(changed)} images, boxes or classes than "
        f"when teacher={args.teacher} was trained on it{seen}; train it again where that matters."
    )


def _precision(model: TeacherStudentModel) -> str:
    return "" if model.precision is None else f", {str(model.precision).removeprefix('torch.')}"


def _alignment(trainer: DistillationTrainer, model: TeacherStudentModel) -> str:
    size = trainer.args.imgsz
    reason = misalignment(model.teacher_model, model.student_model, size)
    gid = model.projector.gid
    if reason is None or model.projector.fine_grained is not None or (gid is not None and gid.aligned):
        if reason:
            raise UserError(f"{reason} at {size} px, although they are aligned at 128 px: use another imgsz.")
        return f"R = {len(_priors(model.student_model, size))} predictions at {size} px, same anchors"
    strides = ", ".join(map(str, model.levels.strides))
    paired = "" if gid is None else "instances are paired by overlap, "
    return f"NO, {reason}: {paired}features compared at strides {strides}"


def _methods(model: TeacherStudentModel) -> str:
    methods = []
    if (gid := model.projector.gid) is not None:
        terms = ", ".join(f"{name} x {weight:g}" for name, weight in gid.weights.items() if weight)
        methods.append(f"GID, K = {gid.top_k}, {terms or 'ALL TERMS OFF'}{_cropping(gid, model)}{_weighting(gid)}")
    for name in ("fitnet", "fine_grained", "mimicking"):
        if (method := getattr(model.projector, name)) is not None:
            methods.append(f"{name} x {method.weight:g}")
    return "; ".join(methods)


def _cropping(gid: GIDLoss, model: TeacherStudentModel) -> str:
    """By what the level of a crop is found, where there are crops."""
    if not (gid.weights["feature"] or gid.weights["relation"]):
        return ""
    if gid.level == "prediction":
        whose = "their" if gid.aligned and gid.types != (GROUND_TRUTH,) else "the student's nearest"
        return f", cropped at the levels of {whose} predictions"
    if gid.level == "detector" and distillable(model.student_model).family == "faster_rcnn":
        return ", cropped where the second stage crops them"
    return ", cropped at the levels of their sizes"


def _weighting(gid: GIDLoss) -> str:
    return "" if gid.weighting == "uniform" else f", instances weighed by {gid.weighting}"


def _mapping(teacher: DetectionModel, student: DetectionModel, shared: SharedClasses) -> str:
    pairs = [f"{student.names[i]} = {teacher.names[j]}" for i, j in zip(shared.student, shared.teacher, strict=True)]
    return (
        f"{len(pairs)} of the student's {student.nc} compared with {len(pairs)} of the teacher's {teacher.nc} "
        f"({some(pairs)}), the rest left out"
    )


@torch.no_grad()
def teacher_columns(trainer: DistillationTrainer, model: TeacherStudentModel) -> tuple[dict[str, float], int]:
    """The paper's ten columns of the teacher on the first `teacher_sample` validation images, and their number."""
    accumulator = CocoAccumulator(model.student_model.nc)
    validator, device = trainer.validator, trainer.device
    teacher = distillable(model.teacher_model)
    validator.device, validator.end2end = device, teacher.end2end
    given, validator.args = validator.args, copy(validator.args)
    usual = thresholds(model.student_model.yaml)  # which give way to the teacher's own; limits that were given do not
    own = {k: v for k, v in thresholds(model.teacher_model.yaml).items() if vars(given)[k] in (None, usual[k])}
    vars(validator.args).update(own)
    # The student's class of each of the teacher's, -1 where it has none; objects that the teacher cannot know are no
    # fault of its
    student_class = torch.arange(teacher.num_classes, device=device)
    known = torch.ones(model.student_model.nc, dtype=torch.bool, device=device)
    if model.class_index is not None:
        of_student, of_teacher = model.class_index
        student_class = student_class.new_full((teacher.num_classes,), -1)
        student_class[of_teacher] = of_student
        known = torch.zeros_like(known).index_fill(0, of_student, True)
    reduced = torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp  # as Ultralytics' loop
    for batch in trainer.test_loader:
        batch = validator.preprocess(batch)
        # As it will teach: in its own precision, or in the one that the student is trained in
        with autocast(reduced, device=device.type), model.in_precision(device):
            detections = teacher.detections(batch["img"].float())
        found = validator.postprocess(detections.float())
        for i, pred in enumerate(found):
            truth = validator._prepare_batch(i, batch)
            labels = student_class[pred["cls"].long()]
            kept, wanted = labels >= 0, known[truth["cls"].long()]
            shape = truth["imgsz"], truth["ori_shape"], truth["ratio_pad"]
            arrays = (
                ops.scale_boxes(shape[0], truth["bboxes"][wanted].clone(), shape[1], ratio_pad=shape[2]),
                truth["cls"][wanted],
                ops.scale_boxes(shape[0], pred["bboxes"][kept].clone(), shape[1], ratio_pad=shape[2]),
                pred["conf"][kept],
                labels[kept],
            )
            accumulator.add(*(x.float().cpu().numpy() for x in arrays))
        if accumulator.count >= trainer.args.teacher_sample:
            break
    validator.args = given
    if hasattr(trainer.test_loader, "reset"):
        trainer.test_loader.reset()  # its workers would go on in the middle of the set
    return accumulator.columns(), accumulator.count
