"""Exported files of the four families, static and dynamic, against PyTorch and against stock Ultralytics."""

from __future__ import annotations

import ast
from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch
from runtime_helpers import NAMES, export, picture
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from gid_yolo import GID
from gid_yolo.data import synthetic_dataset
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.exporter import GIDExporter
from gid_yolo.errors import UserError
from gid_yolo.export import check, to_onnx
from gid_yolo.export.parity import final_differences
from gid_yolo.export.session import open_session, run
from gid_yolo.ops.boxes import xywh_to_xyxy
from gid_yolo.ops.nms import class_nms

DENSE = ["retina_nano", "fcos_nano", "yolo11n.yaml"]
CONF = {"retina_nano": 0.3, "frcnn_nano": 0.3, "fcos_nano": 0.1, "yolo11n.yaml": 0.3}  # what random weights reach


def limits(name):
    return {"conf": CONF[name], "iou": 0.5, "max_det": 40}


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """The network whose file was exported last."""
    last = {}
    call = GIDExporter.__call__

    def remember(self, model):
        last["model"] = deepcopy(model).float().eval()
        return call(self, model)

    monkeypatch.setattr(GIDExporter, "__call__", remember)
    return last


def shapes(path):
    graph = onnx.load(path).graph
    return [
        [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (graph.input[0], graph.output[0])
    ]


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def images_of(*sizes):
    return [np.stack([picture(h, w, i).transpose(2, 0, 1) / np.float32(255) for i in range(b)]) for b, h, w in sizes]


@torch.no_grad()
def dense_of(network, images):
    found = network["model"](torch.from_numpy(images))
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_nms_in_the_graph_finds_what_pytorch_finds(tmp_path, network, name, dynamic):
    path = export(tmp_path, name, [64, 96], batch=2, settle=True, nms=True, dynamic=dynamic, **limits(name))
    assert shapes(path) == [
        ["batch", 3, "height", "width"] if dynamic else [2, 3, 64, 96],
        ["batch" if dynamic else 2, 40, 6],
    ]
    session, least = open_session(path), CONF[name]
    for images in images_of((2, 64, 96), *([(1, 96, 64), (3, 64, 64)] if dynamic else [])):
        found = run(session, images)
        dense = dense_of(network, images)
        boxes = xywh_to_xyxy(dense[:, :4].transpose(1, 2))
        expected = class_nms(boxes, dense[:, 4:], min_score=CONF[name], iou_threshold=0.5, max_det=40).numpy()
        assert expected[..., 4].any(axis=1).all()  # every image of the batch has its own
        # One to one, as two of nearly equal scores may change places
        differences = final_differences(
            lambda _, rows=expected: [torch.from_numpy(rows)], [found], [images], least=least
        )
        assert differences is not None
        assert differences[0] < 2 * check.BOX_LIMIT
        assert differences[1] < check.SCORE_LIMIT


@pytest.mark.parametrize("name", [*DENSE, "frcnn_nano"])
def test_stock_yolo_takes_the_nms_of_the_file(tmp_path, name):
    path = export(tmp_path, name, [64, 96], settle=True, nms=True, **limits(name))
    assert ast.literal_eval(metadata(path)["limits"]) == limits(name)
    (result,) = YOLO(path, task="detect").predict(
        picture(64, 96), imgsz=[64, 96], conf=CONF[name], max_det=40, verbose=False
    )
    rows = run(open_session(path), images_of((1, 64, 96))[0][:, ::-1].copy())[0]  # the picture is in BGR for YOLO
    rows = rows[rows[:, 4] > CONF[name]]
    assert len(rows)
    rows[:, :4] = rows[:, :4].clip(0, [96, 64, 96, 64])
    np.testing.assert_allclose(result.boxes.data.numpy(), rows, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", [*DENSE, "frcnn_nano"])
def test_no_detection_is_rows_of_zeros(tmp_path, name):
    path = export(tmp_path, name, [64, 64], batch=2, nms=True, **{**limits(name), "conf": 1.0})
    assert not run(open_session(path), images_of((2, 64, 64))[0]).any()


@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (3, False), (1, True)])
def test_outputs_say_their_shape(tmp_path, batch, dynamic):
    first = "batch" if dynamic else batch
    retina = shapes(export(tmp_path, "retina_nano", [64, 96], batch=batch, dynamic=dynamic))[1]
    # 9 anchors on maps of 64 x 96 over strides 8 to 128, rounded up: 8x12 + 4x6 + 2x3 + 1x2 + 1x1 = 129
    assert retina == [first, 4 + len(NAMES), "boxes" if dynamic else 9 * 129]
    assert shapes(export(tmp_path, "frcnn_nano", [64, 96], batch=batch, dynamic=dynamic))[1] == [first, 100, 6]


