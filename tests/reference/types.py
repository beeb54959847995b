"""Equations 10 and 11, one instance and one object at a time."""

from reference.boxes import iou


def naive_iop(box, truth):
    """Equation 10: intersection over the area of the general instance."""
    width = max(0.0, min(box[2], truth[2]) - max(box[0], truth[0]))
    height = max(0.0, min(box[3], truth[3]) - max(box[1], truth[1]))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return width * height / area if area else 0.0


def naive_type(box, objects):
    """Equation 11; None where the paper leaves the instance out."""
    best_iou = max((iou(box, truth) for truth in objects), default=0.0)
    best_iop = max((naive_iop(box, truth) for truth in objects), default=0.0)
    if best_iou > 0.5:
        return "pos"
    if best_iop > 0.7:
        return "semi"
    return "neg" if best_iop < 0.3 else None
