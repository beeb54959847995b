"""Reading checkpoints, as data: what is not one of ours, or could run code, is refused in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import checks
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

from gid_yolo.cfg import model_names
from gid_yolo.engine import foreign
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.rebuild import MOST_VALUES, plain
from gid_yolo.engine.safe_load import check_file, could_run, safely
from gid_yolo.engine.yolo_view import is_yolo
from gid_yolo.errors import UserError, printable

_REFUSED = re.compile(r"(?:GLOBAL |got <class '|function <(?:function|class) '?)([\w.]+)")  # in PyTorch's words
_DAMAGED = (
    *(TypeError, RuntimeError, AttributeError, KeyError, ImportError, EOFError, OSError, ValueError, AssertionError),
    *(IndexError, pickle.UnpicklingError, BadZipFile, MemoryError, ArithmeticError),
)


@contextlib.contextmanager
def no_autoinstall() -> Iterator[None]:
    """Keep Ultralytics from installing packages while it reads a file or exports."""
    before = checks.AUTOINSTALL
    checks.AUTOINSTALL = False
    try:
        yield
    finally:
        checks.AUTOINSTALL = before


def is_checkpoint(name: Any) -> bool:
    """True where `name` is that of a file of weights, by its ending."""
    return Path(str(name)).suffix.lower() in {".pt", *foreign.SUFFIXES}


def load_any(path: str | Path, role: str = "model", trust: bool = False) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint as it is: a detector, or the teacher-student model of an unfinished distillation.

    Raises:
        UserError: No such file, neither a checkpoint of gid-yolo nor of a YOLO detector, or one that could run code.
    """
    path = Path(path)
    if not path.is_file() and path.name in GITHUB_ASSETS_NAMES:
        path = _download(path, role)
    if path.is_dir():
        raise UserError(f"{role}={path} is a folder: give a checkpoint in it, e.g. weights/best.pt of a run.")
    if not path.is_file():
        raise UserError(f"{role}={path} does not exist: give a checkpoint of gid-train, e.g. runs/.../weights/best.pt.")
    if path.suffix.lower() in foreign.SUFFIXES:
        return foreign.load_foreign(path, role), {"source": str(path)}
    if trust is not True:
        check_file(path, role)
    try:
        with no_autoinstall(), safely(trust):
            model, ckpt = load_checkpoint(path)
            inner = model.student_model if isinstance(model, DistillationModel) else model
            known = isinstance(inner, GIDDetectionModel) or is_yolo(inner)
            if known:
                _check_attributes(inner)
            if trust is not True:
                model.args = plain(model.args, MOST_VALUES, strict=False)
    except UserError as error:
        raise UserError(f"{role}={path} is not a checkpoint of gid-train: {printable(error, 400)}") from error
    except _DAMAGED as error:  # unpickling damaged bytes can raise any of them
        cause = error.__cause__ if isinstance(error.__cause__, pickle.UnpicklingError) else error
        if isinstance(cause, pickle.UnpicklingError) and (found := _REFUSED.search(str(cause))):
            raise could_run(found[1], path, role) from error
        reason = printable(cause, 160)
        raise UserError(
            f"{role}={path} is not a checkpoint of gid-train ({type(cause).__name__}: {reason}): give another file."
        ) from error
    if not known:
        raise UserError(
            f"{role}={path} holds a {type(inner).__name__}, neither a detector of gid-yolo nor a YOLO detector: "
            f"train one with gid-train, from {', '.join(model_names())} or a YOLO yaml."
        )
    if trust is not True and "://" in str(model.args.get("data")):
        model.args["data"] = None  # a file does not say what is downloaded
    return model, ckpt


def _check_attributes(model: Any) -> None:
    """Refuse a YOLO whose settings, names or strides are not what they are taken for.

    Raises:
        ValueError: Which of them.
    """
    names = model.names
    if not isinstance(model.yaml, dict) or not isinstance(model.stride, Tensor) or not model.stride.numel():
        raise ValueError("its yaml is no dict, or its strides are no tensor")
    if not isinstance(names, dict) or not all(type(k) is int and isinstance(v, str) for k, v in names.items()):
        raise ValueError("its names are no dict of texts")
    plain(model.yaml, MOST_VALUES)


def _download(path: Path, role: str) -> Path:
    """One of the checkpoints that Ultralytics publishes, fetched to where it is looked for.

    Raises:
        UserError: It cannot be had.
    """
    try:
        return Path(attempt_download_asset(path))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).replace("❌", "").split()).rstrip(".")
        raise UserError(
            f"{role}={path} is not here and could not be downloaded ({reason}): put the file there."
        ) from error


def load_model(path: str | Path, role: str = "model", trust: bool = False) -> tuple[DetectionModel, dict[str, Any]]:
    """Load a detector from a checkpoint; of an unfinished distillation, the student.

    Args:
        path: A `.pt` file that gid-yolo's trainer wrote, or Ultralytics' for a YOLO detector; or a file of
            torchvision's, detectron2's or mmdetection's weights (`.pth`, `.pkl`).
        role: What the file is for (`model`, `teacher`), to name it in an error.
        trust: Open it even if that can run code, as a plain pickle does.

    Returns:
        The model in fp32 and evaluation mode, and the checkpoint's dict.

    Raises:
        UserError: No such file, not a checkpoint of gid-yolo, or one that could run code.
    """
    model, ckpt = load_any(path, role, trust)
    if isinstance(model, DistillationModel):
        student = model.student_model
        student.args, student.pt_path = model.args, model.pt_path
        model = student
    return model, ckpt


def record_of(model: nn.Module) -> dict[str, Any]:
    """What produced a checkpoint's weights, as our trainers note it; nothing for one that Ultralytics wrote."""
    return getattr(model, "record", {})


def fingerprint(model: nn.Module) -> str:
    """The first 16 digits of the SHA-256 of all weights in half precision, the precision checkpoints keep."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.half() if value.is_floating_point() else value
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
