"""Files beside the three models, and several providers, in one benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_benchmark import QUICK, save_checkpoint, write_data

import gid_yolo.export.arguments as arguments
import gid_yolo.export.contenders as contenders
import gid_yolo.export.matrix as matrix
import gid_yolo.export.providers as providers
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError
from gid_yolo.export.benchmark import benchmark
from gid_yolo.export.contenders import Contender, gigaflops, load_others, stored_precision
from gid_yolo.export.evaluate import open_split, read_data, ten_columns
from gid_yolo.export.matrix import Settings
from gid_yolo.export.to_onnx import export
from gid_yolo.model import GID


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("ckpt") / "best.pt", imgsz=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoint, data):
    """Of one checkpoint: any size and batch with NMS inside, and a fixed one in int8."""
    folder, network = tmp_path_factory.mktemp("files"), GID(checkpoint).model
    export(network, {"imgsz": 64, "dynamic": True, "nms": True}, folder / "open.onnx")
    export(network, {"imgsz": [64, 96], "batch": 2, "quantize": 8, "data": str(data)}, folder / "closed.onnx")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory, checkpoint, data, files):
    others = f"{files / 'open.onnx'}, {files / 'closed.onnx'},{checkpoint}"
    settings = {**QUICK, "imgsz": [[64, 64], [96, 128]], "batch": [1, 3], "others": others}
    return benchmark(checkpoint, data=data, project=str(tmp_path_factory.mktemp("runs")), **settings)


def test_a_file_is_measured_where_it_can_run(report):
    found = {}
    for row in report.rows:
        found.setdefault(row.label, []).append((row.height, row.width, row.batch, row.precision))
    everywhere = [(h, w, b, "fp32") for h, w in ((64, 64), (96, 128)) for b in (1, 3)]
    assert found == {"model": everywhere, "open": everywhere, "closed": [(64, 96, 2, "int8")], "best": everywhere}
    assert {row.role for row in report.rows[4:]} == {"other"}


def test_a_file_of_the_same_weights_has_the_same_accuracy(report):
    columns = {}
    for row in report.rows:
        assert row.failed is None
        assert min(row.p50, row.preprocess, row.postprocess, row.memory) > 0
        columns.setdefault((row.height, row.width), []).append(row.columns)
    for (height, _), found in columns.items():
        assert len(found) == (1 if (height, _) == (64, 96) else 6)  # three of them, in two batches
        for each in found:
            assert each == pytest.approx(found[0], abs=0.1)


def test_what_has_no_checkpoint_is_not_compared(report):
    for row in report.rows:
        alone = row.label in {"open", "closed"}
        assert row.parity == ("not compared" if alone else "ok")
        assert (row.parameters is None) == (row.gflops is None) == alone
    assert [note for note in report.notes if "ONNX file alone" in note] == [
        f"note: NOT COMPARED with PyTorch: {label} is an ONNX file alone." for label in ("open", "closed")
    ]
    assert set(report.settings["checkpoints"]) == {"model", "open", "closed", "best"}
    assert {label for example in report.examples for label in example.detections} == {"model", "open", "closed", "best"}


def test_given_files_are_left_alone(report, files):
    assert sorted(path.name for path in files.iterdir()) == ["closed.onnx", "open.onnx"]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        ([], []),
        (["a/x.onnx"], ["x"]),
        (["a/weights/best.pt", "b/weights/last.pt"], ["a", "b"]),
        (["a/x.onnx", "b/x.onnx", "y.pt"], ["a/x", "b/x", "{}/y"]),  # as many folders for each
        (["a/weights/best.pt", "a/weights/best.onnx"], ["a best.pt", "a best.onnx"]),
        (["a/x.pt", "a/x.onnx"], ["x.pt", "x.onnx"]),
        (["teacher/weights/best.pt", "plain.onnx"], ["other teacher", "other plain"]),  # beside the three
        (["a/teacher.onnx", "a/other teacher.onnx"], ["a/teacher", "a/other teacher"]),
    ],
)
def test_labels_tell_files_apart(tmp_path, paths, labels):
    found = contenders._labels([tmp_path / path for path in paths])
    assert found == [label.format(tmp_path.name) for label in labels]


def test_labels_name_a_file_given_twice(tmp_path):
    with pytest.raises(UserError, match=r"others= has .*a\.onnx more than once"):
        contenders._labels([tmp_path / "a.onnx", tmp_path / "b" / ".." / "a.onnx"])


def test_precision_is_read_from_the_file(tmp_path, files):
    assert stored_precision(files / "open.onnx") == "fp32"
    assert stored_precision(files / "closed.onnx") == "int8"
    for name, kinds, expected in (
        ("half", [(np.float16, 10), (np.float32, 9)], "fp16"),
        ("full", [(np.float16, 9), (np.float32, 10)], "fp32"),
        ("none", [], "fp32"),
    ):
        weights = [onnx.numpy_helper.from_array(np.zeros(n, kind), f"w{n}") for kind, n in kinds]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], weights)), tmp_path / name)
        assert stored_precision(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"others": "missing.onnx"}, r"missing\.onnx does not exist"),
        ({"others": "missing.pt"}, r"others=missing\.pt does not exist"),
        ({"others": "."}, r"others=\. is a folder: give a checkpoint in it"),
        ({"baseline": "x.onnx"}, r"baseline=x\.onnx is an ONNX file: give the checkpoint .* others=x\.onnx"),
        ({"others": " , "}, r"others= ,  names no file"),
        ({"provider": "npu"}, "provider=npu is not known: cpu, cuda, tensorrt"),
        ({"provider": "cpu,cpu:0"}, "provider=cpu:0 is not known"),
        ({"provider": "cpu", "device": "cpu"}, "device=cpu and provider=cpu say the same"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, data, checkpoint, given, sentence):
    with pytest.raises(UserError, match=sentence):
        benchmark(checkpoint, data=data, project=str(tmp_path), **QUICK, **given)
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(tmp_path, checkpoint, files):
    path = write_data(tmp_path / "set", names={0: "tall", 1: "wide"})  # an ONNX file's are not reordered
    with pytest.raises(
        UserError, match=r"others=.*open.onnx knows 2 classes \(wide, tall\), but data=.*in their order"
    ):
        benchmark(checkpoint, data=path, others=[files / "open.onnx"], project=str(tmp_path / "runs"), **QUICK)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not an ONNX file"):
        load_others([tmp_path / "broken.onnx"])


def test_providers_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(arguments, "check_provider", lambda name: providers.PROVIDERS[name.partition(":")[0]])
    assert arguments.providers("CPU, openvino", None) == ["cpu", "openvino"]
    assert arguments.providers(None, 1) == ["cuda:1"]
    assert arguments.providers(None, None) == arguments.providers(None, "cpu") == ["cpu"]
    with pytest.raises(UserError, match="has OpenVINOExecutionProvider more than once"):
        arguments.providers(["openvino", "cpu", "openvino:gpu"], None)


@pytest.mark.parametrize(
    ("given", "device"),
    [(["cpu"], "cpu"), (["cpu", "openvino"], "cpu"), (["cpu", "cuda:1"], "cuda:1"), (["tensorrt"], "cuda:0")],
)
def test_pytorch_runs_where_onnxruntime_does(monkeypatch, given, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Settings([], [], ["fp32"], given, 1, 1, 1.0).device == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a build of PyTorch without CUDA beside it
    assert Settings([], [], ["fp32"], given, 1, 1, 1.0).device == "cpu"


def test_every_provider_has_its_rows(tmp_path, monkeypatch, data, checkpoint):
    """No second provider can be counted on: the CPU stands in for OpenVINO, and what was asked for is noted."""
    asked, start = [], providers._start

    def stand_in(path, provider, threads):
        asked.append((Path(path).name, provider))
        return start(path, "cpu", threads)

    monkeypatch.setattr(providers, "_start", stand_in)
    for module in (arguments, contenders):
        monkeypatch.setattr(module, "check_provider", lambda name: providers.PROVIDERS[name])
    report = benchmark(
        checkpoint, data=data, provider=["cpu", "openvino"], precision="fp32,fp16", project=str(tmp_path), **QUICK
    )
    names = ["CPUExecutionProvider"] * 2 + ["OpenVINOExecutionProvider"] * 2
    assert [(row.provider, row.precision) for row in report.rows] == list(zip(names, ["fp32", "fp16"] * 2, strict=True))
    assert len(list(report.save_dir.glob("*.onnx"))) == 2  # one file for both
    for name in ("model.onnx", "model_fp16.onnx"):
        # accuracy and times; of fp32 the comparison with PyTorch besides
        assert asked.count((name, "openvino")) == (3 if name == "model.onnx" else 2)
    assert report.rows[0].columns == report.rows[2].columns
    assert report.settings["providers"] == ["CPUExecutionProvider", "OpenVINOExecutionProvider"]


def test_a_file_that_fails_on_one_provider_does_not_end_the_others(tmp_path, monkeypatch, data, checkpoint, files):
    start = providers._start

    def stand_in(path, provider, threads):
        if provider == "openvino" and Path(path).name in {"model_fp16.onnx", "open.onnx"}:
            raise UserError(f"{path} does not start.")
        return start(path, "cpu", threads)

    monkeypatch.setattr(providers, "_start", stand_in)
    for module in (arguments, contenders):
        monkeypatch.setattr(module, "check_provider", lambda name: providers.PROVIDERS[name])
    given = {**QUICK, "provider": ["cpu", "openvino"], "precision": "fp32,fp16", "others": files / "open.onnx"}
    report = benchmark(checkpoint, data=data, project=str(tmp_path), **given)
    failed = {(row.label, row.precision, row.provider) for row in report.rows if row.failed}
    assert failed == {
        (label, precision, "OpenVINOExecutionProvider") for label, precision in (("model", "fp16"), ("open", "fp32"))
    }
    assert all("does not start" in row.failed for row in report.rows if row.failed)
    assert len(report.rows) == 6


def test_a_late_error_leaves_what_others_measured(tmp_path, monkeypatch, data, checkpoint):
    """No training images for INT8, and no memory for a file when all are open to be timed."""
    opened, start = [], providers._start

    def stand_in(path, provider, threads):
        opened.append(Path(path).name)
        if opened[-1] == "model_fp16.onnx" and opened.count(opened[-1]) == 2:  # the first is for its accuracy
            raise UserError(f"{path} has no memory left.")
        return start(path, provider, threads)

    def no_images(*_, **__):
        raise UserError("there are no training images.")

    monkeypatch.setattr(providers, "_start", stand_in)
    monkeypatch.setattr(matrix, "Calibration", no_images)
    report = benchmark(checkpoint, data=data, precision="fp32,fp16,int8", project=str(tmp_path), **QUICK)
    failed = {row.precision: row.failed for row in report.rows}
    assert failed["fp32"] is None
    assert "no memory left" in failed["fp16"]
    assert failed["int8"] == "there are no training images"
    assert report.rows[0].p50 > 0
    assert {"benchmark.html", "benchmark.json"} <= {path.name for path in report.save_dir.iterdir()}


def test_a_network_is_measured_and_left_as_it_is(tmp_path, data, checkpoint):
    """Ultralytics folds the batch norms of what it validates, and moves it to its device."""
    network = GID(checkpoint).model
    before = {key: value.clone() for key, value in network.state_dict().items()}
    path, contents = read_data(data, "val")
    loader = open_split(path, contents, split="val", imgsz=(64, 64), batch=1)
    common = {"data": path, "split": "val", "loader": loader, "device": "cpu", "save_dir": tmp_path}
    ten_columns(network, **common, limits={"conf": 0.05, "iou": 0.5, "max_det": 100})
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_file_of_no_numbers_and_one_of_unknown_limits_are_told(tmp_path, data, checkpoint, files):
    export(GID(checkpoint).model, {"imgsz": 64}, tmp_path / "broken.onnx")  # an NMS inside would drop what is NaN
    broken, foreign = onnx.load(tmp_path / "broken.onnx"), onnx.load(files / "open.onnx")
    for weight in broken.graph.initializer:
        if len(weight.dims) == 4:
            values = onnx.numpy_helper.to_array(weight) * np.float32("nan")
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    kept = {entry.key: entry.value for entry in foreign.metadata_props if entry.key != "limits"}
    onnx.helper.set_model_props(foreign, kept | {"args": str({"nms": True})})
    onnx.save(foreign, tmp_path / "foreign.onnx")
    others = [tmp_path / "broken.onnx", tmp_path / "foreign.onnx"]
    report = benchmark(checkpoint, data=data, others=others, project=str(tmp_path / "runs"), **QUICK)
    assert {row.label: row.failed is not None for row in report.rows} == {
        **{"model": False, "broken": True, "foreign": False}
    }
    assert "LIMITS UNKNOWN: foreign has its NMS inside" in "".join(report.notes)
    assert "LIMITS UNKNOWN: broken" not in "".join(report.notes)


def test_a_contender_without_a_checkpoint_has_no_network(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint"):
        _ = Contender("other", "a", tmp_path / "a.onnx", "", {}).network


def test_operations_are_counted_once_and_for_all():
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert gigaflops(convolution, (32, 64)) == pytest.approx(2 * 3 * 8 * 9 * 32 * 64 / 1e9)
    network = GIDDetectionModel("frcnn_nano", nc=2, verbose=False).eval()
    first, second = gigaflops(network, (64, 96)), gigaflops(network, (64, 96))
    assert first == second > 0


def test_labels_that_differ_in_a_sign_have_files_of_their_own(tmp_path):
    found = [Contender("other", label, tmp_path / "a.onnx", "", {}) for label in ("v 1", "v-1", "v/1", "m", "m_int8")]
    assert len({contender.slug for contender in found}) == 5
    assert not any(contender.slug.endswith("_int8") for contender in found)  # how precisions are named
