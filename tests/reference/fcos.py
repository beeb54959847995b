"""FCOS one image, one point, one box at a time, in Python floats; and torchvision's assignment and losses."""

import math
from types import SimpleNamespace

from reference.boxes import area
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead

STRIDES = (8, 16, 32, 64, 128)


def naive_priors(height, width, strides=STRIDES):
    """A square of one stride around every point, by level, row and column, as lists; and the points of each level."""
    priors, counts = [], []
    for s in strides:
        rows, columns = math.ceil(height / s), math.ceil(width / s)
        priors += [
            [x * s - s / 2, y * s - s / 2, x * s + s / 2, y * s + s / 2] for y in range(rows) for x in range(columns)
        ]
        counts.append(rows * columns)
    return priors, counts


def distances(prior, box):
    """Left, top, right, bottom of the prior's centre in the box, in pixels."""
    x, y = (prior[0] + prior[2]) / 2, (prior[1] + prior[3]) / 2
    return [x - box[0], y - box[1], box[2] - x, box[3] - y]


def naive_encode(box, prior):
    return [d / (prior[2] - prior[0]) for d in distances(prior, box)]


def naive_decode(ltrb, prior):
    side, x, y = prior[2] - prior[0], (prior[0] + prior[2]) / 2, (prior[1] + prior[3]) / 2
    left, top, right, bottom = (d * side for d in ltrb)
    return [x - left, y - top, x + right, y + bottom]


def naive_centerness(prior, box):
    """Equation 3; 0 where the point is not inside."""
    left, top, right, bottom = distances(prior, box)
    if min(left, top, right, bottom) <= 0:
        return 0.0
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def naive_match(priors, boxes, *, radius=1.5, low=4.0, high=8.0):
    """Sections 3.1 and 3.2 with centre sampling, of one image: a list with the box of each point, -1 for none."""
    sides = [p[2] - p[0] for p in priors]
    result = []
    for prior, side in zip(priors, sides, strict=True):
        best = -1
        for m, box in enumerate(boxes):
            left, top, right, bottom = ltrb = distances(prior, box)
            inside = min(ltrb) > 0
            central = max(abs(left - right), abs(top - bottom)) / 2 < radius * side
            above = side == min(sides) or max(ltrb) > low * side
            below = side == max(sides) or max(ltrb) < high * side
            if inside and central and above and below and (best < 0 or area(box) < area(boxes[best])):
                best = m
        result.append(best)
    return result


def naive_inside(priors, boxes):
    """For each point, whether it lies inside any of the boxes."""
    return [any(min(distances(prior, box)) > 0 for box in boxes) for prior in priors]


def naive_giou(a, b):
    """1 - GIoU (Rezatofighi et al. 2019) of two boxes, at least one of them with an area."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = area(a) + area(b) - width * height
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    return 1 - (width * height / union - (hull - union) / hull)


def naive_bce(logit, target):
    """Cross entropy of one logit against a probability."""
    return max(logit, 0.0) - logit * target + math.log1p(math.exp(-abs(logit)))


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def naive_response(teacher, student, mask, *, alpha, beta):
    """Equation 8 for FCOS averaged over images: soft-target cross entropy of classes and centre-ness, GIoU."""
    images = []
    priors = student.priors.double().tolist()
    for b, selected in enumerate(mask.tolist()):
        values = []
        for r, chosen in enumerate(selected):
            if not chosen:
                continue
            pairs = zip(student.logits[b, r].tolist(), teacher.logits[b, r].tolist(), strict=True)
            cls = sum(naive_bce(s, sigmoid(t)) for s, t in pairs)
            target = naive_decode(teacher.regression[b, r].tolist(), priors[r])
            box = naive_decode(student.regression[b, r].tolist(), priors[r])
            giou = naive_giou(box, target) if area(target) > 0 else 0.0
            ctr = naive_bce(student.centerness[b, r].item(), sigmoid(teacher.centerness[b, r].item()))
            values.append(alpha * cls + beta * (giou + ctr))
        images.append(sum(values) / len(values) if values else 0.0)
    return sum(images) / len(images)


def torchvision_matches(priors, counts, images, radius=1.5):
    """A (R,) assignment for each image; `images` are boxes without padding, `counts` the points of each level."""
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)
    model = SimpleNamespace(center_sampling_radius=radius, head=head)
    return FCOS.compute_loss(model, [{"boxes": boxes} for boxes in images], {}, [priors] * len(images), counts)


def torchvision_loss(logits, ltrb, centerness, priors, counts, objects):
    """(class, box, centre-ness) losses; `objects` is a list of (boxes, labels) per image."""
    head = FCOSHead(in_channels=32, num_anchors=1, num_classes=logits.shape[-1])  # its convolutions stay unused
    outputs = {"cls_logits": logits, "bbox_regression": ltrb, "bbox_ctrness": centerness[..., None]}
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in objects]
    matched = torchvision_matches(priors, counts, [boxes for boxes, _ in objects])
    losses = head.compute_loss(targets, outputs, [priors] * len(objects), matched)
    return losses["classification"], losses["bbox_regression"], losses["bbox_ctrness"]
