"""What torchvision's Faster R-CNN gives: stages without networks, outputs of parts, the sampler without chance."""

from contextlib import contextmanager
from unittest import mock

import torch
from reference.torchvision_detectors import SIZE, random_norms
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers


def falling_keys(like):
    """Keys by which our sampler takes the first elements."""
    return torch.linspace(0.99, 0.0, like.shape[1], device=like.device).expand(like.shape)


@contextmanager
def first_of_each_kind():
    """torchvision's sampler takes the first of the positives and of the negatives, and ours does in a detector."""
    with (
        mock.patch("torch.randperm", lambda n, device=None: torch.arange(n, device=device)),
        mock.patch("gid_yolo.detectors.faster_rcnn.random_keys", falling_keys),
    ):
        yield


def make_rpn(before=1000, after=1000, min_score=0.0, samples=256):
    """torchvision's RPN without a network, with the thresholds of its detectors."""
    before, after = {"testing": before}, {"testing": after}
    return RegionProposalNetwork(None, None, 0.7, 0.3, samples, 0.5, before, after, 0.7, min_score).eval()


def make_roi_heads(samples=512, score=0.05, count=100):
    """torchvision's second stage without a network, with the thresholds of its detectors."""
    return RoIHeads(None, None, None, 0.5, 0.5, samples, 0.25, None, score, 0.5, count).eval()


def rpn_losses(rpn, raw, objects):
    """(objectness loss, box loss) for one (boxes, labels) an image."""
    anchors = [raw.priors] * len(objects)
    with first_of_each_kind():
        labels, matched = rpn.assign_targets_to_anchors(anchors, [{"boxes": boxes} for boxes, _ in objects])
        targets = rpn.box_coder.encode(matched, anchors)
        return rpn.compute_loss(raw.logits.reshape(-1, 1), raw.regression.reshape(-1, 4), labels, targets)


def box_losses(heads, proposals, objects, predict):
    """(class loss, box loss) of what `predict` gives for (N, 4) boxes, with our order of the classes."""
    targets = [{"boxes": boxes, "labels": labels + 1} for boxes, labels in objects]
    with first_of_each_kind():
        boxes, _, labels, regression = heads.select_training_samples(list(proposals), targets)
    logits, deltas = predict(torch.cat(boxes))
    return fastrcnn_loss(logits.roll(1, dims=1), torch.cat([deltas[:, :4], deltas], dim=1), labels, regression)


@torch.no_grad()
def spread(model):
    """Make scores and boxes differ as they would after training: centre every output and state its deviation."""
    random_norms(model)
    rpn, predictor = model.rpn.head, model.roi_heads.box_predictor
    layers = [(rpn.cls_logits, 2.0), (rpn.bbox_pred, 0.3), (predictor.cls_score, 2.0), (predictor.bbox_pred, 1.0)]
    images = make_images(1)
    for layer, deviation in layers:
        torch.nn.init.normal_(layer.weight, std=0.01)
        torch.nn.init.zeros_(layer.bias)
        outputs = []
        handle = layer.register_forward_hook(
            lambda module, inputs, result, to=outputs: to.append(result.transpose(0, 1).flatten(1))
        )
        model(list(images))
        handle.remove()
        output = torch.cat(outputs, dim=1)  # (channels, everything else)
        scale = deviation / output.std(dim=1).mean()
        layer.weight.mul_(scale)
        layer.bias.copy_(-scale * output.mean(dim=1))


def make_images(count):
    """Blocks of colour: a deep network averages noise away, and all images would look alike to it."""
    blocks = torch.rand(count, 3, SIZE[0] // 16, SIZE[1] // 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return (blocks + 0.2 * torch.rand(count, 3, *SIZE)).clamp(max=1.0)


def head_outputs(model, images):
    """(features, (B, R) logits, (B, R, 4) deltas, (R, 4) anchors) of the RPN."""
    batch, _ = model.transform(list(images))
    features = list(model.backbone(batch.tensors).values())
    logits, deltas = concat_box_prediction_layers(*model.rpn.head(features))
    anchors = model.rpn.anchor_generator(batch, features)[0]
    return features, logits.view(len(images), -1), deltas.view(len(images), -1, 4), anchors
