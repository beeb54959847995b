"""The model that is trained while distilling: student, adaptation layer, and a frozen teacher beside them."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import copy_attr

from gid_yolo.distill.methods import Distillation
from gid_yolo.distill.response import TeachersHead
from gid_yolo.distill.types import count_types
from gid_yolo.engine.classes import SharedClasses
from gid_yolo.engine.detection_model import batch_targets
from gid_yolo.engine.distillable import Distillable
from gid_yolo.engine.gradients import Pull, pulls
from gid_yolo.engine.instance_counts import COUNT_NAMES
from gid_yolo.engine.shared_levels import share_levels
from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError
from gid_yolo.ops.structures import GeneralInstances, RawPredictions

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TeacherStudentModel(DistillationModel):
    """Student and teacher as Ultralytics' trainer, EMA and `strip_optimizer` know a distillation.

    The teacher is held outside PyTorch's module tree: it is neither optimised, averaged, wrapped by DDP, nor written
    into checkpoints, and `train()` cannot reach it.

    Args:
        student: The model to train, ours or a YOLO detector.
        teacher: The trained model; frozen here.
        projector: The distillation losses with their adaptation layers (Ultralytics' name for it).
        shared: The classes whose scores are compared; None for all.
        precision: In which the teacher's pass computes; where None, as the student's does. Its head on the student's
            features (`gid_cross`) always computes as the student does.
    """

    factor = 1.0  # of the terms in the next training batch; without a teacher's pass where it is 0
    pulled_at = "pyramid"  # where the `pulls` of the last batch were taken

    def __init__(
        self,
        student: DetectionModel,
        teacher: DetectionModel,
        projector: Distillation,
        shared: SharedClasses | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # DistillationModel's own wants a YOLO head
        self.student_model = student
        self.projector = projector
        self.shared = shared
        self.precision = precision
        self.class_index = None if shared is None else (torch.tensor(shared.student), torch.tensor(shared.teacher))
        frozen = freeze_teacher(teacher)
        self.__dict__["teacher_model"] = frozen  # past nn.Module's registration
        self.views: tuple[Distillable, Distillable] | None = distillable(frozen), distillable(student)
        self.levels = share_levels(self.views[1], self.views[0])
        self.instances: GeneralInstances | None = None  # of the last training batch
        self.sketch: tuple[Any, ...] | None = None  # set to () to keep what figure 4 draws of the next batch
        self.has_objects: Tensor | None = None  # whether that batch has any
        self.asked: Literal["", "norms", "pulls"] = ""  # what is wanted as `pulls` of the next training batch
        self.pulls: dict[str, Pull] | None = None
        copy_attr(self, student, exclude=("criterion",))
        self.stride = max(student.stride, frozen.stride, key=lambda s: int(s.max()))  # images must fit both

    def _freeze_teacher(self) -> None:
        """Take no note: the teacher is frozen for good and `train()` does not reach it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled as data, see `rebuild`; a YOLO student as Ultralytics pickles it."""
        from gid_yolo.engine.rebuild import store_distillation  # which needs this class

        return store_distillation(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherStudentModel:
        """A copy of everything but the teacher and the last batch."""
        model = type(self).__new__(type(self))
        memo[id(self)] = model
        model.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the teacher and the last batch, for the EMA's copy."""
        state = self.__dict__.copy()
        state.update(teacher_model=None, views=None, instances=None, sketch=None, asked="", pulls=None)
        state.update(has_objects=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; DistillationModel's own would hook into YOLO layers."""
        self.__dict__.update(state)

    def _remove_feature_hooks(self) -> None:
        """Take no note: features are returned explicitly, not hooked."""

    def _apply(self, fn: Any, recurse: bool = True) -> TeacherStudentModel:
        super()._apply(fn, recurse)
        if self.teacher_model is not None:
            self.teacher_model._apply(fn)
        if self.class_index is not None:
            self.class_index = fn(self.class_index[0]), fn(self.class_index[1])
        return self

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 9 on a training batch; in validation the task loss, with the distillation terms as 0.

        Returns:
            The loss to minimise, in the scale of the student's own, and the named parts as they are logged.
        """
        student, taught = self.student_model, None
        if self.training and self.factor:
            taught = self.taught(batch["img"])  # first: what the teacher's pass frees, the student's then takes
        if preds is None:
            preds = student(batch["img"])
        loss, items = student.loss(batch, preds)
        if taught is None or self.views is None:
            self.instances = self.pulls = None
            self.asked = ""
            return loss, {**items, **{name: loss.new_zeros(()) for name in (*self.term_names, *self.count_names)}}
        view, (teacher_features, teacher_raw) = self.views[1], taught
        targets, size = batch_targets(batch), tuple(batch["img"].shape[-2:])
        self.has_objects = targets.valid.any()
        features, raw = view.outputs(preds)
        places = self._places(features, preds, raw) if self.asked else []
        of_student, of_teacher = self.class_index or (None, None)
        teacher_raw, raw = teacher_raw.select_classes(of_teacher), raw.select_classes(of_student)
        terms, self.instances = self.projector(
            [teacher_features[i] for i in self.levels.teacher],
            [features[i] for i in self.levels.student],
            teacher_raw,
            raw,
            functions=view.functions,
            strides=self.levels.strides,
            image_size=size,
            targets=targets,
            proposals=lambda: view.proposals(features, raw, targets, size),
            levels=self.levels.rules(view.level_rules(features, raw), view.strides),
            head=self._teachers_head(size),
        )
        terms = {name: self.factor * value for name, value in terms.items()}
        counts = {} if self.instances is None else count_types(self.instances)
        if self.sketch is not None and (gid := self.projector.gid) is not None:
            shapes = [tuple(x.shape[-2:]) for x in features] if gid.aligned else None
            self.sketch = batch["img"], (teacher_raw, raw.detach()), self.instances, targets, shapes
        scale = view.loss_scale(batch)
        wanted, self.asked = self.asked, ""
        self.pulls = None
        if wanted:
            self.pulls = pulls({"task": loss.sum() / scale, **terms}, places, angles=wanted == "pulls")
        total = loss.sum() + sum(terms.values()) * scale
        logged = {name: value.detach() for name, value in terms.items()}
        return total, {**items, **logged, **{f"gi_{name}": value for name, value in counts.items()}}

    def _teachers_head(self, size: tuple[int, int]) -> TeachersHead | None:
        """The head for images of (height, width), where the student's pyramid has all levels that it reads."""
        teacher = cast(tuple[Distillable, Distillable], self.views)[0]
        if not self.levels.read_by_head(teacher):
            return None
        index = None if self.class_index is None else self.class_index[1]
        return TeachersHead(lambda x: teacher.predict(x, size).select_classes(index), teacher.functions)

    @torch.no_grad()
    def taught(self, images: Tensor) -> tuple[list[Tensor], RawPredictions]:
        """The teacher's pyramid and predictions for images (B, 3, H, W) in [0, 1]."""
        if self.views is None:
            raise RuntimeError("this copy of the model has no teacher, so it cannot train.")
        with self.in_precision(images.device):
            features, raw = self.views[0].raw(images)
        if self.precision is None:
            return features, raw
        centerness = None if raw.centerness is None else raw.centerness.float()
        raw = replace(raw, logits=raw.logits.float(), regression=raw.regression.float(), centerness=centerness)
        return [x.float() for x in features], raw

    def in_precision(self, device: torch.device) -> AbstractContextManager[None]:
        """The context in which the teacher computes."""
        if self.precision is None:
            return nullcontext()
        reduced = self.precision != torch.float32
        return torch.autocast(device.type, self.precision if reduced else None, enabled=reduced)

    def _places(self, features: list[Tensor], preds: Any, raw: RawPredictions) -> list[Tensor]:
        """Where the `pulls` are taken: at the pyramid, or where that is frozen at the predictions made of it."""
        maps = [x for x in features if x.requires_grad]
        self.pulled_at = "pyramid" if maps else "predictions"
        # YOLO's are what it returns, of which `raw` holds views; those of ours are `raw` itself
        made = [*tree_leaves(preds)] if isinstance(preds, dict) else [raw.logits, raw.regression, raw.centerness]
        return maps or [x for x in made if isinstance(x, Tensor) and x.requires_grad]

    @property
    def term_names(self) -> list[str]:
        """Names of the distillation terms that are on."""
        return self.projector.term_names

    @property
    def count_names(self) -> tuple[str, ...]:
        """Names of the counts of general instances, where there are any."""
        return () if self.projector.gid is None else COUNT_NAMES

    @property
    def criterion(self) -> Any:
        """The student's: YOLO has one, whose schedule the trainer advances; our detectors have none."""
        return self.student_model.criterion

    @criterion.setter
    def criterion(self, value: Any) -> None:
        """Set the student's: Ultralytics clears it before saving."""
        self.student_model.criterion = value

    @property
    def end2end(self) -> bool:
        """The student's: whether its detections need no NMS."""
        return self.student_model.end2end

    @end2end.setter
    def end2end(self, value: bool) -> None:
        """The validator selects a YOLO's branch by it; our detectors have but one."""
        self.student_model.end2end = value

    def init_criterion(self) -> Any:
        """The student's, which Ultralytics rebuilds when it resumes a YOLO with two branches."""
        return self.student_model.init_criterion()

    def fuse(self, verbose: bool = True, imgsz: int | list[int] = 640) -> DetectionModel:
        """The fused student alone."""
        return self.student_model.fuse(verbose=verbose, imgsz=imgsz)

    def info(self, **kwargs: Any) -> Any:
        """Summary of the student."""
        return self.student_model.info(**kwargs)


def freeze_teacher(teacher: DetectionModel) -> DetectionModel:
    """Put a teacher into its state for good: eval mode, batch norms folded, no gradients, fp32."""
    teacher = copy.deepcopy(teacher).float().eval()
    teacher.end2end = False  # before the fuse, which drops the branch that is not in use: one-to-many is compared
    teacher.fuse(verbose=False)
    teacher.to(memory_format=torch.channels_last)  # a third off its forward pass on a CPU, Tensor Cores on CUDA
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def check_precision(precision: str | None, device: torch.device) -> None:
    """Refuse a `teacher_precision=` that the device does not compute in, or only slower than in float32.

    Raises:
        UserError: What to give.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("teacher_precision=fp16 needs a GPU: on a CPU give bf16, or leave it out.")
    if precision != "bf16":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"teacher_precision=bf16: {device} does not compute in bfloat16; give fp16, or leave it out.")
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UserError("teacher_precision=bf16: this CPU has no instructions for bfloat16; leave it out.")
