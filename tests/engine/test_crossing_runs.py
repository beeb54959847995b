"""`gid_cross=`: the teacher's head reads the student's features, through the command that trains."""

import csv

import pytest
import torch
from engine_helpers import FAST

from gid_yolo import GID
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.distillable import distillable
from gid_yolo.errors import UserError

ONLY = {"gid_feature": 0, "gid_relation": 0, "gid_response": 0, "gid_cross": 2.0}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data) -> dict[str, str]:
    files = {}
    for name in ("retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml"):
        folder = tmp_path_factory.mktemp(name.partition(".")[0])
        GID(name).train(**FAST, data=str(data), save_dir=str(folder))
        files[name] = str(folder / "weights" / "best.pt")
    return files


@pytest.mark.parametrize("name", ["retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml"])
def test_a_head_makes_of_its_own_pyramid_what_the_model_predicts(teachers, name: str) -> None:
    view = distillable(load_model(teachers[name], "teacher")[0].float().eval())
    torch.manual_seed(0)
    with torch.no_grad():
        pyramid, raw = view.raw(torch.rand(2, 3, 96, 128))
        again = view.predict(pyramid, (96, 128))
    torch.testing.assert_close(again.logits, raw.logits)
    torch.testing.assert_close(again.boxes, raw.boxes)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(x, x) for x in ("retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml")]
    + [("retina_nano", "fcos_nano"), ("retina_nano", "yolo11n.yaml")],
)
def test_a_student_is_trained_through_the_teachers_head(data, tmp_path, teachers, student: str, teacher: str) -> None:
    taught = {**FAST, "data": str(data), "teacher": teachers[teacher], "save_dir": str(tmp_path)}
    GID(student).train(**taught, **ONLY, gradients=1)
    with (tmp_path / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["train/cross_loss"]) > 0
    assert not {"train/feat_loss", "train/rel_loss", "train/resp_loss"} & set(row)
    with (tmp_path / "gradients.csv").open() as file:
        norms = [float(line["norm"]) for line in csv.DictReader(file) if line["term"] == "cross_loss"]
    assert norms
    assert max(norms) > 0


def test_a_pyramid_that_lacks_a_level_of_the_head_is_refused(data, teachers) -> None:
    with pytest.raises(UserError, match=r"gid_cross=2.0 .* strides 8, 16, 32 .* set gid_cross=0"):
        GID("yolo11n.yaml").train(**FAST, data=str(data), teacher=teachers["retina_nano"], **ONLY)


def test_a_crossing_without_parts_is_refused(data, teachers) -> None:
    with pytest.raises(UserError, match=r"gid_cross=2.0 is on, but gid_alpha and gid_beta"):
        GID("retina_nano").train(
            **FAST, data=str(data), teacher=teachers["retina_nano"], **ONLY, gid_alpha=0, gid_beta=0
        )
