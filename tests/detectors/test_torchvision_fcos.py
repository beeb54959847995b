"""FCOS against torchvision's own, with the same weights."""

from collections.abc import Iterator

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
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gid_yolo.detectors import FCOS
from gid_yolo.detectors.convert.converted import renamed
from gid_yolo.detectors.convert.torchvision_fcos import HEAD, convert_fcos
from gid_yolo.ops.structures import Targets

CLASSES = 4


def body(name: str):
    layers = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256), "trainable_layers": 5}
    return resnet_fpn_backbone(backbone_name=name, weights=None, **layers)  # its batch norms are frozen


def make(name: str, classes: int = CLASSES) -> nn.Module:
    sizes = {"min_size": min(SIZE), "max_size": max(SIZE)}
    if name == "resnet50":
        model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes, **sizes)
    else:
        model = TorchvisionFCOS(body(name), classes, image_mean=[0.4, 0.5, 0.6], center_sampling_radius=2.0, **sizes)
    random_norms(model.eval())
    boxes = model.head.regression_head
    convs = [
        (model.head.classification_head.cls_logits, "cls_logits", 1.0),
        (boxes.bbox_reg, "bbox_regression", 1.0),
        (boxes.bbox_ctrness, "bbox_ctrness", 1.0),
    ]
    spread(model, convs, bias=-3.0)
    nn.init.constant_(boxes.bbox_reg.bias, 1.0)  # most distances are positive, and some are 0
    model.topk_candidates = model.detections_per_img = 10**6  # cuts that come before and after the NMS
    return model


@pytest.fixture(scope="module", params=[("resnet50", CLASSES), ("resnet18", 1)], ids=lambda p: p[0])
def pair(request) -> Iterator[tuple[nn.Module, FCOS]]:
    torch.manual_seed(0)
    with in_float64():
        model = make(*request.param)
        yield model, convert_fcos(model).build().eval()


@torch.no_grad()
def test_raw_outputs(pair) -> None:
    model, detector = pair
    assert isinstance(detector, FCOS)
    images = torch.rand(2, 3, *SIZE)
    features, expected, anchors = head_outputs(model, images)
    pyramid, raw = detector.raw(images)
    for ours, theirs in zip(pyramid, features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for ours, name in (
        (raw.logits, "cls_logits"),
        (raw.regression, "bbox_regression"),
        (raw.centerness[..., None], "bbox_ctrness"),
    ):
        assert expected[name].std() > 0.5
        torch.testing.assert_close(ours, expected[name], rtol=1e-9, atol=1e-10)
    assert torch.equal(raw.priors, anchors)
    assert (raw.regression == 0).any()


@torch.no_grad()
def test_detections(pair) -> None:
    model, detector = pair
    images = torch.rand(2, 3, *SIZE)
    for image, theirs in zip(images, model(list(images)), strict=True):
        ours = after_nms(detector(image[None])[0], score=model.score_thresh, iou=model.nms_thresh)
        assert len(theirs["scores"]) > 50
        assert_same_detections(ours, theirs)


def make_objects(counts: tuple[int, ...], classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    objects = []
    for n in counts:
        corner = torch.rand(n, 2) * torch.tensor([SIZE[1] * 0.6, SIZE[0] * 0.6])
        objects.append((torch.cat([corner, corner + 10 + 90 * torch.rand(n, 2)], 1), torch.randint(0, classes, (n,))))
    return objects


@pytest.mark.parametrize("counts", [(3, 8), (5, 0), (0, 0)])
def test_losses_and_gradients(pair, counts) -> None:
    model, detector = pair
    images, objects = torch.rand(2, 3, *SIZE), make_objects(counts, detector.num_classes)
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):  # in training it would take the batch's statistics
        features, outputs, anchors = head_outputs(model, images)
        dicts = [{"boxes": boxes, "labels": labels} for boxes, labels in objects]
        expected = model.compute_loss(dicts, outputs, [anchors] * 2, [x.shape[-2] * x.shape[-1] for x in features])
    else:
        expected = task_losses(model, images, objects)
    index = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    targets = Targets.from_flat(torch.cat([b for b, _ in objects]), torch.cat([x for _, x in objects]), index, 2)
    losses = detector.loss(*detector.raw(images), targets, SIZE)
    for ours, theirs in (
        ("cls_loss", "classification"),
        ("box_loss", "bbox_regression"),
        ("ctr_loss", "bbox_ctrness"),
    ):
        torch.testing.assert_close(losses[ours], expected[theirs], rtol=1e-6, atol=1e-8)
        assert (losses[ours] == 0) == (ours != "cls_loss" and not any(counts))

    model.zero_grad()
    detector.zero_grad()
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    theirs = renamed(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {
            **{f"head.{old}": new for old, new in HEAD.items()},
            "backbone.body.": "backbone.body.",
            "backbone.fpn.": "neck.fpn.",
        },
    )
    ours = {name: p.grad for name, p in detector.named_parameters()}
    assert {name for name in ours if ".bn" not in name and ".downsample.1" not in name} <= set(theirs)
    for name, gradient in theirs.items():
        # relative to the largest of its tensor, for sums of terms that cancel have the rounding of the terms
        assert (ours[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-8, name


def test_settings_follow_the_model() -> None:
    model = make("resnet18", 7)
    detector = convert_fcos(model).build()
    assert (detector.num_classes, detector.center_radius, detector.level_ranges) == (7, 2.0, (4.0, 8.0))
    assert detector.backbone.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_what_cannot_be_converted_is_said() -> None:
    other = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.0,),) * 5)
    with pytest.raises(ValueError, match="sizes"):
        convert_fcos(TorchvisionFCOS(body("resnet18"), 2, anchor_generator=other))
    model = make("resnet18")
    model.head.classification_head.conv[1] = nn.GroupNorm(8, 256)
    with pytest.raises(ValueError, match="GroupNorms of 32 groups"):
        convert_fcos(model)
