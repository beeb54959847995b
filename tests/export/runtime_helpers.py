"""Small ONNX files of each kind for the tests of the runtime: random weights, real exports."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT

from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError
from gid_yolo.export.parity import export_onnx

NAMES = {0: "round", 1: "tall", 2: "wide"}
META = {"task": "detect", "names": str(NAMES), "imgsz": "[64, 96]", "stride": "32", "batch": "1", "args": "{}"}


def export(folder: Path, name: str, imgsz: list[int], *, batch: int = 1, settle: bool = False, **arguments) -> Path:
    """The file of `model_of`."""
    return export_onnx(model_of(name, settle=settle), folder / f"{Path(name).stem}.onnx", imgsz, batch, **arguments)


def model_of(name: str, *, settle: bool = False) -> DetectionModel:
    """A model with random weights, whose scores and boxes differ from image to image."""
    torch.manual_seed(0)
    kind = DetectionModel if name.endswith(".yaml") else GIDDetectionModel
    model = kind(name, nc=len(NAMES), verbose=False).eval()
    model.names, model.task, model.pt_path = dict(NAMES), "detect", f"{name}.pt"
    model.args = dict(DEFAULT_CFG_DICT if kind is DetectionModel else DEFAULTS)
    head = model.model[-1] if kind is DetectionModel else model.detector.head
    for layer in [] if settle and kind is DetectionModel else head.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.requires_grad:  # YOLO's DFL is a constant
            nn.init.kaiming_normal_(layer.weight)
            layer.weight.data *= 1.5  # so that classes differ
    if settle and kind is DetectionModel:  # at first its features hardly differ from place to place
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # takes the statistics of these images
        with torch.no_grad():
            model.train()(
                torch.stack([torch.from_numpy(picture(64, 96, i).transpose(2, 0, 1)) / 255 for i in range(4)])
            )
        model.eval()
        for branch in head.cv3:
            branch[-1].weight.data *= 0.2  # no float32 probability is 1, which would tie
            branch[-1].bias.data.zero_()  # about half of the scores over 0.5
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth (H, W, 3) uint8 image of many colours."""
    patches = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)


def handmade(
    path: Path, shape: list, output: list, *, meta: dict | None = None, dtype: int = TensorProto.FLOAT
) -> Path:
    """A file whose output is a constant zero of a shape, with metadata."""
    images = helper.make_tensor_value_info("images", dtype, shape)
    result = helper.make_tensor_value_info("output0", dtype, output)
    zeros = helper.make_tensor("zeros", dtype, output, np.zeros(output).flatten().tolist())
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Add", ["zeros", "mean"], ["output0"]),
    ]
    graph = helper.make_graph(nodes, "graph", [images], [result], [zeros])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, META if meta is None else meta)
    save(model, path)
    return path


def one_sentence(part: str, call: Callable[[], object]) -> None:
    """The call raises a UserError of one line that holds `part`."""
    with pytest.raises(UserError) as caught:
        call()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
