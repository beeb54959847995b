"""Converted detectors against the libraries they come from, with random weights: the largest differences of outputs.

torchvision's are compared always. For detectron2's its source is enough, without a build, on a CPU:

    git clone --depth 1 https://github.com/facebookresearch/detectron2
    pip install fvcore iopath yacs omegaconf hydra-core tabulate termcolor
    PYTHONPATH=detectron2 python benchmarks/peers.py --configs detectron2/configs/COCO-Detection
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection

from gid_yolo.detectors.convert import from_torchvision
from gid_yolo.detectors.convert.detectron2 import convert_detectron2

DETECTRON2 = ("retinanet_R_50_FPN_3x", "retinanet_R_101_FPN_3x", "faster_rcnn_R_50_FPN_3x", "faster_rcnn_R_101_FPN_3x")
HEIGHT, WIDTH = 320, 416
RATIOS = 3
CLASSES = 11


TORCHVISION = (
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
)
HEADER = "| model | pyramid | anchors | logits | deltas | detections |\n| --- | ---: | ---: | ---: | ---: | --- |"


def shake(model: nn.Module, scale: tuple[float, float] = (0.2, 0.4)) -> nn.Module:
    """Norms that are no identity, with scales at which activations neither grow nor vanish from block to block."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(*scale)
    return model.eval()


def torchvision_model(name: str) -> nn.Module:
    """A torchvision model with random weights."""
    torch.manual_seed(0)
    size = {"min_size": HEIGHT, "max_size": WIDTH}
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **size)
    shake(model, (0.8, 1.6) if "mobilenet" in name else (0.2, 0.4))  # ReLUs alone halve the variance
    if hasattr(model, "roi_heads"):
        predictor = model.roi_heads.box_predictor
        layers = (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, predictor.cls_score, predictor.bbox_pred)
        for layer, deviation in zip(layers, (2.0, 0.3, 3.0, 1.0), strict=True):
            spread(layer, deviation, lambda: model([torch.rand(3, HEIGHT, WIDTH)]))
    return model


def spread(layer: Any, deviation: float, run: Callable[[], Any]) -> None:
    """Scale a last layer so that its outputs in a run deviate, as after training: equal scores have no order."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output.flatten()))
    with torch.no_grad():
        run()
        layer.weight.mul_(deviation / torch.cat(outputs).std())
    handle.remove()


def torchvision_outputs(model: Any, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs by name, and the pyramid."""
    batch, _ = model.transform(list(images))
    pyramid = list(model.backbone(batch.tensors).values())
    if not hasattr(model, "rpn"):
        heads = model.head(pyramid)
        anchors = model.anchor_generator(batch, pyramid)[0]
        return {"anchors": anchors, "logits": heads["cls_logits"], "deltas": heads["bbox_regression"]}, pyramid
    logits, deltas = model.rpn.head(pyramid)
    count = model.rpn.anchor_generator.num_anchors_per_location()[0]
    flattened = {"logits": logits, "deltas": deltas}
    outputs = {key: torch.cat([flat(x, count) for x in value], 1) for key, value in flattened.items()}
    return {"anchors": model.rpn.anchor_generator(batch, pyramid)[0], **outputs}, pyramid


def row(name: str, ours: Any, images: Tensor, expected: dict[str, Tensor], pyramid: list[Tensor], final: str) -> str:
    """One line of the table."""
    features, raw = ours.raw(images)
    values = {"anchors": raw.priors, "logits": raw.logits, "deltas": raw.regression}
    return line(name, (features, pyramid), values, expected, final)


def line(
    name: str, pyramids: tuple[Any, Any], values: dict[str, Tensor], expected: dict[str, Tensor], final: str
) -> str:
    """A name, the differences of the pyramids and of the values, and the final detections."""
    cells = [f"{max(relative(a, b) for a, b in zip(*pyramids, strict=True)):.1e}"]
    cells += [f"{relative(values[key], expected[key]):.1e}" for key in values]
    return f"| {name} | " + " | ".join([*cells, final]) + " |"


