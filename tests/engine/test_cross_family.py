"""Teachers whose predictions do not correspond to the student's: features and relations need only boxes."""

import csv
from types import SimpleNamespace

import pytest
from engine_helpers import FAST, train_one_epoch, train_teachers

from gid_yolo import GID
from gid_yolo.cfg import MODELS_DIR
from gid_yolo.engine.checkpoint import load_any
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.preflight import misalignment
from gid_yolo.engine.shared_levels import share_levels
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError

PAIRS = [  # student, teacher, strides of the levels that both have
    ("yolo11n.yaml", "retina_nano", [8, 16, 32]),
    ("yolo11n.yaml", "frcnn_nano", [8, 16, 32]),
    ("yolo26n.yaml", "yolov8n-p6.yaml", [8, 16, 32]),
    ("retina_nano", "yolo11n.yaml", [8, 16, 32]),
    ("fcos_nano", "retina_nano", [8, 16, 32, 64, 128]),
    ("retina_nano", "frcnn_nano", [8, 16, 32, 64]),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data) -> dict[str, str]:
    return train_teachers({teacher for _, teacher, _ in PAIRS}, data, tmp_path_factory)


@pytest.mark.parametrize(("student", "teacher", "strides"), PAIRS)
def test_features_and_relations_are_distilled(data, tmp_path, teachers, caplog, student, teacher, strides) -> None:
    model = GID(student)
    seen = {}

    def look(trainer) -> None:
        inner = trainer.model
        seen.update(strides=inner.levels.strides, valid=inner.instances.valid.sum().item())

    model.add_callback("on_train_batch_end", look)
    settings = {**FAST, "imgsz": 96, "data": str(data), "save_dir": str(tmp_path)}  # 96 is no multiple of 64
    model.train(**settings, teacher=teachers[teacher], gid_response=0)
    assert seen["strides"] == strides
    assert seen["valid"] > 0
    with (tmp_path / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["train/feat_loss"]) > 0
    assert float(row["train/rel_loss"]) > 0
    assert "train/resp_loss" not in row
    assert "NO, " in caplog.text
    assert "paired by overlap" in caplog.text


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        ("yolo11n.yaml", "retina_nano", "the teacher is a retinanet and the student a yolo"),
        ("yolo11n.yaml", "yolov8n-p6.yaml", "teacher and student predict 340 and 336 boxes for one image"),
    ],
)
def test_their_responses_are_refused_with_an_offer(data, teachers, student, teacher, says) -> None:
    # 128 px: 16 * 16 + 8 * 8 + 4 * 4 = 336 points on P3 to P5, and 2 * 2 = 4 more on P6
    with pytest.raises(UserError, match=rf"{says}.*gid_response=0"):
        GID(student).train(**FAST, data=str(data), teacher=teachers[teacher])


def test_an_interrupted_run_resumes(data, teachers, tmp_path) -> None:
    arguments = {**FAST, "data": str(data), "save_dir": str(tmp_path), "teacher": teachers["retina_nano"]}
    trainer = YOLOTrainer(overrides={**arguments, "model": "yolo11n.yaml", "gid_response": 0, "epochs": 2})
    train_one_epoch(trainer)
    saved, _ = load_any(trainer.last)
    again = YOLOTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    seen = {}
    again.add_callback("on_train_start", lambda t: seen.update(t.model.projector.state_dict()))
    again.train()
    assert not again.model.projector.gid.aligned
    assert seen.keys() == saved.projector.state_dict().keys()


def test_models_with_the_same_anchors_are_aligned() -> None:
    models = [GIDDetectionModel("retina_nano", nc=2, verbose=False) for _ in range(2)]
    assert misalignment(*models) is None
    assert models[0].training == models[1].training


def test_other_anchors_are_told_from_equal_ones(tmp_path) -> None:
    text = (MODELS_DIR / "retina_nano.yaml").read_text()
    (tmp_path / "other.yaml").write_text(text.replace("anchor_scale: 2.0", "anchor_scale: 4.0"))
    models = [GIDDetectionModel(cfg, nc=2, verbose=False) for cfg in ("retina_nano", tmp_path / "other.yaml")]
    assert "different anchors" in misalignment(*models)


def view(strides: list[int], channels: int | list[int]) -> SimpleNamespace:
    return SimpleNamespace(strides=strides, channels=channels)


def test_levels_are_shared_by_stride() -> None:
    student, teacher = view([8, 16, 32], [10, 20, 30]), view([4, 8, 16, 32, 64], 256)
    levels = share_levels(student, teacher)
    assert (levels.student, levels.teacher, levels.strides) == ([0, 1, 2], [1, 2, 3], [8, 16, 32])
    assert levels.channels(student, teacher) == ([10, 20, 30], [256] * 3)


def test_levels_of_one_stride_go_in_their_order() -> None:
    # torchvision's Faster R-CNN on MobileNetV3 has two levels of stride 32
    both = view([32, 32, 64], 256)
    assert share_levels(both, both).teacher == [0, 1, 2]
    assert share_levels(both, both).channels(both, view([32, 32, 64], 64)) == (256, 64)
    assert share_levels(view([16, 32], 8), both).teacher == [0]


def test_pyramids_without_a_common_level() -> None:
    with pytest.raises(UserError, match="strides 8, 16 and the teacher's 32, 64"):
        share_levels(view([8, 16], 8), view([32, 64], 8))
