"""Malicious and damaged files in the place of checkpoints, each made by one function; `FILES` has them by name."""

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.rebuild import rebuild_detector, store_detector

SENTINEL = "payload-ran"  # what every payload writes into the working folder
PYTHON = f"open({SENTINEL!r}, 'w').close()"
FILES: dict[str, Callable[[Path], Any]] = {}
BOMBS: set[str] = set()  # of FILES: what would fill the memory


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __call__(self) -> None:
        """Be callable, so that the result of a call can be what is called."""

    def __reduce__(self) -> Any:
        return self.parts


class DictThatCalls(dict):
    """A dict, but for how it is pickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {SENTINEL}",)


def file(name: str, *, bomb: bool = False) -> Callable[[Any], Any]:
    """Register a function that writes a file."""

    def register(write: Any) -> Any:
        FILES[name] = write
        if bomb:
            BOMBS.add(name)
        return write

    return register


@functools.cache
def parts() -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """What a checkpoint of retina_nano holds of it."""
    model = GIDDetectionModel("retina_nano", nc=2, verbose=False).half()
    model.names = {0: "a", 1: "b"}
    return store_detector(model)[1]


def good(**changes: Any) -> dict[str, Any]:
    """A checkpoint, with other entries."""
    return {"epoch": -1, "model": Calls(rebuild_detector, *parts()), "train_args": {"imgsz": 64}, **changes}


def with_parts(settings: Any = None, attributes: Any = None, state: Any = None) -> dict[str, Any]:
    """A checkpoint whose model is called with other parts; dicts replace single values of them."""
    own = [
        {**old, **new} if isinstance(new, dict) else old if new is None else new
        for old, new in zip(parts(), (settings, attributes, state), strict=True)
    ]
    return good(model=Calls(rebuild_detector, *own))


def saved(contents: Any, **kwargs: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(contents, buffer, **kwargs)
    return buffer.getvalue()


def rewritten(path: Path, contents: bytes, change: Callable[[str, bytes], bytes], **kwargs: Any) -> None:
    """The same archive with other entries."""
    with zipfile.ZipFile(io.BytesIO(contents)) as old, zipfile.ZipFile(path, "w", **kwargs) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))


def archive(path: Path, data: bytes, storage: bytes = b"\0" * 64) -> None:
    """An archive in the form of `torch.save` with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as new:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("data/0", storage), ("version", b"3\n")):
            new.writestr(f"archive/{name}", content)


def _contents(name: str, make: Callable[[], Any], *, bomb: bool = False, **kwargs: Any) -> None:
    file(name, bomb=bomb)(lambda path: path.write_bytes(saved(make(), **kwargs)))


# Payloads -------------------------------------------------------------------------------------------------------------

SYSTEM = Calls(os.system, f"touch {SENTINEL}")
EVAL = Calls(eval, PYTHON)
_GETATTR = Calls(  # nn.Linear.__init__.__globals__["__builtins__"]["eval"], as far as getattr leads
    Calls(getattr, Calls(getattr, Calls(getattr, nn.Linear, "__init__"), "__globals__"), "__getitem__"), "__builtins__"
)
_contents("os.system as the model", lambda: good(model=SYSTEM))
_contents("os.system alone", lambda: SYSTEM)
_contents("eval as the model", lambda: good(model=EVAL))
_contents("exec as the model", lambda: good(model=Calls(exec, PYTHON)))
_contents("a process as the model", lambda: good(model=Calls(subprocess.Popen, ["touch", SENTINEL])))
_contents("a chain of getattr", lambda: good(date=_GETATTR))
_contents("a payload in the optimizer", lambda: good(optimizer={"state": {0: {"step": SYSTEM}}, "param_groups": []}))
_contents("a payload in train_args", lambda: good(train_args={"imgsz": EVAL}))
_contents("a payload in the record", lambda: with_parts(attributes={"record": {"data": EVAL}}))
_contents("a payload in the names", lambda: with_parts(attributes={"names": {0: "a", 1: EVAL}}))
_contents("a payload behind the model", lambda: good(zzz=EVAL))
_contents("a payload as a tensor", lambda: with_parts(state={"model.0.head.cls_logits.bias": EVAL}))
_contents("a payload in a tensor's hooks", lambda: good(date=Calls(
    torch._utils._rebuild_parameter, torch.zeros(2), True, OrderedDict({0: EVAL}))))  # fmt: skip
