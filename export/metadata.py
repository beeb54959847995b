"""What an exported file says of itself: the metadata that Ultralytics' exporter and ours write."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from gid_yolo.errors import UserError, some

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
        limits_known: False of an NMS inside that goes by other limits, which the file does not say: Ultralytics writes
            neither `conf` nor `iou`.
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
    limits_known: bool
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
    fixed_batch, fixed_size = isinstance(batch, int), isinstance(height, int) and isinstance(width, int)
    count = batch if fixed_batch else stored["batch"]
    imgsz = stored["imgsz"] if isinstance(stored["imgsz"], list | tuple) else [stored["imgsz"]] * 2
    height, width = (height, width) if fixed_size else imgsz
    for side in (height, width):
        check_limits({}, {"stride": stored["stride"], "batch": count, "imgsz": side})
    limits, limits_known = _limits(stored, arguments, output[1] if final else None)
    return FileInfo(
        names=names,
        size=(height, width),
        fixed_size=fixed_size,
        stride=stored["stride"],
        batch=count,
        fixed_batch=fixed_batch,
        most=count if fixed_batch or arguments.get("nms") else None,
        final=final,
        limits=limits,
        limits_known=limits_known,
        dtype=_TYPES[inputs[0].type],
        input=inputs[0].name,
    )


def _limits(stored: dict[str, Any], arguments: dict[str, Any], rows: Any) -> tuple[dict[str, Any], bool]:
    """The limits, and whether those of an NMS inside are among them; `rows` is how many detections the output holds."""
    said = {key: arguments[key] for key in _LIMITS if arguments.get("nms") and arguments.get(key) is not None}
    limits = _LIMITS | {"iou": _NMS_IOU.get(stored.get("head", ""), _LIMITS["iou"])}
    limits |= ({"max_det": rows} if isinstance(rows, int) else {}) | said | stored.get("limits", {})
    check_limits({key: limits[key] for key in ("conf", "iou")}, {"max_det": limits["max_det"]})
    known = not arguments.get("nms") or "limits" in stored or {"conf", "iou"} <= said.keys()
    return {"conf": float(limits["conf"]), "iou": float(limits["iou"]), "max_det": int(limits["max_det"])}, known


def chosen_size(info: FileInfo, imgsz: Any, path: str | Path) -> tuple[int, int]:
    """Height and width of a file's input: those it was exported for, or for a file that leaves them open what is given.

    Args:
        info: Of the file.
        imgsz: A side, or height and width, which are rounded up to the stride; None for the file's own.
        path: Of the file, to name it in an error.

    Raises:
        UserError: No size, or another one than the only one that the file takes.
    """
    if imgsz is None:
        return info.size
    sides = [imgsz] * 2 if isinstance(imgsz, int) else list(imgsz)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise UserError(f"imgsz={imgsz} must be a whole number, or height and width.")
    height, width = (-(-side // info.stride) * info.stride for side in sides)
    if info.fixed_size and (height, width) != info.size:
        raise UserError(f"imgsz={imgsz}: {path} takes {info.size[0]}x{info.size[1]} and no other size.")
    return height, width


def check_names(info: FileInfo, names: Mapping[int, str], role: str, data: Any) -> None:
    """See that a file has a data set's classes, in their order: unlike a checkpoint's, its outputs stay as they are.

    Args:
        info: Of the file.
        names: Of the data's classes.
        role: What the file is, with its path, to name it in an error.
        data: Likewise.

    Raises:
        UserError: Other classes.
    """
    if list(info.names.values()) != list(names.values()):
        raise UserError(
            f"{role} knows {len(info.names)} classes ({some(info.names.values())}), but data={data} has {len(names)} "
            f"({some(names.values())}): an ONNX file must have the data's classes, in their order."
        )


def check_limits(shares: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Refuse shares that are no numbers from 0 to 1, and counts that are no whole numbers of at least 1.

    Raises:
        UserError: There is one.
    """
    for key, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"{key}={share} must be a number from 0 to 1.")
    for key, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{key}={count} must be a whole number of at least 1.")
