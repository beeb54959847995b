"""What the pickle of a checkpoint may name, call and fill; everything else could run code, or fill the memory."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from gid_yolo.weights.inert import Inert, Refused

# What a checkpoint calls: tensors, numbers, paths, and our own two functions
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
MODELS = ("gid_yolo.engine.rebuild.rebuild_detector", "gid_yolo.engine.rebuild.rebuild_distillation")
NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
DTYPE = "numpy.dtype"
ORDERED = "collections.OrderedDict"
GETATTR = "builtins.getattr"
NAMESPACES = ("ultralytics.utils.IterableSimpleNamespace", "ultralytics.yolo.utils.IterableSimpleNamespace")
CALLED = frozenset({
    *TENSORS, PARAMETER, *MODELS, *NUMBERS, *NAMESPACES, ORDERED, DTYPE, "_codecs.encode",
    "torch.Size", "torch.device",
    "torch.serialization._get_layout", "builtins.set",
    GETATTR,  # which Ultralytics' reader replaces by one for networks alone
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
})  # fmt: skip
# What else one names: the classes of networks, which are made without their constructors, and kinds of numbers.
# PyTorch's reader, with Ultralytics' list, has the last word
_LAYERS = "activation batchnorm container conv dropout flatten instancenorm linear loss normalization padding pooling"
_NETWORKS = (
    *(f"torch.nn.modules.{kind}." for kind in (*_LAYERS.split(), "pixelshuffle", "upsampling")),
    *("ultralytics.nn.modules.", "ultralytics.nn.tasks.", "ultralytics.nn.distill_model."),
)
_LOSSES = ("ultralytics.utils.loss.", "ultralytics.utils.tal.")
_ALIASES = {  # as Ultralytics' reader has them
    "ultralytics.nn.modules.block.Silence": "torch.nn.modules.linear.Identity",
    "ultralytics.nn.tasks.YOLOv10DetectionModel": "ultralytics.nn.tasks.DetectionModel",
    "ultralytics.utils.loss.v10DetectLoss": "ultralytics.utils.loss.E2EDetectLoss",
    "ultralytics.yolo.utils.IterableSimpleNamespace": "ultralytics.utils.IterableSimpleNamespace",
}
_TORCH = re.compile(
    r"torch\.(\w+Storage|storage\.UntypedStorage|Tensor|nn\.parameter\.Parameter|strided|(b?float|u?int|bool)\w*)"
    r"|torch\._utils\._rebuild_\w+|builtins\.(bytearray|complex)|collections\.Counter"  # refused where called
)
ITEM_SIZES = {
    **{"DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2},
    **{"BFloat16Storage": 2, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
}
# Classes that are values: kinds of numbers. What else is named is made or called, and nothing else
_VALUES = re.compile(r"torch\.(\w+Storage|storage\.UntypedStorage|strided|(b?float|u?int|bool)\w*)")
MOST_MODELS = 4  # a distillation and its student, as they are and averaged
_DTYPE = re.compile(r"[<>|=]?[biuf][1248]?")


def is_data(name: str) -> bool:
    """True for a name that a checkpoint needs and that, as PyTorch and Ultralytics read it, runs nothing."""
    return name.startswith((*_NETWORKS, *_LOSSES)) or name in CALLED or bool(_TORCH.fullmatch(name))


def check_objects(made: Iterable[Inert], records: Mapping[str, int]) -> None:
    """Refuse objects that could do anything but hold numbers, or that would cost more than they should.

    Args:
        made: All that a pickle makes, whether it keeps them or not.
        records: Bytes of each storage in the file, by its key.

    Raises:
        Refused: What one of them is.
    """
    claimed, models = 0, 0
    for value in made:
        claimed += _check_object(value, records)
        models += value.path in MODELS
    if claimed > 2 * sum(records.values()) + 2**20:  # a storage may be shared, but not by everything
        raise Refused(f"its tensors claim {claimed} bytes, of which the file holds {sum(records.values())}")
    if models > MOST_MODELS:
        raise Refused(f"it holds {models} models")


def check_array(value: Inert) -> None:
    """Refuse what is no part of an array of numbers."""
    path, args, state = value.path, value.args, value.state
    if path in ARRAYS and value.called:
        array = len(args) == 3 and getattr(args[0], "path", "") == "numpy.ndarray" and args[1] == (0,)
        filled = isinstance(state, tuple) and len(state) == 5 and _path(state[2]) == DTYPE and value.builds == 1
        if not (array and isinstance(args[0], type) and filled):
            raise Refused("it holds an array that is none")
    elif path in (DTYPE, ORDERED, "_codecs.encode", *NUMBERS):
        _check_object(value, {})
    else:
        raise Refused(f"it holds a {path}")


def check_value(value: Any, ignored: tuple[str, ...] = ()) -> None:
    """Refuse a class or a function where a value belongs: it could be called later."""
    path = getattr(value, "path", "") if isinstance(value, type) else ""
    if path and not _VALUES.fullmatch(path) and not path.startswith(ignored):
        raise Refused(f"it holds {path} itself as a value, which no checkpoint needs")


def _check_object(value: Inert, records: Mapping[str, int]) -> int:
    """Refuse an object that would cost more than it should; bytes that it claims."""
    path, args = value.path, value.args
    if path == ".storage":
        _check_storage(args[0], records)
        return 0
    if value.builds > 1:
        raise Refused(f"it fills a {path} twice, which no checkpoint needs")
    if not value.called:
        if args or not path.startswith((*_NETWORKS, *_LOSSES)):
            raise Refused(f"it makes a {path} with arguments, which no checkpoint needs")
        _check_state(value)
        return 0
    if path not in CALLED:
        raise Refused(f"it calls {path}, which no checkpoint needs")
    if path != DTYPE and (value.items or value.state is not None) and path not in (ORDERED, *NAMESPACES):
        raise Refused(f"it fills what {path} returns, which no checkpoint needs")
    if path in NAMESPACES:
        _check_state(value)
    elif path == ORDERED and value.state is not None and not _only_metadata(value.state):
        raise Refused("it holds a dict with attributes")
    elif path == DTYPE and not _is_dtype(value):
        raise Refused("it holds an array type that is no number's")
    elif path in NUMBERS and (len(args) != 2 or _path(args[0]) != DTYPE or not _text(args[1])):
        raise Refused("it holds a number without its bytes")
    elif path == "_codecs.encode" and not (len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1"):
        raise Refused("it encodes a text otherwise than pickle does")  # the codecs also compress, and take long
    elif path == GETATTR and not _is_forward(args):
        raise Refused("it takes an attribute of something, which no checkpoint needs")
    elif (path == PARAMETER and not all(map(_empty, args[2:]))) or (path in TENSORS and not all(map(_empty, args[5:]))):
        raise Refused("it holds a tensor with hooks")
    return _tensor_bytes(args, records) if path in TENSORS else 0


def _check_state(value: Inert) -> None:
    """Refuse what would make a network do anything else than its classes do."""
    kind, state = _class_of(value.path), value.state
    if value.items or not isinstance(state, dict | None):
        raise Refused(f"it fills a {value.path} with what is no dict")
    for key, part in (state or {}).items():
        place = f"the {str(key)[:40]} of a {value.path}"
        if not isinstance(key, str) or key.startswith("__") or key == "_compiled_call_impl":
            raise Refused(f"it fills {place}, which no checkpoint needs")
        if "_hooks" in key and not _empty(part):
            raise Refused(f"it holds hooks: {place}")
        if key == "forward" and _path(part) == GETATTR and part.args[0] is value:
            continue  # of a layer that was fused
        if key == "type" and isinstance(part, str):
            continue  # the name that Ultralytics gives a layer
        if _path(part) == GETATTR or _is_method(kind, key):
            raise Refused(f"it replaces a method: {place}")
        if key == "_modules" and not all(child is None or _is_network(child) for child in _values(part)):
            raise Refused(f"it holds something else than networks in {place}")


def _class_of(path: str) -> type:
    """The class of this path, which is not imported for that."""
    module, _, name = _ALIASES.get(path, path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type):
        raise Refused(f"it holds a {path}, which is not known here")
    return found


def _is_method(kind: type, key: str) -> bool:
    found = inspect.getattr_static(kind, key, None)
    return callable(found) or isinstance(found, classmethod | staticmethod)


def _is_forward(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and _is_network(args[0]) and args[1] in ("forward", "forward_fuse")


def _is_network(value: Any) -> bool:
    return isinstance(value, Inert) and not value.called and value.path.startswith((*_NETWORKS, *_LOSSES))


def _values(value: Any) -> list[Any]:
    """The values of a dict, which may be an ordered one; of anything else, itself."""
    if isinstance(value, Inert) and value.path == ORDERED and not any(value.args):
        return [part for _, part in value.items]
    return list(value.values()) if isinstance(value, dict) else [value]


def _empty(value: Any) -> bool:
    """True for nothing, and for what holds nothing."""
    if isinstance(value, Inert):
        return value.path == ORDERED and value.called and not any(value.args) and not value.items and not value.state
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _only_metadata(state: Any) -> bool:
    return isinstance(state, dict) and set(state) <= {"_metadata"}  # of `state_dict`


def _check_storage(pid: Any, records: Mapping[str, int]) -> None:
    """(`storage`, kind, key, device, elements), as `torch.save` writes it."""
    if not (
        isinstance(pid, tuple)
        and len(pid) in (5, 6)
        and not any(pid[5:])
        and pid[0] in ("storage", b"storage")
        and _count(pid[4])
    ):
        raise Refused("it refers to something that is no storage of a tensor")
    if records.get(_key(pid)) is None:
        raise Refused(f"the storage {str(pid[2])[:20]} of a tensor is missing")
    if pid[4] * _item_size(pid) > records[_key(pid)]:
        raise Refused(f"a tensor claims {pid[4]} numbers, of which the file holds {records[_key(pid)]} bytes")


def _tensor_bytes(args: tuple[Any, ...], records: Mapping[str, int]) -> int:
    """Bytes of (storage, offset, size, stride, ...) if every number has a place of its own."""
    storage, offset, size, stride = args[:4] if len(args) >= 4 else (None,) * 4
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and all(map(_count, (*size, *stride)))
    if _path(storage) != ".storage" or not _count(offset) or not shaped or len(size) != len(stride):
        raise Refused("it holds a tensor whose shape is no shape")
    pid = storage.args[0]
    _check_storage(pid, records)
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
    if count > pid[4] or last >= pid[4]:
        raise Refused(f"a tensor of shape {list(size)[:6]} claims more numbers than the {pid[4]} of its storage")
    return count * _item_size(pid)


def _is_dtype(value: Inert) -> bool:
    """True for NumPy's own kinds of numbers: `dtype("f8", False, True)` and the state it is pickled with."""
    order, state = ("<", ">", "|", "="), value.state
    plain = state is None or (
        isinstance(state, tuple) and state[2:7] == (None, None, None, -1, -1) and state[1] in order and not value.items
    )
    return plain and bool(value.args) and isinstance(value.args[0], str) and bool(_DTYPE.fullmatch(value.args[0]))


def _item_size(pid: tuple[Any, ...]) -> int:
    kind = pid[1].path if isinstance(pid[1], type) and issubclass(pid[1], Inert) else ""
    return ITEM_SIZES.get(kind.rpartition(".")[2], 1)


def _key(pid: tuple[Any, ...]) -> str:
    return pid[2].decode("latin1") if isinstance(pid[2], bytes) else str(pid[2])


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _path(value: Any) -> str:
    return value.path if isinstance(value, Inert) else ""


def _text(value: Any) -> bool:
    return isinstance(value, str | bytes) or _path(value) == "_codecs.encode"
