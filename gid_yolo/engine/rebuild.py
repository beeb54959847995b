"""What checkpoints keep of our models: settings, plain values and tensors, of which they are built again.

A pickled model is the name of one of the two functions below and what it is called with. Their names and arguments are
the format of the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import copy_attr

from gid_yolo.detectors.backbone import WeightSource
from gid_yolo.distill.methods import Distillation
from gid_yolo.engine.allocations import LARGEST, Allocations, check_anchors, check_numbers
from gid_yolo.engine.classes import SharedClasses
from gid_yolo.engine.detection_model import GIDDetectionModel, fold_batch_norm
from gid_yolo.engine.shared_levels import SharedLevels
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.yolo_view import is_yolo
from gid_yolo.errors import UserError, some

Stored = tuple[Callable[..., nn.Module], tuple[Any, ...]]

MOST_VALUES = 100_000  # names of a thousand classes, a record, arguments
DEEPEST = 50  # lists in each other
_BACKBONE = re.compile(r"(torchvision/)?[\w.-]+")  # timm would fetch `hf-hub:name` and read `local-dir:path`
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def store_detector(model: GIDDetectionModel) -> Stored:
    """What a detector is pickled as."""
    source = model.detector.backbone.source
    attributes = {
        "names": model.names,
        "record": model.record,
        "args": getattr(model, "args", None),
        "pt_path": getattr(model, "pt_path", None),
        "inplace": model.inplace,
        "training": model.training,
        "folded": model.folded,
        "other_classes": model.detector.other_classes,
        "source": (source.text, source.loaded, source.failed),
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
    }
    return rebuild_detector, (plain(model.yaml), plain(attributes), _tensors(model))


def rebuild_detector(settings: dict[str, Any], attributes: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A detector from the three parts of a checkpoint.

    Args:
        settings: As of a model yaml, `nc` included.
        attributes: What a `GIDDetectionModel` knows besides.
        state: Its tensors, under the names of its `state_dict`.

    Raises:
        UserError: They do not make a detector.
    """
    with _refusing("its detector cannot be built"):
        settings, attributes = plain(settings, MOST_VALUES), plain(attributes, MOST_VALUES)
        _check_settings(settings)
        classes, other = (
            _whole(settings.get("nc"), "nc", 1),
            _whole(attributes.get("other_classes", 0), "other classes"),
        )
        with torch.random.fork_rng(devices=[]), Allocations(state, filled=True):
            model = GIDDetectionModel(settings, nc=classes + other, verbose=False)
            if other:
                model.detector.keep_classes(range(classes))
                model.nc = model.yaml["nc"] = classes
            if attributes.get("folded"):
                model.detector.backbone.body = fold_batch_norm(model.eval().detector.backbone.body)
                model.folded = True
            _fill(model, state)
        model.names = _names(attributes.get("names"), classes)
        model.record = _dict(attributes.get("record"), "record")
        model.inplace = bool(attributes.get("inplace"))
        if (args := attributes.get("args")) is not None:
            model.args = _dict(args, "args")
        if (path := attributes.get("pt_path")) is not None:
            model.pt_path = str(path)
        if (source := attributes.get("source")) is not None:
            text, loaded, failed = source
            model.detector.backbone.source = WeightSource(str(text), bool(loaded), bool(failed))
        _restore_modes(model, attributes)
        return model


def store_distillation(model: TeacherStudentModel) -> Stored:
    """What a distillation is pickled as: without the teacher."""
    shared, levels = model.shared, model.levels
    attributes = {
        "shared": None if shared is None else (shared.student, shared.teacher),
        "levels": (levels.student, levels.teacher, levels.strides),
        "stride": model.stride.tolist(),
        "training": model.training,
        "frozen": [name for name, p in model.projector.named_parameters() if not p.requires_grad],
    }
    parts = model.student_model, plain(model.projector.settings), plain(attributes), _tensors(model.projector)
    return rebuild_distillation, parts


def rebuild_distillation(
    student: nn.Module, settings: dict[str, Any], attributes: dict[str, Any], state: dict[str, Tensor]
) -> nn.Module:
    """The student and the adaptation layers of an unfinished distillation, without its teacher.

    Args:
        student: A detector of ours or a YOLO.
        settings: Of its methods, see `Distillation.settings`.
        attributes: What a `TeacherStudentModel` knows besides.
        state: Tensors of the adaptation layers.

    Raises:
        UserError: They do not make a distillation.
    """
    with _refusing("its distillation cannot be built"):
        if not isinstance(student, GIDDetectionModel) and not is_yolo(student):
            raise ValueError(f"its student is a {type(student).__name__}")
        settings, attributes = plain(settings, MOST_VALUES), plain(attributes, MOST_VALUES)
        check_numbers(settings)
        with torch.random.fork_rng(devices=[]), Allocations(state, filled=True):
            projector = Distillation.from_settings(settings)
            _fill(projector, state)
        _restore_modes(projector, attributes)
        model = TeacherStudentModel.__new__(TeacherStudentModel)
        nn.Module.__init__(model)
        shared = None if attributes.get("shared") is None else SharedClasses(*map(_whole_list, attributes["shared"]))
        index = None if shared is None else (torch.tensor(shared.student), torch.tensor(shared.teacher))
        model.student_model, model.projector = cast(DetectionModel, student), projector
        copy_attr(model, student, exclude=("criterion",))
        model.__setstate__(
            {
                "teacher_model": None, "views": None, "instances": None, "sketch": None, "asked": "", "pulls": None,
                "has_objects": None, "precision": None, "shared": shared, "class_index": index,
                "levels": SharedLevels(*map(_whole_list, attributes["levels"])),
                "stride": torch.tensor([float(s) for s in attributes["stride"]]),
                "training": bool(attributes.get("training")),
            }
        )  # fmt: skip
        return model


