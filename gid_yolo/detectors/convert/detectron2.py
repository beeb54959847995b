"""detectron2's RetinaNet and Faster R-CNN on ResNet-50 and ResNet-101 with a feature pyramid, from files of weights.

A file says nothing of the configuration. What its names and shapes leave open is taken from the model zoo's: BGR images
without scaling, strides in the 1x1 convolutions, frozen batch norms, and the anchors of the base configurations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gid_yolo.detectors.convert.converted import Converted

MEAN, STD = (103.530, 116.280, 123.675), (1.0, 1.0, 1.0)  # of B, G, R in 0 to 255
RATIOS = (0.5, 1.0, 2.0)
BLOCKS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
STAGES = ("res2", "res3", "res4", "res5")
NOT_WEIGHTS = ("pixel_mean", "pixel_std", "anchor_generator.", "proposal_generator.anchor_generator.")


def is_detectron2(state: dict[str, Tensor]) -> bool:
    """True for tensors by detectron2's names."""
    return any(key.startswith("backbone.bottom_up.") for key in state)


def convert_detectron2(state: dict[str, Tensor]) -> Converted:
    """Settings and weights of ours from the tensors of a detectron2 checkpoint.

    Raises:
        ValueError: Another detector; tensors that are missing are named by `Converted.build`.
    """
    if "head.cls_score.weight" in state:
        return _retinanet(state)
    if "proposal_generator.rpn_head.objectness_logits.weight" in state:
        return _faster_rcnn(state)
    raise ValueError("its tensors belong neither to detectron2's RetinaNet nor to its Faster R-CNN.")


def _retinanet(state: dict[str, Tensor]) -> Converted:
    sizes = [[x * 2 ** (i / 3) for i in range(3)] for x in (32.0, 64.0, 128.0, 256.0, 512.0)]
    count = len(RATIOS) * len(sizes[0])
    classes, rest = divmod(len(state["head.cls_score.bias"]), count)
    if rest or len(state["head.bbox_pred.bias"]) != 4 * count:
        raise ValueError(f"its head is not of {count} anchors a cell, 3 sizes x 3 ratios: it cannot be converted.")
    config = {
        "detector": "retinanet",
        **_backbone(state),
        "nc": classes,
        "settings": {
            "fpn_channels": state["head.cls_score.weight"].shape[1],
            "p6_from": "c5" if state["backbone.top_block.p6.weight"].shape[1] > 256 else "p5",
            "num_convs": sum(k.startswith("head.cls_subnet.") and k.endswith("weight") for k in state),
            "anchor_sizes": sizes,
            "aspect_ratios": list(RATIOS),
            "whole_anchors": False,
        },
    }
    names = {"head.cls_subnet.": "head.cls_tower.", "head.bbox_subnet.": "head.reg_tower."}
    used = _renamed(state, names, finest=3)
    for theirs, ours, values in (("cls_score", "cls_logits", classes), ("bbox_pred", "box_deltas", 4)):
        for field in ("weight", "bias"):
            used[f"head.{ours}.{field}"] = _ratio_major(used.pop(f"head.{theirs}.{field}"), len(sizes[0]), values)
    return Converted(config, used)


def _faster_rcnn(state: dict[str, Tensor]) -> Converted:
    classes = len(state["roi_heads.box_predictor.cls_score.bias"]) - 1
    config = {
        "detector": "faster_rcnn",
        **_backbone(state),
        "nc": classes,
        "settings": {
            "fpn_channels": state["proposal_generator.rpn_head.conv.weight"].shape[1],
            "anchor_sizes": [[x] for x in (32.0, 64.0, 128.0, 256.0, 512.0)],
            "aspect_ratios": list(RATIOS),
            "whole_anchors": False,
            "rpn_after_nms": [1000, 1000],
            "roi_points": 0,
            "roi_aligned": True,
            "head_width": len(state["roi_heads.box_head.fc1.bias"]),
            "box_beta": 0.0,
        },
    }
    names = {
        "proposal_generator.rpn_head.conv.": "rpn.tower.0.",
        "proposal_generator.rpn_head.objectness_logits.": "rpn.objectness.",
        "proposal_generator.rpn_head.anchor_deltas.": "rpn.deltas.",
        "roi_heads.box_head.fc1.": "head.layers.1.",
        "roi_heads.box_head.fc2.": "head.layers.3.",
        "roi_heads.box_predictor.cls_score.": "head.cls_logits.",  # background last on both sides
        "roi_heads.box_predictor.bbox_pred.": "head.box_deltas.",
    }
    return Converted(config, _renamed(state, names, finest=2))


