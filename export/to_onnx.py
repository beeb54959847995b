"""A trained detector as an ONNX file: FP32, FP16 or INT8, static or dynamic, with or without the NMS."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn
from ultralytics.cfg import _handle_deprecation, check_cfg
from ultralytics.data.utils import get_split_fraction
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, LOGGER

from gid_yolo.engine.exporter import GIDExporter
from gid_yolo.engine.yolo_view import is_yolo
from gid_yolo.errors import UserError
from gid_yolo.export.check import ENOUGH, check_file
from gid_yolo.export.evaluate import image_size, open_split, read_data, spread
from gid_yolo.export.half import to_fp16
from gid_yolo.export.metadata import check_limits
from gid_yolo.export.quantize import quantize_int8
from gid_yolo.export.session import open_session
from gid_yolo.export.winograd import to_winograd

_QUANTIZE = {"none": "fp32", "32": "fp32", "fp32": "fp32", "16": "fp16", "fp16": "fp16", "8": "int8", "int8": "int8"}
_FLAGS = ("nms", "dynamic", "simplify", "winograd", "half", "int8", "end2end", "agnostic_nms")
# Before opset 11 no regions can be cropped, and maps are resized in another way than PyTorch's; before 12 whole numbers
# cannot be limited, as the NMS does; before 13 INT8 has no range for each channel. PyTorch's exporter ends at 20
OLDEST_OPSET, OLDEST_OF_NMS, OLDEST_OF_INT8, NEWEST_OPSET = 11, 12, 13, 20
CALIBRATION_IMAGES = 128
_TEMPORARY = re.compile(r"\.export-\w+[/\\]")
_FAILURES = (ImportError, OSError, ValueError, RuntimeError, AssertionError, TypeError, KeyError, IndexError)


def export(model: DetectionModel, arguments: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write an ONNX file by the arguments of `gid-export`.

    Args:
        model: One of our detectors or a YOLO.
        arguments: `imgsz`, `batch`, `dynamic`, `quantize` (16: FP16, 8: INT8), `nms` (True: in the graph; False: YOLO's
            head that needs none, of models that have one; None: left outside), `conf`, `iou` and `max_det` of the NMS
            in the graph, `data` and `fraction`, on whose training images INT8's ranges are found, `winograd` (see
            `to_winograd`), `opset`, `simplify`, `device`.
        path: The file; by default beside the checkpoint, with `_fp16` or `_int8` behind its name.

    Returns:
        The file.

    Raises:
        UserError: Arguments that cannot work, or an export that failed; a file of before stays as it was.
    """
    args, precision = _checked(arguments, model)
    if path is not None and (path.suffix.lower() != ".onnx" or path.is_dir()):
        raise UserError(f"file={path} must be a file that ends in .onnx.")
    path = path or _beside_checkpoint(model, precision)
    calibration = None
    if precision == "int8":
        calibration = Calibration(args["data"], args["imgsz"], args["batch"], args.get("fraction"))
    try:
        with _without_temporary(), _workplace(path) as folder:
            made, copy = Path(folder) / path.name, Path(folder) / "lowered.onnx"
            network, replaced = _written(made, model, args)

            def lowered(conf: float) -> tuple[Path, nn.Module]:
                limits = {"conf": conf, "max_det": max(args.get("max_det") or 0, ENOUGH)}
                return copy, _written(copy, model, args | limits)[0]

            said = check_file(made, network, calibration[0] if calibration else None, lowered)
            if precision != "fp32":
                made, said = _converted(made, precision, calibration), ""
            made.replace(path)
    except _FAILURES as error:
        reason = _TEMPORARY.sub("", " ".join(str(error).split()))
        if not isinstance(error, UserError):
            reason = f"the export to {path} failed ({type(error).__name__}): {reason[:300]}"
        raise UserError(reason) from error
    LOGGER.info(f"ONNX file: {path.resolve()}, {precision}, {_layout(path)}{said}{replaced}")
    return path


def _workplace(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside the file, in which it is made.

    Raises:
        UserError: There cannot be one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written to ({error.strerror}): name another place, e.g. file=out/{path.name}."
        ) from error


