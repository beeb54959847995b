"""Winograd's convolutions against onnxruntime's own, by themselves and in exported detectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtime_helpers import export, picture
from ultralytics import YOLO

from gid_yolo.errors import UserError
from gid_yolo.export import winograd
from gid_yolo.export.session import open_session, run
from gid_yolo.export.winograd import to_winograd


def one_layer(path: Path, shape, c_out=128, *, bias=True, group=1, kernel=3, **attributes):
    """A file that is one convolution, with metadata."""
    rng = np.random.default_rng(0)
    c_in = shape[1]
    weight = rng.standard_normal((c_out, c_in // group, kernel, kernel)) / (kernel**2 * c_in) ** 0.5
    tensors = {"weight": weight, **({"bias": rng.standard_normal(c_out)} if bias else {})}
    attributes = {"pads": [1, 1, 1, 1], "kernel_shape": [kernel] * 2, "group": group, **attributes}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", *tensors], ["output0"], name="conv", **attributes)],
        "one",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [shape[0], c_out, "rows", "columns"])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(made, {"stride": "32"})
    onnx.save(made, path)
    return path


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (13, 19), (30, 17)])
def test_equals_the_convolution(tmp_path, height, width, batch, bias):
    shape = [batch, 160, height, width]
    plain = one_layer(tmp_path / "plain.onnx", shape, bias=bias)
    assert to_winograd(plain, tmp_path / "fast.onnx") == 1
    assert "Conv" not in kinds(tmp_path / "fast.onnx")
    onnx.checker.check_model(tmp_path / "fast.onnx", full_check=True)
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    expected, found = (run(open_session(tmp_path / f"{name}.onnx"), x) for name in ("plain", "fast"))
    assert found.shape == expected.shape == (batch, 128, height, width)
    # Results are of size 1; rounding of float32 (6e-8) over 36 * 160 sums
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_matrices_convolve_exactly():
    # In one dimension and float64: 4 results of 3 taps on 6 values
    g, d = np.random.default_rng(0).standard_normal((2, 6))
    g = g[:3]
    products = (winograd._filter_matrix() @ g) * (winograd._input_matrix() @ d)
    np.testing.assert_allclose(winograd._powers(4).T @ products, np.correlate(d, g, "valid"), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ([1, 128, 32, 32], {"strides": [2, 2]}),
        ([1, 128, 32, 32], {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        ([1, 128, 32, 32], {"pads": [0, 0, 0, 0]}),
        ([1, 128, 32, 32], {"kernel": 1, "pads": [0, 0, 0, 0]}),
        ([1, 512, 32, 32], {"group": 2}),
        ([1, 16, 32, 32], {}),  # 16 * 128 channels
        ([1, 128, 12, 16], {}),  # 12 tiles
        ([1, 128, "height", "width"], {}),
    ],
)
def test_what_would_not_gain_stays(tmp_path, shape, arguments):
    plain = one_layer(tmp_path / "plain.onnx", shape, **arguments)
    assert to_winograd(plain, tmp_path / "same.onnx") == 0
    one, other = onnx.load(plain), onnx.load(tmp_path / "same.onnx")
    assert one == other


def weights_of(path):
    return [tensor.name for tensor in onnx.load(path).graph.initializer]


@pytest.mark.parametrize("name", ["retina_r18", "fcos_r18", "frcnn_r18"])
def test_an_exported_detector_finds_the_same(tmp_path, name):
    (tmp_path / "fast").mkdir()
    arguments = {"settle": True, "nms": True, "conf": 0.1, "max_det": 40}
    plain = export(tmp_path, name, [128, 160], **arguments)
    fast = export(tmp_path / "fast", name, [128, 160], winograd=True, **arguments)
    assert kinds(fast).count("Conv") < kinds(plain).count("Conv")
    names = weights_of(fast)
    assert len(names) == len(set(names))
    assert onnx.load(fast).metadata_props[0].key == onnx.load(plain).metadata_props[0].key
    image = picture(128, 160).transpose(2, 0, 1)[None] / np.float32(255)
    one, other = (run(open_session(path), image)[0] for path in (plain, fast))
    assert (one[:, 4] > 0).any()
    np.testing.assert_allclose(np.sort(other[:, 4]), np.sort(one[:, 4]), atol=1e-3)


def test_filters_are_shared_by_the_levels(tmp_path):
    # At 256 px the head's convolutions run on maps of 32 and 16 cells by Winograd's algorithm, on smaller as they are
    path = export(tmp_path, "retina_r18", [256, 256], winograd=True)
    filters = [name for name in weights_of(path) if name.startswith("winograd_model") and "tower" in name]
    assert len(filters) == 8
    shared = [node for node in onnx.load(path).graph.node if node.op_type == "MatMul" and node.input[1] in filters]
    assert len(shared) == 16


def test_stock_yolo_takes_the_file(tmp_path):
    path = export(tmp_path, "retina_r18", [128, 160], winograd=True, settle=True, nms=True, conf=0.1, max_det=40)
    (result,) = YOLO(path, task="detect").predict(picture(128, 160), imgsz=[128, 160], conf=0.1, verbose=False)
    assert len(result.boxes)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"winograd": True, "quantize": 16}, "winograd=True is for FP32 files of a fixed size"),
        ({"winograd": True, "dynamic": True}, "winograd=True is for FP32 files of a fixed size"),
        ({"winograd": "fast"}, "winograd=fast must be True or False"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence):
        export(tmp_path, "retina_nano", [64, 96], **given)
    assert not list(tmp_path.iterdir())
