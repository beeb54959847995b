"""A method that is asked for and weighs nothing is a contradiction, said before anything is trained."""

import pytest
from engine_helpers import FAST

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.engine.config import check_weights
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

OFF = {"gid_feature": 0, "gid_relation": 0.0, "gid_response": 0}
CONTRADICTIONS = [
    ({"distill": "fitnet", "fitnet_weight": 0}, "distill=fitnet asks for fitnet, but fitnet_weight is 0: give it a"),
    ({"distill": "fine_grained", "fine_grained_weight": 0.0}, "but fine_grained_weight is 0"),
    ({"distill": "mimicking", "mimicking_weight": 0}, "but mimicking_weight is 0"),
    ({"distill": "gid+fitnet", "fitnet_weight": 0}, "is 0: give it a weight; distill=gid leaves fitnet out"),
    (OFF, "distill=gid asks for gid, but gid_feature, gid_relation, gid_response, gid_cross are 0: give one of"),
    ({"distill": "gid+fitnet", **OFF}, "are 0: give one of them a weight; distill=fitnet leaves gid out"),
    ({"gid_weighting": "score", "gid_feature": 0}, "gid_weighting=score weighs the instances of the feature loss, but"),
    ({"gid_weighting": "score", "gid_types": "gt"}, "gid_types=gt distils the ground truth, which has no such score"),
    (
        {"gid_level": "size", "gid_feature": 0, "gid_relation": 0},
        "gid_level=size is about the crops .*, but gid_feature and gid_relation are 0: give one a weight, or leave",
    ),
    (
        {"distill_clip": "apart", "gid_feature": 0, "gid_relation": 0},
        "distill_clip=apart clips .*, but gid_feature, gid_relation and gid_cross are 0: give one a weight, or leave",
    ),
    (
        {"gid_cross": 1, "gid_standardize": "maps"},
        "gid_cross=1.* but gid_standardize=maps .*: give gid_standardize=raw",
    ),
    ({"gid_cross": 1, "gid_feature": 0, "gid_standardize": "teacher"}, "but gid_standardize=teacher adapts them"),
    ({"gid_alpha": 0, "gid_beta": 0}, "gid_response=1.0 is on, but gid_alpha and gid_beta, .* or set gid_response=0"),
]


@pytest.mark.parametrize(("settings", "says"), CONTRADICTIONS)
def test_the_sentence(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_weights({"teacher": "teacher.pt", **settings})


@pytest.mark.parametrize(("settings", "says"), CONTRADICTIONS)
def test_the_trainer_refuses_without_a_step(data, teacher, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher), **settings})


def test_a_teacher_is_not_trained_first(data, tmp_path) -> None:
    with pytest.raises(UserError, match="fitnet_weight is 0"):
        GID("retina_nano").train(**FAST, data=str(data), teacher="retina_nano", distill="fitnet", fitnet_weight=0)
    assert not (tmp_path / "runs").exists()


def test_the_command_line(capsys, data, teacher) -> None:
    words = [f"{key}={value}" for key, value in FAST.items()]
    arguments = ["train", "model=retina_nano", f"data={data}", f"teacher={teacher}", *words]
    assert main([*arguments, "gid_feature=0", "gid_relation=0", "gid_response=0"]) == 2
    assert "distill=none trains plainly under the teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gid_feature": 0, "gid_relation": 0},  # table 6: a single term
        {"gid_response": 0, "gid_alpha": 0, "gid_beta": 0},  # no response, no matter what it is made of
        {"gid_alpha": 0},
        {"gid_beta": 0},
        {"fitnet_weight": 0},  # not asked for
        {"distill": "none", **OFF},
        {"distill": None, **OFF},  # as Ultralytics reads the word none
        {"distill": "fitnet", **OFF},
        {"distill": "gid+fitnet", "distill_clip": "apart", "gid_feature": 0, "gid_relation": 0},  # FitNet compares them
    ],
)
def test_what_is_no_contradiction(settings: dict) -> None:
    check_weights({"teacher": "teacher.pt", **settings})


def test_without_a_teacher_weights_mean_nothing() -> None:
    check_weights({"distill": "gid", **OFF})