def _checked(arguments: Mapping[str, Any], model: DetectionModel) -> tuple[dict[str, Any], str]:
    """The arguments as they are worked with, and the precision.

    Raises:
        UserError: They cannot work, alone or together.
    """
    args: dict[str, Any] = dict(arguments)
    if str(args.get("format") or "onnx").lower() != "onnx":
        raise UserError(f"format={args['format']} is not supported: gid-yolo exports format=onnx.")
    for key in _FLAGS:
        if not (args.get(key) is None or isinstance(args[key], bool)):  # a word such as no would count as True
            raise UserError(f"{key}={args[key]} must be True or False.")
    if len(asked := [f"{key}={args[key]}" for key in ("half", "int8", "quantize") if args.get(key)]) > 1:
        raise UserError(f"{' and '.join(asked)} each give a precision: give quantize=16 or quantize=8 alone.")
    if args.get("end2end") is True and not getattr(model, "end2end", False):
        raise UserError("end2end=True: this model has no head without an NMS; nms=True puts the NMS into the file.")
    args = _handle_deprecation(args)  # half= and int8= become quantize=, end2end= becomes nms=
    check_limits({}, {"batch": args.setdefault("batch", DEFAULT_CFG.batch)})
    args["imgsz"] = image_size(args["imgsz"], int(model.stride.max()))
    inside = args.get("nms") or (getattr(model, "end2end", False) and not is_yolo(model))
    if inside and args.get("agnostic_nms"):
        raise UserError("agnostic_nms=True is not supported with the NMS in the file: leave agnostic_nms= out.")
    precision = precision_of(args.get("quantize"))
    _check_opset(args.get("opset"), precision, bool(args.get("nms")))
    if args.get("winograd") and (precision != "fp32" or args.get("dynamic")):
        raise UserError(
            "winograd=True is for FP32 files of a fixed size: leave quantize= and dynamic= out, or winograd=True."
        )
    if precision == "int8" and not args.get("data"):
        raise UserError("quantize=8 finds its ranges on real images: give the data the model was trained on, data=.")
    if args.get("fraction") is not None:
        if precision != "int8":
            raise UserError(f"fraction={args['fraction']} chooses the images of quantize=8: leave it out, or add that.")
        args["fraction"] = _fraction(args["fraction"])
    return args, precision


def _check_opset(opset: Any, precision: str, nms: bool) -> None:
    """Refuse an opset that the file cannot be written in, which PyTorch says in hundreds of lines.

    Raises:
        UserError: Not a whole number, too old or too new.
    """
    oldest, file = OLDEST_OPSET, ""
    if nms:
        oldest, file = OLDEST_OF_NMS, " for a file with the NMS"
    if precision == "int8":
        oldest, file = OLDEST_OF_INT8, " for an INT8 file"
    if opset is not None and (type(opset) is not int or not oldest <= opset <= NEWEST_OPSET):
        raise UserError(f"opset={opset} must be a whole number from {oldest} to {NEWEST_OPSET}{file}.")


def _fraction(fraction: Any) -> float | int:
    """Share or number of the training images, out of what Ultralytics takes for `fraction=`.

    Raises:
        UserError: Something else.
    """
    given = {"fraction": fraction}
    try:
        check_cfg(given)
        return get_split_fraction(given["fraction"], "train")
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def _without_temporary() -> Iterator[None]:
    """Leave out of the log what Ultralytics says of a file that is neither checked nor in its place."""

    def wanted(record: Any) -> bool:
        return not _TEMPORARY.search(record.getMessage())

    LOGGER.addFilter(wanted)
    try:
        yield
    finally:
        LOGGER.removeFilter(wanted)


def _written(path: Path, model: DetectionModel, args: dict[str, Any]) -> tuple[nn.Module, str]:
    """The network that was traced, in evaluation mode and fp32, on the CPU; and what was done besides, for the log."""
    exporter = GIDExporter(path, overrides={**args, "mode": "export", "task": "detect"})
    exporter(model=model)
    said = f"; {to_winograd(path, path)} convolutions by Winograd's algorithm" if args.get("winograd") else ""
    return exporter.model.float().cpu().eval(), said


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


class Calibration(Sequence[np.ndarray]):
    """Images of the training split for INT8's ranges, letterboxed as the file will see them, read when asked for.

    The training split, so that the accuracy on another one is not measured on images that the ranges were chosen on.

    Args:
        data: Data set.
        imgsz: Height and width of the file's input.
        batch: Images an array.
        fraction: Share of the images as a float, or their number as an int; `CALIBRATION_IMAGES` at most where None.
            They are spread evenly over the split.
        trust: See `read_data`.

    Raises:
        UserError: No such data set, or no training images.
    """

    def __init__(
        self,
        data: Any,
        imgsz: Sequence[int],
        batch: int,
        fraction: float | int | None = None,
        *,
        trust: bool = False,
    ) -> None:
        path, contents = read_data(data, "train", trust)
        self.dataset = open_split(path, contents, split="train", imgsz=imgsz, batch=batch).dataset
        images = len(self.dataset)
        count = fraction if isinstance(fraction, int) else max(1, round(images * fraction)) if fraction else None
        self.chosen, self.batch, self.path = spread(images, count or CALIBRATION_IMAGES), batch, path

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


def _layout(path: Path) -> str:
    graph = onnx.load(path, load_external_data=False).graph
    image, shape = (
        [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (graph.input[0], graph.output[0])
    )
    meaning = "x1, y1, x2, y2, score, class; NMS inside" if shape[-1] == 6 else "x, y, w, h, classes; NMS left outside"
    return f"images {tuple(image)}, output0 {tuple(shape)}: {meaning}"
