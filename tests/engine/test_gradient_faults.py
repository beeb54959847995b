"""Gradients that are not finite though the losses are: of which batch, and where batches are accumulated or scaled."""

import math

import pytest
from faults import Fault, finite, make, report
from test_scaled_steps import make as make_scaled
from ultralytics.utils import LOGGER

from gid_yolo.engine.checkpoint import load_any
from gid_yolo.engine.nonfinite import sentence_of
from gid_yolo.engine.run_state import KEY
from gid_yolo.engine.watch import Reading
from gid_yolo.errors import UserError

ACCUMULATED = {"batch": 2, "nbs": 8}  # 8 images are 4 iterations an epoch, and a step each


@pytest.mark.parametrize("iteration", [5, 6, 8])
def test_the_batch_is_named_where_four_make_a_step(data, tmp_path, monkeypatch, iteration):
    fault = Fault("gradient", iteration)
    trainer = make(fault, monkeypatch, data, tmp_path, **ACCUMULATED, warmup_epochs=0)
    trainer.train()
    found = report(trainer)
    (event,) = found["events"]
    assert event["iteration"] == iteration
    assert event["files"] == fault.files
    assert event["sentence"].startswith("the gradient of ")
    assert found["recoveries"] == 1
    assert finite(trainer.best)


def test_gradients_that_wait_at_an_epochs_end_are_not_saved(data, tmp_path, monkeypatch):
    # Steps of 3 batches: the 8th, the last of the second epoch, waits for the 9th
    trainer = make(Fault("gradient", 8), monkeypatch, data, tmp_path, batch=2, nbs=6, warmup_epochs=0)
    saved = []

    def look(t):
        state = load_any(t.last)[1][KEY]
        saved.append((t.epoch, all(x.isfinite().all() for x in state["gradients"].values())))

    trainer.add_callback("on_model_save", look)
    trainer.train()
    assert report(trainer)["recoveries"] == 1
    assert [epoch for epoch, _ in saved] == [0, 1, 2]
    assert all(whole for _, whole in saved)


def test_a_scaler_of_one_overflows_nothing(data, tmp_path, monkeypatch):
    # 4, 2, 1, 1/2: each of the first four steps is skipped, and two of them because of the gradients themselves
    fault = Fault("gradient", 1)
    trainer = make_scaled(data, tmp_path, 4.0, epochs=4)
    fault.attach(trainer, monkeypatch)
    fault.begin = lambda t: None
    parameter = []

    def spoil(p):
        p.grad.mul_(math.nan)

    def begin(t):
        parameter[:] = [next(p for p in t.model.parameters() if p.requires_grad)]
        if t.iteration < 4:
            fault.hooks.append(parameter[0].register_post_accumulate_grad_hook(spoil))

    trainer.add_callback("on_train_batch_start", begin)
    trainer.train()
    found = report(trainer)
    assert found["steps_skipped"] == 4
    assert [(event["iteration"], event["scale"]) for event in found["events"]] == [(3, 1.0), (4, 0.5)]
    assert finite(trainer.last)


def spoil_a_slope(trainer, first: int) -> None:
    """From an iteration on, feat_loss is 0 x sqrt(0) more: the loss stays as it is, and its gradient is no number."""
    projector = trainer.model.projector
    forward = projector.forward

    def spoiled(teacher_pyramid, student_pyramid, *args, **kwargs):
        terms, instances = forward(teacher_pyramid, student_pyramid, *args, **kwargs)
        if trainer.iteration + 1 >= first:
            terms["feat_loss"] = terms["feat_loss"] + (0 * student_pyramid[0]).sum().sqrt()
        return terms, instances

    projector.forward = spoiled


def named(report: dict) -> list[list[str]]:
    return [event["not_finite"]["terms_of_gradients"] for event in report["events"]]


def test_the_term_of_a_gradient_is_found_when_the_epoch_is_tried_again(data, teacher, tmp_path, monkeypatch):
    trainer = make(None, monkeypatch, data, tmp_path, teacher=str(teacher))
    trainer.add_callback("on_train_start", lambda t: spoil_a_slope(t, 3))
    says = r"^the gradient of .* through feat_loss, of a finite loss, .*; Ultralytics gave up"
    with pytest.raises(UserError, match=says):
        trainer.train()
    found = report(trainer)
    assert named(found) == [[], ["feat_loss"], ["feat_loss"], ["feat_loss"]]
    assert "gradients=1 names the term" in found["events"][0]["sentence"]
    assert "lower lr0 or the weight of the term" in found["events"][1]["sentence"]
    assert all(event["not_finite"]["terms"] == [] for event in found["events"])


def test_the_term_of_a_gradient_is_named_where_gradients_are_asked_for(data, teacher, tmp_path, monkeypatch):
    trainer = make(None, monkeypatch, data, tmp_path, teacher=str(teacher), gradients=1)
    trainer.add_callback("on_train_start", lambda t: spoil_a_slope(t, 2))
    with pytest.raises(UserError, match=r"^the gradient of .* through feat_loss, of a finite loss, in epoch 1 "):
        trainer.train()
    assert named(report(trainer)) == [["feat_loss"]]


def test_a_remedy_is_one_that_helps():
    where = {"iteration": 1, "epoch": 1, "batch": 1, "attempt": 0, "files": ["a.png"]}
    terms = Reading(**where, terms={"cls_loss": math.inf, "loss": math.inf})
    student = Reading(**where, inputs={"student features": False})
    gradients = Reading(**where, gradients=["x"], stepped=True)
    for reading in (terms, student, gradients):
        assert "amp=False" not in sentence_of(reading, distilled=False, half=False, half_terms=False)
    for reading in (student, gradients):
        assert "amp=False" in sentence_of(reading, distilled=False, half=True, half_terms=False)
    assert "amp=False" not in sentence_of(terms, distilled=False, half=True, half_terms=False)
    assert "amp=False" in sentence_of(terms, distilled=False, half=True, half_terms=True)
    teacher = Reading(**where, inputs={"teacher features": False})
    for float16 in (True, False):
        said = sentence_of(teacher, distilled=True, half=True, half_terms=False, half_teacher=float16)
        assert ("teacher_precision=fp32" in said) == float16


FROZEN = ["0.backbone", "0.neck"]


def test_a_frozen_pyramid_is_no_place_for_terms_of_features(data, teacher, tmp_path, monkeypatch):
    trainer = make(None, monkeypatch, data, tmp_path, teacher=str(teacher), freeze=FROZEN)
    with pytest.raises(UserError, match=r"feat_loss is on but .* or what it would train is frozen \(freeze=\)"):
        trainer.train()


def test_what_responses_do_to_a_frozen_pyramid_is_measured_at_predictions(data, teacher, tmp_path, monkeypatch):
    off = {"gid_feature": 0, "gid_relation": 0, "gradients": 1, "epochs": 1}
    trainer = make(None, monkeypatch, data, tmp_path, teacher=str(teacher), freeze=FROZEN, **off)
    log: list[str] = []
    monkeypatch.setattr(LOGGER, "info", lambda text="", *args, **kwargs: log.append(str(text)))
    trainer.train()
    text = "\n".join(log)
    assert "First step (gradients at the student's predictions)" in text
    assert "Gradients at the student's predictions, epoch 1" in text


def test_nothing_to_train_is_said(data, tmp_path, monkeypatch):
    trainer = make(None, monkeypatch, data, tmp_path, freeze=[*FROZEN, "0.head"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        trainer.train()
