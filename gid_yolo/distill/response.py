"""Section 3.4: response-based distillation, equations 7 and 8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gid_yolo.ops.losses import mean_over_images
from gid_yolo.ops.structures import RawPredictions

Losses = Callable[[RawPredictions, RawPredictions], Tensor]


class ResponseFunctions(Protocol):
    """All that distillation knows of a detector besides its raw predictions."""

    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) bool, the outputs that the detector's label assignment gives to (B, K, 4) GI boxes."""

    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """L_cls of equation 8: (B, R)."""

    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """L_reg of equation 8: (B, R)."""


@dataclass(frozen=True)
class TeachersHead:
    """What makes the teacher's raw predictions of a pyramid, frozen, and how they are compared.

    Attributes:
        predict: Maps L levels of the teacher's channels to raw predictions, with a graph to the levels.
        functions: The teacher's mask and losses.
    """

    predict: Callable[[list[Tensor]], RawPredictions]
    functions: ResponseFunctions


def response_loss(
    teacher: RawPredictions,
    student: RawPredictions,
    mask: Tensor,
    *,
    functions: ResponseFunctions,
    alpha: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """Equation 8: the head losses between teacher and student over the N_m outputs that the mask selects.

    Args:
        teacher: Predictions, which get no gradient.
        student: Predictions with a graph, aligned with the teacher's.
        mask: (B, R) bool of equation 7.
        functions: The detector's loss functions.
        alpha: Weight of the class term.
        beta: Weight of the box term.

    Returns:
        Scalar, the mean over images of the mean over an image's masked outputs; 0 for an image without any.
    """

    def losses(teacher: RawPredictions, student: RawPredictions) -> Tensor:  # (B, R) of every output
        cls, reg = functions.response_cls_loss(teacher, student), functions.response_reg_loss(teacher, student)
        return alpha * cls + beta * reg

    # The masked outputs are a few hundredths of all, but a GPU would have to wait for their number
    mean = mean_of_masked if mask.device.type == "cpu" else mean_of_all
    return mean(losses, teacher.detach(), student, mask)


def mean_of_all(losses: Losses, teacher: RawPredictions, student: RawPredictions, mask: Tensor) -> Tensor:
    """The mean over images of the mean over masked outputs, (B, R), of losses that are computed of every output."""
    return mean_over_images(losses(teacher, student), mask)


def mean_of_masked(losses: Losses, teacher: RawPredictions, student: RawPredictions, mask: Tensor) -> Tensor:
    """The same, of losses that are computed of the masked outputs alone; the host knows their number."""
    image, output = mask.nonzero(as_tuple=True)  # (N,) each
    found = losses(teacher.at(image, output), student.at(image, output))[0]  # (N,)
    sums = found.new_zeros(mask.shape[0]).index_add(0, image, found)  # (B,)
    return (sums / mask.sum(1).clamp(min=1)).mean()
