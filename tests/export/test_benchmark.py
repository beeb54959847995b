import csv
import json

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import numpy_helper
from torch import nn
from ultralytics.nn.tasks import DetectionModel

import gid_yolo.export.benchmark as module
import gid_yolo.export.matrix as matrix
import gid_yolo.export.parity as parity
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError
from gid_yolo.export.benchmark import benchmark
from gid_yolo.export.evaluate import batches_of, image_size, open_split, read_data
from gid_yolo.model import GID

QUICK = {"runs": 3, "rounds": 2, "warmup": 1, "parity_images": 3}
NAMES = {0: "wide", 1: "tall"}


def write_data(root, names=NAMES):
    """Six images of 128 x 96 px with a bright rectangle each, for training and validation alike."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(6):
        image = rng.integers(0, 90, (96, 128, 3), dtype=np.uint8)
        width, height = [(60, 30), (24, 50)][i % 2]
        x, y = int(rng.integers(0, 128 - width)), int(rng.integers(0, 96 - height))
        image[y : y + height, x : x + width] = 255
        cv2.imwrite(str(root / "images" / f"{i}.png"), image)
        box = ((x + width / 2) / 128, (y + height / 2) / 96, width / 128, height / 96)
        (root / "labels" / f"{i}.txt").write_text(f"{i % 2} {' '.join(map(str, box))}\n")
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(root), "train": "images", "val": "images", "names": names}))
    return path


def save_checkpoint(path, name="retina_nano", names=NAMES, **record):
    """A checkpoint that detects at random, with scores on both sides of the evaluation threshold."""
    torch.manual_seed(0)
    model = GIDDetectionModel(name, nc=len(names), verbose=False)
    model.names, model.record = dict(names), record
    for conv in model.detector.head.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    nn.init.normal_(model.detector.head.cls_logits.weight, std=0.05)
    nn.init.normal_(model.detector.head.box_deltas.weight, std=0.01)
    nn.init.constant_(model.detector.head.cls_logits.bias, -4.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.half(), "ema": None, "train_args": {"imgsz": 128}, "epoch": -1}, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("ckpt") / "best.pt", teacher="t.pt", epochs=2, imgsz=128)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "best.pt", epochs=1, imgsz=128)


@pytest.fixture(scope="module")
def report(tmp_path_factory, data, checkpoint, baseline):
    project = tmp_path_factory.mktemp("runs")
    return GID(checkpoint).benchmark(baseline=str(baseline), data=str(data), project=str(project), **QUICK)


def test_rows_are_measured(report):
    model, plain = report.rows
    assert (model.role, model.label, model.name, model.backbone) == (
        *("model", "distilled", "retina_nano", "mobilenetv2_035"),
    )
    assert (plain.role, plain.label) == ("baseline", "plain")
    for row in report.rows:
        assert row.failed is None
        assert 0 < row.p50 <= row.p95 <= row.p99
        assert row.images_per_second > 0
        assert row.gflops > 0
        assert 0.1 < row.parameters < 2
        assert 0 <= row.box_difference <= module.BOX_LIMIT
        assert 0 <= row.score_difference <= module.SCORE_LIMIT
    assert model.columns == plain.columns  # the same weights


def test_random_scores_reach_the_evaluation(report):
    stored = json.loads((report.save_dir / "model_onnx" / "coco_metrics.json").read_text())
    assert stored["images"] == 6
    assert stored["mAR"] > 0


def test_files_agree_with_the_rows(report):
    stored = json.loads((report.save_dir / "benchmark.json").read_text())
    with (report.save_dir / "benchmark.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for row, from_json, from_csv in zip(report.rows, stored["rows"], lines, strict=True):
        assert from_json["columns"] == row.columns
        assert from_json["p95"] == row.p95 == float(from_csv["p95"])
        assert float(from_csv["mAP"]) == row.columns["mAP"]
        assert row.file_size * 1e6 == pytest.approx((report.save_dir / f"{row.role}.onnx").stat().st_size)
    page = (report.save_dir / "benchmark.html").read_text()
    assert f'data-value="{report.rows[0].p50}"' in page
    assert str(report).splitlines()[2] in (report.save_dir / "benchmark.md").read_text().splitlines()


def test_settings_say_how_it_was_measured(report, checkpoint):
    settings = json.loads((report.save_dir / "benchmark.json").read_text())["settings"]
    assert settings["arguments"]["imgsz"] == [128, 128]  # from the checkpoint
    assert settings["providers"] == ["CPUExecutionProvider"]
    assert settings["threads"] == 1
    assert settings["cpu"]
    assert settings["versions"]["onnxruntime"] == onnxruntime.__version__
    record = settings["checkpoints"]["model"]["record"]
    assert record.items() >= {"teacher": "t.pt", "epochs": 2, "imgsz": 128}.items()
    assert record["network"].startswith(
        f"{sum(p.numel() for p in load_model(checkpoint)[0].parameters())} parameters ("
    )
    assert record["weights"] == settings["checkpoints"]["model"]["fingerprint"]
    assert "WARNING: UNEQUAL BUDGET: epochs is 2 for model, but 1 for baseline." in report.notes


def test_unequal_budgets_are_no_comparison_unless_told_so(report, tmp_path, data, checkpoint, baseline):
    assert report.comparable is False
    assert "distilled vs plain" not in str(report)
    assert "not comparable" in (report.save_dir / "benchmark.html").read_text()
    told = benchmark(checkpoint, baseline=baseline, unequal=True, data=data, project=str(tmp_path), **QUICK)
    assert told.comparable is None
    assert module.NO_COMPARISON in report.notes
    assert module.NO_COMPARISON not in told.notes
    assert "distilled vs plain: +0.0 mAP (+0.0 to +0.0 on other images)" in str(told)  # the same weights
    assert "UNDECIDED" not in str(told)
    assert {row.gain_low for row in report.rows} == {None}
    assert "UNDECIDED" not in str(report)


def test_percentiles_of_few_runs_are_told(report):
    assert "note: p95 and p99 of 6 runs are close to the slowest: ask for 100 runs or more." in report.notes


def test_nothing_is_written_beside_the_checkpoints(report, checkpoint, baseline):
    assert [p.name for p in checkpoint.parent.iterdir()] == ["best.pt"]
    assert [p.name for p in baseline.parent.iterdir()] == ["best.pt"]


def test_rectangles_and_batches(tmp_path, data, checkpoint):
    report = benchmark(checkpoint, data=data, imgsz=[70, 128], batch=4, project=str(tmp_path), **QUICK)
    session = onnxruntime.InferenceSession(report.save_dir / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 3, 96, 128]  # 70 rounded up to what strides divide
    (row,) = report.rows
    assert row.failed is None
    assert row.columns is not None
    assert report.settings["images"] == 6


def test_images_are_what_the_validator_sees(data):
    path, contents = read_data(data, "val")
    loader = open_split(path, contents, split="val", imgsz=[64, 128], batch=2)
    batches = batches_of(loader.dataset, 5, 2)
    assert [x.shape for x in batches] == [(2, 3, 64, 128)] * 3
    np.testing.assert_array_equal(batches[0][0], next(iter(loader))["img"][0].numpy().astype(np.float32) / 255)
    np.testing.assert_array_equal(batches[2][1], batches[0][0])  # filled up


def tamper(path):
    graph = onnx.load(path)
    weight = max((w for w in graph.graph.initializer if len(w.dims) == 4), key=lambda w: np.prod(w.dims))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(1), weight.name))
    onnx.save(graph, path)


def test_a_file_that_differs_has_no_results(tmp_path, monkeypatch, data, checkpoint, baseline):
    def export_wrongly(model, path, imgsz, batch):
        made = parity.export_onnx(model, path, imgsz, batch)
        if path.stem == "model":
            tamper(made)
        return made

    monkeypatch.setattr(matrix, "export_onnx", export_wrongly)
    report = benchmark(checkpoint, baseline=baseline, data=data, project=str(tmp_path), **QUICK)
    bad, good = report.rows
    assert bad.failed is not None
    assert "differ from PyTorch's" in bad.failed
    assert bad.box_difference > module.BOX_LIMIT or bad.score_difference > module.SCORE_LIMIT
    assert (bad.p50, bad.images_per_second, bad.columns) == (None, None, None)
    assert good.failed is None
    assert good.p50 > 0
    assert "FAILED" in str(report)
    assert " vs " not in str(report)


def test_an_ap_that_differs_is_no_result(tmp_path, monkeypatch, data, checkpoint):
    def columns(network, **_):
        return {"mAP": 30.0 if isinstance(network, nn.Module) else 29.8}

    monkeypatch.setattr(matrix, "ten_columns", columns)
    (row,) = benchmark(checkpoint, data=data, project=str(tmp_path), **QUICK).rows
    assert row.failed == "mAP differs from PyTorch's by -0.20 (limit 0.1)"
    assert row.ap_difference == pytest.approx(-0.2)
    assert row.columns is None
    assert row.p50 is None


def test_nan_fails_the_gate():
    class Network(nn.Module):
        def forward(self, x):
            return (torch.full((1, 6, 4), float("nan")),)

    boxes, _ = parity.largest_differences(Network(), [np.zeros((1, 6, 4))], [np.zeros((1, 3, 8, 8), np.float32)])
    assert np.isnan(boxes)
    assert not boxes <= parity.BOX_LIMIT


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": "missing.pt"}, "model=missing.pt does not exist"),
        ({"unequal": "maybe"}, "unequal=maybe must be True or False"),
        ({"baseline": "missing.pt"}, "baseline=missing.pt does not exist"),
        ({"teacher": "missing.pt"}, "teacher=missing.pt does not exist"),
        ({"round": 3}, "'round' is not an argument of the benchmark: did you mean rounds"),
        ({"epochs": 3}, "'epochs' is not an argument of the benchmark"),
        ({"runs": 0}, "runs=0 must be a whole number of at least 1."),
        ({"threads": 0}, "threads=0 must be a whole number of at least 1."),
        ({"threads": 100_000}, "threads=100000 must be at most"),
        ({"rounds": 1.5}, "rounds=1.5 must be a whole number of at least 1."),
        ({"batch": True}, "batch=True must be a whole number of at least 1."),
        ({"warmup": -1}, "warmup=-1 must be a whole number of at least 0."),
        ({"imgsz": 32}, "is too small for a pyramid"),
        ({"imgsz": "big"}, "imgsz=big must be a whole number, or height and width"),
        ({"imgsz": [128, 128, 3]}, "must be a whole number, or height and width"),
        ({"split": "test"}, "'test:' images not found."),
        ({"device": "mps"}, "device=mps is not supported by the benchmark"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, data, checkpoint, arguments, sentence):
    with pytest.raises(UserError) as caught:
        benchmark(**{"model": checkpoint, "data": data, "project": str(tmp_path), **arguments})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(data, checkpoint):
    with pytest.raises(UserError, match="provider=cuda:0 needs a GPU"):
        benchmark(checkpoint, data=data, device="cuda")


def test_what_is_no_checkpoint_is_refused(tmp_path, data):
    path = tmp_path / "a.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a checkpoint"):
        benchmark(path, data=data)


def test_other_classes_are_refused(tmp_path, data, checkpoint):
    other = save_checkpoint(tmp_path / "a.pt", names={0: "cat", 1: "dog"})
    with pytest.raises(UserError, match=r"teacher=.* knows 2 classes \(cat, dog\), but data=.* has 2 \(wide, tall\)"):
        benchmark(checkpoint, teacher=other, data=data)


def test_missing_images_are_refused(tmp_path, checkpoint):
    path = write_data(tmp_path / "set")
    for image in (tmp_path / "set" / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"split=val of data=.* cannot be read"):
        benchmark(checkpoint, data=path)


class Final(torch.nn.Module):
    """A network whose detections are given."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor([rows], dtype=torch.float32)

    def forward(self, images):
        return (self.rows,)


