"""What mmdetection's detectors have in common: backbone, pyramid, anchors, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from gid_yolo.detectors.convert.mmdetection_config import MEND, Section
from gid_yolo.detectors.convert.torchvision_backbone import RESNETS

DENSE_STRIDES = [8, 16, 32, 64, 128]
FCOS_RANGES = [[-1, 64], [64, 128], [128, 256], [256, 512], [512, 1e8]]  # of an FCOSHead that names none
PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
EPSILON = 1e-5  # of every norm, here as there by default
# Not the model's: EMA's copies in 2.x, whose values it has swapped with the model's before saving, and 3.x's mean, std
NOT_WEIGHTS = ("ema_", "data_preprocessor.")
Names = list[tuple[str, str]]  # patterns of their names, and what stands for them here


def backbone(config: Section, model: Section, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the backbone: RGB in [0, 1], as everywhere here."""
    body = model.part("backbone")
    body.expect("type", "ResNet")
    for key, value in (
        ("num_stages", 4),
        ("strides", [1, 2, 2, 2]),
        ("dilations", [1, 1, 1, 1]),
        ("out_indices", [0, 1, 2, 3]),
        ("deep_stem", False),
        ("avg_down", False),
    ):
        body.expect(key, value, default=value)
    norm = body.part("norm_cfg", {"type": "BN"})
    norm.expect("type", "BN", "SyncBN", "NaiveSyncBN")
    norm.expect("eps", EPSILON, default=EPSILON)
    blocks = tuple(_count(state, rf"backbone\.layer{i}\.\d+\.conv1\.weight") for i in range(1, 5))
    second = state.get("backbone.layer1.0.conv2.weight")
    first = () if second is None else tuple(second.shape[:2])
    convs = 3 if "backbone.layer1.0.conv3.weight" in state else 2
    name = RESNETS.get((blocks, first, convs))  # type: ignore[arg-type]
    if name not in PLAIN:
        raise ValueError(
            f"its backbone has {blocks} blocks of {convs} convolutions, no ResNet's of {', '.join(PLAIN)}."
        )
    mean, std, bgr = normalisation(config, model)
    order = -1 if bgr else 1
    style = body.expect("style", "pytorch", "caffe", default="pytorch")
    return {
        "backbone": name,
        "backbone_weights": False,
        "freeze_bn": bool(body.get("norm_eval", default=True)),
        "frozen_stages": body.get("frozen_stages", default=-1) + 1,  # theirs: 0 is the stem, 1 adds layer1
        "mean": [x / 255 for x in mean[::order]],
        "std": [x / 255 for x in std[::order]],
        "stride_in_1x1": style == "caffe" and convs == 3,
    }


def normalisation(config: Section, model: Section) -> tuple[list[float], list[float], bool]:
    """(mean, std, True where the network takes BGR) of the channels in the network's order, in 0 to 255.

    3.x normalises in the model; 2.x in the pipeline of the test data, where `img_norm_cfg` is only a shorthand.
    """
    found = model.get("data_preprocessor", default=config.get("data_preprocessor"))
    if isinstance(found, dict):
        section = Section("data_preprocessor", found)
        section.expect("type", "DetDataPreprocessor", default="DetDataPreprocessor")
        section.expect("rgb_to_bgr", False, default=False)
        rgb = section.get("bgr_to_rgb", default=False)
        mean, std = section.get("mean") or [0.0] * 3, section.get("std") or [1.0] * 3
    else:
        data = config.get("data")
        places = [data.get("test") if isinstance(data, dict) else None]
        places += [config.get(key) for key in ("test_pipeline", "img_norm_cfg")]
        steps = [step for place in places for step in _steps(place)]
        if not steps:
            raise ValueError(f"its configuration does not say how images are normalised: {MEND}.")
        section = Section("Normalize", steps[0])
        rgb = section.get("to_rgb", default=True)
        mean, std = section.get("mean"), section.get("std")
    for values in (mean, std):
        if not isinstance(values, list) or [type(x) in {int, float} for x in values] != [True] * 3 or 0 in std:
            raise ValueError(f"its configuration has {section.name} with mean {mean} and std {std}: not of 3 channels.")
    return mean, std, not rgb


