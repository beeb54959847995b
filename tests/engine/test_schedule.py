"""Runs of a number of iterations, and a learning rate that falls in steps: what every batch is trained with."""

import math

import pytest
import torch
import yaml
from engine_helpers import FAST, train_one_epoch

from gid_yolo.cfg import load_yaml
from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.instance_counts import read_counts
from gid_yolo.engine.schedule import Schedule, check_schedule, override, schedule_of
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError
from gid_yolo.export.budget import budget_notes

# 8 images in batches of 2: epochs of 4, 4 and 3 batches; the warm-up outlasts the first epoch and the first milestone
RUN = {
    **{"model": "retina_nano", **FAST, "batch": 2, "nbs": 2, "lr0": 0.004, "epochs": 50},
    **{"iterations": 11, "lr_steps": [5, 9], "warmup_iterations": 6},
}


def expected(iterations, lr0=0.004):
    """Warm-up from 0 in 6 iterations, times 0.1 from iteration 5 and again from 9 on."""
    return [lr0 * min(i / 6, 1) * 0.1 ** ((i >= 5) + (i >= 9)) for i in iterations]


def watch(trainer):
    """Note the learning rates of every batch, and every step of the optimiser."""
    seen = {"lr": [], "steps": 0}
    step = trainer.optimizer_step

    def counted():
        seen["steps"] += 1
        step()

    trainer.optimizer_step = counted
    trainer.add_callback(
        "on_train_batch_end", lambda t: seen["lr"].append([g["lr"] for g in t.optimizer.param_groups if g["params"]])
    )
    return seen


def first(seen):
    return [lrs[0] for lrs in seen["lr"]]


# Pure functions -------------------------------------------------------------------------------------------------------


def test_factor_falls_from_the_milestone_on():
    schedule = Schedule(batches=4, iterations=11, milestones=(5, 9), gamma=0.5)
    assert [schedule.factor(i) for i in (0, 4, 5, 8, 9, 10)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert schedule.epochs == 3


def test_milestones_in_epochs_are_iterations_of_the_loader():
    schedule = schedule_of({"lr_steps": [8, 11.5]}, batches=10, epochs=12)
    assert schedule == Schedule(10, 120, (80, 115), 0.1)
    assert schedule_of({}, 10, 12) == Schedule(10, 120)
    assert schedule_of({"iterations": 25, "lr_steps": 7, "lr_gamma": 0.2}, 10, 3) == Schedule(10, 25, (7,), 0.2)


def test_the_other_way_to_say_it_is_replaced():
    base = {"iterations": 100, "warmup_iterations": 10, "lr0": 0.1}
    assert override(base, {"epochs": 5}) == {**base, "iterations": None, "epochs": 5}
    assert override(base, {"epochs": 5, "iterations": 7}) == {**base, "iterations": 7, "epochs": 5}
    assert override(base, {"warmup_epochs": 2.0})["warmup_iterations"] is None
    assert override(base, {"epochs": None}) == {**base, "epochs": None}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"iterations": 0}, "iterations=0 must be a whole number of at least 1"),
        ({"iterations": 2.5}, "iterations=2.5 must be a whole number"),
        ({"iterations": "many"}, "iterations=many must be a whole number"),
        ({"iterations": True}, "iterations=True must be a whole number"),
        ({"iterations": 9, "warmup_iterations": 9}, "warmup_iterations=9 must be under the 9 iterations"),
        ({"warmup_iterations": 1.5}, "warmup_iterations=1.5 must be a whole number"),
        ({"warmup_iterations": -1}, "warmup_iterations=-1 must be a whole number"),
        ({"lr_gamma": 0}, "lr_gamma=0 must be a number over 0"),
        ({"lr_gamma": 1.5}, "lr_gamma=1.5 must be a number over 0 and at most 1"),
        ({"lr_gamma": "x"}, "lr_gamma=x must be a number"),
        ({"lr_steps": "8,11"}, "lr_steps=8,11 must be a list of numbers"),
        ({"lr_steps": [0, 3]}, "must be a list of numbers over 0"),
        ({"lr_steps": [5, 5]}, r"lr_steps=\[5, 5\] must increase"),
        ({"lr_steps": [9, 5]}, "must increase"),
        ({"lr_steps": [3, 8], "epochs": 8}, "must lie inside the run of 8 epochs"),
        ({"lr_steps": [3, 8], "epochs": 100, "iterations": 8}, "must lie inside the run of 8 iterations"),
        ({"lr_steps": [2.5], "iterations": 8}, "must be whole numbers where iterations= is given"),
        ({"iterations": 8, "time": 1.0}, "time=1.0 leaves the run's length open and iterations= fixes it"),
        ({"lr_steps": [3], "time": 1.0}, "lr_steps= fixes it"),
    ],
)
def test_values_that_cannot_work(args, says):
    with pytest.raises(UserError, match=says):
        check_schedule(args)