ROWS = [[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 10, 0.8, 0], [5, 5, 20, 20, 0.7, 1], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("found", "boxes", "scores"),
    [
        (ROWS, 0.0, 0.0),
        ([ROWS[2], ROWS[0], ROWS[1], ROWS[3]], 0.0, 0.0),  # rows have no fixed order
        ([[0, 0, 10, 10.5, 0.9, 0], *ROWS[1:]], 0.5, 0.1),  # the nearer of the two is the other one
        ([ROWS[0], ROWS[2], ROWS[3], ROWS[3]], np.inf, np.inf),  # one of two equal boxes is missing
        ([*ROWS[:3], [5, 5, 20, 20, 0.7, 0]], np.inf, np.inf),  # one more
        ([ROWS[0], ROWS[1], [5, 5, 20, 20, 0.7, 2], ROWS[3]], np.inf, np.inf),  # of another class
        ([*ROWS[:3], [1, 1, 2, 2, 0.0505, 0]], 0.0, 0.0),  # at the threshold: on either side of it
    ],
)
def test_final_detections_are_compared_one_to_one(found, boxes, scores):
    images = np.zeros((1, 3, 8, 8), np.float32)
    outputs = [np.array([found], dtype=np.float32)]
    result = parity.final_differences(Final(ROWS), outputs, [images])
    assert result == pytest.approx((boxes, scores), abs=1e-6)


