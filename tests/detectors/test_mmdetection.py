"""Conversion of mmdetection's checkpoints; `benchmarks/peers_mmdetection.py` compares with the library itself."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.mmdetection import (
    BGR,
    BLOCKS,
    CASES,
    CLASSES,
    STRIDES,
    WIDTH,
    conv,
    faster_rcnn,
    faster_rcnn_config,
    fcos,
    fcos_config,
    flat,
    meta_2,
    meta_3,
    normalised,
    retinanet,
    retinanet_config,
    run_conv,
    run_pyramid,
    run_resnet,
    run_tower,
    source,
)
from torchvision.ops import roi_align

from gid_yolo.detectors.convert.mmdetection import convert_mmdetection, is_mmdetection, mmdetection_names
from gid_yolo.detectors.convert.mmdetection_config import read_config
from gid_yolo.errors import UserError


@pytest.mark.parametrize("kind", sorted(CASES))
@pytest.mark.parametrize("depth", sorted(BLOCKS))
@pytest.mark.parametrize("meta", [meta_2, meta_3])
def test_every_tensor_finds_its_place(kind: str, depth: int, meta) -> None:
    make, config = CASES[kind]
    state = make(depth)
    assert is_mmdetection(state)
    detector = convert_mmdetection(
        {**state, "ema_backbone_conv1_weight": torch.zeros(1)}, meta(config("caffe"))
    ).build()
    own = detector.state_dict()
    counted = [v for k, v in state.items() if not k.endswith("num_batches_tracked")]
    zeros = 8 * WIDTH if kind == "fcos" else 0  # biases before norms
    assert sum(v.numel() for v in own.values()) == sum(v.numel() for v in counted) + zeros
    assert (detector.family, detector.backbone.name, detector.num_classes) == (kind, f"resnet{depth}", CLASSES)
    # Images come as RGB in [0, 1], the filters of the caffe style as BGR in 0 to 255
    assert torch.equal(own["backbone.body.conv1.weight"], state["backbone.conv1.weight"][:, [2, 1, 0]])
    assert detector.backbone.mean.flatten().tolist() == pytest.approx([x / 255 for x in BGR[0][::-1]])
    assert detector.backbone.std.flatten().tolist() == pytest.approx([1 / 255] * 3)
    block = detector.backbone.body.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
@torch.no_grad()
def test_retinanet_equals_theirs(style: str) -> None:
    state = retinanet()
    detector = convert_mmdetection(state, meta_3(retinanet_config(style))).build().eval()
    images = torch.rand(1, 3, 96, 160)
    maps = run_resnet(state, normalised(images, style), style)
    levels = run_pyramid(state, maps[1:], top="on_input", relu=False)
    features, raw = detector.raw(images)
    logits, deltas = [], []
    for feature, level in zip(features, levels, strict=True):
        torch.testing.assert_close(feature, level, rtol=1e-4, atol=1e-4)
        logits.append(flat(run_conv(state, "bbox_head.retina_cls", run_tower(state, "cls_convs", level)), CLASSES))
        deltas.append(flat(run_conv(state, "bbox_head.retina_reg", run_tower(state, "reg_convs", level)), 4))
    torch.testing.assert_close(raw.logits[0], torch.cat(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.regression[0], torch.cat(deltas), rtol=1e-4, atol=1e-4)
    # Anchors of a cell go by ratio, then size; the first row's second cell lies 8 px to the right
    for i, ratio in enumerate((0.5, 1.0, 2.0)):
        for j in range(3):
            w, h = (32 * 2 ** (j / 3) * factor for factor in (1 / math.sqrt(ratio), math.sqrt(ratio)))
            expected = [8 - w / 2, -h / 2, 8 + w / 2, h / 2]
            assert raw.priors[9 + 3 * i + j].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("improved", [False, True])
@pytest.mark.parametrize("style", ["pytorch", "caffe"])
@torch.no_grad()
def test_fcos_equals_theirs(style: str, improved: bool) -> None:
    state = fcos(bias=improved)
    extra = {"norm_on_bbox": True, "centerness_on_reg": True, "center_sampling": True, "conv_bias": True}
    config = fcos_config(style, **(extra if improved else {}))
    detector = convert_mmdetection(state, meta_3(config)).build().eval()
    images = torch.rand(1, 3, 96, 160)
    maps = run_resnet(state, normalised(images, style), style)
    levels = run_pyramid(state, maps[1:], top="on_output", relu=True)
    logits, boxes, scores = [], [], []
    for i, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        cls, reg = run_tower(state, "cls_convs", level), run_tower(state, "reg_convs", level)
        logits.append(flat(run_conv(state, "bbox_head.conv_cls", cls), CLASSES))
        centerness = flat(run_conv(state, "bbox_head.conv_centerness", reg if improved else cls), 1)
        ltrb = flat(run_conv(state, "bbox_head.conv_reg", reg) * state[f"bbox_head.scales.{i}.scale"], 4)
        ltrb = ltrb.relu() * stride if improved else ltrb.exp()
        height, width = level.shape[2:]
        points = [((x + 0.5) * stride, (y + 0.5) * stride) for y in range(height) for x in range(width)]
        at = torch.tensor(points)
        boxes.append(torch.cat([at - ltrb[:, :2], at + ltrb[:, 2:]], 1))
        scores.append(logits[-1].sigmoid() * centerness.sigmoid())
    features, raw = detector.raw(images)
    for feature, level in zip(features, levels, strict=True):
        torch.testing.assert_close(feature, level, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.logits[0], torch.cat(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.boxes[0], torch.cat(boxes), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(detector(images)[0, 4:].T, torch.cat(scores), rtol=1e-4, atol=1e-5)
    assert detector.center_radius == (1.5 if improved else math.inf)


@torch.no_grad()
def test_faster_rcnn_equals_theirs() -> None:
    state = faster_rcnn()
    detector = convert_mmdetection(state, meta_2(faster_rcnn_config())).build().eval()
    images = torch.rand(1, 3, 96, 160)
    maps = run_resnet(state, normalised(images, "pytorch"), "pytorch")
    levels = run_pyramid(state, maps, top=None, relu=False)
    features, raw = detector.raw(images)
    hidden = [run_conv(state, "rpn_head.rpn_conv", x).relu() for x in levels]
    logits = torch.cat([flat(run_conv(state, "rpn_head.rpn_cls", x), 1) for x in hidden])
    deltas = torch.cat([flat(run_conv(state, "rpn_head.rpn_reg", x), 4) for x in hidden])
    torch.testing.assert_close(raw.logits[0], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.regression[0], deltas, rtol=1e-4, atol=1e-4)
    w = 32 / math.sqrt(0.5)
    assert raw.priors[0].tolist() == pytest.approx([-w / 2, -w / 4, w / 2, w / 4], rel=1e-5)

    # floor(log2(sqrt(area) / 56)): under 112 px stride 4, from there on stride 8
    boxes = torch.tensor([[3.0, 5.0, 40.0, 60.0], [0.0, 0.0, 159.0, 95.0]])
    head = "roi_head.bbox_head"
    scores, regression = detector.classify(features, boxes[None])
    for i, (level, stride) in enumerate(((levels[0], 4), (levels[1], 8))):
        x = roi_align(level, [boxes[i : i + 1]], 7, 1 / stride, 0, True).flatten(1)
        for layer in ("shared_fcs.0", "shared_fcs.1"):
            x = F.linear(x, state[f"{head}.{layer}.weight"], state[f"{head}.{layer}.bias"]).relu()
        expected = F.linear(x, state[f"{head}.fc_cls.weight"], state[f"{head}.fc_cls.bias"])  # the background last
        torch.testing.assert_close(scores[0, i], expected[0], rtol=1e-4, atol=1e-3)
        expected = F.linear(x, state[f"{head}.fc_reg.weight"], state[f"{head}.fc_reg.bias"])
        torch.testing.assert_close(regression[0, i], expected.view(CLASSES, 4), rtol=1e-4, atol=1e-3)
    assert detector.box_weights.tolist() == [10.0, 10.0, 5.0, 5.0]
    assert (detector.rpn_before_nms, detector.rpn_after_nms, detector.rpn_nms_iou) == ((2000, 900), (1000, 800), 0.6)
    assert (detector.box_min_score, detector.box_nms_iou, detector.max_det) == (0.1, 0.6, 70)


def test_the_keys_of_early_versions() -> None:
    config = faster_rcnn_config()
    test, train = config.pop("test_cfg"), config.pop("train_cfg")
    test["rpn"] = {"nms_across_levels": False, "nms_pre": 700, "nms_post": 700, "max_num": 600, "nms_thr": 0.65}
    extractor = config["roi_head"]["bbox_roi_extractor"]
    extractor["roi_layer"] = {"type": "RoIAlign", "out_size": 7, "sample_num": 0}
    meta = meta_2(config)
    meta["config"] += f"train_cfg = {source(train)}\ntest_cfg = {source(test)}\n"
    settings = convert_mmdetection(faster_rcnn(), meta).config["settings"]
    assert (settings["rpn_before_nms"], settings["rpn_after_nms"], settings["rpn_nms_iou"]) == (
        [2000, 700],
        [1000, 600],
        0.65,
    )
    assert (settings["roi_size"], settings["roi_points"], settings["roi_aligned"]) == (7, 0, True)
    config = fcos_config()
    config["neck"] |= {"add_extra_convs": True, "extra_convs_on_inputs": False}
    assert convert_mmdetection(fcos(), meta_2(config)).config["settings"]["p6_from"] == "p5"


@pytest.mark.parametrize("kind", sorted(CASES))
def test_what_does_not_fit_is_named(kind: str) -> None:
    make, config = CASES[kind]
    state = make()
    del state["backbone.layer3.5.bn2.bias"]
    state["roi_head.mask_head.conv_logits.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing backbone.body.layer3.5.bn2.bias; left over roi_head.mask_head"):
        convert_mmdetection(state, meta_3(config())).build()


@pytest.mark.parametrize("lost", ["bbox_head.scales.3.scale", "bbox_head.reg_convs.2.conv.weight"])
def test_a_part_of_fcos_is_not_made_up(lost: str) -> None:
    state = fcos(bias=True)
    del state[lost]
    with pytest.raises(ValueError, match="missing head"):
        convert_mmdetection(state, meta_3(fcos_config(conv_bias=True))).build()


def test_deformable_convolutions_are_left_over() -> None:
    state = fcos()
    state |= conv("bbox_head.cls_convs.3.conv.conv_offset", 27, WIDTH, 3)
    with pytest.raises(ValueError, match=r"left over head.cls_tower.9.conv_offset"):
        convert_mmdetection(state, meta_3(fcos_config(dcn_on_last_conv=True))).build()


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("retinanet", "type", "MaskRCNN", "type='MaskRCNN'"),
        ("retinanet", "backbone.type", "ResNetV1d", "model.backbone.type='ResNetV1d'"),
        ("retinanet", "backbone.dilations", [1, 1, 1, 2], "dilations"),
        ("retinanet", "neck.type", "PAFPN", "model.neck.type='PAFPN'"),
        ("retinanet", "neck.add_extra_convs", "on_lateral", "on_lateral"),
        ("retinanet", "bbox_head.type", "FSAFHead", "FSAFHead"),
        ("retinanet", "bbox_head.num_classes", CLASSES + 1, "1.x counts otherwise"),
        ("retinanet", "bbox_head.loss_cls.use_sigmoid", False, "use_sigmoid"),
        ("retinanet", "bbox_head.anchor_generator.type", "LegacyAnchorGenerator", "LegacyAnchorGenerator"),
        ("retinanet", "bbox_head.anchor_generator.center_offset", 0.5, "center_offset=0.5"),
        ("retinanet", "bbox_head.bbox_coder.target_stds", [0.1, 0.1, 0.2, 0.2], "target_stds"),
        ("retinanet", "data_preprocessor.mean", [0.5], "not of 3 channels"),
        ("fcos", "bbox_head.strides", [4, 8, 16, 32, 64], "strides"),
        (
            "fcos",
            "bbox_head.regress_ranges",
            [[-1, 64], [64, 128], [128, 256], [256, 1024], [1024, 1e8]],
            "regress_ranges",
        ),
        ("fcos", "bbox_head.regress_ranges", 64, "regress_ranges=64"),
        ("fcos", "bbox_head.norm_cfg", {"type": "BN"}, "norm_cfg.type='BN'"),
        ("faster_rcnn", "roi_head.type", "CascadeRoIHead", "CascadeRoIHead"),
        ("faster_rcnn", "neck.add_extra_convs", "on_input", "add_extra_convs"),
        ("faster_rcnn", "test_cfg.rcnn.nms.type", "soft_nms", "soft_nms"),
    ],
)
def test_what_has_no_equal_here_is_refused(kind: str, path: str, value: Any, message: str) -> None:
    make, config = CASES[kind]
    model = config()
    *parents, last = path.split(".")
    section = model
    for name in parents:
        section = section[name]
    section[last] = value
    with pytest.raises(ValueError, match=message):
        convert_mmdetection(make(), meta_3(model))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [4.0, 8.0]),  # 64 px on P3 are 8 of its strides, and 64 on P4 are 4
        ([[-1, 64], [64, 128], [128, 256], [256, 512], [512, 1e8]], [4.0, 8.0]),
        ([[-1, 32], [48, 64], [96, 128], [192, 256], [384, 1e8]], [3.0, 4.0]),
    ],
)
def test_ranges_of_the_levels_are_in_strides(given: list | None, expected: list[float]) -> None:
    config = fcos_config("pytorch", **({} if given is None else {"regress_ranges": given}))
    assert convert_mmdetection(fcos(bias=False), meta_3(config)).config["settings"]["level_ranges"] == expected


def test_version_1_is_refused() -> None:
    state = {key.removeprefix("roi_head."): value for key, value in faster_rcnn().items()}
    with pytest.raises(ValueError, match=r"mmdetection 1\.x"):
        convert_mmdetection(state, meta_2(faster_rcnn_config()))


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"cfg": None},
        {"cfg": "/some/where/retinanet.py\nmodel = dict(type='RetinaNet')\n"},  # 1.x wrote the file's name first
        {"cfg": "_base_ = './base.py'\nmodel = dict(type='RetinaNet')\n"},
        {"cfg": "model = dict(type='RetinaNet')\nmodel = dict(type='FCOS')\n"},
        {"cfg": "model = __import__('os').system('exit 3')\n"},
        {"cfg": "model = dict(**settings)\n"},
        {"cfg": "model = dict(" * 3000},
        {"cfg": "model = dict(type='RetinaNet')\n"},
    ],
)
def test_without_a_whole_configuration_the_way_out_is_said(meta: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"torch.save\(\{'state_dict': ..., 'meta': \{'cfg': .*pretty_text"):
        convert_mmdetection(retinanet(), meta)


def test_a_configuration_is_data() -> None:
    text = "a = dict({'x-y': 1, 'b': dict(c=(-1, 2.5))}, d=None)\nb = open('x')\nfor i in b: pass\n"
    section = read_config({"cfg": text + "model = dict(type='mmdet.models.FCOS', neck=dict())\n"})
    assert section.get("a") == {"x-y": 1, "b": {"c": [-1, 2.5]}, "d": None}
    assert section.get("b") is None
    assert section.part("model").get("type") == "FCOS"
    assert section.part("model").part("neck").name == "model.neck"


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("cat", "dog")}, ["cat", "dog"]),
        ({"dataset_meta": {"classes": ["cat", "dog"], "palette": []}}, ["cat", "dog"]),
        ({"dataset_meta": {"CLASSES": ("cat", "dog")}}, ["cat", "dog"]),
        ({"CLASSES": ("cat", "dog", "cow")}, None),
        ({"CLASSES": 0}, None),
        ({}, None),
    ],
)
def test_names_of_classes(meta: dict[str, Any], names: list[str] | None) -> None:
    assert mmdetection_names(meta, 2) == names
    assert mmdetection_names({"CLASSES": "cat"}, 1) == ["cat"]


def test_centerness_and_coding_must_be_known() -> None:
    converted = convert_mmdetection(fcos(), meta_3(fcos_config()))
    for key in ("centerness_from", "box_coding"):
        config = {**converted.config, "settings": {**converted.config["settings"], key: "x"}}
        with pytest.raises(UserError, match=f"{key}=x"):
            type(converted)(config, converted.state).build()