def plain(value: Any, most: int | None = None, *, strict: bool = True) -> Any:
    """A copy of values that are nothing but data: dicts, lists, tuples, numbers, texts.

    Args:
        value: Where namespaces become dicts, sets lists, NumPy's numbers Python's, and all else, such as paths, texts.
        most: Refuse more values than these, and if `strict` other ones instead of changing them.
        strict: See `most`.

    Raises:
        ValueError: They are more, of another kind, or nested too deep.
    """
    count = 0

    def copy(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if most is not None and (count > most or depth > DEEPEST):
            raise ValueError("it holds more values than any model")
        if value is None or type(value) in {bool, int, float, str}:
            return value
        if isinstance(value, Mapping):
            return {copy(key, depth + 1): copy(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            parts = [copy(part, depth + 1) for part in value]
            return tuple(parts) if isinstance(value, tuple) else parts
        if most is not None and strict:
            raise ValueError(f"it holds a {type(value).__name__} where plain values belong")
        if isinstance(value, np.generic):
            return copy(value.item(), depth + 1)
        return copy(vars(value), depth + 1) if isinstance(value, SimpleNamespace) else str(value)

    return copy(value, 0)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever unfit values raise into one sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {str(error).rstrip('.')}.") from error
    except Exception as error:  # of values of any kind in any place
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        kind = "" if type(error) is ValueError else f" ({type(error).__name__})"
        raise UserError(f"{what}: {reason or 'wrong values'}{kind}.") from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


def _fill(model: nn.Module, state: Any) -> None:
    """Give a new model the tensors of a checkpoint, their precision and their device.

    Raises:
        ValueError: They are not the model's own.
    """
    if not isinstance(state, dict) or not all(type(v) in {Tensor, nn.Parameter} for v in state.values()):
        raise ValueError("its tensors are no dict of tensors")
    own = model.state_dict(keep_vars=True)
    missing, extra = [n for n in own if n not in state], [str(n) for n in state if n not in own]
    misfits = [
        name
        for name, value in own.items()
        if name in state
        and not (
            value.shape == state[name].shape
            and state[name].layout is torch.strided
            and (state[name].dtype in _FLOATS if value.dtype in _FLOATS else state[name].dtype == value.dtype)
        )
    ]
    if missing or extra or misfits:
        lists = (some(names, 3) or "none" for names in (missing, extra, misfits))
        raise ValueError("its tensors do not fit: missing {}; left over {}; of another shape or kind {}".format(*lists))
    floats = [value for name, value in state.items() if own[name].dtype in _FLOATS]
    if floats:
        model.to(device=floats[0].device, dtype=floats[0].dtype)  # buffers that are no part of the state too
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = state[name].detach().clone(memory_format=torch.contiguous_format)


def _restore_modes(model: nn.Module, attributes: dict[str, Any]) -> None:
    model.train(bool(attributes.get("training")))
    frozen = set(attributes.get("frozen") or ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _check_settings(settings: Any) -> None:
    """Refuse settings of which no detector would be built in bounded time, or one that is fetched from elsewhere."""
    backbone = _dict(settings, "settings").get("backbone")
    if not isinstance(backbone, str) or not _BACKBONE.fullmatch(backbone):
        raise ValueError(f"backbone={str(backbone)[:80]!r} is no name of a network")
    if not isinstance(settings.get("train") or {}, dict) or not isinstance(settings.get("settings") or {}, dict):
        raise ValueError("its settings are no dicts")
    check_numbers({key: value for key, value in settings.items() if key != "train"})  # arguments of a training
    check_anchors(settings.get("settings") or {})


def _names(names: Any, classes: int) -> dict[int, str]:
    found = _dict(names, "names")
    if sorted(found) != list(range(classes)) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"its names are not those of {classes} classes")
    return found


def _dict(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {name} are no dict")
    return value


def _whole(value: Any, name: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{name}={str(value)[:40]} must be a whole number of at least {least}")
    return value


def _whole_list(value: Any) -> list[int]:
    return [_whole(part, "an index") for part in value]


torch.serialization.add_safe_globals([rebuild_detector, rebuild_distillation])
