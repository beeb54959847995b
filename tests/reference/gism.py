"""Section 3.1, equations 1 to 3, straight from the paper."""

from reference.boxes import iou


def naive_gi(teacher_scores, student_scores, teacher_boxes, student_boxes):
    """Equations 1 and 2 of one image: GI scores and GI boxes, as lists."""
    scores, boxes = [], []
    for pt, ps, bt, bs in zip(
        teacher_scores.tolist(), student_scores.tolist(), teacher_boxes.tolist(), student_boxes.tolist(), strict=True
    ):
        scores.append(max(abs(t - s) for t, s in zip(pt, ps, strict=True)))
        boxes.append(bt if max(pt) > max(ps) else bs)
    return scores, boxes


def naive_nms(scores, boxes, threshold):
    """Greedy NMS over all boxes: indices of the kept ones by falling score, ties by lower index."""
    waiting = sorted(range(len(scores)), key=lambda r: (-scores[r], r))
    kept = []
    while waiting:
        best, *rest = waiting
        kept.append(best)
        waiting = [r for r in rest if iou(boxes[best], boxes[r]) <= threshold]
    return kept


def naive_gism(teacher_scores, student_scores, teacher_boxes, student_boxes, *, top_k, iou_threshold):
    """Equation 3 for a batch: per image the full NMS, then the first K, as lists (indices, scores, boxes)."""
    result = []
    for image in zip(teacher_scores, student_scores, teacher_boxes, student_boxes, strict=True):
        scores, boxes = naive_gi(*image)
        kept = naive_nms(scores, boxes, iou_threshold)[:top_k]
        result.append((kept, [scores[r] for r in kept], [boxes[r] for r in kept]))
    return result
