"""Files of torchvision's weights: the names and shapes of the tensors say which detector they belong to."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_Weights,
    RetinaNet,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gid_yolo.detectors.convert.converted import load_exactly
from gid_yolo.detectors.convert.torchvision_backbone import RESNETS

CATEGORIES: list[str] = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # 91 labels of COCO, 0 for nothing
ANCHORS = 9  # a cell of RetinaNet
# torchvision's first COCO models were trained with an epsilon of 0 in their frozen norms; the files do not say so
WITHOUT_EPSILON = ("retinanet_resnet50_fpn_coco-eeacb38b", "fasterrcnn_resnet50_fpn_coco-258fb6c6")


def is_torchvision(state: dict[str, Tensor]) -> bool:
    """True for tensors by the names of torchvision's detectors."""
    return any(key.startswith("backbone.body.") for key in state)


def torchvision_model(state: dict[str, Tensor], file_name: str = "") -> nn.Module:
    """The torchvision detector that a file of weights belongs to, with them.

    Args:
        state: Tensors by torchvision's names.
        file_name: Tells torchvision's first COCO weights, whose norms have no epsilon.

    Raises:
        ValueError: Another detector, or tensors that are missing or left over.
    """
    frozen = not any(key.endswith("num_batches_tracked") for key in state if key.startswith("backbone.body."))
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    if "roi_heads.box_predictor.cls_score.weight" in state:
        model = _faster_rcnn(state, norm)
    elif "head.regression_head.bbox_ctrness.weight" in state:
        classes = len(state["head.classification_head.cls_logits.bias"])
        model = FCOS(_resnet(state, norm, top=True), classes)
    elif "head.classification_head.cls_logits.weight" in state:
        model = _retinanet(state, norm)
    else:
        raise ValueError("its tensors belong to no RetinaNet, FCOS or Faster R-CNN of torchvision.")
    load_exactly(model, state, f"it matches a torchvision {type(model).__name__} only in part")
    if file_name.startswith(WITHOUT_EPSILON):
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    return model.eval()


def class_names(model: Any) -> list[str] | None:
    """COCO's names for our classes of a converted model with COCO's 91 labels; None for another number of labels."""
    if isinstance(model, FasterRCNN):
        return CATEGORIES[1:] if model.roi_heads.box_predictor.cls_score.out_features == len(CATEGORIES) else None
    return CATEGORIES if model.head.classification_head.num_classes == len(CATEGORIES) else None


def _resnet(state: dict[str, Tensor], norm: type[nn.Module], *, top: bool) -> Any:
    """The backbone with its pyramid, P3 to P7 with `top`, else P2 to P6."""
    prefix = "backbone.body."
    if f"{prefix}layer1.0.conv2.weight" not in state:
        raise ValueError("its backbone is not a ResNet.")
    blocks = tuple(len({k.split(".")[3] for k in state if k.startswith(f"{prefix}layer{i}.")}) for i in range(1, 5))
    first = tuple(state[f"{prefix}layer1.0.conv2.weight"].shape[:2])
    convolutions = 3 if f"{prefix}layer1.0.conv3.weight" in state else 2
    name = RESNETS.get((blocks, first, convolutions))  # type: ignore[arg-type]
    if name is None:
        raise ValueError(f"its backbone is a ResNet of {blocks} blocks, which is not known.")
    if not top:
        return resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm)
    source = state["backbone.fpn.extra_blocks.p6.weight"].shape[1]
    return resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        norm_layer=norm,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(source, 256),
    )


def _retinanet(state: dict[str, Tensor], norm: type[nn.Module]) -> nn.Module:
    backbone, anchors = _resnet(state, norm, top=True), _default_anchorgen()
    classes = len(state["head.classification_head.cls_logits.bias"]) // ANCHORS
    if "head.classification_head.conv.0.1.weight" not in state:
        return RetinaNet(backbone, classes, anchor_generator=anchors)
    head = RetinaNetHead(backbone.out_channels, ANCHORS, classes, norm_layer=partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"  # as v2 is trained
    return RetinaNet(backbone, classes, anchor_generator=anchors, head=head)


def _faster_rcnn(state: dict[str, Tensor], norm: type[nn.Module]) -> nn.Module:
    classes = len(state["roi_heads.box_predictor.cls_score.bias"])
    untrained = {"weights": None, "weights_backbone": None, "num_classes": classes}
    if "backbone.body.0.0.weight" in state:
        model = fasterrcnn_mobilenet_v3_large_fpn(**untrained)
    elif "roi_heads.box_head.0.0.weight" in state:
        model = fasterrcnn_resnet50_fpn_v2(**untrained)
    else:
        return FasterRCNN(_resnet(state, norm, top=False), classes)
    return _with_frozen_norms(model) if norm is FrozenBatchNorm2d else model


def _with_frozen_norms(model: nn.Module) -> nn.Module:
    """The model with the batch norms of its backbone's body as torchvision freezes them."""
    body: Any = model.backbone.body  # type: ignore[union-attr]
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent = body.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], FrozenBatchNorm2d(module.num_features, eps=module.eps))
    return model
