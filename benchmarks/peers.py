"""Converted detectors against the libraries they come from, with random weights: the largest differences of outputs.

detectron2 must be importable; its source alone does, without a build, on a CPU:

    git clone --depth 1 https://github.com/facebookresearch/detectron2
    pip install fvcore iopath yacs omegaconf hydra-core tabulate termcolor
    PYTHONPATH=detectron2 python benchmarks/peers.py --configs detectron2/configs/COCO-Detection
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gid_yolo.detectors.convert.detectron2 import convert_detectron2

MODELS = ("retinanet_R_50_FPN_3x", "retinanet_R_101_FPN_3x", "faster_rcnn_R_50_FPN_3x", "faster_rcnn_R_101_FPN_3x")
HEIGHT, WIDTH = 320, 416
RATIOS = 3


def build(config: Path) -> nn.Module:
    """A detectron2 model with random weights and norms that are no identity."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(str(config), allow_unsafe=True)
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.2, 0.4)  # so that activations do not grow from block to block
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


def final_difference(model: Any, ours: nn.Module, images: Tensor) -> str:
    """Detections of a two-stage model: how many, and the largest differences of box and score."""
    batch = [{"image": images[0].flip(0) * 255, "height": HEIGHT, "width": WIDTH}]
    found = model.inference(batch, do_postprocess=False)[0]
    rows = ours(images)[0]
    rows = rows[rows[:, 4] > 0]
    if len(found) != len(rows):
        return f"{len(found)} and {len(rows)} detections"
    boxes = (rows[:, :4] - found.pred_boxes.tensor).abs().max()
    scores = (rows[:, 4] - found.scores).abs().max()
    same = bool((rows[:, 5] == found.pred_classes).all())
    return f"{len(rows)} detections, {boxes:.1e} px, {scores:.1e}{'' if same else ', CLASSES DIFFER'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="detectron2's configs/COCO-Detection")
    options = parser.parse_args()
    try:
        import detectron2
    except ImportError as error:
        sys.exit(f"detectron2 cannot be imported ({error}): see --help.")
    logging.disable()
    print(f"detectron2 {detectron2.__version__}, random weights, {HEIGHT}x{WIDTH}; difference over largest value\n")
    print("| model | pyramid | anchors | logits | deltas | detections |\n| --- | ---: | ---: | ---: | ---: | --- |")
    with torch.no_grad():
        for name in MODELS:
            model = build(options.configs / f"{name}.yaml")
            ours = convert_detectron2(model.state_dict()).build().eval()
            images = torch.rand(1, 3, HEIGHT, WIDTH)
            expected, pyramid = theirs(model, images)
            features, raw = ours.raw(images)
            cells = [f"{max(relative(a, b) for a, b in zip(features, pyramid, strict=True)):.1e}"]
            values = {"anchors": raw.priors, "logits": raw.logits, "deltas": raw.regression}
            cells += [f"{relative(values[key], expected[key]):.1e}" for key in ("anchors", "logits", "deltas")]
            cells.append(final_difference(model, ours, images) if ours.end2end else "-")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
