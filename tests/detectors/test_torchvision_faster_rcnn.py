"""Faster R-CNN against torchvision's own, with the same weights."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from reference.faster_rcnn import first_of_each_kind, head_outputs, make_images, spread
from reference.torchvision_detectors import SIZE, assert_same_detections
from torch import nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import (
    MaskRCNN,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gid_yolo.detectors import Detector, build_detector
from gid_yolo.detectors.backbone import Backbone, TimmBackbone
from gid_yolo.detectors.convert import convert_torchvision, from_torchvision
from gid_yolo.detectors.mobilenet import TorchvisionMobileNet
from gid_yolo.ops.structures import Targets

CLASSES = 4
SMALL = {"min_size": min(SIZE), "max_size": max(SIZE)}
FEW = {"rpn_post_nms_top_n_test": 150}  # proposals: the second stage takes most of the time


def resnet18(**settings) -> nn.Module:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    return TorchvisionFasterRCNN(backbone, CLASSES + 1, **SMALL, **FEW, **settings)


def factory(kind: Callable[..., nn.Module], **settings) -> Callable[..., nn.Module]:
    return partial(kind, weights=None, weights_backbone=None, num_classes=CLASSES + 1, **SMALL, **settings)


KINDS = {
    "r18": resnet18,
    "r50": factory(fasterrcnn_resnet50_fpn, **FEW),
    "r50_v2": factory(fasterrcnn_resnet50_fpn_v2, **FEW),
    "mobile": factory(fasterrcnn_mobilenet_v3_large_fpn),
    "mobile_320": factory(fasterrcnn_mobilenet_v3_large_320_fpn),
}


def make(name: str, **settings) -> tuple[nn.Module, Detector]:
    torch.manual_seed(0)
    model = KINDS[name](**settings).eval()
    spread(model)
    return model, from_torchvision(model)


@pytest.fixture(scope="module", params=KINDS)
def pair(request) -> tuple[nn.Module, Detector]:
    return make(request.param)


@torch.no_grad()
def test_raw_outputs(pair) -> None:
    model, detector = pair
    images = make_images(2)
    features, logits, deltas, anchors = head_outputs(model, images)
    pyramid, raw = detector.raw(images)
    assert logits.std() > 1
    for ours, theirs in zip(pyramid, features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())
    torch.testing.assert_close(raw.logits[..., 0], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.regression, deltas, rtol=1e-4, atol=1e-4)
    assert torch.equal(raw.priors, anchors)


@torch.no_grad()
def test_detections(pair) -> None:
    model, detector = pair
    folded = any(isinstance(m, nn.BatchNorm2d) for m in model.roi_heads.modules())  # v2: rounded once more
    images = make_images(2)
    for rows, theirs in zip(detector(images), model(list(images)), strict=True):
        real = rows[rows[:, 4] > 0]
        assert len(real) > 10
        assert len(real[:, 5].unique()) > 1
        # the background is their class 0
        ours = {"boxes": real[:, :4], "scores": real[:, 4], "labels": real[:, 5] + 1}
        assert_same_detections(ours, theirs, probability=1e-4 if folded else 1e-5)


def random_objects(counts: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    objects = []
    for n in counts:
        corner = torch.rand(n, 2) * torch.tensor([SIZE[1] * 0.6, SIZE[0] * 0.6])
        objects.append((torch.cat([corner, corner + 10 + 80 * torch.rand(n, 2)], 1), torch.randint(0, CLASSES, (n,))))
    return objects


@pytest.fixture(scope="module", params=["r18", "mobile"])
def training_pair(request) -> tuple[nn.Module, Detector]:
    few = {"rpn_pre_nms_top_n_train": 300, "rpn_post_nms_top_n_train": 200}
    model, detector = make(request.param, rpn_batch_size_per_image=64, box_batch_size_per_image=96, **few)
    for module in [*model.train().modules(), *detector.train().modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model, detector


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_losses_and_gradients(training_pair, counts: tuple[int, ...]) -> None:
    model, detector = training_pair
    model.zero_grad()
    detector.zero_grad()
    images, objects = make_images(2), random_objects(counts)
    index = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    targets = Targets.from_flat(torch.cat([b for b, _ in objects]), torch.cat([x for _, x in objects]), index, 2)
    with first_of_each_kind():
        expected = model(list(images), [{"boxes": boxes, "labels": labels + 1} for boxes, labels in objects])
        losses = detector.loss(*detector.raw(images), targets, SIZE)
    names = {
        "rpn_cls_loss": "loss_objectness",
        "rpn_box_loss": "loss_rpn_box_reg",
        "cls_loss": "loss_classifier",
        "box_loss": "loss_box_reg",
    }
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours], expected[theirs], rtol=1e-4, atol=1e-7)
        assert (losses[ours] > 0) == ("cls" in ours or sum(counts) > 0)

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    predictor = model.roi_heads.box_predictor
    layers = [
        (detector.rpn.tower[0].weight.grad, model.rpn.head.conv[0][0].weight.grad),
        (detector.rpn.deltas.weight.grad, model.rpn.head.bbox_pred.weight.grad),
        (detector.head.layers[1].weight.grad, model.roi_heads.box_head.fc6.weight.grad),
        (detector.head.cls_logits.bias.grad, predictor.cls_score.bias.grad.roll(-1)),
        (detector.head.box_deltas.weight.grad, predictor.bbox_pred.weight.grad[4:]),
        (detector.neck.fpn.inner_blocks[0][0].weight.grad, model.backbone.fpn.inner_blocks[0][0].weight.grad),
    ]
    for ours, theirs in layers:
        assert theirs.any() or sum(counts) == 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_settings_are_carried_over() -> None:
    settings = {
        "rpn_pre_nms_top_n_train": 111,
        "rpn_pre_nms_top_n_test": 112,
        "rpn_post_nms_top_n_train": 113,
        "rpn_nms_thresh": 0.61,
        "rpn_fg_iou_thresh": 0.62,
        "rpn_bg_iou_thresh": 0.23,
        "rpn_batch_size_per_image": 115,
        "rpn_positive_fraction": 0.44,
        "rpn_score_thresh": 0.01,
        "box_score_thresh": 0.06,
        "box_nms_thresh": 0.45,
        "box_detections_per_img": 46,
        "box_fg_iou_thresh": 0.57,
        "box_bg_iou_thresh": 0.48,
        "box_batch_size_per_image": 116,
        "box_positive_fraction": 0.29,
        "bbox_reg_weights": (8.0, 9.0, 4.0, 3.0),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=100),
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    config = convert_torchvision(resnet18(**settings)).config
    assert (config["nc"], config["mean"], config["std"]) == (CLASSES, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (config["backbone"], config["frozen_stages"], config["freeze_bn"]) == ("resnet18", 2, True)
    ours = config["settings"]
    assert (ours["rpn_before_nms"], ours["rpn_after_nms"]) == ([111, 112], [113, 150])
    assert (ours["rpn_nms_iou"], ours["rpn_positive_iou"], ours["rpn_negative_iou"]) == (0.61, 0.62, 0.23)
    assert (ours["rpn_samples"], ours["rpn_positive_share"], ours["rpn_min_score"]) == (115, 0.44, 0.01)
    assert (ours["box_min_score"], ours["box_nms_iou"], ours["max_det"]) == (0.06, 0.45, 46)
    assert (ours["roi_positive_iou"], ours["roi_negative_iou"]) == (0.57, 0.48)
    assert (ours["roi_samples"], ours["roi_positive_share"], ours["roi_canonical"]) == (116, 0.29, 100)
    assert ours["box_weights"] == [8.0, 9.0, 4.0, 3.0]
    detector = build_detector(config)
    assert detector.box_weights.tolist() == [8.0, 9.0, 4.0, 3.0]
    assert detector.backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@torch.no_grad()
def test_epsilon_of_the_first_coco_weights() -> None:
    torch.manual_seed(0)
    model = resnet18().eval()
    spread(model)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.eps = 0.0  # as torchvision sets it for them
            module.running_var.uniform_(1e-4, 1e-3)  # where an epsilon of 1e-5 shows
            module.weight.mul_(0.02)
    images = make_images(1)
    logits = from_torchvision(model).raw(images)[1].logits[..., 0]
    torch.testing.assert_close(logits, head_outputs(model, images)[1], rtol=1e-4, atol=1e-4)


def test_mobilenet_backbone(tmp_path) -> None:
    detector = build_detector(
        "frcnn_nano",
        2,
        backbone="torchvision/mobilenet_v3_large",
        strides=[32, 32, 64],
        frozen_stages=3,
        freeze_bn=True,
    ).eval()
    backbone = detector.backbone
    assert isinstance(backbone, TorchvisionMobileNet)
    assert isinstance(backbone, Backbone)
    assert not isinstance(backbone, TimmBackbone)  # it is no network of timm's
    assert set(backbone.state_dict()) == {f"body.{key}" for key in backbone.body.state_dict()}
    assert backbone.channels == [160, 960]
    assert [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96))] == [(1, 160, 2, 3), (1, 960, 2, 3)]
    assert backbone.frozen_names == [str(i) for i in range(7)]  # the fourth stage begins at layer 7
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert not backbone.source.loaded
    assert detector(torch.rand(2, 3, 64, 96)).shape == (2, 100, 6)

    classifier = mobilenet_v3_large(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    loaded = TorchvisionMobileNet("torchvision/mobilenet_v3_large", weights=tmp_path / "weights.pth")
    assert loaded.source.loaded
    assert torch.equal(loaded.body[16][0].weight, classifier.features[16][0].weight)
    with pytest.raises(ValueError, match=r"missing\.pth cannot be read \(FileNotFoundError"):
        TorchvisionMobileNet("torchvision/mobilenet_v3_large", weights=tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="torchvision/vgg16 cannot be used: choose from torchvision/mobilenet_v2"):
        TorchvisionMobileNet("torchvision/vgg16")


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_other_mobilenets(name: str) -> None:
    torch.manual_seed(0)
    backbone = mobilenet_backbone(backbone_name=name, weights=None, fpn=True, trainable_layers=2)
    anchors = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None).rpn.anchor_generator
    model = TorchvisionFasterRCNN(backbone, 3, rpn_anchor_generator=anchors, **SMALL).eval()
    spread(model)
    detector, images = from_torchvision(model), make_images(1)
    assert detector.strides == (32, 32, 64)
    torch.testing.assert_close(detector.raw(images)[1].logits[..., 0], head_outputs(model, images)[1])
    frozen = [name for name, layer in backbone.body.items() if not any(p.requires_grad for p in layer.parameters())]
    assert detector.backbone.frozen_names == frozen


def test_what_cannot_be_converted_is_said() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, extra_blocks=LastLevelP6P7(256, 256))
    with pytest.raises(ValueError, match="top is made from p5 by convolutions"):
        convert_torchvision(TorchvisionFasterRCNN(backbone, 3))
    with pytest.raises(ValueError, match="canonical level 5 cannot be converted"):
        convert_torchvision(resnet18(box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2, canonical_level=5)))
    with pytest.raises(ValueError, match="a MaskRCNN cannot be converted"):
        convert_torchvision(MaskRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 3))