def differences(rows, found, **arguments):
    outputs = [np.array([found], dtype=np.float32)]
    return parity.final_differences(Final(rows), outputs, [np.zeros((1, 3, 8, 8), np.float32)], **arguments)


def test_the_end_of_a_full_list_may_be_on_either_side():
    third, other = [5, 5, 20, 20, 0.7, 1], [7, 7, 9, 9, 0.7003, 1]
    full = [*ROWS[:2], third]
    assert differences(full, [*ROWS[:2], other]) == pytest.approx((0.0, 0.0))
    assert differences(full, [*ROWS[:2], [0] * 6]) == (np.inf, np.inf)  # there was room for it


def test_nothing_to_compare_is_not_equality():
    low = [[*row[:4], row[4] / 20, row[5]] for row in ROWS]  # 0.045 and less
    assert differences(low, low) is None
    assert differences([[0] * 6], [[0] * 6], most=10) is None
    assert differences(low, low, least=0.01) == (0.0, 0.0)
    assert differences(low, low, most=1) == (0.0, 0.0)
    assert differences(low, [low[1], low[2], [0] * 6, [0] * 6], most=2) == (np.inf, np.inf)


def final_checkpoint(path, background):
    """A Faster R-CNN whose classes have about e^-background of the probability."""
    torch.manual_seed(0)
    model = GIDDetectionModel("frcnn_nano", nc=2, verbose=False)
    model.names = dict(NAMES)
    model.detector.head.cls_logits.bias.data[-1] = background
    torch.save({"model": model.half(), "train_args": {"imgsz": 128}, "epoch": -1}, path)
    return path


