"""torchvision's FCOS."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gid_yolo.detectors.convert.converted import Converted, renamed
from gid_yolo.detectors.convert.torchvision_backbone import backbone_state, pyramid_config, resnet_config
from gid_yolo.detectors.fcos import FCOS

HEAD = {
    "classification_head.conv.": "head.cls_tower.",
    "classification_head.cls_logits.": "head.cls_logits.",
    "regression_head.conv.": "head.reg_tower.",
    "regression_head.bbox_reg.": "head.box_ltrb.",
    "regression_head.bbox_ctrness.": "head.centerness.",
}


def convert_fcos(model: Any) -> Converted:
    """Settings and weights of a `torchvision.models.detection.FCOS`."""
    classes, sizes = model.head.classification_head, model.anchor_generator.sizes
    if tuple(sizes) != tuple((stride,) for stride in FCOS.strides):
        raise ValueError(f"the anchors' sizes are {sizes}, not the strides of P3 to P7: that cannot be converted.")
    norms = [layer for layer in classes.conv if not isinstance(layer, nn.Conv2d | nn.ReLU)]
    groups = math.gcd(32, model.backbone.out_channels)
    if not all(isinstance(norm, nn.GroupNorm) and norm.num_groups == groups for norm in norms):
        raise ValueError(f"the head's norms are not GroupNorms of {groups} groups: that cannot be converted.")
    config = {
        "detector": "fcos",
        **resnet_config(model.backbone.body, model.transform),
        "nc": classes.num_classes,
        "train": {"iou": model.nms_thresh},
        "settings": {
            **pyramid_config(model.backbone),
            "num_convs": sum(isinstance(layer, nn.Conv2d) for layer in classes.conv),
            "head_norm": "gn" if norms else None,
            "center_radius": model.center_sampling_radius,
        },
    }
    return Converted(config, {**backbone_state(model.backbone), **renamed(model.head.state_dict(), HEAD)})
