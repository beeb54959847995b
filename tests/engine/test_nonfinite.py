"""A NaN or an infinite value is traced to its cause, iteration and images; the run recovers, or says why it cannot."""

import math

import pytest
import torch
from engine_helpers import train_one_epoch
from faults import Fault, finite, make, report, weights

from gid_yolo.engine.checkpoint import load_any
from gid_yolo.engine.run_state import KEY
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.watch import INPUTS, checksum
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError

DISTILLED = ["cls_loss", "box_loss", "feat_loss", "rel_loss", "resp_loss"]


@pytest.mark.parametrize("iteration", [3, 4])
@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("images", math.nan, "the images hold NaN"),
        ("targets", math.nan, "the labels hold NaN"),
        ("features", math.inf, "the student predicted NaN"),
        ("feat_loss", 1e38, "feat_loss became NaN or infinite, of finite predictions of both models,"),
        ("gradient", math.inf, "the gradient of "),
    ],
)
def test_one_fault_is_traced_and_recovered_from(data, teacher, tmp_path, monkeypatch, kind, value, sentence, iteration):
    fault = Fault(kind, iteration, value)
    trainer = make(fault, monkeypatch, data, tmp_path, teacher=str(teacher))
    trainer.train()
    found = report(trainer)
    if kind == "targets":  # a box that is no number matches no anchor: the loss is finite
        assert "recoveries" not in found
        assert found["batches_not_finite"] == 1
    else:
        assert found["recoveries"] == 1
        assert found["batches_not_finite"] == 4 - iteration + 1  # the weights are lost: so is the rest of the epoch
    (event,) = found["events"]
    assert event["sentence"].startswith(sentence)
    assert f"in epoch 2 on a batch of {', '.join(fault.files)} (iteration {iteration}): " in event["sentence"]
    assert (event["iteration"], event["epoch"], event["batch"], event["attempt"]) == (iteration, 2, iteration - 2, 0)
    assert event["files"] == fault.files
    assert len(fault.files) == 4
    assert list(event["inputs_finite"]) == list(INPUTS)
    flows = {"images": ["images"], "targets": ["targets"], "features": ["student features", "student predictions"]}
    if kind == "images":
        flows["images"] = list(INPUTS[:1] + INPUTS[2:])
    assert event["not_finite"]["inputs"] == flows.get(kind, [])
    if kind == "feat_loss":
        assert event["not_finite"]["terms"] == ["feat_loss"]
        assert event["terms"]["feat_loss"] == "inf"
    if kind == "gradient":
        assert event["not_finite"]["terms"] == []
        assert event["not_finite"]["gradients"] == len(event["not_finite"]["first_gradients"]) == 1
    assert list(event["terms"]) == [*DISTILLED, "loss"]
    assert event["precision"] == "float32"
    assert event["scale"] is None
    assert all(lr > 0 for lr in event["lr"].values())
    assert finite(trainer.best)
    with trainer.csv.open() as file:
        assert [line.split(",")[0] for line in file][1:] == ["1", "2", "3"]


@pytest.mark.parametrize("model", ["fcos_nano", "frcnn_nano", "yolo11n.yaml"])
def test_every_kind_is_traced_without_a_teacher(data, tmp_path, monkeypatch, model):
    kind = YOLOTrainer if model.startswith("yolo") else GIDTrainer
    fault = Fault("features", 4)
    trainer = make(fault, monkeypatch, data, tmp_path, kind, model=model, epochs=2)
    trainer.train()
    (event,) = report(trainer)["events"]
    assert event["files"] == fault.files
    assert event["iteration"] == 4
    assert event["not_finite"]["inputs"] == ["student features", "student predictions"]
    assert set(event["inputs_finite"]) == {"images", "targets", "student features", "student predictions"}
    assert event["sentence"].startswith("the student predicted NaN")
    assert finite(trainer.best)


def test_the_first_epoch_has_nothing_to_go_back_to(data, tmp_path, monkeypatch):
    fault = Fault("targets", 2)
    trainer = make(fault, monkeypatch, data, tmp_path)
    with pytest.raises(UserError, match=r"the labels hold NaN .* in epoch 1 .*\(iteration 2\): mend .*nonfinite.json"):
        trainer.train()
    assert report(trainer)["events"][0]["files"] == fault.files
    assert not trainer.last.exists()