_contents("a dict that calls", lambda: good(train_args=DictThatCalls()))
_contents("a payload in protocol 4", lambda: good(model=EVAL), pickle_protocol=4)
_contents("a payload in the old format", lambda: good(model=EVAL), _use_new_zipfile_serialization=False)
_contents("functools.partial", lambda: good(date=Calls(functools.partial, eval, PYTHON)))
file("a plain pickle of protocol 0")(lambda path: path.write_bytes(pickle.dumps(EVAL, protocol=0)))
file("a plain pickle of protocol 5")(lambda path: path.write_bytes(pickle.dumps(good(model=SYSTEM), protocol=5)))
file("posix.system by hand")(lambda path: archive(path, f"cposix\nsystem\n(Vtouch {SENTINEL}\ntR.".encode()))
file("nt.system and INST")(lambda path: archive(path, f"(Vtouch {SENTINEL}\nios\nsystem\n.".encode()))
file("getattr of builtins")(lambda path: archive(
    path, b"c__builtin__\ngetattr\n(c__builtin__\n__dict__\nX\x04\0\0\0evaltR(X\x05\0\0\0open(tR."))  # fmt: skip
file("a class that is filled")(lambda path: archive(
    path, b"\x80\x02ctorch.nn.modules.linear\nLinear\n}(X\x07\0\0\0forwardcbuiltins\neval\nub."))  # fmt: skip


# Not checkpoints ------------------------------------------------------------------------------------------------------

_contents("the old format without a payload", lambda: {"model": torch.zeros(2)}, _use_new_zipfile_serialization=False)
_contents("a tensor", lambda: torch.zeros(3))
_contents("a list", lambda: [torch.zeros(3)])
_contents("a dict without a model", lambda: {"epoch": 3, "train_args": {}})
_contents("a model that is a tensor", lambda: good(model=torch.zeros(3)))
_contents("a model that is a text", lambda: good(model="retina_nano"))
_contents("a model that is a dict", lambda: good(model=OrderedDict(parts()[2])))
_contents("a state dict alone", lambda: dict(parts()[2]))
_contents("an ordered state dict alone", lambda: OrderedDict(parts()[2]))
_contents("a module of torch", lambda: good(model=nn.Linear(2, 2)))
_contents("train_args that are a list", lambda: good(train_args=["imgsz"]))
_contents("an epoch that is a text", lambda: good(epoch="3"))
_contents("a fitness that is a text", lambda: good(best_fitness="high"))
_contents("an optimizer that is a list", lambda: good(optimizer=[1]))
_contents("an optimizer without groups", lambda: good(optimizer={"state": {}}))
_contents("a quantised network", lambda: good(modelopt={"state": 1}))
file("an empty file")(lambda path: path.write_bytes(b""))
file("a folder")(lambda path: path.mkdir())
file("a web page")(lambda path: path.write_text("\n<!DOCTYPE html><html><body>404: Not Found</body></html>"))
file("a pointer of Git LFS")(lambda path: path.write_text(
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d1"
    "7e2393\nsize 12345\n"))  # fmt: skip
file("text")(lambda path: path.write_text("the weights will follow\n"))
file("zeros")(lambda path: path.write_bytes(b"\0" * 1000))
file("gzip")(lambda path: path.write_bytes(b"\x1f\x8b\x08\0" + b"\0" * 100))
file("JPEG")(lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(range(256))))


@file("TorchScript")
def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


@file("safetensors")
def _safetensors(path: Path) -> None:
    head = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 4)


@file("ONNX")
def _onnx(path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), path)


@file("another zip")
def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("images/0.png", b"1234")