def test_a_model_of_low_scores_is_compared_all_the_same(tmp_path, monkeypatch, data):
    path = final_checkpoint(tmp_path / "low.pt", background=7.0)  # scores of about 0.001
    with torch.no_grad():
        assert not load_model(path)[0].detector(torch.rand(1, 3, 128, 128)).any()
    (row,) = benchmark(path, data=data, project=str(tmp_path), **QUICK).rows
    assert (row.failed, row.compared) == (None, True)
    assert 0 < row.box_difference < parity.BOX_LIMIT
    export = parity.export_onnx

    def export_wrongly(*args, **limits):
        made = export(*args, **limits)
        tamper(made)
        return made

    monkeypatch.setattr(parity, "export_onnx", export_wrongly)
    (row,) = benchmark(path, data=data, project=str(tmp_path), **QUICK).rows
    assert "differ from PyTorch's" in row.failed


def test_a_model_that_finds_nothing_at_all_was_not_compared(tmp_path, data):
    path = final_checkpoint(tmp_path / "none.pt", background=1e4)  # e^-10000 is 0
    report = benchmark(path, data=data, project=str(tmp_path), **QUICK)
    (row,) = report.rows
    assert (row.failed, row.compared, row.box_difference, row.score_difference) == (None, False, None, None)
    assert "not compared" in str(report)
    assert "NOT COMPARED with PyTorch: model detects nothing" in report.notes[0]
    assert json.loads((report.save_dir / "benchmark.json").read_text())["rows"][0]["compared"] is False
    with (report.save_dir / "benchmark.csv").open(newline="") as stream:
        assert next(csv.DictReader(stream))["compared"] == "False"


def test_sizes_are_multiples_of_the_largest_stride(tmp_path, data, checkpoint):
    # A YOLO with P6 has stride 64; ours pad to 32, and their coarser levels round up
    model = DetectionModel("yolov8n-p6.yaml", nc=2, verbose=False)
    model.names = dict(NAMES)
    path = tmp_path / "p6.pt"
    torch.save({"model": model.half(), "train_args": {"imgsz": 128}, "epoch": -1}, path)
    report = benchmark(path, data=data, imgsz=[96, 128], project=str(tmp_path), **QUICK)
    assert report.rows[0].failed is None
    assert report.settings["arguments"]["imgsz"] == [128, 128]
    assert image_size([96, 160], 32) == [96, 160]
    assert image_size(160, 64) == [192, 192]
    mixed = benchmark(checkpoint, teacher=path, data=data, imgsz=96, project=str(tmp_path), **QUICK)
    assert [row.failed for row in mixed.rows] == [None, None]
    assert mixed.settings["arguments"]["imgsz"] == [128, 128]
