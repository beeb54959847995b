"""mmdetection's RetinaNet, FCOS and Faster R-CNN on ResNets with a feature pyramid, from its 2.x and 3.x checkpoints.

Names and shapes do not say how images are normalised, where a ResNet has its strides, or how boxes are coded. The
configuration does, which mmdetection keeps in `meta`: it is believed as mmdetection believes it, and what has no equal
here is refused. Weights without a configuration are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gid_yolo.detectors.convert.converted import Converted
from gid_yolo.detectors.convert.mmdetection_config import Section, read_config
from gid_yolo.detectors.convert.mmdetection_parts import (
    DENSE_STRIDES,
    anchors,
    backbone,
    dense_pyramid,
    evaluation,
    expect_deltas,
    expect_pyramid,
    expect_sigmoid,
    level_ranges,
    num_classes,
    renamed,
    tower_names,
    towers,
)

PARTS = ("neck.lateral_convs.", "bbox_head.", "rpn_head.", "roi_head.")
RETINA_ANCHORS = {  # of a RetinaHead whose configuration names none
    "type": "AnchorGenerator",
    "octave_base_scale": 4,
    "scales_per_octave": 3,
    "ratios": [0.5, 1.0, 2.0],
    "strides": DENSE_STRIDES,
}


def is_mmdetection(state: Mapping[str, Tensor]) -> bool:
    """True for tensors by mmdetection's names."""
    return any(key.startswith(PARTS) for key in state)


def mmdetection_names(meta: Mapping[str, Any], count: int) -> list[str] | None:
    """Names of the classes out of the `meta` of a checkpoint, if it has one for each."""
    data = meta.get("dataset_meta")
    places = [data if isinstance(data, Mapping) else {}, meta]  # 3.x, 2.x
    names = next((place[key] for place in places for key in ("classes", "CLASSES") if place.get(key)), ())
    names = [names] if isinstance(names, str) else names
    return [str(name) for name in names] if isinstance(names, list | tuple) and len(names) == count else None


