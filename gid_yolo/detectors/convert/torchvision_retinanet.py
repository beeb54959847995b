"""torchvision's RetinaNet, v1 and v2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gid_yolo.detectors.convert.converted import Converted
from gid_yolo.detectors.convert.torchvision_backbone import backbone_state, pyramid_config, resnet_config


def convert_retinanet(model: Any) -> Converted:
    """Settings and weights of a `torchvision.models.detection.RetinaNet`."""
    classes, boxes, anchors = model.head.classification_head, model.head.regression_head, model.anchor_generator
    if len(set(anchors.aspect_ratios)) != 1:
        raise ValueError("the anchors' aspect ratios differ between levels: that cannot be converted.")
    first = classes.conv[0]
    norm = next((m for m in first.modules() if isinstance(m, nn.GroupNorm)), None)
    config = {
        "detector": "retinanet",
        **resnet_config(model.backbone.body, model.transform),
        "nc": classes.num_classes,
        "settings": {
            **pyramid_config(model.backbone),
            "num_convs": len(classes.conv),
            "head_norm": None if norm is None else "gn",
            "anchor_sizes": [list(sizes) for sizes in anchors.sizes],
            "aspect_ratios": list(anchors.aspect_ratios[0]),
            "positive_iou": model.proposal_matcher.high_threshold,
            "negative_iou": model.proposal_matcher.low_threshold,
            "box_loss": boxes._loss_type,
        },
    }
    state = {
        **backbone_state(model.backbone),
        **_tower(classes.conv, "head.cls_tower"),
        **_tower(boxes.conv, "head.reg_tower"),
        **{f"head.cls_logits.{key}": value for key, value in classes.cls_logits.state_dict().items()},
        **{f"head.box_deltas.{key}": value for key, value in boxes.bbox_reg.state_dict().items()},
    }
    return Converted(config, state)


def _tower(blocks: Any, prefix: str) -> dict[str, Tensor]:
    """Blocks of convolution, norm or not, and activation as one flat sequence."""
    flat = nn.Sequential(*[layer for block in blocks for layer in block])
    return {f"{prefix}.{key}": value for key, value in flat.state_dict().items()}
