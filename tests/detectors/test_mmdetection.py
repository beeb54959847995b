import math

import pytest
import torch
import torch.nn.functional as F
from detectors.mmdetection_files import BLOCKS, CLASSES, MAKERS, NORMALISATION, config, fcos, retinanet

from gid_yolo.detectors.convert.detectron2 import is_detectron2
from gid_yolo.detectors.convert.mmdetection import class_names, convert_mmdetection, is_mmdetection
from gid_yolo.detectors.convert.mmdetection_config import normalisation, read_config
from gid_yolo.detectors.convert.torchvision_checkpoint import is_torchvision


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("depth", sorted(BLOCKS))
@pytest.mark.parametrize("style", sorted(NORMALISATION))
def test_every_tensor_finds_its_place(kind: str, depth: int, style: str) -> None:
    state = MAKERS[kind](depth)
    assert is_mmdetection(state)
    assert not is_torchvision(state)
    assert not is_detectron2(state)
    detector = convert_mmdetection(dict(state), {"cfg": config(kind, depth, style)}).build()
    own = {key: value for key, value in detector.state_dict().items() if not key.endswith("num_batches_tracked")}
    weights = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    added = 8 * 256 if kind == "FCOS" else 0  # biases before GroupNorm, zeros
    assert sum(v.numel() for v in own.values()) == sum(v.numel() for v in weights.values()) + added
    assert detector.backbone.name == f"resnet{depth}"
    assert detector.num_classes == CLASSES
    # Images come as RGB in [0, 1]
    mean, std, rgb = NORMALISATION[style]
    filters = state["backbone.conv1.weight"]
    assert torch.equal(own["backbone.body.conv1.weight"], filters if rgb else filters[:, [2, 1, 0]])
    assert detector.backbone.mean.flatten().tolist() == pytest.approx([x / 255 for x in (mean if rgb else mean[::-1])])
    assert detector.backbone.std.flatten().tolist() == pytest.approx([x / 255 for x in std])
    block = detector.backbone.body.layer2[0]
    strides = ((2, 2), (1, 1)) if style == "caffe" else ((1, 1), (2, 2))
    assert (block.conv1.stride, block.conv2.stride) == strides


