"""YOLO's responses, one prediction at a time, in float64 with a graph."""

import math

import torch


def naive_distances(logits):
    """Four distances, each the mean of a distribution over bins 0 to n - 1 (Li et al. 2020, equation 5)."""
    bins = len(logits) // 4
    if bins == 1:
        return list(logits)
    sides = []
    for i in range(4):
        powers = [x.exp() for x in logits[i * bins : (i + 1) * bins]]
        sides.append(sum(k * p for k, p in enumerate(powers)) / sum(powers))
    return sides


def naive_box(logits, prior):
    """Corners of a prediction: its point is the centre of the prior, its unit the prior's side."""
    left, top, right, bottom = naive_distances(logits)
    x, y, side = (prior[0] + prior[2]) / 2, (prior[1] + prior[3]) / 2, prior[2] - prior[0]
    return [x - left * side, y - top * side, x + right * side, y + bottom * side]


def naive_ciou(a, b):
    """1 - CIoU (Zheng et al. 2020, equations 10 and 11); the trade-off alpha is a constant to the gradient."""
    (wa, ha), (wb, hb) = ((box[2] - box[0], box[3] - box[1]) for box in (a, b))
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    iou = width * height / (wa * ha + wb * hb - width * height)
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    centres = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    v = 4 / math.pi**2 * (torch.atan(wb / hb) - torch.atan(wa / ha)) ** 2
    v_, iou_ = v.detach(), iou.detach()
    alpha = v_ / (1 - iou_ + v_) if v_ else 0.0
    return 1 - iou + centres / diagonal + alpha * v


def naive_response(teacher, student, mask, *, alpha, beta):
    """Equation 8 for YOLO averaged over images: soft-target cross entropy of the classes, CIoU of the boxes."""
    images = []
    priors = student.priors.double().tolist()
    for b, selected in enumerate(mask.tolist()):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for r, chosen in enumerate(selected):
            if not chosen:
                continue
            y, z = teacher.logits[b, r].double().sigmoid(), student.logits[b, r].double()
            cls = (-y * torch.nn.functional.logsigmoid(z) - (1 - y) * torch.nn.functional.logsigmoid(-z)).sum()
            target = naive_box(teacher.regression[b, r].double(), priors[r])
            reg = naive_ciou(naive_box(student.regression[b, r].double(), priors[r]), target)
            total, count = total + alpha * cls + beta * reg, count + 1
        images.append(total / count if count else total)
    return sum(images) / len(images)