def model(name="retina_nano"):
    torch.manual_seed(0)
    made = GIDDetectionModel(name, nc=2, verbose=False)
    made.args = {"imgsz": 64, "data": None}
    return made


def test_a_file_that_answers_differently_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"of before")
    right = check.network_output
    monkeypatch.setattr(check, "network_output", lambda *args: right(*args) + 0.6)
    with pytest.raises(UserError, match=r"boxes differ by up to 0\.6 px \(limit 0\.5\)"):
        to_onnx.export(model(), {"imgsz": 64, "batch": 1}, path)
    monkeypatch.setattr(check, "network_output", lambda *args: right(*args)[:, :, 1:])
    with pytest.raises(UserError, match=r"its output is \(1, 6, \d+\), not \(1, 6, \d+\)"):
        to_onnx.export(model(), {"imgsz": 64, "batch": 1}, path)
    assert path.read_bytes() == b"of before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_a_failed_export_leaves_the_file_of_before(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"of before")

    def fail(*args, **kwargs):
        raise RuntimeError("no such\n operator")

    monkeypatch.setattr("torch.onnx.export", fail)
    with pytest.raises(UserError, match=r"the export to .*a\.onnx failed \(RuntimeError\): no such operator"):
        to_onnx.export(model(), {"imgsz": 64, "batch": 1}, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"of before"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"format": "engine"}, "format=engine is not supported"),
        ({"nms": True, "agnostic_nms": True}, "leave agnostic_nms= out"),
        ({"quantize": 4}, "quantize=4 is not supported: give quantize=16 for FP16"),
        ({"quantize": True}, "quantize=True is not supported"),
        ({"quantize": 8}, "quantize=8 finds its ranges on real images"),
        ({"quantize": 8, "data": "none.yaml"}, "none.yaml"),
        ({"quantize": 16, "half": True}, "half=True and quantize=16 each give a precision"),
        ({"half": True, "int8": True}, "half=True and int8=True each give a precision: give quantize=16 or quantize=8"),
        ({"imgsz": [64, 64, 64]}, "must be a whole number, or height and width"),
        ({"imgsz": 64.5}, "imgsz=64.5 must be a whole number"),
        ({"imgsz": -64}, "imgsz=.* is too small"),
        ({"batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"batch": -1}, "batch=-1 must be a whole number of at least 1"),
        ({"batch": 1.5}, "batch=1.5 must be a whole number of at least 1"),
        ({"batch": True}, "batch=True must be a whole number of at least 1"),
        *(({key: "no"}, f"{key}=no must be True or False") for key in to_onnx._FLAGS),
        ({"nms": 1}, "nms=1 must be True or False"),
        *(({"opset": x}, f"opset={x} must be a whole number from 11 to 20") for x in (5, 10, 21, 17.0, True, "x")),
        ({"opset": 11, "nms": True}, "opset=11 must be a whole number from 12 to 20 for a file with the NMS"),
        ({"opset": 12, "quantize": 8, "data": "x"}, "opset=12 must be a whole number from 13 to 20 for an INT8 file"),
        ({"fraction": 0.5}, "fraction=0.5 chooses the images of quantize=8"),
        ({"fraction": 2.5, "quantize": 8, "data": "none.yaml"}, "fraction=2.5"),
        ({"fraction": "half", "quantize": 8, "data": "none.yaml"}, "fraction=half"),
        ({"fraction": [0, 1], "quantize": 8, "data": "none.yaml"}, r"fraction=\[0, 1\]"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence):
        to_onnx.export(model(), {"imgsz": 64, "batch": 1, **given}, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_work_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "Calibration", None)
    monkeypatch.setattr(to_onnx, "GIDExporter", None)
    single = ("batch", -1), ("imgsz", 0), ("nms", "off"), ("fraction", -1), ("opset", 5)
    for given in (*({key: value} for key, value in single), {"agnostic_nms": True, "nms": True}):
        with pytest.raises(UserError):
            to_onnx.export(model(), {"imgsz": 64, "batch": 1, "quantize": 8, "data": "x", **given}, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="agnostic_nms=True is not supported with the NMS in the file"):
        to_onnx.export(model("frcnn_nano"), {"imgsz": 64, "batch": 1, "agnostic_nms": True}, tmp_path / "a.onnx")


@pytest.mark.parametrize("opset", [to_onnx.OLDEST_OPSET, to_onnx.NEWEST_OPSET])
def test_the_oldest_and_the_newest_opset_can_be_written(tmp_path, opset):
    path = to_onnx.export(model("frcnn_nano"), {"imgsz": 64, "batch": 1, "opset": opset}, tmp_path / "a.onnx")
    assert [x.version for x in onnx.load(path).opset_import if not x.domain] == [opset]


@pytest.mark.parametrize(("oldest", "given"), [("OLDEST_OF_NMS", {"nms": True}), ("OLDEST_OF_INT8", {"quantize": 8})])
def test_an_older_opset_gives_a_file_that_onnxruntime_does_not_open(tmp_path, monkeypatch, oldest, given):
    given = {"imgsz": 64, "batch": 1, **given}
    if "quantize" in given:
        given["data"] = synthetic_dataset(tmp_path / "set", image_size=64, counts={"train": 1, "val": 1})
    opset = getattr(to_onnx, oldest)
    path = to_onnx.export(model(), {**given, "opset": opset}, tmp_path / "a.onnx")
    assert [x.version for x in onnx.load(path).opset_import if not x.domain] == [opset]
    monkeypatch.setattr(to_onnx, oldest, opset - 1)
    with pytest.raises(UserError, match=r"is not an ONNX file that onnxruntime \S+ can open"):
        to_onnx.export(model(), {**given, "opset": opset - 1}, tmp_path / "b.onnx")


@pytest.mark.parametrize(("fraction", "count"), [(None, 9), (1.0, 9), (1, 9), (0.5, 4), (0.01, 1), (5, 5), ([3, 1], 3)])
def test_fraction_chooses_the_images_for_the_ranges(tmp_path, monkeypatch, fraction, count):
    data = synthetic_dataset(tmp_path / "set", image_size=64, counts={"train": 9, "val": 1})
    made = []
    monkeypatch.setattr(to_onnx, "quantize_int8", lambda source, target, batches: made.append(batches) or 1 / 0)
    monkeypatch.setattr(to_onnx, "check_file", lambda *_: "")
    given = {} if fraction is None else {"fraction": fraction}
    with pytest.raises(ZeroDivisionError):
        to_onnx.export(model(), {"imgsz": 64, "batch": 1, "int8": True, "data": data, **given}, tmp_path / "a.onnx")
    assert len(made[0]) == len(set(made[0].chosen)) == count
    assert made[0][0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("given", [{}, {"nms": True, "conf": 1.0}, {"quantize": 16}])
def test_the_log_names_the_file_and_nothing_that_is_gone(tmp_path, caplog, given):
    path = to_onnx.export(model(), {"imgsz": 64, "batch": 1, **given}, tmp_path / "a.onnx")
    assert caplog.messages[-1].startswith(f"ONNX file: {path.resolve()}, ")
    assert not [line for line in caplog.messages if ".export-" in line]


def test_no_error_names_a_place_that_is_gone(tmp_path, monkeypatch):
    def fail(source, *_):
        raise UserError(f"{source} has no layer to quantise.")

    monkeypatch.setattr(to_onnx, "to_fp16", fail)
    with pytest.raises(UserError) as caught:
        to_onnx.export(model(), {"imgsz": 64, "batch": 1, "quantize": 16}, tmp_path / "a.onnx")
    assert str(caught.value) == f"{tmp_path / 'a.onnx'} has no layer to quantise."


def test_what_nms_means_for_a_yolo_that_needs_none(tmp_path):
    for nms, shape in ((None, [1, 7, 126]), (True, [1, 300, 6]), (False, [1, 126, 6])):  # 126 cells in all
        path = export(tmp_path, "yolo26n.yaml", [64, 96], nms=nms)
        assert shapes(path)[1] == shape
        assert metadata(path)["end2end"] == str(nms is False)
    assert shapes(export(tmp_path, "yolo11n.yaml", [64, 96], nms=False))[1] == [1, 7, 126]  # it has no such head


def test_the_command_takes_nms(tmp_path, monkeypatch):
    path = tmp_path / "best.pt"
    made = model()
    torch.save({"model": made.half(), "train_args": {"imgsz": 64}, "epoch": -1}, path)
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(LOGGER, level, lambda text="", *_, **__: said.append(str(text)))
    file = GID(path).export(nms=True, imgsz=70)
    assert any("imgsz=70 is rounded up to [96]: the network takes multiples of 32" in text for text in said)
    assert "images (1, 3, 96, 96), output0 (1, 300, 6): x1, y1" in said[-1]
    assert shapes(file) == [[1, 3, 96, 96], [1, 300, 6]]  # rounded up to the stride; the model's own max_det
    assert "'nms': True" in metadata(file)["args"]
    with pytest.raises(UserError, match="no head without an NMS; nms=True puts the NMS into the file"):
        GID(path).export(end2end=True)
    for given in ({"nms": "no"}, {"batch": 0}, {"end2end": "maybe"}):
        with pytest.raises(UserError, match=next(iter(given))):
            GID(path).export(**given)