def test_retinanets_pyramid_has_no_relu_before_p7() -> None:
    state = retinanet()
    detector = convert_mmdetection(dict(state), {"cfg": config("RetinaNet")}).build().eval()
    images = torch.rand(1, 3, 128, 128)
    c5 = detector.backbone(images)[-1]
    p6 = F.conv2d(c5, state["neck.fpn_convs.3.conv.weight"], state["neck.fpn_convs.3.conv.bias"], 2, 1)
    p7 = F.conv2d(p6, state["neck.fpn_convs.4.conv.weight"], state["neck.fpn_convs.4.conv.bias"], 2, 1)
    features, raw = detector.raw(images)
    torch.testing.assert_close(features[3], p6)
    torch.testing.assert_close(features[4], p7)
    assert (p6 < 0).any()  # so that a ReLU would show
    # Anchors by ratio, then size: on P3 w = 32 * 2^(size / 3) / sqrt(h / w), h = w * ratio, around (0, 0), unrounded
    for size in range(3):
        for i, ratio in enumerate((0.5, 1.0, 2.0)):
            w = 32 * 2 ** (size / 3) / math.sqrt(ratio)
            box = [-w / 2, -w * ratio / 2, w / 2, w * ratio / 2]
            assert raw.priors[3 * i + size].tolist() == pytest.approx(box, rel=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("on_box", [False, True])
@torch.no_grad()
def test_fcos_head_equals_its_definition(normalised: bool, on_box: bool) -> None:
    state = {key: value * 0.1 if "conv_reg" in key else value for key, value in fcos().items()}
    text = config("FCOS").replace(
        "type='FCOSHead'", f"type='FCOSHead', norm_on_bbox={normalised}, centerness_on_reg={on_box}"
    )
    detector = convert_mmdetection(dict(state), {"cfg": text}).build().eval()
    features, raw = detector.raw(torch.rand(1, 3, 128, 160))

    def tower(name: str, x: torch.Tensor) -> torch.Tensor:
        for i in range(4):
            x = F.conv2d(x, state[f"bbox_head.{name}.{i}.conv.weight"], padding=1)
            x = F.relu(F.group_norm(x, 32, *(state[f"bbox_head.{name}.{i}.gn.{p}"] for p in ("weight", "bias"))))
        return x

    def last(name: str, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, *(state[f"bbox_head.{name}.{p}"] for p in ("weight", "bias")), padding=1)
        return y.permute(0, 2, 3, 1).flatten(1, 2)

    start = 0
    for level, (x, stride) in enumerate(zip(features, (8, 16, 32, 64, 128), strict=True)):
        height, width = x.shape[-2:]
        place = slice(start, start + height * width)
        start += height * width
        cls, reg = tower("cls_convs", x), tower("reg_convs", x)
        torch.testing.assert_close(raw.logits[:, place], last("conv_cls", cls), rtol=1e-4, atol=1e-5)
        centerness = last("conv_centerness", reg if on_box else cls)[..., 0]
        torch.testing.assert_close(raw.centerness[:, place], centerness, rtol=1e-4, atol=1e-5)
        scaled = last("conv_reg", reg) * state[f"bbox_head.scales.{level}.scale"]
        pixels = scaled.clamp(min=0) * stride if normalised else scaled.exp()  # left, top, right, bottom
        y, z = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        point = torch.stack([z, y], dim=-1).flatten(0, 1) * stride + stride // 2  # (H W, 2) x, y
        boxes = torch.cat([point - pixels[..., :2], point + pixels[..., 2:]], dim=-1)
        torch.testing.assert_close(raw.boxes[:, place], boxes, rtol=1e-4, atol=1e-3)
    assert start == raw.logits.shape[1]


def test_thresholds_of_faster_rcnn_are_the_configurations() -> None:
    detector = convert_mmdetection(MAKERS["FasterRCNN"](), {"cfg": config("FasterRCNN")}).build()
    assert (detector.rpn_before_nms[1], detector.rpn_after_nms[1], detector.rpn_nms_iou) == (700, 600, 0.6)
    assert (detector.box_min_score, detector.box_nms_iou, detector.max_det) == (0.1, 0.4, 50)
    # Targets are divided by their deviations: 1 / 0.1 and 1 / 0.2
    assert detector.box_weights.tolist() == [10, 10, 5, 5]
    assert detector.roi_aligned
    assert detector.roi_points == 0


def test_deviations_of_the_box_coder_are_put_into_the_convolution() -> None:
    text = config("RetinaNet").replace("target_stds=[1.0, 1.0, 1.0, 1.0]", "target_stds=[0.1, 0.1, 0.2, 0.2]")
    state = retinanet()
    plain = convert_mmdetection(dict(state), {"cfg": config("RetinaNet")}).build().eval()
    scaled = convert_mmdetection(dict(state), {"cfg": text}).build().eval()
    images = torch.rand(1, 3, 64, 64)
    expected = plain.raw(images)[1].regression * torch.tensor([0.1, 0.1, 0.2, 0.2])
    torch.testing.assert_close(scaled.raw(images)[1].regression, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_what_does_not_fit_is_named(kind: str) -> None:
    state = MAKERS[kind]()
    del state["backbone.layer3.5.bn2.bias"]
    state["roi_head.mask_head.conv.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing backbone.body.layer3.5.bn2.bias; left over roi_head.mask_head"):
        convert_mmdetection(state, {"cfg": config(kind)}).build()


@pytest.mark.parametrize(
    ("kind", "old", "new", "says"),
    [
        ("RetinaNet", "type='RetinaNet'", "type='ATSS'", "a ATSS of mmdetection: only RetinaNet, FCOS, FasterRCNN"),
        ("RetinaNet", "type='RetinaHead'", "type='FreeAnchorRetinaHead'", "only RetinaHead can be converted"),
        ("RetinaNet", "type='FPN'", "type='PAFPN'", "type=PAFPN, and only FPN"),
        ("RetinaNet", "'on_input'", "'on_lateral'", "add_extra_convs=on_lateral"),
        ("RetinaNet", "type='ResNet'", "type='ResNeXt'", "type=ResNeXt, and only ResNet"),
        ("RetinaNet", "depth=50", "depth=18", "a ResNet-18: only ResNet-50, 101 and 152"),
        ("RetinaNet", "DeltaXYWHBBoxCoder", "TBLRBBoxCoder", "box coder TBLRBBoxCoder"),
        ("RetinaNet", "strides=[8, 16", "strides=[4, 16", "only .8, 16, 32, 64, 128. can be converted"),
        ("FasterRCNN", "reg_class_agnostic=False", "reg_class_agnostic=True", "reg_class_agnostic=True"),
        ("FasterRCNN", "type='StandardRoIHead'", "type='CascadeRoIHead'", "only StandardRoIHead"),
        ("FasterRCNN", "roi_head=dict(", "other=dict(", "1.x, whose background is the first class"),
        ("FCOS", "data_preprocessor=", "other=", "no mean and std"),
        ("FCOS", "model = dict(", "other = dict(", "a None of mmdetection"),
        ("FCOS", "model = dict(", "model = dict((", "configuration cannot be read"),
    ],
)
def test_other_models_are_refused(kind: str, old: str, new: str, says: str) -> None:
    text = config(kind)
    assert old in text
    with pytest.raises(ValueError, match=says):
        convert_mmdetection(MAKERS[kind](), {"cfg": text.replace(old, new)}).build()


def test_a_file_without_a_configuration_or_of_1x_is_refused() -> None:
    with pytest.raises(ValueError, match="without its configuration"):
        convert_mmdetection(fcos(), {})
    with pytest.raises(ValueError, match=r"of mmdetection 1\.x"):
        convert_mmdetection(fcos(), {"mmdet_version": "1.2.0", "config": config("FCOS", version=2)})


def test_a_configuration_is_read_and_never_run(tmp_path) -> None:
    text = f"""
open({str(tmp_path / "run")!r}, 'w')
a = open({str(tmp_path / "run")!r}, 'w')
b = dict(c=-1.5, d=[1, (2, 'x')], e={{'f': None}}, g=dict(h=True))
i = dict(j=open({str(tmp_path / "run")!r}, 'w'))
"""
    assert read_config(text) == {"b": {"c": -1.5, "d": [1, [2, "x"]], "e": {"f": None}, "g": {"h": True}}}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6], to_rgb=False)",
        "train = [dict(type='Load'), dict(type='Normalize', mean=[1, 2, 3], std=[4, 5, 6], to_rgb=False)]",
        "data_preprocessor = dict(mean=[1, 2, 3], std=[4, 5, 6], bgr_to_rgb=False)",
    ],
)
def test_normalisation_is_found_wherever_it_stands(text: str) -> None:
    assert normalisation(read_config(text), {}) == ([1, 2, 3], [4, 5, 6], False)


def test_names_of_classes() -> None:
    assert class_names({"CLASSES": ("a", "b")}) == ["a", "b"]
    assert class_names({"CLASSES": "person"}) == ["person"]
    assert class_names({"dataset_meta": {"classes": ["a"], "palette": []}}) == ["a"]
    assert class_names({"dataset_meta": {"CLASSES": ("b",)}}) == ["b"]
    assert class_names({}) is None
