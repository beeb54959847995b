"""RetinaNet against torchvision's own, with the same weights."""

import pytest
import torch
from reference.torchvision_detectors import (
    SIZE,
    after_nms,
    assert_same_detections,
    head_outputs,
    in_float64,
    random_norms,
    spread,
    task_losses,
)
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gid_yolo.detectors import Detector
from gid_yolo.detectors.convert import from_torchvision
from gid_yolo.ops.structures import Targets

CLASSES = 4


def make(kind) -> nn.Module:
    model = kind(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=min(SIZE), max_size=max(SIZE)
    ).eval()
    random_norms(model)
    head = model.head
    convs = [
        (head.classification_head.cls_logits, "cls_logits", 1.0),
        (head.regression_head.bbox_reg, "bbox_regression", 0.3),
    ]
    spread(model, convs)
    model.topk_candidates = model.detections_per_img = 10**6  # cuts that come before and after the NMS
    return model


@pytest.fixture(scope="module", params=[retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2])
def pair(request) -> tuple[nn.Module, Detector]:
    torch.manual_seed(0)
    model = make(request.param)
    return model, from_torchvision(model)


@torch.no_grad()
def test_raw_outputs(pair) -> None:
    model, detector = pair
    images = torch.rand(2, 3, *SIZE)
    features, expected, anchors = head_outputs(model, images)
    pyramid, raw = detector.raw(images)
    assert expected["cls_logits"].std() > 0.5
    for ours, theirs in zip(pyramid, features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw.logits, expected["cls_logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw.regression, expected["bbox_regression"], rtol=1e-4, atol=1e-5)
    assert torch.equal(raw.priors, anchors)


@torch.no_grad()
def test_detections(pair) -> None:
    model, detector = pair
    images = torch.rand(2, 3, *SIZE)
    for image, theirs in zip(images, model(list(images)), strict=True):
        ours = after_nms(detector(image[None])[0], score=model.score_thresh, iou=model.nms_thresh)
        assert len(theirs["scores"]) > 50
        assert_same_detections(ours, theirs)


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_losses(pair, counts) -> None:
    model, detector = pair
    images = torch.rand(2, 3, *SIZE)
    objects = []
    for n in counts:
        corner = torch.rand(n, 2) * torch.tensor([SIZE[1] * 0.6, SIZE[0] * 0.6])
        objects.append((torch.cat([corner, corner + 10 + 80 * torch.rand(n, 2)], 1), torch.randint(0, CLASSES, (n,))))
    expected = task_losses(model, images, objects) if not has_batch_norm(model) else None
    index = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    targets = Targets.from_flat(torch.cat([b for b, _ in objects]), torch.cat([x for _, x in objects]), index, 2)
    if expected is None:  # batch statistics in training: the losses of the evaluated head instead
        _, outputs, anchors = head_outputs(model, images)
        dicts = [{"boxes": boxes, "labels": labels} for boxes, labels in objects]
        expected = model.compute_loss(dicts, outputs, [anchors] * 2)
    losses = detector.loss(*detector.raw(images), targets, SIZE)
    torch.testing.assert_close(losses["cls_loss"], expected["classification"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(losses["box_loss"], expected["bbox_regression"], rtol=1e-4, atol=1e-8)
    if counts == (0, 0):
        assert losses["box_loss"] == 0


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@torch.no_grad()
def test_epsilon_of_the_first_coco_weights() -> None:
    model = make(retinanet_resnet50_fpn)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.eps = 0.0  # as torchvision sets it for them
            module.running_var.uniform_(1e-4, 1e-3)  # where an epsilon of 1e-5 shows
            module.weight.mul_(0.02)
    dead = model.backbone.body
    dead.conv1.weight[3] = 0.0  # a channel that never fires, as their first layers have: its variance fell to nothing
    for name, value in (("running_var", 5.6e-45), ("running_mean", 0.0), ("weight", 1e-8)):
        getattr(dead.bn1, name)[3] = value
    images = torch.rand(1, 3, *SIZE)
    detector = from_torchvision(model)
    theirs = head_outputs(model, images)[1]["cls_logits"]
    torch.testing.assert_close(detector.raw(images)[1].logits, theirs, rtol=1e-4, atol=1e-4)
    kept = detector.half().float().raw(images)[1].logits  # as checkpoints keep it: 11 bits of every weight
    torch.testing.assert_close(kept, theirs, rtol=1e-2, atol=1e-2)


@torch.no_grad()
@in_float64()
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_other_resnets(name: str) -> None:
    layers = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256), "trainable_layers": 2}
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, **layers)
    model = TorchvisionRetinaNet(
        backbone, 3, anchor_generator=_default_anchorgen(), image_mean=[0.4, 0.5, 0.6], min_size=128, max_size=128
    ).eval()
    random_norms(model)
    detector = from_torchvision(model)
    images = torch.rand(1, 3, 128, 128)
    expected = head_outputs(model, images)[1]["cls_logits"]
    torch.testing.assert_close(detector.raw(images)[1].logits, expected, rtol=1e-9, atol=1e-10)
    # trainable_layers=2 trains layer3 and layer4: stem, layer1 and layer2 are frozen
    assert {n.split(".")[0] for n in detector.backbone.frozen_names} == {"conv1", "bn1", "act1", "maxpool"} | {
        "layer1",
        "layer2",
    }


def test_what_cannot_be_converted_is_said() -> None:
    with pytest.raises(ValueError, match="a Linear cannot be converted: give a torchvision RetinaNet"):
        from_torchvision(nn.Linear(1, 1))
