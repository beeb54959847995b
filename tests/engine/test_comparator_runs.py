"""The methods GID is compared with, through the command that trains."""

import csv
from types import SimpleNamespace

import pytest
import torch
from engine_helpers import FAST, write_data

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.errors import UserError

TERMS = {"gid": {"feat_loss", "rel_loss", "resp_loss", "gi_pos", "gi_semi", "gi_neg"}}


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("retina_nano", "fitnet"),
        ("retina_nano", "fine_grained"),
        ("fcos_nano", "gid+fitnet"),
        ("frcnn_nano", "mimicking"),
        ("frcnn_nano", "gid+fitnet+fine_grained+mimicking"),
        ("yolo11n.yaml", "fitnet"),
    ],
)
def test_a_method_trains_a_detector_it_applies_to(data, tmp_path, teachers, name: str, methods: str) -> None:
    GID(name).train(
        **FAST, data=str(data), teacher=teachers[name], distill=methods, save_dir=str(tmp_path), gid_visualize_every=2
    )
    with (tmp_path / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    logged = {key.removeprefix("train/") for key in row if key.startswith("train/")}
    for method in ("gid", "fitnet", "fine_grained", "mimicking"):
        terms = TERMS.get(method, {f"{method}_loss"})
        assert terms <= logged if method in methods.split("+") else not terms & logged
        assert all(float(row[f"train/{term}"]) > 0 for term in terms & logged if term.endswith("_loss"))
    assert (tmp_path / "gi_types.csv").is_file() == methods.startswith("gid")


@pytest.mark.parametrize(("name", "teacher"), [("retina_nano", "yolo11n.yaml"), ("yolo11n.yaml", "frcnn_nano")])
def test_whole_maps_need_no_alignment(data, tmp_path, teachers, name: str, teacher: str) -> None:
    GID(name).train(**FAST, data=str(data), teacher=teachers[teacher], distill="fitnet", save_dir=str(tmp_path))
    with (tmp_path / "results.csv").open() as file:
        assert float(next(csv.DictReader(file))["train/fitnet_loss"]) > 0


def test_none_is_plain_training_although_a_teacher_is_given(data, tmp_path, teachers) -> None:
    words = [f"{key}={value}" for key, value in FAST.items()]
    teacher = f"teacher={teachers['retina_nano']}"
    run = ["train", "model=retina_nano", f"data={data}", teacher, "distill=none", f"save_dir={tmp_path}", *words]
    assert main(run) == 0
    with (tmp_path / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert not any("feat" in key or "gi_" in key for key in row)


@pytest.mark.parametrize("settings", [{"distill": "fine_grained"}, {"gid_types": "gt"}, {"gid_types": "pos"}])
def test_a_first_batch_without_anything_to_distil_is_passed_over(tmp_path, teachers, caplog, settings) -> None:
    data = write_data(tmp_path / "data", train=8)
    for i in range(1, 8):  # one image with objects, in any of the four batches
        (data.parent / "labels" / "train" / f"{i}.txt").write_text("")
    arguments = {**FAST, "batch": 2, "epochs": 2, "seed": 1, "data": str(data), "save_dir": str(tmp_path / "run")}
    GID("retina_nano").train(**arguments, teacher=teachers["retina_nano"], **settings)
    assert "First step" in caplog.text or "nothing to distil" in caplog.text
    assert (tmp_path / "run" / "coco_metrics.json").is_file()


@pytest.mark.parametrize(
    ("name", "teacher", "methods", "says"),
    [
        ("fcos_nano", "fcos_nano", "fine_grained", "by anchors, which a fcos does not have"),
        ("yolo11n.yaml", "yolo11n.yaml", "fine_grained", "by anchors, which a yolo does not have"),
        (
            "retina_nano",
            "frcnn_nano",
            "fine_grained",
            "needs the same anchors, but the teacher is a faster_rcnn .*use fitnet, or gid",
        ),
        ("retina_nano", "retina_nano", "mimicking", "the student is a retinanet and the teacher a retinanet"),
        ("retina_nano", "retina_nano", "gid+hint", "distill=gid.hint names hint"),
    ],
)
def test_a_method_that_does_not_apply_is_refused(data, teachers, name, teacher, methods, says) -> None:
    with pytest.raises(UserError, match=says):
        GID(name).train(**FAST, data=str(data), teacher=teachers[teacher], distill=methods)


@pytest.mark.parametrize("method", ["gid", "fitnet", "mimicking"])
def test_a_method_leaves_the_numbers_that_the_task_draws(method: str) -> None:
    """Faster R-CNN draws anchors and proposals to train on: under a teacher the same ones as its plain twin."""
    args = SimpleNamespace(**{**DEFAULTS, "nbs": 2, "distill": method})
    student, teacher = (GIDDetectionModel("frcnn_nano", nc=3, verbose=False) for _ in range(2))
    student.args = teacher.args = args
    batch = {"img": torch.rand(2, 3, 64, 96), "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    batch |= {"cls": torch.zeros(1, 1), "batch_idx": torch.zeros(1)}
    drawn = []
    for model in (student, TeacherStudentModel(student, teacher, make_projector(args, student, teacher))):
        torch.manual_seed(0)
        _, items = model.train().loss(batch)
        drawn.append((torch.rand(1).item(), items["cls_loss"].item()))
    assert drawn[0] == drawn[1]