@file("two contents")
def _two_contents(path: Path) -> None:
    archive(path, b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as new:
        new.writestr("archive/data.pkl", pickle.dumps(EVAL, protocol=2))


@file("a storage that is missing")
def _no_storage(path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(good()))) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith("/data/7"):
                new.writestr(entry.filename, old.read(entry))


for _share in (0.001, 0.1, 0.5, 0.99, 0.9999):
    file(f"{_share:.2%} of a checkpoint")(
        lambda path, share=_share: path.write_bytes((data := saved(good()))[: int(share * len(data))])
    )
for _place in (b"retina_nano", b"numpy", b"rebuild_detector", b"PK\x01\x02", b"PK\x05\x06", b"_rebuild_tensor_v2"):

    @file(f"a flipped bit in {_place.decode('latin1')!r}")
    def _flipped(path: Path, place: bytes = _place) -> None:
        data = bytearray(saved(good(numbers="numpy")))
        data[data.index(place) + 3] ^= 4
        path.write_bytes(data)


@file("a flipped bit in a tensor")
def _flipped_tensor(path: Path) -> None:
    data = bytearray(saved(good()))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Bombs ----------------------------------------------------------------------------------------------------------------


def tensor(numbers: int, size: tuple[int, ...], stride: tuple[int, ...], kind: str = "FloatStorage") -> bytes:
    """A pickle of a dict with one tensor as its model, of a storage that is said to hold so many numbers."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value: Any) -> Any:
            kinds = getattr(torch, kind)
            return ("storage", kinds, "0", "cpu", numbers) if isinstance(value, Storage) else None

    call = Calls(torch._utils._rebuild_tensor_v2, Storage(), 0, size, stride, False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"model": call, "train_args": {}})
    return buffer.getvalue()


file("a huge declared tensor", bomb=True)(lambda path: archive(path, tensor(10**11, (10**11,), (1,))))
file("a tensor beyond its storage", bomb=True)(lambda path: archive(path, tensor(16, (10**10,), (1,))))
file("a tensor of stride 0", bomb=True)(lambda path: archive(path, tensor(16, (10**5, 10**6), (0, 0))))
file("a tensor of negative size", bomb=True)(lambda path: archive(path, tensor(16, (-5,), (1,))))
file("a tensor whose offset is out", bomb=True)(lambda path: archive(path, tensor(16, (4,), (10**9,))))
file("an index of 2 ** 31", bomb=True)(lambda path: archive(path, b"\x80\x02}r\xff\xff\xff\x7f."))
file("a number of 200 MB", bomb=True)(lambda path: archive(path, b"\x80\x02\x8b\xff\xff\xff\x0b" + b"\x01" * 1000))


@file("compressed zeros", bomb=True)
def _zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", b"\0" * 2**26)


@file("compressed tensors", bomb=True)
def _compressed(path: Path) -> None:
    data = {"model": torch.zeros(2**24), "train_args": {}}
    rewritten(path, saved(data), lambda _, content: content, compression=zipfile.ZIP_DEFLATED)


@file("an entry that claims more than the file", bomb=True)
def _claims(path: Path) -> None:
    data = saved(good())
    at = data.rindex(b"PK\x01\x02")  # the last entry of the list of contents: compressed size, size
    path.write_bytes(data[: at + 20] + struct.pack("<II", 2**31, 2**31) + data[at + 28 :])


@file("many views of one storage", bomb=True)
def _views(path: Path) -> None:
    base = torch.zeros(2**20)
    path.write_bytes(saved(good(views=[base.view(2**20) for _ in range(500)])))


@file("deeply nested", bomb=True)
def _nested(path: Path) -> None:
    archive(path, b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".")


@file("a billion laughs", bomb=True)
def _laughs(path: Path) -> None:
    value: Any = ["ha"] * 10
    for _ in range(9):
        value = [value] * 10
    path.write_bytes(saved(with_parts(attributes={"record": {"joke": value}})))


@file("a record that holds itself", bomb=True)
def _itself(path: Path) -> None:
    record: dict[str, Any] = {}
    record["record"] = record
    path.write_bytes(saved(with_parts(attributes={"record": record})))


_contents("bytearray(10 ** 11)", lambda: good(date=Calls(bytearray, 10**11)), bomb=True)
_contents("nn.Linear(10 ** 6, 10 ** 6)", lambda: good(model=Calls(nn.Linear, 10**6, 10**6)), bomb=True)
_contents("a sparse tensor", lambda: good(date=torch.sparse_coo_tensor([[0]], [1.0], (10**12,))), bomb=True)


# Hostile values in our own format -------------------------------------------------------------------------------------

_BIAS = "model.0.head.cls_logits.bias"
_SETTINGS = parts()[0]["settings"]
for _name, _value in {
    "an unknown backbone": {"backbone": "resnet19"},
    "a backbone to download": {"backbone": "hf-hub:someone/something"},
    "a backbone in a folder": {"backbone": "local-dir:/tmp/x"},
    "a backbone that is a number": {"backbone": 5},
    "a much larger backbone": {"backbone": "convnext_xxlarge"},
    "an unknown detector": {"detector": "ssd"},
    "another detector": {"detector": "faster_rcnn"},
    "a billion classes": {"nc": 10**9},
    "a million classes": {"nc": 10**6},
    "minus one class": {"nc": -1},
    "classes that are a text": {"nc": "2"},
    "classes that are true": {"nc": True},
    "a billion channels": {"settings": {**_SETTINGS, "fpn_channels": 10**9}},
    "a hundred thousand channels": {"settings": {**_SETTINGS, "fpn_channels": 10**5}},
    "minus 64 channels": {"settings": {**_SETTINGS, "fpn_channels": -64}},
    "channels that are a list": {"settings": {**_SETTINGS, "fpn_channels": [64]}},
    "a billion convolutions": {"settings": {**_SETTINGS, "num_convs": 10**9}},
    "a billion octaves": {"settings": {**_SETTINGS, "anchor_octaves": 10**9}},
    "a million aspect ratios": {"settings": {**_SETTINGS, "aspect_ratios": [1.0] * 10**6}},
    "infinite anchors": {"settings": {**_SETTINGS, "anchor_scale": float("inf")}},
    "an unknown setting": {"settings": {**_SETTINGS, "depth": 3}},
    "settings that are a text": {"settings": "all"},
    "train: that is a list": {"train": [1]},
}.items():
    _contents(_name, lambda value=_value: with_parts(settings=value), bomb="illion" in _name or "arger" in _name)
_contents("settings that are a tensor", lambda: with_parts(settings=torch.zeros(2)))
_contents("settings that hold a tensor", lambda: with_parts(settings={"nc": torch.zeros(10**6)}))
_contents("names that are a list", lambda: with_parts(attributes={"names": ["a", "b"]}))
_contents("names of other classes", lambda: with_parts(attributes={"names": {0: "a"}}))
_contents("a source without its parts", lambda: with_parts(attributes={"source": ("x",)}))
_contents("a billion other classes", lambda: with_parts(attributes={"other_classes": 10**9}), bomb=True)
_contents("attributes that are a list", lambda: with_parts(attributes=["training"]))
_contents("a state that is a list", lambda: with_parts(state=[torch.zeros(2)]))
_contents("a state of numbers", lambda: with_parts(state={_BIAS: 5}))
_contents("a tensor of another shape", lambda: with_parts(state={_BIAS: torch.zeros(7).half()}))
_contents("a tensor of another kind", lambda: with_parts(state={_BIAS: torch.zeros(18, dtype=torch.int64)}))
_contents("a tensor too many", lambda: with_parts(state={"model.0.extra": torch.zeros(2)}))
_contents("a tensor too few", lambda: good(model=Calls(
    rebuild_detector, *parts()[:2], {k: v for k, v in parts()[2].items() if k != _BIAS})))  # fmt: skip
_contents("too few arguments", lambda: good(model=Calls(rebuild_detector, parts()[0])))
