"""The check of an exported file: what differs from PyTorch is refused, ties are not."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from runtime_helpers import export, model_of

from gid_yolo.data import synthetic_dataset
from gid_yolo.engine.exporter import GIDExporter
from gid_yolo.errors import UserError
from gid_yolo.export import to_onnx
from gid_yolo.export.check import check_file, wrong_detections

FINAL = {
    "retina_nano": {"nms": True, "conf": 0.3, "iou": 0.2},
    "fcos_nano": {"nms": True, "conf": 1.0, "iou": 0.2},  # nothing is detected: a lower score is compared
    "frcnn_nano": {"conf": 1.0},
    "yolo11n.yaml": {"nms": True, "dynamic": True},
    "yolo26n.yaml": {"nms": False},
}


class Doubled(torch.nn.Module):
    """(B, 3, H, W) twice, (B, 6, H * W)."""

    def forward(self, images):
        return torch.cat([images, images], 1).flatten(2)


@pytest.mark.parametrize("fault", ["", "batch", "size"])
def test_a_dynamic_file_is_tried_where_its_axes_differ(tmp_path, fault):
    shape = np.array([1 if fault == "batch" else 0, 6, -1], np.int64)  # 0: as many as come
    images = "turned" if fault == "size" else "images"  # height and width exchanged, equal in a square
    nodes = [
        helper.make_node("Transpose", ["images"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("Concat", [images, images], ["both"], axis=1),
        helper.make_node("Reshape", ["both", "shape"], ["output0"]),
    ]
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)
        for name, axes in (("images", ["batch", 3, "height", "width"]), ("output0", ["batch", 6, "boxes"]))
    )
    graph = helper.make_graph(nodes, "doubled", [given], [made], [numpy_helper.from_array(shape, "shape")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "a.onnx")
    if not fault:
        assert "within 0 px" in check_file(tmp_path / "a.onnx", Doubled(), None, None)
        return
    with pytest.raises(UserError, match="does not answer as the checkpoint does"):
        check_file(tmp_path / "a.onnx", Doubled(), None, None)


def move(graph):
    """Boxes one pixel to the right."""
    add(graph, [1, 0, 1, 0, 0, 0])


def rename(graph):
    """Classes counted from 1."""
    add(graph, [0, 0, 0, 0, 0, 1])


def add(graph, row):
    """Change the output by a row."""
    for node in graph.node:
        node.output[:] = ["before" if name == "output0" else name for name in node.output]
    graph.initializer.append(numpy_helper.from_array(np.array(row, np.float32), "row"))
    graph.node.append(helper.make_node("Add", ["before", "row"], ["output0"]))


def keep_all(graph):
    """No box suppresses another."""
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.float32), "one"))
    for node in graph.node:
        if node.op_type == "NonMaxSuppression":
            node.input[3] = "one"


def tampered(monkeypatch, change):
    """Let everything that is exported be changed behind the exporter's back."""
    call = GIDExporter.__call__

    def wrong(self, model):
        call(self, model)
        file = onnx.load(self.path)
        change(file.graph)
        onnx.save(file, self.path)

    monkeypatch.setattr(GIDExporter, "__call__", wrong)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("retina_nano", move),
        ("retina_nano", keep_all),
        ("fcos_nano", rename),
        ("frcnn_nano", move),
        ("frcnn_nano", keep_all),
        ("yolo11n.yaml", keep_all),
        ("yolo26n.yaml", rename),
    ],
)
def test_final_files_that_differ_are_not_kept(tmp_path, monkeypatch, name, change):
    tampered(monkeypatch, change)
    with pytest.raises(UserError, match=r"\d+ of \d+ detections on noise are not those of PyTorch; it was not written"):
        export(tmp_path, name, [64, 96], settle=True, **FINAL[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FINAL)
def test_final_files_that_do_not_differ_are_kept(tmp_path, caplog, name):
    path = export(tmp_path, name, [64, 96], batch=2, settle=True, **FINAL[name])
    assert list(tmp_path.iterdir()) == [path]
    assert "; on noise within " in caplog.messages[-1]


def test_a_file_of_int8_is_checked_on_its_real_images(tmp_path, monkeypatch):
    data = synthetic_dataset(tmp_path / "set", image_size=64, counts={"train": 3, "val": 1})
    tampered(monkeypatch, move)
    with pytest.raises(UserError, match="on images of data= are not those"):
        to_onnx.export(
            model_of("frcnn_nano"), {"imgsz": 64, "batch": 2, "quantize": 8, "data": data}, tmp_path / "a.onnx"
        )
    assert not (tmp_path / "a.onnx").exists()


def rows(count):
    """(1, count, 6) boxes of 20 px, 25 px apart."""
    x, y = np.divmod(np.arange(count), 10)
    box = np.stack([x, y, x, y], axis=1) * 25 + [0, 0, 20, 20]
    return np.concatenate([box, np.linspace(0.9, 0.1, count)[:, None], np.arange(count)[:, None] % 3], axis=1)[None]


def test_the_order_of_rows_does_not_matter():
    one = rows(60)
    assert wrong_detections(one[:, ::-1], one, one, 0.5, 0.05) == (120, 0, 0, 0)
    other = one + np.array([0.1, 0, 0, 0, 0.002, 0])
    assert wrong_detections(other, one, one, 0.5, 0.05) == (120, 0, pytest.approx(0.1), pytest.approx(0.002))


def test_either_of_two_boxes_that_tie_is_right():
    one, other = rows(60), rows(60)
    other[0, 7, :4] += 3  # IoU 17 * 17 / (800 - 289)
    both = np.concatenate([one, other[:, 7:8]], axis=1)
    for found, expected in ((one, other), (other, one)):
        assert wrong_detections(found, expected, both, 0.5, 0.05)[:2] == (120, 0)
        assert wrong_detections(found, expected, both, 0.7, 0.05)[:2] == (120, 1)  # they do not suppress each other
    assert wrong_detections(both, one, both, 0.5, 0.05)[:2] == (121, 1)


def test_what_a_full_list_has_no_room_for_is_not_missing():
    one = rows(60)
    one[0, 50:, 4] = 0.2
    assert wrong_detections(one[:, :55], one[:, [*range(50), *range(55, 60)]], one, 0.5, 0.05)[:2] == (110, 0)
    empty = one[:, :55] * (np.arange(55) < 54)[:, None]  # one that is not full
    assert wrong_detections(empty, one[:, :55], one, 0.5, 0.05)[:2] == (109, 1)


def test_what_is_missing_doubled_strange_or_nan_is_wrong():
    one = rows(60)
    assert wrong_detections(np.zeros_like(one), one, one, 0.5, 0.05)[:2] == (60, 60)
    assert wrong_detections(one[:, [0] * 60], one, one, 0.5, 0.05)[:2] == (120, 59)  # and so no room for the others
    assert wrong_detections(one + np.array([1, 0, 1, 0, 0, 0]), one, one, 0.5, 0.05)[:2] == (120, 60)
    assert wrong_detections(one, one, np.zeros((1, 0, 6)), 0.5, 0.05)[:2] == (120, 60)
    assert wrong_detections(one * np.array([1, 1, 1, 1, np.nan, 1]), one, one, 0.5, 0.05)[:2] == (120, 120)
    assert wrong_detections(np.zeros_like(one), np.zeros_like(one), one, 0.5, 0.05)[:2] == (0, 0)