def _steps(place: Any) -> Iterator[dict[str, Any]]:
    """Every step of normalisation within a pipeline, a data set, or `img_norm_cfg`."""
    if isinstance(place, dict):
        if place.get("type") == "Normalize" or ("type" not in place and "mean" in place):
            yield place
        place = list(place.values())
    if isinstance(place, list):
        for inner in place:
            yield from _steps(inner)


def dense_pyramid(neck: Section) -> dict[str, Any]:
    """Settings of the pyramid P3 to P7."""
    expect_pyramid(neck, start=1)
    where = neck.expect("add_extra_convs", True, "on_input", "on_output", default=False)
    if where is True:  # the second key is of 2.x before 2.11
        where = "on_input" if neck.get("extra_convs_on_inputs", default=True) else "on_output"
    return {
        "fpn_channels": neck.get("out_channels"),
        "p6_from": "c5" if where == "on_input" else "p5",
        "p7_relu": bool(neck.get("relu_before_extra_convs", default=False)),
    }


def evaluation(config: Section, model: Section) -> dict[str, Any]:
    """Defaults of the converted model: the threshold of a dense head's NMS."""
    test = model.get("test_cfg", default=config.get("test_cfg"))
    nms = Section("test_cfg.nms", (test.get("nms") if isinstance(test, dict) else None) or {})
    nms.expect("type", "nms", default="nms")
    return {"iou": float(nms.get("iou_threshold", "iou_thr", default=0.5))}


def expect_pyramid(neck: Section, *, start: int) -> None:
    """See that the pyramid is plain and of five levels."""
    neck.expect("type", "FPN")
    neck.expect("num_outs", 5)
    neck.expect("start_level", start, default=0)
    neck.expect("end_level", -1, 3, default=-1)
    neck.expect("upsample_cfg", {"mode": "nearest"}, None)
    for key in ("norm_cfg", "act_cfg", "conv_cfg"):
        neck.expect(key, None)


