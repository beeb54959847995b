"""Several precisions, batches and sizes in one benchmark."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_benchmark import QUICK, save_checkpoint, write_data

import gid_yolo.export.matrix as matrix
from gid_yolo.errors import UserError
from gid_yolo.export.benchmark import benchmark
from gid_yolo.export.evaluate import image_sizes
from gid_yolo.export.example_images import EXAMPLES
from gid_yolo.export.memory import peak_memory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("ckpt") / "best.pt", teacher="t.pt", epochs=2, imgsz=64)


@pytest.fixture(scope="module")
def report(tmp_path_factory, data, checkpoint):
    settings = {**QUICK, "batch": [1, 2], "imgsz": [[64, 64], [64, 96]], "precision": "int8,fp32, FP16"}
    return benchmark(checkpoint, data=data, project=str(tmp_path_factory.mktemp("runs")), max_ap_drop=100, **settings)


def test_every_setting_has_a_row_and_a_file(report):
    expected = set(itertools.product(["fp32", "fp16", "int8"], [1, 2], [(64, 64), (64, 96)]))
    assert {(row.precision, row.batch, (row.height, row.width)) for row in report.rows} == expected
    assert len(report.rows) == len(expected) == len(list(report.save_dir.glob("*.onnx")))
    for row in report.rows:
        assert row.failed is None
        assert min(row.preprocess, row.p50, row.postprocess, row.memory) > 0
    sizes = {row.precision: row.file_size for row in report.rows}
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]


def test_a_limit_that_nothing_could_miss_is_no_gate(report):
    """100 points of mAP are more than any file has."""
    for row in report.rows:
        assert row.parity == ("ok" if row.precision == "fp32" else "not judged")
    told = [note for note in report.notes if note.startswith("WARNING: NOT JUDGED: distilled ")]
    assert len(told) == len([row for row in report.rows if row.precision != "fp32"]) == 8


def test_accuracy_is_of_the_size_and_precision(report):
    rows = {(row.precision, row.batch, row.width): row for row in report.rows}
    for (precision, _, width), row in rows.items():
        assert row.columns == rows[precision, 1, width].columns
        full = rows["fp32", 1, width].columns["mAP"]
        drop = None if precision == "fp32" else full - row.columns["mAP"]
        assert row.ap_drop == (None if drop is None else pytest.approx(drop))


def test_examples_are_of_the_split(report):
    assert len(report.examples) == EXAMPLES
    for example in report.examples:
        assert set(example.detections) == {"distilled"}
        assert example.image.ndim == 3
        height, width = example.image.shape[:2]
        assert (example.true_boxes >= -1e-3).all()
        assert (example.true_boxes <= [width + 1e-3, height + 1e-3] * 2).all()
        assert len(example.true_boxes) == len(example.true_classes) > 0


def test_a_precision_that_loses_too_much_has_failed(tmp_path, monkeypatch, data, checkpoint):
    measure = matrix.ten_columns

    def worse(model, **arguments):
        columns = measure(model, **arguments)
        return columns | {"mAP": -3.0} if "int8" in str(getattr(model, "path", "")) else columns

    monkeypatch.setattr(matrix, "ten_columns", worse)
    report = benchmark(checkpoint, data=data, project=str(tmp_path), precision=["fp32", "int8"], **QUICK)
    full, int8 = report.rows
    lost = full.columns["mAP"] + 3
    assert int8.failed == f"mAP is {lost:.2f} lower than in fp32 (limit 1)"
    assert int8.ap_drop == pytest.approx(lost)
    assert int8.p50 is int8.columns is None
    assert any("distilled int8" in note and "lower than in fp32" in note for note in report.notes)


def test_a_file_that_cannot_be_made_has_failed_everywhere(tmp_path, monkeypatch, data, checkpoint):
    tries = []

    def broken(source, target, batches):
        tries.append(target)
        raise UserError("its layers cannot be quantised.")

    monkeypatch.setattr(matrix, "quantize_int8", broken)
    given = {**QUICK, "precision": "fp32,int8", "imgsz": [[64, 64], [64, 96]]}
    report = benchmark(checkpoint, data=data, project=str(tmp_path), **given)
    assert [row.failed for row in report.rows] == [None, "its layers cannot be quantised"] * 2
    assert len(tries) == 2  # once a file
    assert [row.file_size is None for row in report.rows] == [False, True] * 2
    assert (report.save_dir / "benchmark.html").is_file()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"precision": "int8"}, "precision=int8 must be fp32 with or without"),
        ({"precision": "fp32,int4"}, "precision=fp32,int4 must be"),
        ({"max_ap_drop": -1}, "max_ap_drop=-1 must be a number of at least 0"),
        ({"max_ap_drop": True}, "max_ap_drop=True must be"),
        ({"batch": [1, 0]}, "batch=0 must be a whole number of at least 1"),
        ({"imgsz": [[64, 64], [64, 64, 64]]}, "must be a whole number, or height and width"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, data, checkpoint, given, sentence):
    with pytest.raises(UserError, match=sentence):
        benchmark(checkpoint, data=data, project=str(tmp_path), **{**QUICK, **given})


def test_sizes():
    assert image_sizes(100, 32) == [[128, 128]]
    assert image_sizes([64, 96], 32) == [[64, 96]]
    assert image_sizes([[64, 96], [60 + 40], [64, 90]], 32) == [[64, 96], [128, 128]]  # the last is the first


def test_memory_of_a_larger_input_is_larger(tmp_path):
    layers = [torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.Conv2d(64, 1, 3)]
    peaks = []
    for side in (64, 512):
        path = tmp_path / f"{side}.onnx"
        torch.onnx.export(torch.nn.Sequential(*layers), torch.zeros(1, 3, side, side), path, dynamo=False)
        peaks.append(peak_memory(path, "cpu", 1, (1, 3, side, side)))
    # One feature map of 64 channels of float32 on 512 x 512 is 67 MB
    assert peaks[0] < 64 * 512 * 512 * 4 / 1e6 < peaks[1]
    assert peak_memory(tmp_path / "none.onnx", "cpu", 1, (1, 3, 64, 64)) is None
