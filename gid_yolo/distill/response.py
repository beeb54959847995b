"""Section 3.4: response-based distillation, equations 7 and 8."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gid_yolo.ops.losses import mean_over_images
from gid_yolo.ops.structures import RawPredictions


class ResponseFunctions(Protocol):
    """All that distillation knows of a detector besides its raw predictions."""

    def response_mask(self, priors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """Equation 7: (B, R) bool, the outputs that the detector's label assignment gives to (B, K, 4) GI boxes."""

    def response_cls_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """L_cls of equation 8: (B, R)."""

    def response_reg_loss(self, teacher: RawPredictions, student: RawPredictions) -> Tensor:
        """L_reg of equation 8: (B, R)."""


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
        teacher: Predictions without a graph.
        student: Predictions with a graph, aligned with the teacher's.
        mask: (B, R) bool of equation 7.
        functions: The detector's loss functions.
        alpha: Weight of the class term.
        beta: Weight of the box term.

    Returns:
        Scalar, the mean over images of the mean over an image's masked outputs; 0 for an image without any.
    """
    if mask.device.type != "cpu":  # which would have to wait for the number of outputs
        return mean_over_images(_losses(teacher, student, functions, alpha, beta), mask)
    image, output = mask.nonzero(as_tuple=True)  # (N,) each; a few hundredths of all
    losses = _losses(teacher.at(image, output), student.at(image, output), functions, alpha, beta)[0]  # (N,)
    sums = losses.new_zeros(mask.shape[0]).index_add(0, image, losses)
    return (sums / mask.sum(1).clamp(min=1)).mean()


def _losses(
    teacher: RawPredictions, student: RawPredictions, functions: ResponseFunctions, alpha: float, beta: float
) -> Tensor:
    """(B, R) of every output."""
    return alpha * functions.response_cls_loss(teacher, student) + beta * functions.response_reg_loss(teacher, student)
