"""A trained detector as an ONNX file: FP32, FP16 or INT8, static or dynamic, with or without the NMS."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from ultralytics.cfg import _handle_deprecation
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from gid_yolo.engine.distillable import is_yolo
from gid_yolo.engine.exporter import GIDExporter
from gid_yolo.errors import UserError
from gid_yolo.export.evaluate import image_size, open_split, read_data, spread
from gid_yolo.export.half import to_fp16
from gid_yolo.export.quantize import quantize_int8
from gid_yolo.export.session import open_session, run
from gid_yolo.export.winograd import to_winograd

_QUANTIZE = {"none": "fp32", "32": "fp32", "fp32": "fp32", "16": "fp16", "fp16": "fp16", "8": "int8", "int8": "int8"}
CALIBRATION_IMAGES = 128
# What PyTorch and onnxruntime may differ by in fp32, in pixels and probability: far under what an NMS could notice
BOX_LIMIT, SCORE_LIMIT = 0.05, 1e-3
# Likewise on noise, which no network was trained for and which an ill-conditioned one makes more of
NOISE_BOX_LIMIT, NOISE_SCORE_LIMIT = 0.5, 0.01
_FAILURES = (ImportError, OSError, ValueError, RuntimeError, AssertionError, TypeError, KeyError, IndexError)


def export(model: DetectionModel, arguments: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write an ONNX file by the arguments of `gid-export`.

    Args:
        model: One of our detectors or a YOLO.
        arguments: `imgsz`, `batch`, `dynamic`, `nms`, `quantize` (16: FP16, 8: INT8), `conf`, `iou` and `max_det` of
            the NMS in the graph, `data` on whose training images INT8's ranges are found, `winograd` (see
            `to_winograd`), `opset`, `simplify`, `device`.
        path: The file; by default beside the checkpoint, with `_fp16` or `_int8` behind its name.

    Returns:
        The file.

    Raises:
        UserError: Arguments that cannot work together, or an export that failed; a file of before stays as it was.
    """
    args: dict[str, Any] = _handle_deprecation(dict(arguments))  # half= and int8= become quantize=
    if str(args.get("format") or "onnx").lower() != "onnx":
        raise UserError(f"format={args['format']} is not supported: gid-yolo exports format=onnx.")
    if args.get("nms") and args.get("agnostic_nms"):
        raise UserError("agnostic_nms=True is not supported with nms=True: leave the NMS outside, nms=False.")
    precision = precision_of(args.get("quantize"))
    _check_winograd(args, precision)
    args["imgsz"] = image_size(args["imgsz"], int(model.stride.max()))
    path = path or _beside_checkpoint(model, precision)
    calibration = None
    if precision == "int8":
        if not args.get("data"):
            raise UserError(
                "quantize=8 finds its ranges on real images: give the data the model was trained on, data=."
            )
        calibration = Calibration(args.get("data"), args["imgsz"], args["batch"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            GIDExporter(made, overrides={**args, "mode": "export", "task": "detect"})(model=model)
            replaced = to_winograd(made, made) if args.get("winograd") else None
            said = _check(made, model)
            if precision != "fp32":
                made, said = _converted(made, precision, calibration), ""
            made.replace(path)
    except UserError:
        raise
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the export to {path} failed ({type(error).__name__}): {reason}") from error
    said += "" if replaced is None else f"; {replaced} convolutions by Winograd's algorithm"
    LOGGER.info(f"ONNX file: {path.resolve()}, {precision}, {_layout(path)}{said}")
    return path


def precision_of(quantize: Any) -> str:
    """`fp32`, `fp16` or `int8` of Ultralytics' `quantize=`.

    Raises:
        UserError: Another value.
    """
    known = _QUANTIZE.get(str(quantize).lower())
    if known is None:
        raise UserError(
            f"quantize={quantize} is not supported: give quantize=16 for FP16, quantize=8 for INT8, or neither."
        )
    return known


def _check_winograd(args: Mapping[str, Any], precision: str) -> None:
    wanted = args.get("winograd")
    if wanted not in (None, True, False):
        raise UserError(f"winograd={wanted} must be True or False.")
    if wanted and (precision != "fp32" or args.get("dynamic")):
        raise UserError(
            "winograd=True is for FP32 files of a fixed size: leave quantize= and dynamic= out, or winograd=True."
        )


class Calibration(Sequence[np.ndarray]):
    """Images of the training split for INT8's ranges, letterboxed as the file will see them, read when asked for.

    The training split, so that the accuracy on another one is not measured on images that the ranges were chosen on.

    Args:
        data: Data set.
        imgsz: Height and width of the file's input.
        batch: Images an array.
        count: Images in all, spread evenly over the split.

    Raises:
        UserError: No such data set, or no training images.
    """

    def __init__(self, data: Any, imgsz: Sequence[int], batch: int, count: int = CALIBRATION_IMAGES) -> None:
        path, contents = read_data(data, "train")
        self.dataset = open_split(path, contents, split="train", imgsz=imgsz, batch=batch).dataset
        self.chosen, self.batch, self.path = spread(len(self.dataset), count), batch, path

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch)

    def __getitem__(self, index: Any) -> Any:
        """(batch, 3, H, W) RGB in [0, 1]; the last is filled up with the first images."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = [i % len(self.chosen) for i in range(index * self.batch, (index + 1) * self.batch)]
        images = [self.dataset[self.chosen[i]]["img"].numpy() for i in places]
        return np.stack(images).astype(np.float32) / 255


def _beside_checkpoint(model: DetectionModel, precision: str) -> Path:
    yaml = Path(str(model.yaml.get("yaml_file") or "model")).name
    path = Path(getattr(model, "pt_path", None) or yaml)
    return path.with_name(f"{path.stem}{'' if precision == 'fp32' else '_' + precision}.onnx")


def _converted(source: Path, precision: str, calibration: Calibration | None) -> Path:
    target = source.with_name(f"{source.stem}.{precision}.onnx")
    if calibration is None:
        to_fp16(source, target)
    else:
        LOGGER.info(f"INT8: ranges of {len(calibration.chosen)} training images of {calibration.path}")
        quantize_int8(source, target, calibration)
    contents = onnx.load(target)
    for entry in contents.metadata_props:
        if entry.key == "args":
            entry.value = entry.value.replace("'quantize': None", f"'quantize': {16 if precision == 'fp16' else 8}")
    onnx.save(contents, target)
    open_session(target)  # or an error that says why it cannot be opened
    return target


@torch.no_grad()
def _check(path: Path, model: DetectionModel) -> str:
    """Run the file once beside the network, and say how far they are from each other.

    Raises:
        UserError: They differ by more than rounding.
    """
    session = open_session(path)
    declared, least = session.get_inputs()[0].shape, (1, 3, 64, 64)  # sizes for axes that are dynamic
    shape = [size if isinstance(size, int) else some for size, some in zip(declared, least, strict=True)]
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    found = run(session, images)
    if found.shape[-1] == 6:  # final: which of two nearly equal boxes of noise stays is no matter
        return ""
    fused = deepcopy(model).float().cpu().eval().fuse(verbose=False)
    if is_yolo(fused):
        fused.end2end = False
    expected = dense_output(fused, images)
    difference = (
        np.abs(expected.astype(np.float64) - found) if expected.shape == found.shape else np.full((1, 5, 1), np.inf)
    )
    boxes, scores = float(difference[:, :4].max()), float(difference[:, 4:].max())
    if not (boxes <= NOISE_BOX_LIMIT and scores <= NOISE_SCORE_LIMIT):  # NaN fails too
        raise UserError(
            f"the ONNX file does not answer as the checkpoint does: boxes differ by up to {boxes:.3g} px (limit "
            f"{NOISE_BOX_LIMIT}), scores by {scores:.3g} (limit {NOISE_SCORE_LIMIT}); it was not written. Try another "
            "opset=, or simplify=False."
        )
    return f"; on noise within {boxes:.1g} px and {scores:.1g} of PyTorch"


def dense_output(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """What the network in evaluation mode gives for (B, 3, H, W) images, before an NMS outside of it."""
    with torch.no_grad():
        found = model(torch.from_numpy(images))
    return (found if isinstance(found, torch.Tensor) else found[0]).numpy()


def _layout(path: Path) -> str:
    output = onnx.load(path, load_external_data=False).graph.output[0]
    shape = [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
    meaning = "x1, y1, x2, y2, score, class; NMS inside" if shape[-1] == 6 else "x, y, w, h, classes; NMS left outside"
    return f"output0 {tuple(shape)}: {meaning}"
