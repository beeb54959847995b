"""Ultralytics' own YOLO detectors: trained, distilled, evaluated and exported by the same commands."""

import csv
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from engine_helpers import FAST, train_one_epoch
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.ops import xywh2xyxy

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.engine import checkpoint
from gid_yolo.engine.checkpoint import load_any, load_model
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.views import distillable
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError
from gid_yolo.export.benchmark import benchmark

FAMILIES = ("yolov8n.yaml", "yolov10n.yaml", "yolo11n.yaml", "yolo26n.yaml")
TERMS = ("feat_loss", "rel_loss", "resp_loss")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data) -> Path:
    """YOLO11 of another width, trained for one epoch."""
    folder = tmp_path_factory.mktemp("yolo_teacher")
    trainer = YOLOTrainer(overrides={**FAST, "model": "yolo11s.yaml", "data": str(data), "save_dir": str(folder)})
    trainer.train()
    return trainer.best


def train(data, **overrides) -> YOLOTrainer:
    trainer = YOLOTrainer(overrides={"model": "yolo11n.yaml", **FAST, "data": str(data), **overrides})
    trainer.train()
    return trainer


def rows(trainer) -> list[dict[str, float]]:
    with trainer.csv.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_raw_predictions_are_the_heads(name: str) -> None:
    # Ultralytics' own decoding of the same branch is the oracle
    model = DetectionModel(name, nc=3, verbose=False).eval()
    model.end2end = False
    images = torch.rand(2, 3, 96, 160)
    view = distillable(model)
    decoded, (pyramid, raw) = view.detections(images), view.raw(images)
    torch.testing.assert_close(raw.boxes, xywh2xyxy(decoded[:, :4].mT), rtol=0, atol=1e-3)
    torch.testing.assert_close(raw.scores, decoded[:, 4:].mT)
    assert [x.shape[1] for x in pyramid] == view.channels
    # strides 8, 16, 32: 12 * 20 + 6 * 10 + 3 * 5 points
    assert raw.priors.shape == (315, 4)


def test_distillation_logs_every_term_and_keeps_a_plain_yolo(data, teacher) -> None:
    trainer = train(data, teacher=str(teacher), epochs=2)
    for row in rows(trainer):
        for name in ("box_loss", "cls_loss", "dfl_loss", *TERMS):
            assert row[f"train/{name}"] > 0
    assert (trainer.save_dir / "coco_metrics.json").is_file()
    model, _ = load_any(trainer.best)
    assert type(model) is DetectionModel
    assert YOLO(trainer.best).names == {0: "a", 1: "b"}  # needs nothing of gid-yolo
    stored = torch.load(trainer.best, weights_only=False)["model"]
    assert type(stored).__module__.startswith("ultralytics.")


@pytest.mark.parametrize("family", ["yolo26", "yolov10"])
def test_both_branches_are_trained_under_a_teacher(data, tmp_path, family: str) -> None:
    heavy = train(data, model=f"{family}s.yaml", save_dir=str(tmp_path / "t"))
    trainer = train(data, model=f"{family}n.yaml", teacher=str(heavy.best), save_dir=str(tmp_path / "s"))
    assert all(rows(trainer)[0][f"train/{name}"] > 0 for name in TERMS)
    head = load_model(trainer.best)[0].model[-1]
    assert head.one2one_cv2 is not None
    assert head.cv2 is not None


def test_the_task_loss_is_ultralytics_own(data, teacher) -> None:
    trainer = YOLOTrainer(overrides={"model": "yolo11n.yaml", **FAST, "data": str(data), "teacher": str(teacher)})
    seen = {}

    def compare(t) -> None:
        if seen:
            return
        model: TeacherStudentModel = t.model.train()
        batch = t.preprocess_batch(next(iter(t.train_loader)))
        total, items = model.loss(batch)
        own, _ = model.student_model.loss(batch, model.student_model(batch["img"]))
        terms = sum(items[name] for name in TERMS)
        seen["difference"] = (total - own.sum()).item() / (terms.item() * len(batch["img"]))

    trainer.add_callback("on_train_epoch_end", compare)
    trainer.train()
    # The loss of Ultralytics is that of an image times the batch size, and so are the terms
    assert seen["difference"] == pytest.approx(1.0, rel=1e-4)


