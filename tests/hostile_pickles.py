"""More of `hostile_files.FILES`: networks that would do what their classes do not, and pickles written by hand."""

import codecs
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_files import (
    _SETTINGS,
    EVAL,
    FILES,
    PYTHON,
    Calls,
    _contents,
    file,
    good,
    parts,
    rewritten,
    saved,
    with_parts,
)
from torch import nn
from ultralytics.nn.modules.conv import Index
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.engine.rebuild import rebuild_detector

BEFORE = len(FILES)


def yolo(change: Callable[[Any, Any], Any] | None = None) -> dict[str, Any]:
    """A checkpoint of a YOLO, after something was done to it and its first layer."""
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    model.names = {0: "a", 1: "b"}
    if change is not None:
        change(model, model.model[0])
    return {"epoch": -1, "model": model, "train_args": {"imgsz": 64}}


def _network(name: str, change: Callable[[Any, Any], Any]) -> None:
    _contents(name, lambda: yolo(change))


# Networks -------------------------------------------------------------------------------------------------------------

_METHOD = Calls(getattr, nn.Module, "requires_grad_")  # as Ultralytics' reader gives it


def _builds_another(model: Any, layer: Any) -> None:
    """The activation calls the class of a network with settings whose activation is evaluated."""
    settings = nn.ModuleDict()
    settings._modules["k"] = {"activation": PYTHON, "backbone": [[-1, 1, "Conv", [8]]], "head": [], "nc": 1}
    settings._forward_pre_hooks[0] = _METHOD
    vars(settings).update(parameters=OrderedDict, forward=nn.Identity())
    layer.act = nn.Sequential()
    layer.act._modules.update({"0": settings, "1": Index("k"), "2": DetectionModel})


_network("a network that builds another", _builds_another)
_network("a class among the layers", lambda m, layer: layer._modules.update(act=DetectionModel))
_network("a class as a value", lambda m, layer: vars(layer).update(kind=OrderedDict))
_network("a function as a value", lambda m, layer: vars(layer).update(kind=torch._utils._rebuild_tensor_v2))
_network("a method as a value", lambda m, layer: vars(layer).update(kind=_METHOD))
_network("the forward of another layer", lambda m, layer: vars(layer).update(forward=m.model[1].forward_fuse))
_network("a forward under another name", lambda m, layer: vars(layer).update(kind=layer.forward_fuse))
_network("a network as a forward", lambda m, layer: vars(layer).update(forward=nn.Identity()))
_network("a network as a method", lambda m, layer: vars(layer).update(parameters=nn.Identity()))
_network("a method that is a text", lambda m, layer: vars(m).update(fuse="yes"))
_network("a dict among the layers", lambda m, layer: layer._modules.update(act={"a": 1}))
for _hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
    _network(f"{_hooks} of a layer", lambda m, layer, hooks=_hooks: vars(layer)[hooks].update({0: nn.Identity()}))
_network("hooks that are a list", lambda m, layer: vars(layer).update(_forward_hooks=[nn.Identity()]))
_contents("hooks of a tensor", lambda: good(date=Calls(
    torch._utils._rebuild_parameter, torch.zeros(2), True, OrderedDict({0: nn.Identity()}))))  # fmt: skip
_contents("a parameter with attributes", lambda: good(date=Calls(
    torch._utils._rebuild_parameter_with_state, torch.zeros(2), True, OrderedDict(), {"detach": 1})))  # fmt: skip
_contents("a recurrent network", lambda: good(date=nn.LSTM(2, 2)))
_contents("many models", lambda: good(more=[Calls(rebuild_detector, *parts()) for _ in range(50)]), bomb=True)


# Archives -------------------------------------------------------------------------------------------------------------


@file("contents in capitals")
def _capitals(path: Path) -> None:
    path.write_bytes(saved(good()))
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/DATA.PKL", pickle.dumps(EVAL, protocol=2))


@file("two lists of contents")
def _two_lists(path: Path) -> None:
    """The end of the archive points to one list, and another stands directly before it."""
    names = {"byteorder": b"little", "version": b"3\n", "data/0": bytes(64)}
    out, lists = bytearray(), []

    def entry(name: str, content: bytes) -> bytes:
        place, full, crc = len(out), f"archive/{name}".encode(), zlib.crc32(content)
        sizes = (crc, len(content), len(content), len(full), 0)
        out.extend(struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0x21, *sizes) + full + content)
        return struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0x21, *sizes, 0, 0, 0, 0, place) + full

    shared = b"".join(entry(name, content) for name, content in names.items())
    for value in (EVAL, {"model": 1, "train_args": {}}):
        lists.append(shared + entry("data.pkl", pickle.dumps(value, protocol=2)))
    places = []
    for listed in lists:
        start = len(out)
        out.extend(listed)
        places.append(len(out))
        out.extend(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 4, 4, len(listed), start))
    out.extend(struct.pack("<IIQI", 0x07064B50, 0, places[0], 1))
    out.extend(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0))
    path.write_bytes(out)


# By hand --------------------------------------------------------------------------------------------------------------


def _below(name: str, data: bytes, *, bomb: bool = False) -> None:
    """A whole checkpoint, below which the pickle makes something else and drops it."""

    def write(path: Path) -> None:
        rewritten(
            path,
            saved(good()),
            lambda entry, content: content[:2] + data + content[2:] if entry.endswith("/data.pkl") else content,
        )

    file(name, bomb=bomb)(write)


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


_IDENTITY = b"ctorch.nn.modules.linear\nIdentity\n)\x81"
_below("bytearray(10 ** 9) that is dropped", b"cbuiltins\nbytearray\n(J\x00\xca\x9a\x3btR", bomb=True)
_below("a dropped nn.Linear", b"ctorch.nn.modules.linear\nLinear\n(J\x20\x4e\0\0J\x20\x4e\0\0tR", bomb=True)
_PARSE = b"cultralytics.nn.tasks\nparse_model\n(}" + _text("activation") + _text(PYTHON) + b"sK\x03tR"
_below("a dropped parse_model", _PARSE)
_below("an object that is filled twice", _IDENTITY + b"}b}b")
_below("a state that is a tuple", _IDENTITY + b"}}\x86b")
_below("a state with a name of bytes", _IDENTITY + b"}U\x0e_forward_hooks}K\x00K\x01ssb")
_below("a state with another call", _IDENTITY + b"}" + _text("_compiled_call_impl") + _IDENTITY + b"sb")
_CHANGED = _IDENTITY + b"}q\xff" + _text("type") + _IDENTITY + b"sbh\xff" + _text("type") + _text("x") + b"s"
_below("a state that is changed later", _CHANGED)
_below("a tensor without its storage", b"ctorch\nTensor\n)\x81")
_below("a dict with attributes", b"ccollections\nOrderedDict\n)R}" + _text("values") + _IDENTITY + b"sb")


@file("a text in hexadecimals", bomb=True)
def _hexadecimals(path: Path) -> None:
    text = Calls(codecs.encode, "aa", "latin1")
    for _ in range(27):
        text = Calls(codecs.encode, text, "hex")
    path.write_bytes(saved(good(date=text)))


_MANY = {"anchor_sizes": [[8.0] * 1000] * 5, "aspect_ratios": [1.0] * 1000}
_contents("five million anchors", lambda: with_parts(settings={"settings": {**_SETTINGS, **_MANY}}), bomb=True)
_contents("a hundred thousand anchors of octaves", lambda: with_parts(settings={"settings": {
    **_SETTINGS, "anchor_octaves": 100, "aspect_ratios": [1.0] * 1000}}), bomb=True)  # fmt: skip
