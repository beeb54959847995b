"""Section 3.1: the general instance selection module (GISM), equations 1 to 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gid_yolo.ops.boxes import Corners
from gid_yolo.ops.precision import wide
from gid_yolo.ops.structures import GeneralInstances, RawPredictions, probabilities

CHUNK = 2**19  # scores that a CPU looks at at once: few enough for what is made of them to stay in its cache
CHUNK_OF_DEVICE = 2**24  # likewise elsewhere: 64 MB, where kernels are long enough
_REMOVED = -1.0  # below every GI score, which lies in [0, 1]


def gi_scores(teacher_scores: Tensor, student_scores: Tensor) -> Tensor:
    """Equation 1: (...) the largest absolute difference over classes, from two (..., C) of probabilities."""
    # Not `aminmax`, which writes no absolute values but takes twice the time on a CPU
    return (wide(teacher_scores) - wide(student_scores)).abs_().amax(-1)


def compare(teacher: Tensor, student: Tensor, scores: Callable[[Tensor], Tensor] = wide) -> tuple[Tensor, Tensor]:
    """What equations 1 and 2 ask of two (B, R, C): (B, R) GI scores, and (B, R) True where the teacher's is the box.

    Args:
        teacher: What its class probabilities are made of.
        student: Likewise.
        scores: Makes them; of a part at a time, on a CPU of one that its cache holds, or most of the time would go into
            writing them out.
    """
    shape, classes = teacher.shape[:2], teacher.shape[2]
    rows = teacher.flatten(0, 1), student.flatten(0, 1)  # (B*R, C)
    size = (CHUNK if teacher.device.type == "cpu" else CHUNK_OF_DEVICE) // max(1, classes)
    # Whole blocks of 64: the numbers at the end of a block are not computed as its others are, and round otherwise
    size = max(64, size // 64 * 64) if size < len(rows[0]) else max(1, size)
    parts = []
    for t, s in zip(*(x.split(size) for x in rows), strict=True):
        t, s = scores(t), scores(s)
        parts.append((gi_scores(t, s), t.amax(-1) > s.amax(-1)))
    difference, teacher_wins = (torch.cat(x).view(shape) for x in zip(*parts, strict=True))
    return difference, teacher_wins


def gi_boxes(teacher_scores: Tensor, student_scores: Tensor, teacher_boxes: Tensor, student_boxes: Tensor) -> Tensor:
    """Equation 2: (B, R, 4) the box of the more confident model, the student's where both are equal."""
    return _winners(teacher_scores.amax(-1) > student_scores.amax(-1), teacher_boxes, student_boxes)


@torch.no_grad()
def select_general_instances(
    teacher_scores: Tensor,
    student_scores: Tensor,
    teacher_boxes: Tensor,
    student_boxes: Tensor,
    *,
    top_k: int = 10,
    iou_threshold: float = 0.3,
) -> GeneralInstances:
    """Select the K instances on which teacher and student differ most (equations 1 to 3).

    The result equals greedy NMS over all R predictions followed by the top K, exactly. Greedy NMS visits boxes by
    falling score and keeps one if no kept box overlaps it; so its k-th kept box is the best of those that the first
    k - 1 kept boxes leave over, and K rounds of "take the best, remove what it overlaps" give the first K of them
    without ever sorting or comparing all pairs: O(K R) time, the same kernels for every image, no host sync.

    Scores are subtracted in at least float32. Those of models that ran in half precision are rounded before they come
    here: of two whose differences are closer than that, half precision may choose the other, and so other instances
    than float32 does. A prediction whose score or box is NaN or infinite is never an instance.

    Args:
        teacher_scores: (B, R, C) class probabilities in [0, 1].
        student_scores: (B, R, C) likewise.
        teacher_boxes: (B, R, 4) xyxy in input pixels.
        student_boxes: (B, R, 4) likewise.
        top_k: Instances K per image (paper: 10).
        iou_threshold: Instances that overlap a better one by more are dropped (paper: 0.3).

    Returns:
        Instances sorted by score, ties by lower index.

    Raises:
        ValueError: Shapes of teacher and student differ, or `top_k` is negative.
    """
    return _selected(teacher_scores, student_scores, teacher_boxes, student_boxes, wide, top_k, iou_threshold)