@pytest.mark.parametrize(
    "args", [{}, {"lr_steps": [2.5], "epochs": 3}, {"lr_steps": 7}, {"lr_steps": []}, {"lr_gamma": 1}]
)
def test_values_that_work(args):
    check_schedule(args)


def test_budgets_differ_in_their_iterations():
    record = dict.fromkeys(("data", "fraction", "epochs", "imgsz", "initialised_from", "seed"), 1) | {"batch": 4}
    new = {**record, "iterations": None, "lr_steps": None}
    assert budget_notes({**new, "teacher": "t.pt"}, record) == []  # the older record had neither
    notes = budget_notes({**new, "iterations": 30, "teacher": "t.pt"}, {**new, "batch": 8})
    assert "WARNING: UNEQUAL BUDGET: iterations is 30 for model, but None for baseline." in notes
    assert "WARNING: UNEQUAL BUDGET: batch is 4 for model, but 8 for baseline." in notes


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_has_exactly_its_iterations_and_their_learning_rates(data):
    trainer = GIDTrainer(overrides={**RUN, "data": str(data), "backbone_lr": 0.25})
    seen = watch(trainer)
    trainer.train()
    assert seen["steps"] == len(seen["lr"]) == 11
    initial = [g["initial_lr"] for g in trainer.optimizer.param_groups if g["params"]]
    assert set(initial) == {0.004, 0.001}
    for i, lrs in enumerate(seen["lr"]):
        assert lrs == pytest.approx([expected([i], lr0)[0] for lr0 in initial])
    assert trainer.epochs == 3  # the 50 of epochs= are replaced
    assert len(trainer.csv.read_text().splitlines()) == 1 + 3  # the partial epoch is validated and logged too
    assert load_yaml(trainer.save_dir / "args.yaml")["epochs"] == 3
    record = load_model(trainer.best)[0].record
    assert (record["epochs"], record["iterations"], record["lr_steps"]) == (3, 11, [5, 9])
    assert (trainer.save_dir / "coco_metrics.json").is_file()
    trainer.args.iterations = 500  # EMA over the last tenth of the real number of steps
    trainer._fit_ema()
    assert trainer.ema.decay(10**6) == pytest.approx(1 - 10 / 500)


def test_an_interrupted_run_goes_on_with_the_same_schedule(data):
    trainer = GIDTrainer(overrides={**RUN, "data": str(data)})
    before = watch(trainer)
    train_one_epoch(trainer)
    with pytest.raises(UserError, match="began with batch=2, 3 epochs; with batch=4"):
        GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last), "batch": 4}).train()
    with pytest.raises(UserError, match=r"time=1.0 leaves the run's length open"):
        GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last), "time": 1.0})
    again = GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    after = watch(again)
    again.train()
    assert first(before) == pytest.approx(expected(range(4)))
    assert first(after) == pytest.approx(expected(range(4, 11)))
    assert after["steps"] == 7


