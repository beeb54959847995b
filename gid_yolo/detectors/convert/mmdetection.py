"""mmdetection's RetinaNet, FCOS and Faster R-CNN on ResNets with a feature pyramid, from checkpoints of 2.x and 3.x.

Names and shapes leave open where the strides are, how images are normalised and how boxes are coded; the configuration
that every checkpoint carries says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gid_yolo.detectors.convert.converted import Converted
from gid_yolo.detectors.convert.mmdetection_config import normalisation, read_config

BLOCKS = {50: "resnet50", 101: "resnet101", 152: "resnet152"}
FROM = {"on_input": "c5", True: "c5", "on_output": "p5", False: "pool"}  # add_extra_convs; absent is False
STAGES = 4


def is_mmdetection(state: Mapping[str, Tensor]) -> bool:
    """True for tensors by mmdetection's names."""
    return any(key.startswith("neck.lateral_convs.") for key in state)


def class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes: `CLASSES` in 2.x, in the `dataset_meta` of 3.x; None where the file has none."""
    data = meta.get("dataset_meta") or {}
    names = meta.get("CLASSES") or data.get("classes") or data.get("CLASSES")
    return [names] if isinstance(names, str) else [str(name) for name in names] if names else None


def convert_mmdetection(state: dict[str, Tensor], meta: Mapping[str, Any]) -> Converted:
    """Settings and weights of ours from the tensors of a checkpoint and its `meta`.

    Raises:
        ValueError: Another detector, one with parts that ours lack, or no configuration; tensors that are missing are
            named by `Converted.build`.
    """
    if str(meta.get("mmdet_version", "2")).startswith("1."):
        raise ValueError("it is of mmdetection 1.x, whose classes and boxes are coded otherwise: upgrade it first.")
    text = meta.get("cfg") or meta.get("config")
    if not isinstance(text, str):
        raise ValueError(
            "it is a checkpoint of mmdetection without its configuration, which says how images are normalised and "
            'boxes coded: save the whole checkpoint, {"meta": {"cfg": <text of the config>}, "state_dict": ...}.'
        )
    config = read_config(text)
    model = config.get("model")
    kinds = {"RetinaNet": _retinanet, "FCOS": _fcos, "FasterRCNN": _faster_rcnn}
    if not isinstance(model, dict) or model.get("type") not in kinds:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f"it is a {kind} of mmdetection: only {', '.join(kinds)} can be converted.")
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return kinds[model["type"]](state, model, config)


def _retinanet(state: dict[str, Tensor], model: dict[str, Any], config: dict[str, Any]) -> Converted:
    head = model["bbox_head"]
    _require(head, "type", "RetinaHead")
    anchors = head.get("anchor_generator") or {}
    base, octaves = float(anchors.get("octave_base_scale", 4)), int(anchors.get("scales_per_octave", 3))
    scales = anchors.get("scales") or [base * 2 ** (i / octaves) for i in range(octaves)]
    _require(anchors, "strides", [8, 16, 32, 64, 128])
    settings = _shared(state, model, first=1) | {
        "num_convs": int(head.get("stacked_convs", 4)),
        "anchor_sizes": [[scale * stride for scale in scales] for stride in (8, 16, 32, 64, 128)],
        "aspect_ratios": [float(x) for x in anchors.get("ratios", (0.5, 1.0, 2.0))],
        "whole_anchors": False,
    }
    names = _tower_names("cls_convs", "cls_tower", settings["num_convs"], norm=False)
    names |= _tower_names("reg_convs", "reg_tower", settings["num_convs"], norm=False)
    names |= {"bbox_head.retina_cls.": "head.cls_logits.", "bbox_head.retina_reg.": "head.box_deltas."}
    used = _renamed(state, names, model, laterals=3)
    _scale_deltas(used, "head.box_deltas", head)
    return Converted(_config("retinanet", head, settings, model, config), _for_rgb(used, model, config))


def _fcos(state: dict[str, Tensor], model: dict[str, Any], config: dict[str, Any]) -> Converted:
    head = model["bbox_head"]
    _require(head, "type", "FCOSHead")
    _require(head, "strides", [8, 16, 32, 64, 128])
    depth = int(head.get("stacked_convs", 4))
    norm = "gn" if "bbox_head.cls_convs.0.gn.weight" in state else None
    settings = _shared(state, model, first=1) | {
        "num_convs": depth,
        "head_norm": norm,
        "level_scales": True,
        "distances": "relu" if head.get("norm_on_bbox") else "exp",
        "centerness_on": "box" if head.get("centerness_on_reg") else "cls",
        "centered_points": True,
    }
    names = _tower_names("cls_convs", "cls_tower", depth, norm=norm is not None)
    names |= _tower_names("reg_convs", "reg_tower", depth, norm=norm is not None)
    names |= {
        "bbox_head.conv_cls.": "head.cls_logits.",
        "bbox_head.conv_reg.": "head.box_ltrb.",
        "bbox_head.conv_centerness.": "head.centerness.",
    }
    scales = [state.pop(f"bbox_head.scales.{i}.scale") for i in range(5) if f"bbox_head.scales.{i}.scale" in state]
    used = _renamed(state, names, model, laterals=3)
    if scales:
        used["head.level_scales"] = torch.stack([scale.reshape(()) for scale in scales])
    for key in [key for key in used if key.endswith(".weight") and used[key].dim() == 4 and "_tower." in key]:
        bias = key.replace(".weight", ".bias")  # ours has biases before a norm too
        used.setdefault(bias, used[key].new_zeros(len(used[key])))
    return Converted(_config("fcos", head, settings, model, config), _for_rgb(used, model, config))


def _faster_rcnn(state: dict[str, Tensor], model: dict[str, Any], config: dict[str, Any]) -> Converted:
    if "roi_head" not in model:
        raise ValueError("it is a Faster R-CNN of mmdetection 1.x, whose background is the first class: upgrade it.")
    rpn, second = model["rpn_head"], model["roi_head"]
    box, extractor = second["bbox_head"], second["bbox_roi_extractor"]
    anchors, layer = rpn.get("anchor_generator") or {}, extractor["roi_layer"]
    _require(rpn, "type", "RPNHead")
    _require(second, "type", "StandardRoIHead")
    _require(box, "reg_class_agnostic", False)
    _require(anchors, "strides", [4, 8, 16, 32, 64])
    _require(layer, "type", "RoIAlign")
    _require(extractor, "finest_scale", 56)
    sizes = [float(scale) for scale in anchors.get("scales", [8])]
    coder = box.get("bbox_coder") or {}
    test = model.get("test_cfg") or config.get("test_cfg") or {}
    first, final = test.get("rpn") or {}, test.get("rcnn") or {}
    settings = _shared(state, model, first=0) | {
        "anchor_sizes": [[scale * stride for scale in sizes] for stride in (4, 8, 16, 32, 64)],
        "aspect_ratios": [float(x) for x in anchors.get("ratios", (0.5, 1.0, 2.0))],
        "whole_anchors": False,
        "rpn_before_nms": [2000, int(first.get("nms_pre", 1000))],
        "rpn_after_nms": [1000, int(first.get("max_per_img", first.get("max_num", 1000)))],
        "rpn_nms_iou": float((first.get("nms") or {}).get("iou_threshold", 0.7)),
        "roi_size": int(layer.get("output_size", layer.get("out_size", 7))),
        "roi_points": int(layer.get("sampling_ratio", layer.get("sample_num", 0))),
        "roi_aligned": bool(layer.get("aligned", True)),
        "head_width": int(box.get("fc_out_channels", 1024)),
        "box_weights": [1 / float(x) for x in coder.get("target_stds", (0.1, 0.1, 0.2, 0.2))],
        "box_beta": 0.0,
        "box_min_score": float(final.get("score_thr", 0.05)),
        "box_nms_iou": float((final.get("nms") or {}).get("iou_threshold", 0.5)),
        "max_det": int(final.get("max_per_img", 100)),
    }
    settings.pop("p6_from")
    settings.pop("p7_relu")
    names = {
        "rpn_head.rpn_conv.": "rpn.tower.0.",
        "rpn_head.rpn_cls.": "rpn.objectness.",
        "rpn_head.rpn_reg.": "rpn.deltas.",
        "roi_head.bbox_head.shared_fcs.0.": "head.layers.1.",
        "roi_head.bbox_head.shared_fcs.1.": "head.layers.3.",
        "roi_head.bbox_head.fc_cls.": "head.cls_logits.",  # background last on both sides
        "roi_head.bbox_head.fc_reg.": "head.box_deltas.",
    }
    used = _renamed(state, names, model, laterals=4)
    _scale_deltas(used, "rpn.deltas", rpn)
    return Converted(_config("faster_rcnn", box, settings, model, config), _for_rgb(used, model, config))


def _shared(state: dict[str, Tensor], model: dict[str, Any], *, first: int) -> dict[str, Any]:
    """Settings of the pyramid.

    Raises:
        ValueError: Another neck.
    """
    neck = model["neck"]
    _require(neck, "type", "FPN")
    _require(neck, "start_level", first)
    extra = neck.get("add_extra_convs", False)
    if extra not in FROM or (FROM[extra] == "pool") != (first == 0):
        raise ValueError(f"its pyramid has add_extra_convs={extra}, which cannot be converted.")
    return {
        "fpn_channels": len(state["neck.lateral_convs.0.conv.weight"]),
        "p6_from": FROM[extra],
        "p7_relu": bool(neck.get("relu_before_extra_convs", False)),
    }


def _config(
    detector: str, head: dict[str, Any], settings: dict[str, Any], model: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """Our settings of the whole model: RGB in [0, 1], as everywhere here."""
    backbone = model["backbone"]
    _require(backbone, "type", "ResNet")
    if (depth := backbone.get("depth")) not in BLOCKS:
        raise ValueError(f"its backbone is a ResNet-{depth}: only ResNet-50, 101 and 152 are known.")
    mean, std, rgb = normalisation(config, model)
    order = 1 if rgb else -1
    return {
        "detector": detector,
        "backbone": BLOCKS[depth],
        "backbone_weights": False,
        "freeze_bn": bool(backbone.get("norm_eval", True)),
        "frozen_stages": int(backbone.get("frozen_stages", -1)) + 1,  # its stage 0 is the stem
        "mean": [x / 255 for x in mean[::order]],
        "std": [x / 255 for x in std[::order]],
        "stride_in_1x1": backbone.get("style", "pytorch") == "caffe",
        "nc": int(head["num_classes"]),
        "settings": settings,
    }


def _renamed(
    state: dict[str, Tensor], names: dict[str, str], model: dict[str, Any], *, laterals: int
) -> dict[str, Tensor]:
    """Every tensor by our name; what has none keeps its own, so that `Converted.build` says that it is left over."""
    names = {"backbone.": "backbone.body.", **names}
    for i in range(laterals):
        names[f"neck.lateral_convs.{i}.conv."] = f"neck.fpn.inner_blocks.{i}.0."
        names[f"neck.fpn_convs.{i}.conv."] = f"neck.fpn.layer_blocks.{i}.0."
    for i, level in enumerate(("p6", "p7"), start=laterals):
        names[f"neck.fpn_convs.{i}.conv."] = f"neck.fpn.extra_blocks.{level}."
    found = {}
    for key, value in state.items():
        name = next((new + key[len(old) :] for old, new in names.items() if key.startswith(old)), key)
        found[name] = value
    return found


def _tower_names(theirs: str, ours: str, depth: int, *, norm: bool) -> dict[str, str]:
    """Names of the convolutions of a tower, and of the GroupNorms behind them."""
    step = 3 if norm else 2  # convolution, norm, ReLU
    names = {}
    for i in range(depth):
        names[f"bbox_head.{theirs}.{i}.conv."] = f"head.{ours}.{step * i}."
        if norm:
            names[f"bbox_head.{theirs}.{i}.gn."] = f"head.{ours}.{step * i + 1}."
    return names


def _scale_deltas(used: dict[str, Tensor], name: str, head: dict[str, Any]) -> None:
    """Put the standard deviations of the box coder into the last convolution, where they are not 1.

    Raises:
        ValueError: Another box coder.
    """
    coder = head.get("bbox_coder") or {}
    if coder.get("type", "DeltaXYWHBBoxCoder") != "DeltaXYWHBBoxCoder" or any(coder.get("target_means", ())):
        raise ValueError(f"its box coder {coder.get('type')} with means {coder.get('target_means')} is not known.")
    deviations = torch.tensor([float(x) for x in coder.get("target_stds", (1.0,) * 4)])
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in used and not bool((deviations == 1).all()):
            used[key] = (used[key].unflatten(0, (-1, 4)).movedim(1, -1) * deviations).movedim(-1, 1).flatten(0, 1)


def _for_rgb(used: dict[str, Tensor], model: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    """The first filters turned round where they were made for BGR."""
    key = "backbone.body.conv1.weight"
    if key in used and not normalisation(config, model)[2]:
        used[key] = used[key].flip(1)
    return used


def _require(part: dict[str, Any], key: str, value: Any) -> None:
    """Refuse a setting that ours lack; one that is absent is the library's default, `value`.

    Raises:
        ValueError: It has another value.
    """
    if part.get(key, value) != value:
        raise ValueError(f"its {part.get('type', 'part')} has {key}={part[key]}, and only {value} can be converted.")