@torch.no_grad()
def general_instances(
    teacher: RawPredictions, student: RawPredictions, *, top_k: int, iou_threshold: float
) -> GeneralInstances:
    """`select_general_instances` of aligned predictions, whose probabilities are made in parts, see `compare`."""
    logits, boxes = (teacher.logits, student.logits), (teacher.boxes, student.boxes)
    return _selected(*logits, *boxes, probabilities, top_k, iou_threshold)


def _selected(
    teacher: Tensor,
    student: Tensor,
    teacher_boxes: Tensor,
    student_boxes: Tensor,
    scores: Callable[[Tensor], Tensor],
    top_k: int,
    iou_threshold: float,
) -> GeneralInstances:
    """Equations 1 to 3 of two (B, R, C), of which `scores` makes probabilities, and of their (B, R, 4) boxes."""
    _check(teacher, student, teacher_boxes, student_boxes, top_k)
    difference, teacher_wins = compare(teacher, student, scores)
    return _first_of_nms(difference, _winners(teacher_wins, teacher_boxes, student_boxes), top_k, iou_threshold)


def _winners(teacher_wins: Tensor, teacher_boxes: Tensor, student_boxes: Tensor) -> Tensor:
    """(B, R, 4) of two such the teacher's where (B, R) is True."""
    return torch.where(teacher_wins[..., None], teacher_boxes, student_boxes)


def _check(
    teacher_scores: Tensor, student_scores: Tensor, teacher_boxes: Tensor, student_boxes: Tensor, top_k: int
) -> None:
    """Refuse what `select_general_instances` does; scores may be logits, of which only the shape counts."""
    aligned = teacher_scores.shape == student_scores.shape and teacher_boxes.shape == student_boxes.shape
    if not aligned or teacher_boxes.shape != (*teacher_scores.shape[:2], 4):
        raise ValueError(
            f"teacher and student predictions must be aligned one to one, but scores are {tuple(teacher_scores.shape)} "
            f"and {tuple(student_scores.shape)}, boxes {tuple(teacher_boxes.shape)} and {tuple(student_boxes.shape)}."
        )
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative.")


def _first_of_nms(scores: Tensor, boxes: Tensor, top_k: int, iou_threshold: float) -> GeneralInstances:
    """Equation 3 of (B, R) GI scores and (B, R, 4) GI boxes, see `select_general_instances`."""
    batch, count = scores.shape
    remaining = _candidates(scores, boxes)
    corners = Corners.of(boxes)
    scores = remaining.new_full((batch, top_k), _REMOVED)
    indices = torch.zeros(batch, top_k, dtype=torch.long, device=boxes.device)
    for k in range(min(top_k, count)):
        best, index = remaining.max(dim=1, keepdim=True)  # (B, 1); the first of equals
        overlapped = corners.iou(corners.gather(index)) > iou_threshold  # (B, R); nan of two empty is not an overlap
        remaining = remaining.masked_fill_(overlapped, _REMOVED).scatter_(1, index, _REMOVED)
        scores[:, k], indices[:, k] = best[:, 0], index[:, 0]

    valid = scores > _REMOVED  # (B, K)
    indices = indices.masked_fill(~valid, 0)
    chosen = boxes.gather(1, indices[..., None].expand(-1, -1, 4)) if count else boxes.new_zeros(batch, top_k, 4)
    return GeneralInstances(
        boxes=chosen.masked_fill(~valid[..., None], 0.0), scores=scores.clamp(min=0.0), indices=indices, valid=valid
    )


def _candidates(scores: Tensor, boxes: Tensor) -> Tensor:
    """(B, R) GI scores; `_REMOVED` where the score or the (B, R, 4) box is not finite."""
    scores = scores.nan_to_num(_REMOVED, posinf=_REMOVED)
    # A sum is not finite where a corner is not: one pass, and nothing the size of the boxes is written
    return scores.masked_fill(~boxes.sum(-1, dtype=scores.dtype).isfinite(), _REMOVED)
