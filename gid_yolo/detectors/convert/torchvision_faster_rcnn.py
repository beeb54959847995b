"""torchvision's Faster R-CNN: on ResNets with a feature pyramid, v1 and v2, and on MobileNets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from gid_yolo.detectors.convert.converted import Converted
from gid_yolo.detectors.convert.torchvision_backbone import backbone_state, pyramid_config, resnet_config
from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.detectors.mobilenet import PREFIX, STAGES


def convert_faster_rcnn(model: Any) -> Converted:
    """Settings and weights of a `torchvision.models.detection.FasterRCNN`.

    Its background, class 0, becomes the last here. Batch norms of the pyramid and of the second stage, as v2 has them,
    are folded into the convolutions before them: outputs in evaluation are equal, and further training has them fixed.
    """
    anchors, pool = model.rpn.anchor_generator, model.roi_heads.box_roi_pool
    if len(set(anchors.aspect_ratios)) != 1:
        raise ValueError("the anchors' aspect ratios differ between levels: that cannot be converted.")
    if (pool.sampling_ratio, pool.canonical_level) != (2, 4):
        raise ValueError(f"crops by {pool} at canonical level {pool.canonical_level} cannot be converted.")
    pyramid = pyramid_config(model.backbone)
    if (top := pyramid.pop("p6_from")) != "pool":
        raise ValueError(f"the pyramid's top is made from {top} by convolutions: that cannot be converted.")
    mobile = "0" in model.backbone.body
    body = _mobilenet_config if mobile else resnet_config
    config = {
        "detector": FasterRCNN.family,
        **body(model.backbone.body, model.transform),
        "nc": model.roi_heads.box_predictor.cls_score.out_features - 1,
        "settings": {
            **pyramid,
            "strides": [32, 32, 64] if mobile else [4, 8, 16, 32, 64],
            "anchor_sizes": [list(sizes) for sizes in anchors.sizes],
            "aspect_ratios": list(anchors.aspect_ratios[0]),
            **_settings(model.rpn, model.roi_heads),
        },
    }
    return Converted(config, _state(model))


def _settings(rpn: Any, heads: Any) -> dict[str, Any]:
    modes = ("training", "testing")
    convs, linears = _box_layers(heads.box_head)
    return {
        "rpn_convs": len(rpn.head.conv),
        "rpn_positive_iou": rpn.proposal_matcher.high_threshold,
        "rpn_negative_iou": rpn.proposal_matcher.low_threshold,
        "rpn_samples": rpn.fg_bg_sampler.batch_size_per_image,
        "rpn_positive_share": rpn.fg_bg_sampler.positive_fraction,
        "rpn_before_nms": [rpn._pre_nms_top_n[mode] for mode in modes],
        "rpn_after_nms": [rpn._post_nms_top_n[mode] for mode in modes],
        "rpn_nms_iou": rpn.nms_thresh,
        "rpn_min_score": rpn.score_thresh,
        "roi_size": heads.box_roi_pool.output_size[0],
        "roi_canonical": heads.box_roi_pool.canonical_scale,
        "roi_positive_iou": heads.proposal_matcher.high_threshold,
        "roi_negative_iou": heads.proposal_matcher.low_threshold,
        "roi_samples": heads.fg_bg_sampler.batch_size_per_image,
        "roi_positive_share": heads.fg_bg_sampler.positive_fraction,
        "head_convs": len(convs),
        "head_layers": len(linears),
        "head_width": linears[0].out_features,
        "box_weights": list(heads.box_coder.weights),
        "box_min_score": heads.score_thresh,
        "box_nms_iou": heads.nms_thresh,
        "max_det": heads.detections_per_img,
    }


def _state(model: Any) -> dict[str, Tensor]:
    """Every tensor by our names."""
    state = {key: value for key, value in backbone_state(model.backbone).items() if key.startswith("backbone.")}
    fpn = model.backbone.fpn
    for kind in ("inner_blocks", "layer_blocks"):
        for i, block in enumerate(getattr(fpn, kind)):
            state |= _affine(f"neck.fpn.{kind}.{i}.0", *block)
    for i, block in enumerate(model.rpn.head.conv):
        state |= _affine(f"rpn.tower.{2 * i}", *block)  # a ReLU stands between ours
    state |= _affine("rpn.objectness", model.rpn.head.cls_logits) | _affine("rpn.deltas", model.rpn.head.bbox_pred)
    convs, linears = _box_layers(model.roi_heads.box_head)
    for i, block in enumerate(convs):
        state |= _affine(f"head.tower.{2 * i}", *block)
    for i, layer in enumerate(linears):
        state |= _affine(f"head.layers.{2 * i + 1}", layer)  # behind one that flattens
    predictor = model.roi_heads.box_predictor
    for key, value in predictor.cls_score.state_dict().items():
        state[f"head.cls_logits.{key}"] = value.roll(-1, dims=0)  # the background from first to last
    for key, value in predictor.bbox_pred.state_dict().items():
        state[f"head.box_deltas.{key}"] = value[4:]  # without the background's, which nothing uses
    return state


def _affine(name: str, layer: Any, *rest: Any) -> dict[str, Tensor]:
    """Weight and bias of a linear layer, with the batch norm among `rest` folded in."""
    weight = layer.weight
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    for norm in rest:
        if hasattr(norm, "running_var"):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - norm.running_mean) * scale + norm.bias
    return {f"{name}.weight": weight.detach(), f"{name}.bias": bias.detach()}


def _box_layers(head: Any) -> tuple[list[Any], list[Any]]:
    """(blocks of convolutions, linear layers) of the second stage, v1's or v2's."""
    layers = list(head.children())
    return [x for x in layers if isinstance(x, nn.Sequential)], [x for x in layers if isinstance(x, nn.Linear)]


def _mobilenet_config(body: Any, transform: Any) -> dict[str, Any]:
    """Settings of the backbone, as `resnet_config`."""
    layers = list(body.values())
    kind = {stages[-1] + 1: name for name, stages in STAGES.items()}.get(len(layers))
    if kind is None or [int(name) for name in body.return_layers] != list(STAGES[kind][-2:]):
        raise ValueError(
            f"a backbone of {len(layers)} layers with maps of layers {', '.join(body.return_layers)} is not known."
        )
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    frozen = next((i for i, layer in enumerate(trained) if layer), len(layers))
    return {
        "backbone": PREFIX + kind,
        "backbone_weights": False,
        "freeze_bn": any(isinstance(m, FrozenBatchNorm2d) for m in body.modules()),
        "frozen_stages": sum(start < frozen for start in STAGES[kind]),
        "mean": [float(x) for x in transform.image_mean],
        "std": [float(x) for x in transform.image_std],
    }
