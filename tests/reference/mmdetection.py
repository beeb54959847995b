"""mmdetection's names, shapes, configurations and arithmetic, written down here from its source."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CLASSES, WIDTH = 5, 64
STRIDES = [8, 16, 32, 64, 128]
RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
BGR = ([102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0])
DELTAS = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0]}
State = dict[str, Tensor]


# Tensors --------------------------------------------------------------------------------------------------------------


def norm(prefix: str, channels: int) -> State:
    return {
        f"{prefix}.weight": torch.rand(channels),
        f"{prefix}.bias": torch.rand(channels),
        f"{prefix}.running_mean": torch.rand(channels),
        f"{prefix}.running_var": torch.rand(channels) + 0.5,
        f"{prefix}.num_batches_tracked": torch.tensor(7),
    }


def conv(prefix: str, out: int, inside: int, size: int, *, bias: bool = True, middle: float = 0.0) -> State:
    weight = torch.randn(out, inside, size, size) / math.sqrt(inside * size * size)
    return {f"{prefix}.weight": weight} | ({f"{prefix}.bias": torch.randn(out) + middle} if bias else {})


def linear(prefix: str, out: int, inside: int) -> State:
    return {f"{prefix}.weight": torch.randn(out, inside) / math.sqrt(inside), f"{prefix}.bias": torch.randn(out)}


def resnet(depth: int) -> State:
    state = conv("backbone.conv1", 64, 3, 7, bias=False) | norm("backbone.bn1", 64)
    inside = 64
    for stage, count in enumerate(BLOCKS[depth]):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"backbone.layer{stage + 1}.{block}"
            if block == 0:
                state |= conv(f"{name}.downsample.0", out, inside, 1, bias=False) | norm(f"{name}.downsample.1", out)
            for i, (o, c, k) in enumerate(((width, inside, 1), (width, width, 3), (out, width, 1)), start=1):
                state |= conv(f"{name}.conv{i}", o, c, k, bias=False) | norm(f"{name}.bn{i}", o)
            inside = out
    return state


def pyramid(first: int, top: str | None) -> State:
    state = {}
    for i, channels in enumerate((256, 512, 1024, 2048)[first:]):
        state |= conv(f"neck.lateral_convs.{i}.conv", WIDTH, channels, 1)
        state |= conv(f"neck.fpn_convs.{i}.conv", WIDTH, WIDTH, 3)
    if top:
        state |= conv("neck.fpn_convs.3.conv", WIDTH, 2048 if top == "on_input" else WIDTH, 3)
        state |= conv("neck.fpn_convs.4.conv", WIDTH, WIDTH, 3)
    return state


def retinanet(depth: int = 50) -> State:
    state = resnet(depth) | pyramid(1, "on_input")
    for tower in ("cls_convs", "reg_convs"):
        for i in range(4):
            state |= conv(f"bbox_head.{tower}.{i}.conv", WIDTH, WIDTH, 3)
    return state | conv("bbox_head.retina_cls", 9 * CLASSES, WIDTH, 3) | conv("bbox_head.retina_reg", 36, WIDTH, 3)


def fcos(depth: int = 50, *, bias: bool = False) -> State:
    state = resnet(depth) | pyramid(1, "on_output")
    for tower in ("cls_convs", "reg_convs"):
        for i in range(4):
            state |= conv(f"bbox_head.{tower}.{i}.conv", WIDTH, WIDTH, 3, bias=bias)
            state |= {f"bbox_head.{tower}.{i}.gn.{field}": torch.rand(WIDTH) for field in ("weight", "bias")}
    state |= conv("bbox_head.conv_cls", CLASSES, WIDTH, 3) | conv("bbox_head.conv_reg", 4, WIDTH, 3, middle=2.0)
    state |= conv("bbox_head.conv_centerness", 1, WIDTH, 3)
    return state | {f"bbox_head.scales.{i}.scale": torch.rand(()) + 0.5 for i in range(5)}


def faster_rcnn(depth: int = 50) -> State:
    state = resnet(depth) | pyramid(0, None) | conv("rpn_head.rpn_conv", WIDTH, WIDTH, 3)
    state |= conv("rpn_head.rpn_cls", 3, WIDTH, 1) | conv("rpn_head.rpn_reg", 12, WIDTH, 1)
    head = "roi_head.bbox_head"
    state |= linear(f"{head}.shared_fcs.0", 64, WIDTH * 49) | linear(f"{head}.shared_fcs.1", 64, 64)
    return state | linear(f"{head}.fc_cls", CLASSES + 1, 64) | linear(f"{head}.fc_reg", CLASSES * 4, 64)


# Configurations -------------------------------------------------------------------------------------------------------


def base(kind: str, style: str, neck: dict[str, Any]) -> dict[str, Any]:
    mean, std = RGB if style == "pytorch" else BGR
    rest = {"depth": 50, "num_stages": 4, "out_indices": (0, 1, 2, 3), "norm_eval": True, "frozen_stages": 1}
    return {
        "type": kind,
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": mean,
            "std": std,
            "bgr_to_rgb": style == "pytorch",
            "pad_size_divisor": 32,
        },
        "backbone": {"type": "ResNet", "style": style, "norm_cfg": {"type": "BN", "requires_grad": True}, **rest},
        "neck": {"type": "FPN", "out_channels": WIDTH, "num_outs": 5, **neck},
    }


def retinanet_config(style: str = "pytorch") -> dict[str, Any]:
    return base("RetinaNet", style, {"start_level": 1, "add_extra_convs": "on_input"}) | {
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": CLASSES,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "octave_base_scale": 4,
                "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0],
                "strides": STRIDES,
            },
            "bbox_coder": {**DELTAS, "target_stds": [1.0, 1.0, 1.0, 1.0]},
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True},
        }
    }


def fcos_config(style: str = "caffe", **head: Any) -> dict[str, Any]:
    neck = {"start_level": 1, "add_extra_convs": "on_output", "relu_before_extra_convs": True}
    loss = {"type": "FocalLoss", "use_sigmoid": True}
    settings = {"type": "FCOSHead", "num_classes": CLASSES, "strides": STRIDES, "loss_cls": loss, **head}
    return base("FCOS", style, neck) | {"bbox_head": settings}


def faster_rcnn_config(style: str = "pytorch") -> dict[str, Any]:
    nms = {"type": "nms", "iou_threshold": 0.6}
    proposals = {"nms_pre": 900, "max_per_img": 800, "nms": nms, "min_bbox_size": 0}
    return base("FasterRCNN", style, {}) | {
        "rpn_head": {
            "type": "RPNHead",
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": {**DELTAS, "target_stds": [1.0, 1.0, 1.0, 1.0]},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": {
                "type": "SingleRoIExtractor",
                "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
                "featmap_strides": [4, 8, 16, 32],
            },
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "fc_out_channels": 64,
                "num_classes": CLASSES,
                "bbox_coder": {**DELTAS, "target_stds": [0.1, 0.1, 0.2, 0.2]},
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False},
            },
        },
        "train_cfg": {"rpn_proposal": {**proposals, "nms_pre": 2000, "max_per_img": 1000}},
        "test_cfg": {"rpn": proposals, "rcnn": {"score_thr": 0.1, "nms": nms, "max_per_img": 70}},
    }


def source(value: Any) -> str:
    """A value as mmdetection writes it."""
    if isinstance(value, dict):
        return "dict(" + ", ".join(f"{k}={source(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(source, value)) + "]"
    return repr(value)


def meta_3(model: dict[str, Any]) -> dict[str, Any]:
    """`meta` of 3.x."""
    return {"cfg": f"model = {source(model)}\ntrain_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)\n"}


def meta_2(model: dict[str, Any]) -> dict[str, Any]:
    """`meta` of 2.x, where the pipeline normalises, whatever `img_norm_cfg` may say, and nothing else pre-processes."""
    model = copy.deepcopy(model)
    found = model.pop("data_preprocessor")
    step = {"type": "Normalize", "mean": found["mean"], "std": found["std"], "to_rgb": found["bgr_to_rgb"]}
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "MultiScaleFlipAug", "transforms": [{"type": "Pad"}, step]}]
    data = {"samples_per_gpu": 2, "test": {"type": "CocoDataset", "pipeline": pipeline}}
    other = {"mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0], "to_rgb": True}
    text = f"model = {source(model)}\nimg_norm_cfg = {source(other)}\ndata = {source(data)}\nlog = print\n"
    return {"config": text, "mmdet_version": "2.28.2"}


CASES = {
    "retinanet": (retinanet, retinanet_config),
    "fcos": (fcos, fcos_config),
    "faster_rcnn": (faster_rcnn, faster_rcnn_config),
}


# The library's arithmetic, in plain words -----------------------------------------------------------------------------


def run_conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)


def run_norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        state[f"{name}.{field}"][:, None, None] for field in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def run_resnet(state: State, x: Tensor, style: str) -> list[Tensor]:
    x = F.max_pool2d(run_norm(state, "backbone.bn1", run_conv(state, "backbone.conv1", x, 2)).relu(), 3, 2, 1)
    maps = []
    for stage, count in enumerate(BLOCKS[50]):
        for block in range(count):
            name, stride = f"backbone.layer{stage + 1}.{block}", 2 if stage and not block else 1
            strides = (stride, 1, 1) if style == "caffe" else (1, stride, 1)
            out = x
            for i in (1, 2, 3):
                out = run_norm(state, f"{name}.bn{i}", run_conv(state, f"{name}.conv{i}", out, strides[i - 1]))
                out = out.relu() if i < 3 else out
            if not block:
                x = run_norm(state, f"{name}.downsample.1", run_conv(state, f"{name}.downsample.0", x, stride))
            x = (out + x).relu()
        maps.append(x)
    return maps


def run_pyramid(state: State, maps: list[Tensor], *, top: str | None, relu: bool) -> list[Tensor]:
    laterals = [run_conv(state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
    outs = [run_conv(state, f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(laterals)]
    if top is None:
        return [*outs, outs[-1][:, :, ::2, ::2]]
    p6 = run_conv(state, "neck.fpn_convs.3.conv", maps[-1] if top == "on_input" else outs[-1], 2)
    return [*outs, p6, run_conv(state, "neck.fpn_convs.4.conv", p6.relu() if relu else p6, 2)]


def run_tower(state: State, name: str, x: Tensor) -> Tensor:
    for i in range(4):
        x = run_conv(state, f"bbox_head.{name}.{i}.conv", x)
        if f"bbox_head.{name}.{i}.gn.weight" in state:
            norms = (state[f"bbox_head.{name}.{i}.gn.{field}"] for field in ("weight", "bias"))
            x = F.group_norm(x, 32, *norms)
        x = x.relu()
    return x


def flat(x: Tensor, values: int) -> Tensor:
    return x[0].permute(1, 2, 0).reshape(-1, values)


def normalised(images: Tensor, style: str) -> Tensor:
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (RGB if style == "pytorch" else BGR))
    return ((images if style == "pytorch" else images.flip(1)) * 255 - mean) / std
