"""Every kind of detector through the same commands: train, distil, evaluate, predict, export, compare."""

import csv

import pytest
import torch
from engine_helpers import FAST
from ultralytics.utils import LOGGER

from gid_yolo import GID
from gid_yolo.cfg import MODELS_DIR
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.export.benchmark import benchmark

TASK_LOSSES = {
    "fcos_nano": {"cls_loss", "box_loss", "ctr_loss"},
    "frcnn_nano": {"rpn_cls_loss", "rpn_box_loss", "cls_loss", "box_loss"},
}
TERMS = {"feat_loss", "rel_loss", "resp_loss"}
COUNTS = {"gi_pos", "gi_semi", "gi_neg"}


@pytest.fixture(scope="module", params=sorted(TASK_LOSSES))
def runs(request, tmp_path_factory, data) -> tuple[str, GIDTrainer, GIDTrainer]:
    """Name of the student, its teacher's run and its own."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    wide = folder / "wide.yaml"
    wide.write_text((MODELS_DIR / f"{name}.yaml").read_text().replace("fpn_channels: 64", "fpn_channels: 96"))
    common = {**FAST, "data": str(data), "exist_ok": True}
    teacher = GIDTrainer(overrides={**common, "model": str(wide), "save_dir": str(folder / "teacher")})
    teacher.train()
    arguments = {"model": name, "teacher": str(teacher.best), "epochs": 2, "save_dir": str(folder / "student")}
    student = GIDTrainer(overrides={**common, **arguments})
    student.train()
    return name, teacher, student


def test_every_term_is_logged_and_the_student_is_kept_alone(runs) -> None:
    name, _, student = runs
    with student.csv.open() as file:
        rows = list(csv.DictReader(file))
    logged = {key.removeprefix("train/") for key in rows[0] if key.startswith("train/")}
    assert logged == TASK_LOSSES[name] | TERMS | COUNTS
    assert all(float(row[f"train/{term}"]) > 0 for row in rows for term in TERMS)
    assert (student.save_dir / "coco_metrics.json").is_file()
    assert type(load_model(student.best)[0]) is GIDDetectionModel


def test_a_trained_model_evaluates_and_predicts(runs, data) -> None:
    _, _, student = runs
    model = GID(student.best)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    assert "metrics/mAP50-95(B)" in model.val(data=str(data), imgsz=64).results_dict
    after = model.model.state_dict()  # Ultralytics folds the batch norms of what it validates
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert set(model.columns) >= {"mAP", "AR_L"}
    image = next((data.parent / "images" / "val").glob("*.png"))
    boxes = model.predict(str(image), imgsz=64, conf=0.001)[0].boxes
    assert boxes.data.shape[1] == 6
    assert ((boxes.xyxy >= 0) & (boxes.xyxy <= 64)).all()


def test_the_files_are_equal_to_the_checkpoints(runs, data, tmp_path) -> None:
    _, teacher, student = runs
    arguments = {"data": str(data), "imgsz": 64, "project": str(tmp_path), "runs": 2, "rounds": 1, "warmup": 0}
    report = benchmark(model=student.best, teacher=teacher.best, **arguments)
    assert [row.failed for row in report.rows] == [None, None]
    assert all(row.box_difference < 0.05 and row.score_difference < 1e-3 for row in report.rows)


@pytest.mark.parametrize("name", ["retina_nano", "fcos_nano", "frcnn_nano"])
def test_the_summary_holds_what_can_be_counted(name, monkeypatch) -> None:
    lines = []
    monkeypatch.setattr(LOGGER, "info", lambda text, *args, **kwargs: lines.append(text))
    model = GIDDetectionModel(name, nc=2)
    layers, parameters, gradients, flops = model.info()
    assert layers == len([m for m in model.modules() if not m._modules])
    assert parameters == gradients == sum(p.numel() for p in model.parameters())
    counted = name != "frcnn_nano"  # whose second stage works on the proposals there are
    assert ("GFLOPs" in lines[-1]) == counted == (flops > 0)
    assert f"{parameters:,} parameters" in lines[-1]