def convert_mmdetection(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Converted:
    """Settings and weights of ours from the tensors and the `meta` of an mmdetection checkpoint.

    Raises:
        ValueError: Another detector, or one that is configured as ours cannot be; tensors that are missing are named by
            `Converted.build`.
    """
    if any(key.startswith(("bbox_head.shared_fcs.", "bbox_head.fc_cls.")) for key in state):
        raise ValueError(
            "it is of mmdetection 1.x, whose boxes and classes are coded otherwise: only 2.x and 3.x can be converted."
        )
    config = read_config(meta)
    model = config.part("model")
    kind = model.expect("type", "RetinaNet", "FCOS", "FasterRCNN")
    return {"RetinaNet": _retinanet, "FCOS": _fcos, "FasterRCNN": _faster_rcnn}[kind](config, model, state)


def _retinanet(config: Section, model: Section, state: Mapping[str, Tensor]) -> Converted:
    head = model.part("bbox_head")
    head.expect("type", "RetinaHead")
    expect_sigmoid(head)
    expect_deltas(head)
    settings = {
        **dense_pyramid(model.part("neck")),
        **towers(head, state),
        **anchors(head.part("anchor_generator", RETINA_ANCHORS), DENSE_STRIDES),
        "box_loss": "giou" if head.get("reg_decoded_bbox") else "l1",
    }
    count = len(settings["anchor_sizes"][0]) * len(settings["aspect_ratios"])
    names = [
        *tower_names(settings["head_norm"]),
        (r"bbox_head\.retina_cls\.(.*)", r"head.cls_logits.\1"),
        (r"bbox_head\.retina_reg\.(.*)", r"head.box_deltas.\1"),
    ]
    classes = num_classes(head, state, "bbox_head.retina_cls.bias", anchors=count)
    base = {
        "detector": "retinanet",
        **backbone(config, model, state),
        "nc": classes,
        "train": evaluation(config, model),
    }
    return Converted({**base, "settings": settings}, renamed(config, model, state, names))


def _fcos(config: Section, model: Section, state: Mapping[str, Tensor]) -> Converted:
    head = model.part("bbox_head")
    head.expect("type", "FCOSHead")
    head.expect("strides", DENSE_STRIDES)
    head.expect("cls_predictor_cfg", None)
    head.part("bbox_coder", {"type": "DistancePointBBoxCoder"}).expect("type", "DistancePointBBoxCoder")
    expect_sigmoid(head)
    settings = {
        **dense_pyramid(model.part("neck")),
        **towers(head, state),
        "point_offset": 0.5,
        "box_coding": "relu" if head.get("norm_on_bbox") else "exp",
        "level_scales": True,
        "centerness_from": "reg" if head.get("centerness_on_reg") else "cls",
        "sqrt_score": False,
        "center_radius": head.get("center_sample_radius", default=1.5) if head.get("center_sampling") else math.inf,
        "level_ranges": level_ranges(head),
    }
    names = [
        *tower_names(settings["head_norm"]),
        (r"bbox_head\.conv_cls\.(.*)", r"head.cls_logits.\1"),
        (r"bbox_head\.conv_reg\.(.*)", r"head.box_ltrb.\1"),
        (r"bbox_head\.conv_centerness\.(.*)", r"head.centerness.\1"),
    ]
    ours = renamed(config, model, state, names)
    scales = [f"bbox_head.scales.{level}.scale" for level in range(len(DENSE_STRIDES))]
    if all(key in ours for key in scales):
        ours["head.scales"] = torch.stack([ours.pop(key) for key in scales])
    if not any(re.fullmatch(r"bbox_head\.\w+_convs\.\d+\.conv\.bias", key) for key in state):
        # Before a norm they are left away by default. Ours, as torchvision's, are there: they are 0
        tower = [k for k in state if re.fullmatch(r"bbox_head\.\w+_convs\.\d+\.conv\.weight", k)]
        zeros = {k.replace("weight", "bias"): state[k].new_zeros(len(state[k])) for k in tower}
        ours |= renamed(config, model, zeros, names)
    classes = num_classes(head, state, "bbox_head.conv_cls.bias")
    base = {"detector": "fcos", **backbone(config, model, state), "nc": classes, "train": evaluation(config, model)}
    return Converted({**base, "settings": settings}, ours)


def _faster_rcnn(config: Section, model: Section, state: Mapping[str, Tensor]) -> Converted:
    rpn, roi, neck = model.part("rpn_head"), model.part("roi_head"), model.part("neck")
    rpn.expect("type", "RPNHead")
    roi.expect("type", "StandardRoIHead")
    expect_pyramid(neck, start=0)
    neck.expect("add_extra_convs", False, default=False)
    expect_sigmoid(rpn)
    expect_deltas(rpn)
    box = roi.part("bbox_head")
    box.expect("type", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead")
    box.part("loss_cls", {"type": "CrossEntropyLoss"}).expect("type", "CrossEntropyLoss")
    for key in ("cls_predictor_cfg", "reg_predictor_cfg"):
        box.expect(key, {"type": "Linear"}, None)
    second = "roi_head.bbox_head"
    rpn_convs, convs, layers = (
        sum(key.startswith(prefix) and key.endswith(f"{end}.weight") for key in state)
        for prefix, end in (
            ("rpn_head.rpn_conv.", "conv"),
            (f"{second}.shared_convs.", "conv"),
            (f"{second}.shared_fcs.", ""),
        )
    )
    settings = {
        "fpn_channels": neck.get("out_channels"),
        **anchors(rpn.part("anchor_generator"), [4, 8, 16, 32, 64]),
        **_crops(roi.part("bbox_roi_extractor")),
        "rpn_convs": max(rpn_convs, 1),
        "head_convs": convs,
        "head_layers": layers,
        "head_width": box.get("fc_out_channels", default=1024),
        "box_weights": [1 / std for std in expect_deltas(box, stds=True)],
        "box_beta": 0.0,
        **_selection(config, model),
    }
    names = [
        (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.tower.0.\1"),
        *[(rf"rpn_head\.rpn_conv\.{i}\.conv\.(.*)", rf"rpn.tower.{2 * i}.\1") for i in range(rpn_convs)],
        (r"rpn_head\.rpn_cls\.(.*)", r"rpn.objectness.\1"),
        (r"rpn_head\.rpn_reg\.(.*)", r"rpn.deltas.\1"),
        *[(rf"roi_head\.bbox_head\.shared_convs\.{i}\.conv\.(.*)", rf"head.tower.{2 * i}.\1") for i in range(convs)],
        *[(rf"roi_head\.bbox_head\.shared_fcs\.{i}\.(.*)", rf"head.layers.{2 * i + 1}.\1") for i in range(layers)],
        (r"roi_head\.bbox_head\.fc_cls\.(.*)", r"head.cls_logits.\1"),  # the background is the last on both sides
        (r"roi_head\.bbox_head\.fc_reg\.(.*)", r"head.box_deltas.\1"),
    ]
    classes = num_classes(box, state, f"{second}.fc_cls.bias", background=1)
    base = {"detector": "faster_rcnn", **backbone(config, model, state), "nc": classes}
    return Converted({**base, "settings": settings}, renamed(config, model, state, names))


def _crops(extractor: Section) -> dict[str, Any]:
    """Settings of the crops; some have other names in early 2.x."""
    extractor.expect("type", "SingleRoIExtractor")
    extractor.expect("featmap_strides", [4, 8, 16, 32])
    layer = extractor.part("roi_layer")
    layer.expect("type", "RoIAlign")
    layer.expect("pool_mode", "avg", default="avg")
    return {
        "roi_size": layer.get("output_size", "out_size"),
        "roi_points": layer.get("sampling_ratio", "sample_num", default=0),
        "roi_aligned": layer.get("aligned", default=True),
        "roi_canonical": 4.0 * extractor.get("finest_scale", default=56),  # theirs is the upper bound of stride 4
    }


def _selection(config: Section, model: Section) -> dict[str, Any]:
    """Settings of proposals and detections; before 2.8 they stood beside the model."""
    test = model.part("test_cfg") if "test_cfg" in model.values else config.part("test_cfg")
    proposals, final = test.part("rpn"), test.part("rcnn")
    train = model.get("train_cfg", default=config.get("train_cfg"))
    training = train.get("rpn_proposal") if isinstance(train, dict) else None
    modes = [Section("rpn_proposal", training) if isinstance(training, dict) else proposals, proposals]
    for section in modes:
        section.expect("nms_across_levels", False, default=False)
        section.expect("min_bbox_size", 0, default=0)
    most = [section.get("max_per_img", "max_num", default=1000) for section in modes]
    overlap = proposals.part("nms", {"iou_threshold": proposals.get("nms_thr", default=0.7)})
    within = final.part("nms")
    for section in (overlap, within):
        section.expect("type", "nms", default="nms")
    return {
        "rpn_before_nms": [section.get("nms_pre", default=1000) for section in modes],
        "rpn_after_nms": most,
        "rpn_nms_iou": overlap.get("iou_threshold", "iou_thr"),
        "box_min_score": final.get("score_thr"),
        "box_nms_iou": within.get("iou_threshold", "iou_thr"),
        "max_det": final.get("max_per_img"),
    }
