"""Boxes one at a time, in Python floats (float64)."""

import math


def area(box):
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def iou(a, b):
    """Intersection over union; 0 where both boxes are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    union = area(a) + area(b) - inter
    return inter / union if union > 0 else 0.0


def centre_form(box):
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def encode(box, anchor):
    """Faster R-CNN, equation 2."""
    x, y, w, h = centre_form(box)
    xa, ya, wa, ha = centre_form(anchor)
    return [(x - xa) / wa, (y - ya) / ha, math.log(w / wa), math.log(h / ha)]


def decode(delta, anchor):
    """The inverse, with Detectron's limit on the growth of a box: from 16 px to 1000 px."""
    dx, dy, dw, dh = delta
    xa, ya, wa, ha = centre_form(anchor)
    limit = math.log(1000 / 16)
    x, y, w, h = xa + dx * wa, ya + dy * ha, wa * math.exp(min(dw, limit)), ha * math.exp(min(dh, limit))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def random_boxes(generator_shape, *, image=(100.0, 100.0), smallest=1.0, largest=60.0):
    """Random xyxy boxes with centres in the image, of the given leading shape."""
    import torch

    height, width = image
    centre = torch.rand(*generator_shape, 2) * torch.tensor([width, height])
    half = (smallest + torch.rand(*generator_shape, 2) * (largest - smallest)) / 2
    return torch.cat([centre - half, centre + half], dim=-1)
