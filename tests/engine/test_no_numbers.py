"""NaN or infinite values in a prediction of any kind of detector end in a sentence that names the model."""

import math

import pytest
import torch
from engine_helpers import FAST, train_teachers
from torch import nn

from gid_yolo import GID
from gid_yolo.errors import UserError

NAMES = ("fcos_nano", "frcnn_nano", "yolo11n.yaml")  # RetinaNet's are in test_trainer.py


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data) -> dict[str, str]:
    return train_teachers(NAMES, data, tmp_path_factory)


def regression_layers(model: nn.Module) -> list[nn.Module]:
    """The last layers of the boxes of the dense predictions."""
    if not hasattr(model, "detector"):
        return [branch[-1] for branch in model.model[-1].cv2]
    detector = model.detector
    return [detector.rpn.deltas if hasattr(detector, "rpn") else detector.head.box_ltrb]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_model_is_named(data, tmp_path, teachers, name: str, who: str, value: float) -> None:
    model = GID(name)

    def break_it(trainer) -> None:
        for layer in regression_layers(getattr(trainer.model, f"{who}_model")):
            nn.init.constant_(layer.bias, value)

    model.add_callback("on_train_start", break_it)
    with pytest.raises(UserError, match=rf"the {who} predicted NaN or infinite values in epoch 1 on a batch of \S+png"):
        model.train(**FAST, data=str(data), teacher=teachers[name], save_dir=str(tmp_path))
    assert not (tmp_path / "weights" / "last.pt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_float16_overflow_is_one(data, tmp_path, teachers, name: str) -> None:
    # Autocast to float16: weights of 1e5 are infinite in it
    model = GID(name)

    def break_it(trainer) -> None:
        trainer.amp = True
        for layer in regression_layers(trainer.model.student_model):
            nn.init.constant_(layer.weight, 1e5)
        forward = trainer.model.loss

        def in_half_precision(*arguments):
            with torch.autocast("cpu", dtype=torch.float16):
                return forward(*arguments)

        trainer.model.loss = in_half_precision

    model.add_callback("on_train_start", break_it)
    with pytest.raises(UserError, match=r"the student predicted NaN or infinite values .* or set amp=False"):
        model.train(**FAST, data=str(data), teacher=teachers[name], save_dir=str(tmp_path))
