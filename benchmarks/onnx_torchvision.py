"""Our ONNX files against torchvision's own export of the same weights: latency in turns, and whether they agree.

All hold everything from an image in [0, 1] to final detections: normalisation, network, decoding and NMS. The weights
are random, scaled so that there are detections; the images are noise of the network's size, so that torchvision's
resizing has nothing to do. INT8's ranges are of such an image: its accuracy is measured elsewhere, on trained weights.
Prints a Markdown table:

    python benchmarks/onnx_torchvision.py [--models retinanet fcos fasterrcnn] [--size 640] [--rounds 5] [--runs 3]

With `--profile`, onnxruntime's own profile in its place: milliseconds by kind of operator, and how much faster our
plain file and torchvision's would be if all but their convolutions were free.
"""

import argparse
import json
import tempfile
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torchvision
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.engine.checkpoint import load_model
from gid_yolo.export.quantize import quantize_int8
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
KINDS = {  # of operators, by a part of their names; the first that fits
    "convolutions": ("Conv",),
    "matrix products": ("Gemm", "MatMul"),
    "RoIAlign": ("RoiAlign",),
    "NMS, selection": ("NonMaxSuppression", "TopK", "NonZero", "Gather", "Scatter", "Slice", "Split", "Where"),
    "layout": ("Reorder", "Transpose", "Concat", "Reshape", "Expand"),
    "rest": ("",),
}
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
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.002)  # scores of 0.6 to 0.8
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


def write(name: str, images: np.ndarray, folder: Path) -> dict[str, Path]:
    """The files by what the table calls them, torchvision's the last."""
    model = theirs(name, images.shape[-1])
    weights = folder / f"{name}.pth"
    torch.save(model.state_dict(), weights)
    ours = load_model(weights)[0]
    nms = True if name != "fasterrcnn" else None  # whose file always has it
    arguments = {"imgsz": images.shape[-1], "batch": 1, "nms": nms, "conf": CONF[name], "max_det": MAX_DET}
    plain = export(ours, arguments, folder / "ours.onnx")
    files = {
        "ours": plain,
        "ours, winograd=True": export(ours, {**arguments, "winograd": True}, folder / "winograd.onnx"),
        "ours, INT8": quantize_int8(plain, folder / "int8.onnx", [images]),
        "torchvision": folder / "theirs.onnx",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, ([torch.from_numpy(images[0])],), files["torchvision"], opset_version=18, dynamo=False)
    return files


def feed(session: onnxruntime.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    """The input of one image; torchvision's has no axis of the batch."""
    (wanted,) = session.get_inputs()
    return {wanted.name: images if len(wanted.shape) == 4 else images[0]}


def scores_of(outputs: list[np.ndarray]) -> np.ndarray:
    """Scores of the detections, the best first; ours are a column of rows, torchvision's an output of their own."""
    if len(outputs) == 1:
        found = outputs[0][0][:, 4]
        return np.sort(found[found > 0])[::-1]
    return np.sort(next(v for v in outputs if v.ndim == 1 and v.dtype == np.float32))[::-1]


def compare(files: dict[str, Path], images: np.ndarray, rounds: int, runs: int) -> list[list[str]]:
    """A row for each file, measured against the last."""
    calls = {}
    for key, path in files.items():
        session = open_session(path)
        calls[key] = partial(session.run, None, feed(session, images))
    scores = {key: scores_of(call()) for key, call in calls.items()}
    times = interleave(
        {key: (lambda _, call=call: call()) for key, call in calls.items()},
        [images],
        warmup=2,
        runs=runs,
        rounds=rounds,
    )
    # A round's ratio of medians: what disturbs the machine in a round disturbs all
    chunks = {key: np.median(np.reshape(value, (rounds, runs)), axis=1) for key, value in times.items()}
    rows = []
    *_, last = files
    for key, path in files.items():
        ratios = chunks[last] / chunks[key]
        both = min(len(scores[key]), len(scores[last]))
        apart = np.abs(scores[key][:both] - scores[last][:both]).max(initial=0.0)
        rows.append(
            [
                key,
                f"{path.stat().st_size / 1e6:.0f}",
                f"{np.median(times[key]):.0f}",
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})" if key != last else "1",
                f"{len(scores[key])}",
                f"{apart:.1e}" if key != last else "-",
            ]
        )
    return rows


def profile(path: Path, images: np.ndarray, runs: int) -> list[str]:
    """Milliseconds of a run by kind of operator, their share, and the speed-up if all but convolutions were free."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(1 + runs):
        session.run(None, feed(session, images))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    _, *timed = (event for event in events if event["name"] == "model_run")  # without the first, which warms up
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        # Of an operator with a graph inside (If, Loop) only the nodes inside: they are events of their own
        if event["name"].endswith("_kernel_time") and event["ts"] >= timed[0]["ts"]:
            operator = event["args"]["op_name"]
            if operator not in {"If", "Loop"}:
                kind = next(k for k, parts in KINDS.items() if any(part in operator for part in parts))
                spent[kind] += event["dur"] / 1e3 / runs
    total = sum(event["dur"] for event in timed) / 1e3 / runs
    spent["rest"] += total - sum(spent.values())  # between the operators
    cells = [f"{spent[kind]:.0f} ({spent[kind] / total:.1%})" for kind in KINDS]
    return [f"{total:.0f}", *cells, f"{total / spent['convolutions']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BUILDERS), choices=list(BUILDERS))
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    images = np.random.default_rng(0).random((1, 3, options.size, options.size), dtype=np.float32)
    print(f"{get_cpu_info()}, 1 thread, onnxruntime, one image of {options.size} px, 91 classes, ResNet-50")
    if options.profile:
        head = ["model", "file", "ms", *KINDS, "at most"]
    else:
        head = ["model", "file", "MB", "ms", "speed-up (rounds)", "detections", "scores apart"]
    print("\n| " + " | ".join(head) + " |\n| --- | --- |" + " ---: |" * (len(head) - 2), flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            files = write(name, images, Path(folder))
            if options.profile:
                rows = [[key, *profile(files[key], images, options.runs)] for key in ("ours", "torchvision")]
            else:
                rows = compare(files, images, options.rounds, options.runs)
        for row in rows:
            print("| " + " | ".join([name, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