def test_a_teacher_that_breaks_ends_the_run(data, teacher, tmp_path, monkeypatch):
    trainer = make(Fault("teacher", 3), monkeypatch, data, tmp_path, teacher=str(teacher))
    with pytest.raises(UserError, match=r"the teacher predicted NaN .* in epoch 2 .*last.pt is whole: gid-train"):
        trainer.train()
    assert report(trainer)["events"][0]["not_finite"]["inputs"] == ["teacher predictions"]


def test_a_run_that_cannot_recover_leaves_a_checkpoint_that_can_be_resumed(data, teacher, tmp_path, monkeypatch):
    fault = Fault("feat_loss", 3, 1e38, always=True)
    with monkeypatch.context() as patch:
        trainer = make(fault, patch, data, tmp_path, teacher=str(teacher))
        with pytest.raises(
            UserError, match=r"^feat_loss became .*; Ultralytics gave up \(.*persisted for 4 epochs\); "
        ):
            trainer.train()
    found = report(trainer)
    assert [event["attempt"] for event in found["events"]] == [0, 1, 2, 3]
    assert {event["iteration"] for event in found["events"]} == {3}
    assert found["recoveries"] == 3
    ckpt = load_any(trainer.last)[1]
    assert ckpt["epoch"] == 0
    assert all(torch.isfinite(x).all() for x in ckpt[KEY]["model"].values())
    again = GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    again.train()
    assert finite(again.best)
    assert len(report(again)["events"]) == 4  # what is written stays


def test_counts_are_not_lost_by_a_resumption(data, tmp_path, monkeypatch):
    trainer = make(Fault("images", 3), monkeypatch, data, tmp_path)
    seen = []

    def second(t):
        seen.append(t.epoch)
        if t.epoch == 1:
            raise InterruptedError

    trainer.add_callback("on_model_save", second)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert seen == [0, 1]
    again = GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    again.train()
    assert again.counts == {"batches_not_finite": 2, "recoveries": 1}
    assert len(report(again)["events"]) == 1
    assert trainer.counts == again.counts


def test_a_new_run_in_the_same_folder_forgets_the_reports_of_the_old(data, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("nonfinite.json", "nonfinite_rank1.json"):
        (tmp_path / "run" / name).write_text("{}")
    trainer = make(None, monkeypatch, data, tmp_path, epochs=1, exist_ok=True)
    trainer.train()
    assert not list(trainer.save_dir.glob("nonfinite*"))


def test_without_a_fault_there_is_no_report_and_nothing_changes(data, teacher, tmp_path, monkeypatch):
    runs = []
    for name in ("watched", "alone"):
        trainer = make(None, monkeypatch, data, tmp_path / name, teacher=str(teacher))
        if name == "alone":
            trainer.add_callback("on_train_start", lambda t: setattr(t, "watch", None))
        trainer.train()
        assert not (trainer.save_dir / "nonfinite.json").exists()
        runs.append(weights(trainer.best))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize("iteration", [1, 3, 4])
def test_what_is_read_later_is_of_its_own_batch(data, tmp_path, monkeypatch, iteration):
    # As on a GPU: of the batch before
    fault = Fault("targets", iteration)
    trainer = make(fault, monkeypatch, data, tmp_path)
    trainer.add_callback("on_train_start", lambda t: setattr(t.watch, "delay", 1))
    if iteration == 1:
        with pytest.raises(UserError, match=r"\(iteration 1\)"):
            trainer.train()
        assert trainer.iteration == 1  # from 0: it is read in the second
    else:
        trainer.train()
    (event,) = report(trainer)["events"]
    assert event["iteration"] == iteration
    assert event["files"] == fault.files


def test_a_checkpoint_without_counts_is_resumed(data, tmp_path, monkeypatch):
    trainer = make(None, monkeypatch, data, tmp_path)
    train_one_epoch(trainer)
    ckpt = torch.load(trainer.last, weights_only=False)
    del ckpt[KEY]["counts"]
    torch.save(ckpt, trainer.last)
    again = GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    again.train()
    assert not again.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_is_found(dtype, value):
    # The largest numbers of float16, 65504: their sum of 4000 is beyond it, but none is infinite
    tensors = [torch.full((2, 500, 4), 65504.0, dtype=dtype), torch.zeros(2, 500, dtype=dtype)]
    assert checksum(tensors).isfinite()
    for tensor in tensors:
        before = tensor.view(-1)[7].item()
        tensor.view(-1)[7] = value
        assert not checksum(tensors).isfinite()
        tensor.view(-1)[7] = before
