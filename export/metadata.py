"""What an exported file says of itself: the metadata that Ultralytics' exporter and ours write."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from gid_yolo.errors import UserError

# What Ultralytics evaluates with, and the NMS thresholds of our heads, for files that do not say their limits
_LIMITS = {"conf": 0.001, "iou": 0.7, "max_det": 300}
_NMS_IOU = {"RetinaNet": 0.5, "FCOS": 0.6}
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class FileInfo:
    """A detector's file.

    Attributes:
        names: Class names by number.
        size: Height and width that it was exported for.
        fixed_size: It takes no other.
        stride: What height and width are multiples of.
        batch: Images in a run that it was exported for.
        fixed_batch: It takes no other number.
        most: Images in a run at most, None for any: an NMS that Ultralytics puts inside is unrolled over `batch`
            images, and would leave out the others.
        final: True for an output (B, N, 6), xyxy, score, class, with the NMS inside; False for (B, 4 + C, R), xywh and
            class scores, NMS left outside.
        limits: `conf`, `iou` of the NMS and `max_det` that it is evaluated with.
        dtype: Of the input.
        input: Name of the input.
    """

    names: Mapping[int, str]
    size: tuple[int, int]
    fixed_size: bool
    stride: int
    batch: int
    fixed_batch: bool
    most: int | None
    final: bool
    limits: Mapping[str, Any]
    dtype: type
    input: str


def read_info(session: onnxruntime.InferenceSession, path: str | Path) -> FileInfo:
    """Read and check what a file says of itself.

    Raises:
        UserError: No metadata, or not that of a detector of RGB images whose output is known here.
    """
    stored = session.get_modelmeta().custom_metadata_map
    if missing := [key for key in ("names", "imgsz", "stride", "batch", "task") if key not in stored]:
        raise UserError(
            f"{path} does not say what it detects (no {', '.join(missing)} in its metadata): export the checkpoint "
            "with gid-export or yolo export."
        )
    if stored["task"] != "detect":
        raise UserError(f"{path} is a model for task={stored['task']}: only detectors are run here.")
    try:
        return _info(session, {key: _value(text) for key, text in stored.items()})
    except (ValueError, TypeError, KeyError, IndexError, SyntaxError, AttributeError) as error:
        why = (
            error if isinstance(error, UserError) else f"its metadata cannot be read ({type(error).__name__}: {error})"
        )
        raise UserError(f"{path} cannot be run: {why}") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # a plain string, such as the version


def _info(session: onnxruntime.InferenceSession, stored: dict[str, Any]) -> FileInfo:
    inputs, output = session.get_inputs(), session.get_outputs()[0].shape
    names = dict(enumerate(stored["names"])) if isinstance(stored["names"], list | tuple) else stored["names"]
    names = {int(number): str(name) for number, name in names.items()}
    arguments = stored.get("args", {})
    final = bool(stored.get("end2end") or arguments.get("nms"))
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[1] != 3 or inputs[0].type not in _TYPES:
        raise UserError("it must have one input of (batch, 3, height, width) floats.")
    place, wide = (2, 6) if final else (1, 4 + len(names))
    if len(output) != 3 or (isinstance(output[place], int) and output[place] != wide):
        wanted = "(batch, detections, 6)" if final else f"(batch, 4 + {len(names)}, boxes)"
        raise UserError(f"its output is {output}, where {wanted} is expected (head {stored.get('head', 'unknown')}).")
    batch, _, height, width = inputs[0].shape
    fixed_batch, count = isinstance(batch, int), batch if isinstance(batch, int) else int(stored["batch"])
    fixed_size = isinstance(height, int) and isinstance(width, int)
    imgsz = stored["imgsz"] if isinstance(stored["imgsz"], list | tuple) else [stored["imgsz"]] * 2
    return FileInfo(
        names=names,
        size=(height, width) if fixed_size else (int(imgsz[0]), int(imgsz[1])),
        fixed_size=fixed_size,
        stride=int(stored["stride"]),
        batch=count,
        fixed_batch=fixed_batch,
        most=count if fixed_batch or arguments.get("nms") else None,
        final=final,
        limits=_limits(stored),
        dtype=_TYPES[inputs[0].type],
        input=inputs[0].name,
    )


def _limits(stored: dict[str, Any]) -> dict[str, Any]:
    limits = _LIMITS | {"iou": _NMS_IOU.get(stored.get("head", ""), _LIMITS["iou"])} | stored.get("limits", {})
    return {"conf": float(limits["conf"]), "iou": float(limits["iou"]), "max_det": int(limits["max_det"])}
