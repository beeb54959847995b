"""Weight files of other libraries, as models that can teach, train and be evaluated."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gid_yolo.detectors.convert import Converted, convert_torchvision
from gid_yolo.detectors.convert.detectron2 import convert_detectron2, is_detectron2
from gid_yolo.detectors.convert.mmdetection import convert_mmdetection, is_mmdetection, mmdetection_names
from gid_yolo.detectors.convert.torchvision_checkpoint import (
    CATEGORIES,
    class_names,
    is_torchvision,
    torchvision_model,
)
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError, printable
from gid_yolo.weights.archive import look
from gid_yolo.weights.pickle_scan import check_arrays, survey

SUFFIXES = (".pth", ".pkl")
COCO = [name for name in CATEGORIES[1:] if name != "N/A"]  # its 80 classes in their order
UNNAMED = "class {}"  # of classes whose names the file does not hold
UNNAMED_LABEL = "label {}"  # likewise, where label 0 may be nothing's
# What mmdetection 3.x saves beside the weights is made of these; they are read as `_Inert`
INERT_PACKAGES = ("mmengine", "mmcv", "mmdet", "numpy")
_UNREADABLE = (
    *(RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError, OSError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
INERT_NAMES = ("builtins.getattr",)  # by which the history of its log names its methods


def load_foreign(path: Path, role: str) -> GIDDetectionModel:
    """A detector from a file of torchvision's, detectron2's or mmdetection's weights.

    Files are state dicts, alone or under `model` or `state_dict`; detectron2's `.pkl` hold arrays, mmdetection's files
    their configuration under `meta`. Nothing in a file is run. Classes have the names in the file, else COCO's where
    they are as many, else numbers in their order.

    Raises:
        UserError: The file cannot be read, or matches no known detector, or one only in part.
    """
    try:
        content = _read_pickle(path) if path.suffix.lower() == ".pkl" else _read_torch(path)
    except _UNREADABLE as error:
        raise UserError(
            f"{role}={path} cannot be read as weights alone ({type(error).__name__}: {_line(error)}): "
            "save the state dict alone, torch.save(model.state_dict(), path), and of mmdetection's files the meta too, "
            "torch.save({'meta': file['meta'], 'state_dict': file['state_dict']}, path)."
        ) from error
    state = _state_dict(content)
    try:
        if is_torchvision(state):
            theirs = torchvision_model(state, path.name)
            converted, names = convert_torchvision(theirs), class_names(theirs)
            pattern = UNNAMED if converted.config["detector"] == "faster_rcnn" else UNNAMED_LABEL
        elif is_detectron2(state):
            converted = convert_detectron2(state)
            names, pattern = COCO if converted.config["nc"] == len(COCO) else None, UNNAMED
        elif is_mmdetection(state):
            meta = content["meta"] if isinstance(content.get("meta"), Mapping) else {}
            converted = convert_mmdetection(state, meta)
            count = converted.config["nc"]
            names, pattern = mmdetection_names(meta, count) or (COCO if count == len(COCO) else None), UNNAMED
        else:
            raise UserError(
                f"{role}={path} holds {len(state)} tensors, but not by the names of torchvision's, detectron2's or "
                "mmdetection's detectors: give a file of a RetinaNet, FCOS or Faster R-CNN, or a checkpoint of "
                "gid-train."
            )
        return _model(converted, names or [pattern.format(i) for i in range(converted.config["nc"])], path)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        # Names, shapes and configurations of any kind
        raise UserError(f"{role}={path} cannot be used: {_line(error)}") from error


def _model(converted: Converted, names: list[str], path: Path) -> GIDDetectionModel:
    detector = converted.build()
    model = GIDDetectionModel(converted.config, verbose=False)
    model.model = nn.Sequential(detector)
    model.names = dict(enumerate(names))
    model.args, model.pt_path = {**DEFAULTS, "model": str(path), "task": "detect"}, str(path)
    return model.eval()


class _Inert:
    """Stands for any object of a library in a file of weights: it takes what it is given and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _read_torch(path: Path) -> Any:
    """The contents of a file of `torch.save`: tensors and plain values, and `_Inert` in place of a few objects."""
    look(path, (*(f"{package}." for package in INERT_PACKAGES), *INERT_NAMES))
    with _pytorchs_own_list():
        try:
            return torch.load(path, "cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not zipfile.is_zipfile(path):  # of the older format, whose names cannot be listed without reading it
                raise
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if others := [x for x in names if x.partition(".")[0] not in INERT_PACKAGES and x not in INERT_NAMES]:
            raise pickle.UnpicklingError(f"it holds a {others[0]}")
        inert: list[Any] = [(_Inert, name) for name in names]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, "cpu", weights_only=True)


@contextlib.contextmanager
def _pytorchs_own_list() -> Iterator[None]:
    """Forget for a while what was ever allowed besides: Ultralytics adds classes as it meets them, and keeps them."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and plain values; everything else a pickle can name could run code."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """The few names that arrays are made from."""
        package = module.partition(".")[0]
        if package == "numpy" and name in {"_reconstruct", "ndarray", "dtype", "scalar"}:
            return super().find_class(module, name)
        if (module, name) in {("_codecs", "encode"), ("collections", "OrderedDict")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _read_pickle(path: Path) -> Any:
    """The contents of a `.pkl` of arrays; Python 2's, as the oldest are, included."""
    data = path.read_bytes()
    if problem := survey(data, known=None)[1]:
        raise problem
    check_arrays(data)
    return _ArraysOnly(io.BytesIO(data), encoding="latin1").load()


def _state_dict(content: Any) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    values = content if isinstance(content, dict) else {}
    numbers = {k: v for k, v in values.items() if not isinstance(v, np.ndarray) or v.dtype.kind in "fiub"}
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in numbers.items()}
    return {str(key).removeprefix("module."): v for key, v in tensors.items() if isinstance(v, torch.Tensor)}


def _line(error: BaseException) -> str:
    return printable(error, 600)
