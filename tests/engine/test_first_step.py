"""What is judged after the first step: a term that is on teaches, or the run says why not; an empty batch waits."""

from types import SimpleNamespace

import pytest
import torch
from engine_helpers import FAST, write_data

from gid_yolo import GID
from gid_yolo.engine.first_step import FirstStep
from gid_yolo.engine.gradients import Pull
from gid_yolo.errors import UserError

NAMES = ["feat_loss", "rel_loss", "resp_loss"]


def trainer_after(instances: list[int], *, pulled_at: str = "pyramid", alpha: float = 0.1, **values: float):
    """A trainer after a batch of images with so many instances, whose terms have the values given, else 1."""
    pulls = {name: Pull(x := values.get(name, 1.0), x, 1.0, 0.5) for name in ("task", *NAMES)}
    valid = torch.tensor([[k < count for k in range(10)] for count in instances])
    gid = SimpleNamespace(term_names=NAMES, alpha=alpha)
    model = SimpleNamespace(factor=1.0, term_names=NAMES, pulls=pulls, instances=SimpleNamespace(valid=valid))
    model.projector, model.pulled_at, model.has_objects = SimpleNamespace(gid=gid), pulled_at, torch.tensor(True)
    model.module = model
    return SimpleNamespace(model=model)


def test_terms_that_teach_pass_at_once(caplog) -> None:
    first = FirstStep()
    first.check(trainer_after([3, 10]))
    assert first.passed
    assert "First step" in caplog.text


@pytest.mark.parametrize("name", ["feat_loss", "rel_loss"])
def test_a_term_of_0_between_instances_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is on but its value is 0 .* may be the same model"):
        FirstStep().check(trainer_after([3, 0], **{name: 0.0}))


@pytest.mark.parametrize(("count", "says"), [(1, "two general instances to relate"), (2, "is always 1")])
def test_relations_wait_for_an_image_of_three_instances(caplog, count: int, says: str) -> None:
    # Of two instances both distances are their mean: d / phi = 1 in teacher and student, whatever they are
    first = FirstStep()
    first.check(trainer_after([count, 1], rel_loss=0.0))
    assert not first.passed
    assert says in caplog.text
    with pytest.raises(UserError, match="rel_loss is on but"):
        first.check(trainer_after([3, 1], rel_loss=0.0))


def test_a_term_that_was_judged_is_not_judged_again() -> None:
    first = FirstStep()
    first.check(trainer_after([2], rel_loss=0.0))
    first.check(trainer_after([3], feat_loss=0.0))  # of the others alone
    assert first.passed


def test_responses_wait_for_an_output_that_answers(caplog) -> None:
    first = FirstStep()
    first.check(trainer_after([10], resp_loss=0.0))
    assert "no output answers for a general instance" in caplog.text
    first.check(trainer_after([10]))
    assert first.passed


def test_boxes_alone_may_be_equal() -> None:
    # Without classes (alpha = 0) a response loss of 0 is that of equal boxes, and no sign of an empty mask
    with pytest.raises(UserError, match="resp_loss is on but"):
        FirstStep().check(trainer_after([10], alpha=0.0, resp_loss=0.0))


def test_the_wait_ends_with_a_warning(caplog) -> None:
    first = FirstStep()
    for _ in range(20):
        assert not first.passed
        first.check(trainer_after([2], rel_loss=0.0))
    assert first.passed
    assert "in none of the first 20 batches" in caplog.text


def test_batches_without_instances_are_passed_over(caplog) -> None:
    first = FirstStep()
    for _ in range(30):
        first.check(trainer_after([0, 0], feat_loss=0.0, rel_loss=0.0, resp_loss=0.0))
    assert caplog.text.count("nothing to distil") == 1
    assert not first.passed
    first.check(trainer_after([4, 0]))
    assert first.passed


def test_a_run_on_images_of_two_objects(tmp_path, caplog) -> None:
    data = write_data(tmp_path / "data")
    for label in (data.parent / "labels" / "train").iterdir():
        label.write_text("0 0.2 0.2 0.3 0.3\n1 0.7 0.7 0.3 0.3\n")
    run, teacher = tmp_path / "run", tmp_path / "teacher"
    GID("retina_nano").train(**FAST, data=str(data), save_dir=str(teacher))
    best = str(teacher / "weights" / "best.pt")
    GID("retina_nano").train(**FAST, data=str(data), save_dir=str(run), teacher=best, gid_types="gt", seed=1)
    assert "rel_loss is 0, as no image has three general instances" in caplog.text
    assert (run / "coco_metrics.json").is_file()


@pytest.mark.parametrize("settings", [{}, {"gid_types": "pos"}])
def test_two_instances_have_no_relation(data, settings) -> None:
    with pytest.raises(UserError, match="gid_top_k=2 leaves the relation loss nothing to compare"):
        GID("retina_nano").train(**FAST, data=str(data), teacher="t.pt", gid_top_k=2, **settings)
