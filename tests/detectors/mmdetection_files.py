"""mmdetection's names, shapes and configurations, written down from its source; benchmarks compare with the library."""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CLASSES = 5

# Mean, std and order of the channels: of torchvision's weights, and of those of Caffe
NORMALISATION = {
    "pytorch": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], True),
    "caffe": ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0], False),
}
HEADS = {
    "RetinaNet": "bbox_head=dict(type='RetinaHead', num_classes=5, in_channels=256, stacked_convs=4, anchor_generator="
    "dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0], "
    "strides=[8, 16, 32, 64, 128]), bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], "
    "target_stds=[1.0, 1.0, 1.0, 1.0]))",
    "FCOS": "bbox_head=dict(type='FCOSHead', num_classes=5, in_channels=256, stacked_convs=4, "
    "strides=[8, 16, 32, 64, 128])",
    "FasterRCNN": "rpn_head=dict(type='RPNHead', anchor_generator=dict(type='AnchorGenerator', scales=[8], "
    "ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])), roi_head=dict(type='StandardRoIHead', bbox_roi_extractor="
    "dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0), "
    "featmap_strides=[4, 8, 16, 32]), bbox_head=dict(type='Shared2FCBBoxHead', fc_out_channels=1024, num_classes=5, "
    "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2]), "
    "reg_class_agnostic=False)), test_cfg=dict(rpn=dict(nms_pre=700, max_per_img=600, nms=dict(type='nms', "
    "iou_threshold=0.6)), rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.4), max_per_img=50))",
}
NECKS = {
    "RetinaNet": "start_level=1, add_extra_convs='on_input', num_outs=5",
    "FCOS": "start_level=1, add_extra_convs='on_output', num_outs=5, relu_before_extra_convs=True",
    "FasterRCNN": "num_outs=5",
}


def config(kind: str, depth: int = 50, style: str = "pytorch", *, version: int = 3) -> str:
    """A configuration as the library prints it."""
    mean, std, rgb = NORMALISATION[style]
    pixels = f"mean={mean}, std={std}"
    parts = [f"type='{kind}'"]
    if version == 3:
        parts.append(f"data_preprocessor=dict(type='DetDataPreprocessor', {pixels}, bgr_to_rgb={rgb})")
    parts.append(
        f"backbone=dict(type='ResNet', depth={depth}, frozen_stages=1, norm_cfg=dict(type='BN', requires_grad=True), "
        f"norm_eval=True, style='{style}')"
    )
    parts.append(f"neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, {NECKS[kind]})")
    text = f"dataset_type = 'CocoDataset'\nmodel = dict(\n    {', '.join([*parts, HEADS[kind]])})\n"
    return text if version == 3 else f"img_norm_cfg = dict({pixels}, to_rgb={rgb})\n{text}"


def conv(prefix: str, out: int, inside: int, size: int, *, bias: bool = True) -> State:
    weight = torch.randn(out, inside, size, size) / math.sqrt(inside * size * size)
    return {f"{prefix}.weight": weight} | ({f"{prefix}.bias": torch.randn(out)} if bias else {})


def linear(prefix: str, out: int, inside: int) -> State:
    return {f"{prefix}.weight": torch.randn(out, inside) / math.sqrt(inside), f"{prefix}.bias": torch.randn(out)}


def norm(prefix: str, channels: int) -> State:
    state = {f"{prefix}.{name}": torch.rand(channels) for name in ("weight", "bias", "running_mean")}
    state[f"{prefix}.running_var"] = torch.rand(channels) + 0.5
    return state | {f"{prefix}.num_batches_tracked": torch.tensor(7)}


def resnet(depth: int) -> State:
    state = conv("backbone.conv1", 64, 3, 7, bias=False) | norm("backbone.bn1", 64)
    inside = 64
    for stage, count in enumerate(BLOCKS[depth]):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"backbone.layer{stage + 1}.{block}"
            for i, (o, c, k) in enumerate(((width, inside, 1), (width, width, 3), (out, width, 1)), start=1):
                state |= conv(f"{name}.conv{i}", o, c, k, bias=False) | norm(f"{name}.bn{i}", o)
            if block == 0:
                state |= conv(f"{name}.downsample.0", out, inside, 1, bias=False) | norm(f"{name}.downsample.1", out)
            inside = out
    return state


def fpn(channels: list[int], extra: list[int]) -> State:
    state = {}
    for i, inside in enumerate(channels):
        state |= conv(f"neck.lateral_convs.{i}.conv", 256, inside, 1) | conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3)
    for i, inside in enumerate(extra, start=len(channels)):
        state |= conv(f"neck.fpn_convs.{i}.conv", 256, inside, 3)
    return state


def retinanet(depth: int = 50) -> State:
    state = resnet(depth) | fpn([512, 1024, 2048], [2048, 256])
    for tower in ("cls_convs", "reg_convs"):
        for i in range(4):
            state |= conv(f"bbox_head.{tower}.{i}.conv", 256, 256, 3)
    return state | conv("bbox_head.retina_cls", 9 * CLASSES, 256, 3) | conv("bbox_head.retina_reg", 36, 256, 3)


def fcos(depth: int = 50) -> State:
    state = resnet(depth) | fpn([512, 1024, 2048], [256, 256])
    for tower in ("cls_convs", "reg_convs"):
        for i in range(4):
            name = f"bbox_head.{tower}.{i}"
            state |= conv(f"{name}.conv", 256, 256, 3, bias=False)
            state |= {f"{name}.gn.weight": torch.rand(256), f"{name}.gn.bias": torch.rand(256)}
    state |= conv("bbox_head.conv_cls", CLASSES, 256, 3) | conv("bbox_head.conv_reg", 4, 256, 3)
    state |= conv("bbox_head.conv_centerness", 1, 256, 3)
    return state | {f"bbox_head.scales.{i}.scale": torch.tensor(0.8 + 0.1 * i) for i in range(5)}


def faster_rcnn(depth: int = 50) -> State:
    state = resnet(depth) | fpn([256, 512, 1024, 2048], [])
    state |= conv("rpn_head.rpn_conv", 256, 256, 3) | conv("rpn_head.rpn_cls", 3, 256, 1)
    state |= conv("rpn_head.rpn_reg", 12, 256, 1)
    head = "roi_head.bbox_head"
    state |= linear(f"{head}.shared_fcs.0", 1024, 256 * 49) | linear(f"{head}.shared_fcs.1", 1024, 1024)
    return state | linear(f"{head}.fc_cls", CLASSES + 1, 1024) | linear(f"{head}.fc_reg", 4 * CLASSES, 1024)


MAKERS = {"RetinaNet": retinanet, "FCOS": fcos, "FasterRCNN": faster_rcnn}