def test_a_last_epoch_that_is_tried_again_is_as_long(data):
    trainer = GIDTrainer(overrides={**RUN, "data": str(data)})
    seen = watch(trainer)

    def spoil(t):
        if t.epoch == 2 and len(seen["lr"]) == 11:
            t.loss = torch.tensor(math.nan)  # Ultralytics goes back to last.pt and repeats the epoch

    trainer.add_callback("on_train_epoch_end", spoil)
    trainer.train()
    assert first(seen) == pytest.approx(expected([*range(11), *range(8, 11)]))


@pytest.mark.parametrize("steps", [True, False])
def test_after_a_retry_with_a_smaller_batch_the_iterations_are_those_asked_for(data, steps):
    own = {} if steps else {"lr_steps": None, "cos_lr": True}
    trainer = GIDTrainer(overrides={**RUN, "data": str(data), "batch": 4, **own})
    seen = watch(trainer)
    prepare = trainer.preprocess_batch

    def fail_once(batch):
        if len(seen["lr"]) == 1 and trainer.batch_size == 4:
            raise RuntimeError("CUDA out of memory")
        return prepare(batch)

    trainer.preprocess_batch = fail_once
    trainer.train()
    if steps:
        assert first(seen) == pytest.approx(expected([0, *range(11)]))
    else:  # half a cosine from 1 to lrf over the 3 epochs, which are no longer 6
        factors = [trainer.args.lrf + (1 - trainer.args.lrf) * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]
        assert first(seen)[-1] == pytest.approx(trainer.args.lr0 * factors[2])
    assert (trainer.epochs, trainer.batch_size) == (3, 2)
    record = load_model(trainer.best)[0].record
    assert (record["epochs"], record["batch"]) == (3, 2)  # what was trained, by which runs are compared
    args = yaml.safe_load((trainer.save_dir / "args.yaml").read_text())
    assert (args["epochs"], args["batch"]) == (3, 2)  # and repeated


def test_steps_in_epochs(data):
    lengths = {"epochs": 2, "iterations": None, "lr_steps": [0.5, 1.25], "warmup_iterations": 0, "lr_gamma": 0.5}
    trainer = GIDTrainer(overrides={**RUN, "data": str(data), **lengths})
    seen = watch(trainer)
    trainer.train()
    # epochs of 4 batches: 0.5 epochs are iteration 2, 1.25 epochs iteration 5
    assert first(seen) == pytest.approx([0.004 * f for f in (1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25)])


def test_fewer_iterations_than_batches_of_a_step_still_make_one(data):
    few = {"batch": 4, "nbs": 16, "iterations": 1, "warmup_iterations": 0, "lr_steps": None}
    trainer = GIDTrainer(overrides={**RUN, "data": str(data), **few})
    seen = watch(trainer)
    trainer.train()
    assert (seen["steps"], len(seen["lr"])) == (1, 1)


def test_yolo_has_the_same_schedule(data):
    overrides = {**RUN, "model": "yolo11n.yaml", "optimizer": "SGD", "warmup_bias_lr": 0.0}
    trainer = YOLOTrainer(overrides={**overrides, "data": str(data)})
    seen = watch(trainer)
    trainer.train()
    assert first(seen) == pytest.approx(expected(range(11)))
    assert load_model(trainer.best)[0].record["epochs"] == 3


def test_a_warm_up_that_outlasts_the_run_is_one_sentence(data, capsys):
    words = [f"data={data}", "epochs=1", "imgsz=64", "batch=4", "plots=False", "warmup_iterations=2"]
    assert main(["train", "model=retina_nano", *words]) == 2  # 8 images in batches of 4
    assert "warmup_iterations=2 must be under the 2 iterations of the run" in capsys.readouterr().err


def test_instances_are_counted_in_a_partial_epoch_too(data, teacher):
    trainer = GIDTrainer(overrides={**RUN, "data": str(data), "teacher": str(teacher)})
    seen = watch(trainer)
    trainer.train()
    assert first(seen) == pytest.approx(expected(range(11)))
    assert [row[0] for row in read_counts(trainer.save_dir / "gi_types.csv")] == list(range(1, 12))
