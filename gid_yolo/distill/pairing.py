"""Section 3.1 for models whose predictions do not correspond one to one, which the paper does not treat."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou


@torch.no_grad()
def pair_predictions(
    teacher_scores: Tensor,
    student_scores: Tensor,
    teacher_boxes: Tensor,
    student_boxes: Tensor,
    *,
    candidates: int = 500,
    iou_threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pair every confident prediction of each model with what the other one says of the same place.

    Equations 1 and 2 compare two predictions of one anchor. Without common anchors, the counterpart of a prediction is
    the other model's most confident one that overlaps it by `iou_threshold`; where there is none, the other model sees
    nothing there: scores of 0, and the same box. The GI score of a pair is at most the larger of its two confidences,
    so that only confident predictions can become instances.

    Args:
        teacher_scores: (B, R_t, C_t) class probabilities in [0, 1].
        student_scores: (B, R_s, C_s) likewise. Where C_t and C_s differ, one is an RPN's objectness: classes are
            reduced to the largest probability.
        teacher_boxes: (B, R_t, 4) xyxy in input pixels.
        student_boxes: (B, R_s, 4) likewise.
        candidates: Most confident predictions of each model that are paired, N_t and N_s at most.
        iou_threshold: Smallest IoU of a pair.

    Returns:
        Teacher's and student's scores (B, N_t + N_s, C), teacher's and student's boxes (B, N_t + N_s, 4), as
        `select_general_instances` takes them.
    """
    if teacher_scores.shape[-1] != student_scores.shape[-1]:
        teacher_scores, student_scores = teacher_scores.amax(-1, keepdim=True), student_scores.amax(-1, keepdim=True)
    teacher_scores, teacher_boxes = _most_confident(teacher_scores, teacher_boxes, candidates)
    student_scores, student_boxes = _most_confident(student_scores, student_boxes, candidates)
    same_place = box_iou(teacher_boxes, student_boxes) >= iou_threshold  # (B, N_t, N_s)
    of_teacher = _counterparts(same_place, student_scores, student_boxes, teacher_boxes)
    of_student = _counterparts(same_place.mT, teacher_scores, teacher_boxes, student_boxes)
    return (
        torch.cat([teacher_scores, of_student[0]], dim=1),
        torch.cat([of_teacher[0], student_scores], dim=1),
        torch.cat([teacher_boxes, of_student[1]], dim=1),
        torch.cat([of_teacher[1], student_boxes], dim=1),
    )


def _most_confident(scores: Tensor, boxes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` predictions of each image with the largest class probability, sorted by it."""
    confidence = scores.amax(-1).nan_to_num(-1.0)  # (B, R)
    index = confidence.topk(min(count, scores.shape[1])).indices[..., None]  # (B, N, 1)
    return scores.gather(1, index.expand(-1, -1, scores.shape[-1])), boxes.gather(1, index.expand(-1, -1, 4))


def _counterparts(same_place: Tensor, scores: Tensor, boxes: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The first, hence most confident, of M predictions (B, M, ...) at the place of each of N: (B, N, C), (B, N, 4)."""
    if not scores.shape[1]:
        return scores.new_zeros(*own.shape[:2], scores.shape[-1]), own
    found = same_place.any(-1, keepdim=True)  # (B, N, 1)
    index = same_place.byte().argmax(-1, keepdim=True)  # (B, N, 1) the first of equals
    return (
        scores.gather(1, index.expand(-1, -1, scores.shape[-1])) * found,
        torch.where(found, boxes.gather(1, index.expand(-1, -1, 4)), own),
    )
