"""What torchvision's own detectors give: outputs of the head, losses, detections."""

from contextlib import contextmanager

import torch
from torchvision.ops import batched_nms, box_convert

SIZE = (320, 256)


@contextmanager
def in_float64():
    """Random networks enlarge what float32 rounds: in float64 only a difference of the functions is left to see."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def spread(model, convs, *, bias=-5.0):
    """Make scores and boxes differ as they would after training.

    Args:
        model: A one-stage detector.
        convs: The last convolution of each output, by the output's name, and the deviation the output shall have.
        bias: Of the class logits; with a deviation of 1, -5 leaves the 2 % over 2 deviations above 0.05.
    """
    for conv, _, _ in convs:
        torch.nn.init.normal_(conv.weight, std=0.01)
        torch.nn.init.zeros_(conv.bias)
    outputs = head_outputs(model, torch.rand(1, 3, *SIZE))[1]
    for conv, name, deviation in convs:
        conv.weight.mul_(deviation / outputs[name].std())
        if name == "cls_logits":
            torch.nn.init.constant_(conv.bias, bias)


def random_norms(model):
    """Statistics and affine maps of batch norms that are no identity."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)


def head_outputs(model, images):
    """(features, outputs by name, (R, 4) anchors) of a one-stage detector."""
    batch, _ = model.transform(list(images))
    features = list(model.backbone(batch.tensors).values())
    return features, model.head(features), model.anchor_generator(batch, features)[0]


def task_losses(model, images, objects):
    """Losses by torchvision's names; `objects` is a list of (boxes, labels) per image."""
    training = model.training
    model.train()
    losses = model(list(images), [{"boxes": boxes, "labels": labels} for boxes, labels in objects])
    model.train(training)
    return losses


def after_nms(detections, *, score, iou):
    """Detections (4 + C, R) of one image as torchvision returns them: a box for every class over the threshold."""
    boxes = box_convert(detections[:4].T, "cxcywh", "xyxy")
    index, labels = detections[4:].T.gt(score).nonzero().T
    scores = detections[4:].T[index, labels]
    keep = batched_nms(boxes[index], scores, labels, iou)
    return {"boxes": boxes[index][keep], "scores": scores[keep], "labels": labels[keep]}


def assert_same_detections(ours, theirs, *, pixels=0.01, probability=1e-5):
    """Equal as sets: each of the one has its like in the other, and both have as many."""
    assert len(ours["scores"]) == len(theirs["scores"])
    same = ours["labels"][:, None] == theirs["labels"]
    same &= (ours["scores"][:, None] - theirs["scores"]).abs() < probability
    same &= (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1) < pixels
    assert same.any(0).all()
    assert same.any(1).all()
