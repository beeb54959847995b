"""Our ONNX file against torchvision's own export of the same weights: latency in turns, and whether they agree.

Both hold everything from an image in [0, 1] to final detections: normalisation, network, decoding and NMS. The weights
are random, scaled so that there are detections; the images are noise of the network's size, so that torchvision's
resizing has nothing to do. Prints a Markdown table:

    python benchmarks/onnx_torchvision.py [--models retinanet fcos fasterrcnn] [--size 640] [--rounds 5] [--runs 3]
"""

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.engine.checkpoint import load_model
from gid_yolo.export.session import open_session
from gid_yolo.export.timing import interleave
from gid_yolo.export.to_onnx import export

BUILDERS = {
    "retinanet": torchvision.models.detection.retinanet_resnet50_fpn,
    "fcos": torchvision.models.detection.fcos_resnet50_fpn,
    "fasterrcnn": torchvision.models.detection.fasterrcnn_resnet50_fpn,
}
CONF = {"retinanet": 0.05, "fcos": 0.2, "fasterrcnn": 0.05}  # torchvision's
MAX_DET = 100
SHARE = 5e-4  # of the scores of a dense head over the threshold: 3,500 of RetinaNet's 7 million at 640 px


def theirs(name: str, size: int) -> torch.nn.Module:
    """Torchvision's model on images of one size, with random weights under which there is something to detect."""
    torch.manual_seed(0)
    model = BUILDERS[name](
        weights=None, weights_backbone=None, num_classes=91, min_size=size, max_size=size, detections_per_img=MAX_DET
    ).eval()
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    if name == "fasterrcnn":
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)
    else:
        fit_scores(model, CONF[name], size)
    return model


@torch.no_grad()
def fit_scores(model: torch.nn.Module, conf: float, size: int) -> None:
    """Scale the last layer so that a share of the scores is over the threshold, as of a trained model."""
    layer = model.head.classification_head.cls_logits
    torch.nn.init.normal_(layer.weight, std=0.05)
    features = list(model.backbone(torch.randn(1, 3, size, size)).values())
    logits = model.head.classification_head(features).flatten()
    prior = layer.bias.mean()
    high = logits.sort().values[-int(SHARE * len(logits))] - prior
    layer.weight *= (torch.logit(torch.tensor(conf)) - prior) / high


def compare(name: str, size: int, rounds: int, runs: int, folder: Path) -> list[str]:
    model = theirs(name, size)
    images = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    ours = load_model(folder / f"{name}.pth")[0]
    nms = True if name != "fasterrcnn" else None  # whose file always has it
    our_file = export(
        ours,
        {"imgsz": size, "batch": 1, "nms": nms, "conf": CONF[name], "max_det": MAX_DET},
        folder / f"{name}_ours.onnx",
    )
    their_file = folder / f"{name}_theirs.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, ([torch.from_numpy(images[0])],), their_file, opset_version=18, dynamo=False)
    one, other = open_session(our_file), open_session(their_file)
    calls = {
        "ours": partial(one.run, None, {one.get_inputs()[0].name: images}),
        "theirs": partial(other.run, None, {other.get_inputs()[0].name: images[0]}),
    }
    found = calls["ours"]()[0][0]
    found = found[found[:, 4] > 0]
    names = [output.name for output in other.get_outputs()]
    values = dict(zip(names, calls["theirs"](), strict=True))
    scores = next(v for v in values.values() if v.ndim == 1 and v.dtype == np.float32)
    both = min(len(found), len(scores))
    apart = np.abs(np.sort(found[:, 4])[::-1][:both] - np.sort(scores)[::-1][:both]).max() if both else 0.0
    times = interleave(
        {key: (lambda _, call=call: call()) for key, call in calls.items()},
        [images],
        warmup=2,
        runs=runs,
        rounds=rounds,
    )
    # A round's ratio of medians: what disturbs the machine in a round disturbs both
    chunks = {key: np.median(np.reshape(value, (rounds, runs)), axis=1) for key, value in times.items()}
    ratios = chunks["theirs"] / chunks["ours"]
    return [
        name,
        *(f"{np.median(times[key]):.0f}" for key in ("ours", "theirs")),
        f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
        f"{len(found)} / {len(scores)}",
        f"{apart:.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BUILDERS), choices=list(BUILDERS))
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    print(f"{get_cpu_info()}, 1 thread, onnxruntime, fp32, one image of {options.size} px, 91 classes, ResNet-50")
    head = ["model", "ours ms", "torchvision ms", "speed-up (rounds)", "detections", "scores apart"]
    print("\n| " + " | ".join(head) + " |\n| --- |" + " ---: |" * (len(head) - 1), flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            cells = compare(name, options.size, options.rounds, options.runs, Path(folder))
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
