"""Files of weights are looked at before they are opened: a checkpoint is a pickle, and a pickle can run code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultralytics.nn import tasks
from ultralytics.utils import SAFE_LOAD, downloads

from gid_yolo.errors import UserError, printable
from gid_yolo.weights.archive import LARGEST_PICKLE, Foreign, check_names, contents_of
from gid_yolo.weights.inert import Inert, Refused
from gid_yolo.weights.rules import NUMBERS, ORDERED, PARAMETER, TENSORS

_HEADS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file itself: fetch that with git lfs pull"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it first"),
    (b"7z\xbc\xaf", "it is an archive of 7-Zip: unpack it first"),
)
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # its magic number, pickled
_WHOLE, _DICT = (int, type(None)), (dict, type(None))
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("train_metrics", "train_results", "optimizer", "scaler", "stopper"), (_DICT, "a dict")),
    **{"train_args": ((dict,), "a dict"), "epoch": (_WHOLE, "a number"), "updates": (_WHOLE, "a number")},
    "modelopt": ((type(None),), "empty: quantised networks are not opened"),
}


_lock = threading.Lock()
_within = 0  # how many contexts of `safely` are entered, in all threads


@contextlib.contextmanager
def safely(trust: Any = False) -> Iterator[None]:
    """Let Ultralytics open files with `weights_only`, and build networks without `eval`, unless they are trusted.

    Its switch is one for all threads: it stays on as long as any of them needs it, and a trusted file that is opened
    meanwhile is read as data, too.
    """
    if trust is True:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _within
    with _lock:
        _within += change
        tasks.SAFE_LOAD = SAFE_LOAD or _within > 0  # Ultralytics' own switch in the environment stays on


def _as_named(file: str | Path, *args: Any, **kwargs: Any) -> str:
    """Ultralytics' search for a file of weights, which changes its name first: a file that is here is itself."""
    return str(file) if Path(file).is_file() else _search(file, *args, **kwargs)


_search = downloads.attempt_download_asset
downloads.attempt_download_asset = _as_named  # by which its reader opens every file


def could_run(name: str, path: Path, role: str) -> UserError:
    """The refusal of a file that names something that a plain reader would import, and might call."""
    advice = "trust=True opens it all the same, if you know who made it"
    if name.startswith(("gid_yolo.", "timm.", "torchvision.")):
        advice += "; if gid-yolo did, GID('old.pt', trust=True).save('new.pt') writes it anew as plain data"
    return UserError(f"{role}={path} holds {printable(name)}, so that opening it could run code: {advice}.")


def check_file(path: Path, role: str) -> None:
    """Refuse a file that is no checkpoint, or that could run code or fill the memory if it were opened.

    Nothing in it is unpickled, and no more of it is read than its pickle and the list of its tensors.

    Args:
        path: A file.
        role: What it is for (`model`, `teacher`), to name it in an error.

    Raises:
        UserError: What is wrong with it, in one sentence.
    """
    try:
        _check_head(path)
        _check_entries(contents_of(path))
    except Foreign as error:
        raise could_run(str(error), path, role) from error
    except Refused as error:
        raise UserError(f"{role}={path} is not a checkpoint of gid-train: {printable(error, 300)}.") from error
    except OSError as error:
        raise UserError(f"{role}={path} cannot be read: {error.strerror or error}.") from error


def _check_head(path: Path) -> None:
    """Tell by its first bytes what a file is that is no archive."""
    with path.open("rb") as file:
        head = file.read(512)
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if not head:
            raise Refused("it is empty: copy or download it again")
        if head.startswith(b"PK\x03\x04"):
            return
        if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
            raise Refused("it is a web page that was saved under this name: the download failed")
        for start, reason in _HEADS:
            if head.startswith(start):
                raise Refused(reason)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            raise Refused("it is a file of safetensors, which holds tensors but no model: backbone_weights= reads it")
        if (head[:1] == b"\x08" and b"pytorch" in head) or b"onnx" in head[:64].lower():
            raise Refused("it is an ONNX file: give it the ending .onnx")
        if head.startswith(_OLD_FORMAT):
            raise Foreign("a pickle of PyTorch's format before 1.6")
        try:
            check_names(head + file.read(LARGEST_PICKLE))  # of a bare pickle
        except Foreign:
            raise
        except Refused:
            pass
    raise Refused("it is neither the archive that torch.save writes nor anything that is known here")


def _check_entries(root: Any) -> None:
    """Refuse contents that are not a checkpoint's dict with a model in it."""
    contents = _as_dict(root)
    if contents is None:
        raise Refused(f"it holds {_kind(root)}, not a dict with a model in it")
    if not contents.get("model") and not contents.get("ema"):
        alone = all(_kind(value) == "a tensor" for value in contents.values()) and contents
        what = "the tensors of a model" if alone else "a dict"
        raise Refused(f"it holds {what} without the model itself: give the file that the training wrote")
    for key in ("model", "ema"):
        value = contents.get(key)
        if value is not None and not (isinstance(value, Inert) and _kind(value) == "an object"):
            raise Refused(f"its {key} is {_kind(value)}, not a model")
    for key, (kinds, wanted) in _KINDS.items():
        value = contents.get(key, {} if key == "train_args" else None)
        plain = _as_dict(value) if dict in kinds and value is not None else value
        if not isinstance(plain, kinds) or (dict in kinds and value is not None and plain is None):
            raise Refused(f"its {key} is {_kind(value)}, not {wanted}")
    best = contents.get("best_fitness")
    if not isinstance(best, int | float | None) and getattr(best, "path", None) not in NUMBERS:
        raise Refused(f"its best_fitness is {_kind(best)}, not a number")
    state = _as_dict(contents.get("optimizer")) or {"state": {}, "param_groups": []}
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise Refused("its optimizer has no groups of parameters")


def _as_dict(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Inert) and value.path == ORDERED and not any(value.args):
        return dict(value.items)
    return value if isinstance(value, dict) else None


def _kind(value: Any) -> str:
    """What an inert value is, for a message."""
    if isinstance(value, Inert):
        return {**dict.fromkeys((*TENSORS, PARAMETER), "a tensor"), ORDERED: "a dict"}.get(value.path, "an object")
    if value is None:
        return "nothing"
    return {"dict": "a dict", "list": "a list", "str": "a text"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )
