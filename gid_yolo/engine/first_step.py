"""What is checked after the first training step: every distillation term has a value and a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.engine.gradients import Pull
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.errors import UserError

if TYPE_CHECKING:
    from gid_yolo.engine.distillation_trainer import DistillationTrainer

_PATIENCE = 20  # batches in which a term may have nothing to compare while another one has


class FirstStep:
    """After the first training step every distillation term that is on must have a value and a gradient.

    A batch in which a term finds nothing to compare says nothing of it, so the next one is looked at.

    Attributes:
        passed: All that can be said has been said.
        pending: Terms that were not judged yet; None before the first batch that has anything to distil.
        batches: How many were looked at since then.
    """

    def __init__(self) -> None:
        self.passed = self._waiting = False
        self.pending: list[str] | None = None
        self.batches = 0

    def ask(self, trainer: DistillationTrainer) -> None:
        """Before a batch."""
        model = unwrap_model(trainer.model)
        if not self.passed and model.factor:
            model.asked = model.asked or "norms"

    def check(self, trainer: DistillationTrainer) -> None:
        """After it.

        Raises:
            UserError: A term is 0 or has no gradient, although it is on and has something to compare.
        """
        model: Any = unwrap_model(trainer.model)
        if self.passed or not model.factor:  # a run that is resumed after `distill_until` has no term to look at
            return
        names = model.term_names if self.pending is None else self.pending
        reasons = {name: reason for name in names if (reason := _nothing_to_compare(model, name))}
        if self.pending is None:
            if len(reasons) == len(names):
                if not self._waiting:
                    LOGGER.warning(
                        "nothing to distil in the first batch: the losses are checked on the first that has something."
                    )
                self._waiting = True
                return
            _tell(model)
        for name in names:
            if name not in reasons:
                _check(name, model.pulls[name])
        if reasons and self.pending is None:
            LOGGER.warning(f"{_said(reasons)}: looked at again in the next batches.")
        self.pending = list(reasons)
        self.batches += 1
        self.passed = not reasons or self.batches == _PATIENCE
        if reasons and self.passed:
            LOGGER.warning(
                f"{_said(reasons)}, in none of the first {_PATIENCE} batches: it may never teach anything; results.csv "
                "has its value in every epoch."
            )


def _said(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name} is 0, as {reason}" for name, reason in reasons.items())


def _tell(model: TeacherStudentModel) -> None:
    """The table of all terms."""
    found = cast("dict[str, Pull]", model.pulls)
    task = found["task"]
    lines = [f"  {'task loss':<10} {task.value:>11.4g}                gradient {task.norm:>9.3g}"]
    for name in model.term_names:
        value, norm, *_ = found[name]
        lines.append(f"  {name:<10} {value:>11.4g} = {value / task.value:>9.3g} x task, gradient {norm:>9.3g}")
    LOGGER.info(f"\nFirst step (gradients at the student's {model.pulled_at})\n" + "\n".join(lines) + "\n")


def _check(name: str, pull: Pull) -> None:
    if not math.isfinite(pull.value):
        return  # which is traced wherever it happens, see `WatchedTrainer`
    if pull.value == 0 or pull.norm == 0 or not math.isfinite(pull.norm):
        raise UserError(
            f"{name} is on but its value is {pull.value:g} and its gradient {pull.norm:g} in the first step: teacher "
            "and student may be the same model, or what it would train is frozen (freeze=)."
        )


def _nothing_to_compare(model: TeacherStudentModel, name: str) -> str | None:
    """Why the last batch gave a term nothing to compare; None where it had something."""
    if cast("dict[str, Pull]", model.pulls)[name].value != 0:
        return None
    if name == "fine_grained_loss":
        return None if bool(cast(Tensor, model.has_objects)) else "no image has an object"
    gid = model.projector.gid
    if gid is None or name not in gid.term_names:
        return None
    most = int(cast(Any, model.instances).valid.sum(1).max())
    if not most:
        return "no image has a general instance"
    if name == "rel_loss" and most == 2:  # both distances are the mean of the two
        return "no image has three general instances, and the distance of two, over their mean, is always 1"
    if name == "rel_loss" and most == 1:
        return "no image has two general instances to relate"
    if name in {"resp_loss", "cross_loss"} and gid.alpha:  # between equal models too the cross entropy is over 0
        return "no output answers for a general instance (equation 7)"
    return None