def towers(head: Section, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the towers of a dense head."""
    norm = head.get("norm_cfg")
    if isinstance(norm, dict):
        section = Section(f"{head.name}.norm_cfg", norm)
        section.expect("type", "GN")
        section.expect("num_groups", 32)
        section.expect("eps", EPSILON, default=EPSILON)
    normed = any(re.match(r"bbox_head\.cls_convs\.\d+\.gn\.", key) for key in state)
    return {
        "num_convs": _count(state, r"bbox_head\.cls_convs\.\d+\.conv\.weight"),
        "head_norm": "gn" if normed else None,
    }


def anchors(generator: Section, strides: list[int]) -> dict[str, Any]:
    """Settings of the anchors, which go by ratio, then size in a cell as ours do."""
    generator.expect("type", "AnchorGenerator")
    generator.expect("strides", strides, [[s, s] for s in strides])
    generator.expect("scale_major", True, default=True)
    generator.expect("centers", None)
    generator.expect("center_offset", 0, default=0)
    scales = generator.get("scales")
    if scales is None:
        octaves = generator.expect("scales_per_octave", *range(1, 17))
        scales = [generator.get("octave_base_scale") * 2 ** (i / octaves) for i in range(octaves)]
    bases = generator.get("base_sizes") or strides
    return {
        "anchor_sizes": [[float(base * scale) for scale in scales] for base in bases],
        "aspect_ratios": generator.get("ratios"),
        "whole_anchors": False,
    }


def level_ranges(head: Section) -> list[float]:
    """Bounds of the distances that the levels of FCOS learn, which here are of all levels the same, in strides.

    Raises:
        ValueError: They are others.
    """
    given = head.get("regress_ranges", default=FCOS_RANGES)
    try:
        low, high = given[1][0] / DENSE_STRIDES[1], given[0][1] / DENSE_STRIDES[0]
        alike = [x[0] for x in given[1:]] == [low * s for s in DENSE_STRIDES[1:]]
        alike &= [x[1] for x in given[:-1]] == [high * s for s in DENSE_STRIDES[:-1]]
    except (TypeError, LookupError):
        alike = False
    if not alike:
        raise ValueError(f"its configuration has {head.name}.regress_ranges={given!r}: that cannot be converted.")
    return [low, high]


def expect_sigmoid(head: Section) -> None:
    """See that a head's classes have a sigmoid each; else the background would be one more."""
    head.part("loss_cls", {"use_sigmoid": True}).expect("use_sigmoid", True)


def expect_deltas(head: Section, *, stds: bool = False) -> list[float]:
    """The scale of a head's box deltas; all 1 unless `stds`."""
    coder = head.part("bbox_coder", {"type": "DeltaXYWHBBoxCoder"})
    coder.expect("type", "DeltaXYWHBBoxCoder")
    coder.expect("target_means", [0.0] * 4, default=[0.0] * 4)
    coder.expect("clip_border", True, default=True)
    coder.expect("add_ctr_clamp", False, default=False)
    if stds:
        return coder.get("target_stds", default=[0.1, 0.1, 0.2, 0.2])
    return coder.expect("target_stds", [1.0] * 4, default=[1.0] * 4)


def num_classes(head: Section, state: Mapping[str, Tensor], name: str, *, anchors: int = 1, background: int = 0) -> int:
    """Classes by the shape of the last layer's bias, which the configuration must know as well."""
    if name not in state:
        raise ValueError(f"it lacks {name}.")
    classes, rest = divmod(len(state[name]) - background, anchors)
    if rest or head.get("num_classes") != classes:
        raise ValueError(
            f"its {name} is of {len(state[name])} values, which are not {anchors} anchors a cell of the "
            f"{head.get('num_classes')} classes of its configuration; mmdetection 1.x counts otherwise: {MEND}."
        )
    return classes


def tower_names(norm: str | None) -> Names:
    """Names in the towers of a dense head: convolution, norm or not, and ReLU in one sequence here."""
    step = 2 if norm is None else 3
    return [
        (rf"bbox_head\.{tower}_convs\.{i}\.{part}\.(.*)", rf"head.{tower}_tower.{step * i + offset}.\1")
        for tower in ("cls", "reg")
        for i in range(16)
        for offset, part in enumerate(("conv", "gn"))
    ]


def renamed(config: Section, model: Section, state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Every tensor by our name: the backbone's, the pyramid's, and those of `names`; filters for RGB.

    What has no name here keeps its own, so that `Converted.build` says that it is left over.
    """
    levels = _count(state, r"neck\.lateral_convs\.\d+\.conv\.weight")
    names = [
        (r"backbone\.(.*)", r"backbone.body.\1"),
        (r"neck\.lateral_convs\.(\d+)\.conv\.(.*)", r"neck.fpn.inner_blocks.\1.0.\2"),
        (rf"neck\.fpn_convs\.{levels}\.conv\.(.*)", r"neck.fpn.extra_blocks.p6.\1"),
        (rf"neck\.fpn_convs\.{levels + 1}\.conv\.(.*)", r"neck.fpn.extra_blocks.p7.\1"),
        (r"neck\.fpn_convs\.(\d+)\.conv\.(.*)", r"neck.fpn.layer_blocks.\1.0.\2"),
        *names,
    ]
    patterns = [(re.compile(theirs), ours) for theirs, ours in names]
    found = {}
    for key, value in state.items():
        if key.startswith(NOT_WEIGHTS) or key.endswith("num_batches_tracked"):
            continue
        match = next(((m, ours) for pattern, ours in patterns if (m := pattern.fullmatch(key))), None)
        found[match[0].expand(match[1]) if match else key] = value
    first = "backbone.body.conv1.weight"
    if normalisation(config, model)[2] and first in found:
        found[first] = found[first].flip(1)  # of B, G, R
    return found


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)
