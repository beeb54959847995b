"""Sections 3.2 to 3.4, equations 4 to 8, one image, one instance, one pair at a time, in float64 with a graph."""

import math

import torch
from torchvision.ops import roi_align


def naive_level(box, strides, image_size):
    """The level of one box: floor(4 + log2(sqrt(w h) / c)), c being 224 px in an image of 800 x 1333 px."""
    height, width = image_size
    side = math.sqrt(max((box[2] - box[0]) * (box[3] - box[1]), 1.0))
    canonical = 224 * math.sqrt(height * width) / math.sqrt(800 * 1333)
    level = math.floor(4 + math.log2(side / canonical))  # 3 is the level of stride 8
    levels = [int(math.log2(stride)) for stride in strides]
    return levels.index(min(max(level, levels[0]), levels[-1]))


def naive_rois(pyramid, boxes, strides, image_size, size):
    """Crop every box alone from its own level: (B, K, C, size, size)."""
    images = []
    for b, image_boxes in enumerate(boxes):
        crops = []
        for box in image_boxes:
            level = naive_level(box.tolist(), strides, image_size)
            feature, stride = pyramid[level][b : b + 1], strides[level]
            crops.append(roi_align(feature, [box[None].to(feature)], size, 1 / stride, 2, True)[0])
        images.append(torch.stack(crops) if crops else pyramid[0].new_zeros(0, pyramid[0].shape[1], size, size))
    return torch.stack(images)


def naive_adapt(crops, weight, bias):
    """Equation 5, a linear map at every pixel: crops (B, K, C_s, h, w), weight (C_t, C_s), bias (C_t,)."""
    return torch.einsum("ts,bkshw->bkthw", weight, crops) + bias[None, None, :, None, None]


def naive_feature(teacher, student, valid, *, per_pixel=False):
    """Equation 4 averaged over images."""
    images = []
    for t, s, ok in zip(teacher.double(), student.double(), valid.tolist(), strict=True):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i, real in enumerate(ok):
            if real:
                distance = (t[i] - s[i]).pow(2).sum()
                total = total + (distance / (t[i].shape[-1] * t[i].shape[-2]) if per_pixel else distance)
                count += 1
        images.append(total / count if count else total)
    return sum(images) / len(images)


def smooth_l1(x, y, beta=1.0):
    d = abs(x - y)
    return 0.5 * d * d / beta if d < beta else d - 0.5 * beta


def naive_relation(teacher, student, valid, *, mean=True):
    """Equation 6 averaged over images; `mean` divides the sum by the number of pairs."""
    images = []
    for t, s, ok in zip(teacher.double(), student.double(), valid.tolist(), strict=True):
        real = [i for i, good in enumerate(ok) if good]
        pairs = [(i, j) for i in real for j in real if i != j]
        total = torch.zeros((), dtype=torch.float64)
        if pairs:
            distance_t = [(t[i] - t[j]).pow(2).sum().sqrt() for i, j in pairs]
            distance_s = [(s[i] - s[j]).pow(2).sum().sqrt() for i, j in pairs]
            phi_t, phi_s = sum(distance_t) / len(pairs), sum(distance_s) / len(pairs)
            for dt, ds in zip(distance_t, distance_s, strict=True):
                total = total + smooth_l1(dt / phi_t, ds / phi_s)
            if mean:
                total = total / len(pairs)
        images.append(total)
    return sum(images) / len(images)


def naive_response(logits_t, logits_s, deltas_t, deltas_s, mask, *, alpha, beta, box_beta=0.0):
    """Equation 8 for RetinaNet averaged over images: soft-target cross entropy and (smooth) L1 on the deltas."""
    images = []
    for b, selected in enumerate(mask.tolist()):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i, chosen in enumerate(selected):
            if not chosen:
                continue
            y, z = logits_t[b, i].double().sigmoid(), logits_s[b, i].double()
            cls = (-y * torch.nn.functional.logsigmoid(z) - (1 - y) * torch.nn.functional.logsigmoid(-z)).sum()
            pairs = zip(deltas_t[b, i].double(), deltas_s[b, i].double(), strict=True)
            reg = sum(smooth_l1(s, t, box_beta) if box_beta else abs(s - t) for t, s in pairs)
            total, count = total + alpha * cls + beta * reg, count + 1
        images.append(total / count if count else total)
    return sum(images) / len(images)