def test_an_interrupted_run_resumes(data, teacher) -> None:
    trainer = YOLOTrainer(
        overrides={"model": "yolo11n.yaml", **FAST, "data": str(data), "teacher": str(teacher), "epochs": 2}
    )
    train_one_epoch(trainer)
    state = load_any(trainer.last)[1]["run_state"]["model"]
    again = YOLOTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    seen = {}

    def remember(t) -> None:
        seen["adaptation"] = {k: v.clone() for k, v in t.model.projector.state_dict().items()}

    again.add_callback("on_train_start", remember)
    again.train()
    assert seen["adaptation"]
    assert all(torch.equal(state[f"projector.{key}"], value) for key, value in seen["adaptation"].items())
    assert [row["epoch"] for row in rows(again)] == [1, 2]


def test_the_commands_take_a_yolo(data, teacher, tmp_path) -> None:
    model = GID("yolo11n.yaml")
    model.train(**FAST, data=str(data), teacher=str(teacher), save_dir=str(tmp_path / "run"))
    best = tmp_path / "run" / "weights" / "best.pt"
    assert set(GID(best).val(data=str(data), imgsz=64).results_dict) >= {"metrics/mAP50-95(B)"}
    image = next((data.parent / "images" / "val").glob("*.png"))
    assert len(GID(best).predict(str(image), imgsz=64)) == 1
    path = GID(best).export(imgsz=64)
    network = load_model(best)[0]
    network.end2end = False
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.fuse(verbose=False)(images)[0].numpy()
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-3)


def test_benchmark_of_yolos(data, teacher, tmp_path) -> None:
    student = train(data, save_dir=str(tmp_path / "s"))
    report = benchmark(
        model=student.best, teacher=teacher, data=str(data), imgsz=64, project=str(tmp_path), runs=2, rounds=1, warmup=0
    )
    assert [row.failed for row in report.rows] == [None, None]
    assert [row.name for row in report.rows] == ["yolo11n", "yolo11s"]


def test_a_yolo_does_not_teach_a_retinanet(data, teacher) -> None:
    with pytest.raises(UserError, match="the teacher is a yolo and the student a retinanet"):
        GID("retina_nano").train(**FAST, data=str(data), teacher=str(teacher))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_bn": True}, "freeze_bn= is for the detectors of gid-yolo"),
        ({"distill_model": "u.pt"}, "distill_model= is Ultralytics' own distillation"),
    ],
)
def test_arguments_that_do_not_fit_a_yolo(data, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        YOLOTrainer(overrides={"model": "yolo11n.yaml", **FAST, "data": str(data), **arguments})


def test_only_detectors_are_taken() -> None:
    with pytest.raises(UserError, match=r"ends in a Segment head"):
        GID("yolo11n-seg.yaml")


def test_weights_that_cannot_be_downloaded(capsys, data, tmp_path, monkeypatch) -> None:
    def offline(path):
        raise ConnectionError("no network")

    monkeypatch.setattr(checkpoint, "attempt_download_asset", offline)
    path = tmp_path / "yolo11s.pt"
    assert main(["train", "model=yolo11n.yaml", f"data={data}", f"teacher={path}", "epochs=1"]) == 2
    text = capsys.readouterr().err
    assert f"teacher={path} is not here and could not be downloaded (no network)" in text


def test_a_number_of_frozen_layers_as_ultralytics_takes_it(data) -> None:
    trainer = train(data, freeze=10)
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert any(name.startswith("model.9.") for name in frozen)


def test_pretrained_of_another_kind_is_refused(tmp_path, data, teacher) -> None:
    with pytest.raises(UserError, match="is a yolo and the model a retinanet"):
        GID("retina_nano").train(**FAST, data=str(data), pretrained=str(teacher))
    GID("retina_nano").save(tmp_path / "own.pt")
    with pytest.raises(UserError, match="is a yolo and the model a retinanet"):  # a model that is a checkpoint, too
        GID(tmp_path / "own.pt").train(**FAST, data=str(data), pretrained=str(teacher))
