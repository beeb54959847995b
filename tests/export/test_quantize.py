"""INT8 and FP16 files of the four families against the FP32 file, in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtime_helpers import export, picture

from gid_yolo.errors import UserError
from gid_yolo.export.half import to_fp16
from gid_yolo.export.quantize import leading_on, quantise_names, quantize_int8
from gid_yolo.export.session import open_session, run

FAMILIES = ["retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml"]
# The layers whose results are logits and box codes
PREDICTIONS = {
    "retina_nano": ("cls_logits", "box_deltas"),
    "fcos_nano": ("cls_logits", "box_ltrb", "centerness"),
    "frcnn_nano": ("objectness", "deltas", "cls_logits", "box_deltas"),
    "yolo11n.yaml": ("cv2.0.2", "cv2.1.2", "cv2.2.2", "cv3.0.2", "cv3.1.2", "cv3.2.2", "dfl"),
}


def images_of(count, height=64, width=96):
    return [picture(height, width, i).transpose(2, 0, 1)[None] / np.float32(255) for i in range(count)]


@pytest.fixture(scope="module", params=FAMILIES)
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    fp32 = export(folder, request.param, [64, 96], settle=True)
    int8 = quantize_int8(fp32, folder / "int8.onnx", images_of(8))
    return request.param, fp32, int8, to_fp16(fp32, folder / "fp16.onnx")


def nodes_of(path):
    return onnx.load(path).graph.node


def is_prediction(name, family):
    return any(f"/{part}" in name for part in PREDICTIONS[family]) and name.endswith(("Conv", "Gemm"))


def test_prediction_layers_stay_float_and_all_others_do_not(files):
    family, fp32, int8, _ = files
    quantised = {out for node in nodes_of(int8) if node.op_type == "DequantizeLinear" for out in node.output}
    layers = [node for node in nodes_of(int8) if node.op_type in {"Conv", "Gemm"}]
    assert len(layers) == sum(node.op_type in {"Conv", "Gemm"} for node in nodes_of(fp32))
    for node in layers:
        assert (node.input[1] in quantised) != is_prediction(node.name, family), node.name


def test_weights_are_quantised_per_channel(files):
    _, _, int8, _ = files
    graph = onnx.load(int8).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    seen = 0
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in made:
            weights, scales, zeros = (arrays[name] for name in made[node.input[1]].input)
            assert weights.dtype == np.int8
            assert scales.shape == zeros.shape == weights.shape[:1]
            assert not zeros.any()  # symmetric
            seen += 1
    assert seen > 10


def differences(path, fp32):
    """Median over the images of the median difference of boxes in pixels, and of scores."""
    one, other = open_session(path), open_session(fp32)
    pairs = [(run(one, images), run(other, images)) for images in images_of(6)]
    boxes = [np.median(np.abs(a[:, :4] - b[:, :4])) for a, b in pairs]
    scores = [np.median(np.abs(a[:, 4:] - b[:, 4:])) for a, b in pairs]
    return float(np.median(boxes)), float(np.median(scores))


def test_answers_are_near_those_of_fp32(files):
    family, fp32, int8, fp16 = files
    if family == "frcnn_nano":  # which of its proposals survive is no matter of rounding: the best ones are compared
        for path, limit in ((int8, 0.1), (fp16, 5e-3)):
            for images in images_of(6):
                found, expected = (run(open_session(p), images)[0, :5, 4] for p in (path, fp32))
                np.testing.assert_allclose(found, expected, atol=limit)
        return
    boxes, scores = differences(int8, fp32)
    # px; a random YOLO's sides are means of a nearly flat distribution over 16 cells of up to 32 px
    assert 0 < boxes < (8.0 if family == "yolo11n.yaml" else 3.0)
    assert 0 < scores < 0.05
    boxes, scores = differences(fp16, fp32)
    assert 0 < boxes < 0.1
    assert 0 < scores < 2e-3


def test_files_keep_metadata_shapes_and_versions(files):
    _, fp32, int8, fp16 = files
    source = onnx.load(fp32)
    for path in (int8, fp16):
        made = onnx.load(path)
        assert list(made.metadata_props) == list(source.metadata_props)
        assert made.ir_version <= 10
        assert [x.version for x in made.opset_import if not x.domain] == [x.version for x in source.opset_import]
        assert (made.graph.input[0], made.graph.output[0]) == (source.graph.input[0], source.graph.output[0])
        assert path.stat().st_size < fp32.stat().st_size


def test_half_precision_ends_before_the_decoding(files):
    family, _, _, fp16 = files
    graph = onnx.shape_inference.infer_shapes(onnx.load(fp16)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    decided = [
        node for node in graph.node if node.op_type in {"Exp", "TopK", "NonMaxSuppression", "Softmax", "RoiAlign"}
    ]
    for node in decided:
        assert TensorProto.FLOAT16 not in [types.get(name) for name in node.input], node.name
    for node in graph.node:
        if node.op_type in {"Conv", "Gemm"} and "dfl" not in node.name:
            assert types[node.input[1]] == TensorProto.FLOAT16, node.name
    assert decided or family == "fcos_nano"


@pytest.mark.parametrize("name", ["retina_nano", "yolo11n.yaml"])
def test_dynamic_files_with_nms(tmp_path, name):
    limits = {"conf": 0.01, "iou": 0.5, "max_det": 20}
    fp32 = export(tmp_path, name, [64, 96], settle=True, dynamic=True, nms=True, **limits)
    int8, fp16 = quantize_int8(fp32, tmp_path / "8.onnx", images_of(4)), to_fp16(fp32, tmp_path / "16.onnx")
    for made, limit in ((int8, 0.3), (fp16, 0.01)):  # INT8 clips what random weights make of another shape of image
        for batch, height, width in ((1, 64, 96), (3, 96, 64)):
            images = np.concatenate(images_of(batch, height, width))
            found, expected = run(open_session(made), images), run(open_session(fp32), images)
            assert found.shape == expected.shape == (batch, 20, 6)
            np.testing.assert_allclose(found[:, 0, 4], expected[:, 0, 4], atol=limit)  # the best of each image


def test_the_same_images_give_the_same_file(tmp_path):
    fp32 = export(tmp_path, "retina_nano", [64, 96])
    one, two = (quantize_int8(fp32, tmp_path / name, images_of(3)).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "retina_nano.onnx"]


def chain(path, *kinds):
    """A file of 1x1 convolutions and other operators in a row."""
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    nodes, name = [], "images"
    for i, kind in enumerate(kinds):
        nodes.append(helper.make_node(kind, [name, "w"] if kind == "Conv" else [name], [f"t{i}"], f"{kind}{i}"))
        name = f"t{i}"
    shape = [1, 1, 4, 4]
    inputs, outputs = (helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in ("images", name))
    graph = helper.make_graph(nodes, "g", [inputs], [outputs], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_what_leads_on(tmp_path):
    path = chain(tmp_path / "a.onnx", "Conv", "Relu", "Conv", "Sigmoid", "Relu")
    assert leading_on(onnx.load(path).graph) == {"Conv0", "Relu1"}
    assert quantise_names(onnx.load(path).graph) == ["Conv0", "Relu1"]
    decision = chain(tmp_path / "b.onnx", "Conv", "Softmax", "Conv")
    assert leading_on(onnx.load(decision).graph) == {"Softmax1"}  # behind it the features are lost


def test_what_cannot_be_quantised_is_said(tmp_path):
    one = chain(tmp_path / "one.onnx", "Conv", "Sigmoid")
    images = [np.zeros((1, 1, 4, 4), np.float32)]
    with pytest.raises(UserError, match="has no layer to quantise"):
        quantize_int8(one, tmp_path / "x.onnx", images)
    two = chain(tmp_path / "two.onnx", "Conv", "Conv")
    with pytest.raises(UserError, match="without images"):
        quantize_int8(two, tmp_path / "x.onnx", [])
    done = quantize_int8(two, tmp_path / "done.onnx", images)
    with pytest.raises(UserError, match="is quantised already"):
        quantize_int8(done, tmp_path / "x.onnx", images)
    assert not (tmp_path / "x.onnx").exists()


def test_a_file_beside_the_source_is_left_alone_and_its_folder_may_be_closed(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    source = chain(folder / "a.onnx", "Conv", "Conv")
    (folder / "a-inferred.onnx").write_bytes(b"a user's")  # the name that onnxruntime would take
    folder.chmod(0o555)
    try:
        quantize_int8(source, tmp_path / "8.onnx", [np.zeros((1, 1, 4, 4), np.float32)])
        to_fp16(source, tmp_path / "16.onnx")
    finally:
        folder.chmod(0o755)
    assert (folder / "a-inferred.onnx").read_bytes() == b"a user's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["16.onnx", "8.onnx", "closed"]


@pytest.mark.parametrize(
    ("precision", "make"),
    [("INT8", lambda a, b: quantize_int8(a, b, [np.zeros((2, 3), np.float32)])), ("FP16", to_fp16)],
)
def test_a_conversion_that_fails_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch, precision, make):
    (tmp_path / "text.onnx").write_bytes(b"no protobuf")
    source = chain(tmp_path / "a.onnx", "Conv", "Conv")
    target = tmp_path / "x.onnx"
    target.write_bytes(b"of before")
    with pytest.raises(UserError, match=rf"text\.onnx cannot be made {precision}: .*"):
        make(tmp_path / "text.onnx", target)
    with pytest.raises(UserError, match=f"a.onnx cannot be made {precision}"):
        make(source, tmp_path / "none" / "x.onnx")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(UserError, match=f"a.onnx cannot be made {precision}: .*") as caught:
        make(source, target)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"of before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "text.onnx", "x.onnx"]


def test_weights_that_half_precision_cannot_hold(tmp_path):
    path = chain(tmp_path / "a.onnx", "Conv", "Conv")
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((1, 1, 1, 1), 7e4, np.float32), "w"))
    onnx.save(model, path)
    with pytest.raises(UserError, match="w has weights over 65,504"):
        to_fp16(path, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_values_that_half_precision_cannot_hold(tmp_path):
    """On a CPU onnxruntime computes them in float32, and the file would answer as FP32 does: on a GPU it would not.

    300 x 300 x an image of 1 is 90,000, and of 0.5 45,000.
    """
    path = chain(tmp_path / "a.onnx", "Conv", "Conv")
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((1, 1, 1, 1), 300, np.float32), "w"))
    onnx.save(model, path)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    with pytest.raises(UserError, match=r"reaches 9e\+04, over 65,504, which FP16 cannot hold: export FP32 or INT8"):
        to_fp16(path, tmp_path / "x.onnx", np.ones(shape, np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx"]
    to_fp16(path, tmp_path / "x.onnx", np.full(shape, 0.5, np.float32))
