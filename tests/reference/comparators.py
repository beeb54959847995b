"""FitNet, fine-grained imitation and mimicking, one location and one proposal at a time, in float64."""

import torch
from reference.boxes import iou


def naive_fitnet(teacher, student):
    """Half the mean squared difference of a map, averaged over maps."""
    total = torch.zeros((), dtype=torch.float64)
    for t, s in zip(teacher, student, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(t.double().flatten(), s.double().flatten(), strict=True)]
        total = total + 0.5 * sum(squares) / len(squares)
    return total / len(teacher)


def naive_imitation_mask(anchors, boxes, per_location, psi):
    """One image: True for every location one of whose anchors overlaps a box by more than psi times the box's best."""
    near = [False] * len(anchors)
    for box in boxes:
        overlaps = [iou(box, anchor) for anchor in anchors]
        near = [n or o > psi * max(overlaps) for n, o in zip(near, overlaps, strict=True)]
    return [any(near[i : i + per_location]) for i in range(0, len(near), per_location)]


def naive_fine_grained(teacher, student, mask):
    """Maps of a batch and (B, N) mask: the loss of an image, averaged over images."""
    images = []
    for b in range(len(mask)):
        total, count, place = torch.zeros((), dtype=torch.float64), 0, 0
        for t, s in zip(teacher, student, strict=True):
            for y in range(t.shape[2]):
                for x in range(t.shape[3]):
                    if mask[b][place]:
                        total = total + 0.5 * ((t[b, :, y, x].double() - s[b, :, y, x].double()) ** 2).sum()
                        count += 1
                    place += 1
        images.append(total / count if count else total)
    return sum(images) / len(images)


def naive_mimicking(teacher, student, valid):
    """Crops of a batch: half the mean square of every proposal, averaged over an image's, then over images."""
    images = []
    for t, s, ok in zip(teacher.double(), student.double(), valid.tolist(), strict=True):
        losses = [0.5 * ((t[i] - s[i]) ** 2).mean() for i, real in enumerate(ok) if real]
        images.append(sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64))
    return sum(images) / len(images)
