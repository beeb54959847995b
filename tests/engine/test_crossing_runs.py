"""`gid_cross=`: the teacher's head reads the student's features, through the command that trains."""

import csv
from types import SimpleNamespace

import pytest
import torch
from engine_helpers import FAST, write_data

from gid_yolo import GID
from gid_yolo.analysis.study_plan import lacks_levels
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.config import DEFAULTS, check_weights
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError

ONLY = {"gid_feature": 0, "gid_relation": 0, "gid_response": 0, "gid_cross": 2.0}


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


def test_what_a_crossing_can_do_beside_other_features() -> None:
    alone = {"gid_feature": 0, "gid_relation": 0, "gid_cross": 1}
    check_weights({"teacher": "teacher.pt", "gid_cross": 1, "gid_standardize": "crops", "gid_adapt_kernel": 3})
    check_weights({"teacher": "teacher.pt", **alone, "gid_standardize": "maps", "gid_adapt_kernel": 3})


def test_classes_in_another_order_are_crossed_by_name(teachers, tmp_path, data) -> None:
    model = GID("retina_nano")
    seen = {}

    def look(trainer) -> None:
        inner = trainer.model
        head = inner._teachers_head((64, 64))
        pyramid = inner.views[0].raw(torch.rand(1, 3, 64, 64))[0]
        every = inner.views[0].predict(pyramid, (64, 64)).logits
        seen.update(crossed=head.predict(pyramid).logits, every=every, index=inner.class_index)

    model.add_callback("on_train_batch_end", look)
    names = list(reversed(load_model(teachers["retina_nano"], "teacher")[0].names.values()))
    other = write_data(tmp_path / "data", train=8, names=names)
    model.train(**FAST, data=str(other), teacher=teachers["retina_nano"], save_dir=str(tmp_path / "run"), **ONLY)
    order = list(range(len(names)))[::-1]
    assert seen["index"][1].tolist() == order
    torch.testing.assert_close(seen["crossed"], seen["every"][..., order])


@pytest.mark.parametrize(
    ("student", "teacher", "lacks"),
    [
        ("yolo", "retinanet", True),  # strides 8, 16, 32 and perhaps 64, of 8 to 128
        ("retinanet", "yolo", False),
        ("retinanet", "fcos", False),
        ("fcos", "faster_rcnn", False),  # whose strides are a setting: the trainer looks
        ("faster_rcnn", "retinanet", True),  # which reads stride 128
    ],
)
def test_a_study_knows_of_levels_before_it_trains(student: str, teacher: str, lacks: bool) -> None:
    assert lacks_levels(student, teacher) is lacks


def test_losses_are_made_as_the_arguments_say_also_of_a_run_that_knew_less(teachers) -> None:
    network = load_model(teachers["retina_nano"], "teacher")[0]
    made = make_projector(SimpleNamespace(**{**DEFAULTS, "gid_weighting": "score", "gid_cross": 2.0}), network, network)
    assert (made.gid.weighting, made.gid.weights["cross"], made.gid.level) == ("score", 2.0, "detector")
    later = {"gid_weighting", "gid_cross", "gid_level"}
    before = {key: value for key, value in DEFAULTS.items() if key not in later}
    made = make_projector(SimpleNamespace(**before), network, network)
    assert (made.gid.weighting, made.gid.weights["cross"], made.gid.level) == ("uniform", 0.0, "size")