def _backbone(state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of the backbone: RGB in [0, 1], as everywhere here."""
    prefix = "backbone.bottom_up."
    blocks = tuple(len({k.split(".")[3] for k in state if k.startswith(f"{prefix}{stage}.")}) for stage in STAGES)
    if blocks not in BLOCKS or f"{prefix}res2.0.conv3.weight" not in state:
        raise ValueError(f"its backbone has {blocks} blocks in res2 to res5: only ResNet-50, 101 and 152 are known.")
    mean = state["pixel_mean"].flatten().tolist() if "pixel_mean" in state else MEAN
    std = state["pixel_std"].flatten().tolist() if "pixel_std" in state else STD
    return {
        "backbone": BLOCKS[blocks],
        "backbone_weights": False,
        "freeze_bn": True,
        "frozen_stages": 2,  # the zoo's FREEZE_AT: stem and res2
        "mean": [x / 255 for x in mean[::-1]],
        "std": [x / 255 for x in std[::-1]],
        "stride_in_1x1": True,
    }


def _renamed(state: dict[str, Tensor], names: dict[str, str], *, finest: int) -> dict[str, Tensor]:
    """Every tensor by our name: the backbone's, the pyramid's from level `finest` on, and those of `names`.

    What has no name here keeps its own, so that `Converted.build` says that it is left over.
    """
    found = {}
    for key, value in state.items():
        head = next((new + key[len(old) :] for old, new in names.items() if key.startswith(old)), None)
        name = head or _shared_name(key, finest) or key
        if name == "backbone.body.conv1.weight":
            value = value.flip(1)  # filters for RGB instead of BGR
        if not key.startswith(NOT_WEIGHTS):
            found[name] = value
    return found


def _shared_name(key: str, finest: int) -> str | None:
    """Our name of a tensor of the backbone or of the pyramid; None for another part's."""
    if key.startswith("backbone.bottom_up."):
        parts = key.split(".")[2:]
        if parts[0] == "stem":
            return "backbone.body." + ("bn1." if parts[2] == "norm" else "conv1.") + parts[-1]
        stage, block, layer, *rest = parts
        ours = f"backbone.body.layer{STAGES.index(stage) + 1}.{block}."
        if layer == "shortcut":
            return ours + ("downsample.1." if rest[0] == "norm" else "downsample.0.") + rest[-1]
        return ours + (f"bn{layer[4:]}." if rest[0] == "norm" else f"{layer}.") + rest[-1]
    for kind, blocks in (("fpn_lateral", "inner_blocks"), ("fpn_output", "layer_blocks")):
        if key.startswith(f"backbone.{kind}"):
            level, field = key[len(f"backbone.{kind}") :].split(".")
            return f"neck.fpn.{blocks}.{int(level) - finest}.0.{field}"
    if key.startswith("backbone.top_block."):
        return "neck.fpn.extra_blocks." + key[len("backbone.top_block.") :]
    return None


def _ratio_major(value: Tensor, sizes: int, values: int) -> Tensor:
    """Rows of a last convolution, whose anchors go by size then ratio there, by ratio then size."""
    return value.unflatten(0, (sizes, len(RATIOS), values)).transpose(0, 1).flatten(0, 2)
