"""Pairs of predictions that do not correspond one to one, by plain loops."""

from reference.boxes import iou


def naive_pairs(teacher_scores, student_scores, teacher_boxes, student_boxes, *, candidates, iou_threshold):
    """Pairs of one image: (teacher's scores, student's scores, teacher's box, student's box), the teacher's first."""
    teacher = _most_confident(teacher_scores.tolist(), teacher_boxes.tolist(), candidates)
    student = _most_confident(student_scores.tolist(), student_boxes.tolist(), candidates)
    pairs = []
    for scores, box in teacher:
        other = _counterpart(box, student, iou_threshold) or ([0.0] * len(scores), box)
        pairs.append((scores, other[0], box, other[1]))
    for scores, box in student:
        other = _counterpart(box, teacher, iou_threshold) or ([0.0] * len(scores), box)
        pairs.append((other[0], scores, other[1], box))
    return pairs


def _most_confident(scores, boxes, count):
    order = sorted(range(len(scores)), key=lambda r: -max(scores[r]))
    return [(scores[r], boxes[r]) for r in order[:count]]


def _counterpart(box, others, threshold):
    overlapping = [other for other in others if iou(box, other[1]) >= threshold]
    return max(overlapping, key=lambda other: max(other[0]), default=None)