def build(config: Path) -> nn.Module:
    """A detectron2 model with random weights and norms that are no identity."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(str(config), allow_unsafe=True)
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    shake(model)
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.cls_score.weight.mul_(10.0)  # so that some class passes the threshold
    return model


def theirs(model: Any, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs by name, in our order, and the pyramid, of RGB images in [0, 1]."""
    features = model.backbone((images.flip(1) * 255 - model.pixel_mean) / model.pixel_std)
    pyramid = [features[name] for name in sorted(features)]
    dense = hasattr(model, "head")
    part = model if dense else model.proposal_generator
    levels = [features[name] for name in (model.head_in_features if dense else part.in_features)]
    anchors = torch.cat([a.tensor for a in part.anchor_generator(levels)])
    logits, deltas = (model.head if dense else part.rpn_head)(levels)
    count = part.anchor_generator.num_anchors[0]
    outputs = {
        "anchors": anchors,
        "logits": torch.cat([flat(x, count) for x in logits], 1),
        "deltas": torch.cat([flat(x, count) for x in deltas], 1),
    }
    # Anchors of a cell go by size, then ratio there; by ratio, then size here
    order = (-1, count // RATIOS, RATIOS)
    return {k: v.unflatten(-2, order).transpose(-2, -3).flatten(-4, -2) for k, v in outputs.items()}, pyramid


def flat(x: Tensor, count: int) -> Tensor:
    """(B, A * V, H, W) to (B, H * W * A, V)."""
    return x.unflatten(1, (count, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def final_difference(rows: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor) -> str:
    """Detections of a two-stage model: how many, and the largest differences of box and score to the nearest."""
    rows = rows[rows[:, 4] > 0]
    if len(scores) != len(rows):
        return f"{len(scores)} and {len(rows)} detections"
    distance = (rows[:, None, :4] - boxes).abs().amax(-1)  # (N, N) pixels
    distance = distance.masked_fill(rows[:, None, 5] != classes, float("inf"))
    nearest = distance.argmin(1)
    if len(nearest.unique()) != len(rows):
        return f"{len(rows)} detections, of which {len(rows) - len(nearest.unique())} have no counterpart"
    box, score = distance.amin(1).max(), (rows[:, 4] - scores[nearest]).abs().max()
    return f"{len(rows)} detections, {box:.1e} px, {score:.1e}"


@torch.no_grad()
def compare_torchvision() -> None:
    print(f"torchvision {torchvision.__version__}, random weights, {HEIGHT}x{WIDTH}; difference over largest value\n")
    print(HEADER, flush=True)
    for name in TORCHVISION:
        model: Any = torchvision_model(name)
        ours, images = from_torchvision(model).eval(), torch.rand(1, 3, HEIGHT, WIDTH)
        final = "-"
        if ours.end2end:
            found = model(list(images))[0]
            final = final_difference(ours(images)[0], found["boxes"], found["scores"], found["labels"] - 1)
        print(row(name, ours, images, *torchvision_outputs(model, images), final), flush=True)


@torch.no_grad()
def compare_detectron2(configs: Path) -> None:
    try:
        import detectron2
    except ImportError as error:
        sys.exit(f"detectron2 cannot be imported ({error}): see --help.")
    print(f"\ndetectron2 {detectron2.__version__}, likewise\n\n{HEADER}", flush=True)
    for name in DETECTRON2:
        model: Any = build(configs / f"{name}.yaml")
        ours = convert_detectron2(model.state_dict()).build().eval()
        images, final = torch.rand(1, 3, HEIGHT, WIDTH), "-"
        if ours.end2end:
            batch = [{"image": images[0].flip(0) * 255, "height": HEIGHT, "width": WIDTH}]
            found = model.inference(batch, do_postprocess=False)[0]
            final = final_difference(ours(images)[0], found.pred_boxes.tensor, found.scores, found.pred_classes)
        print(row(name, ours, images, *theirs(model, images), final), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, help="detectron2's configs/COCO-Detection")
    options = parser.parse_args()
    logging.disable()
    compare_torchvision()
    if options.configs:
        compare_detectron2(options.configs)


if __name__ == "__main__":
    main()
