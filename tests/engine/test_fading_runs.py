"""A teacher that fades: its terms weigh less, and when they weigh nothing it is not asked."""

import copy
import csv
import re

import pytest
import torch
from engine_helpers import FAST, Interrupted
from test_no_waiting import make_batch, make_pair
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.distill.fading import fading
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.fade import told
from gid_yolo.engine.run_state import KEY
from gid_yolo.engine.schedule import override
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError


def make(data, teacher, folder, **overrides) -> GIDTrainer:
    settings = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher), "epochs": 4, "val": False}
    return GIDTrainer(overrides={**settings, "save_dir": str(folder), **overrides})


def interrupt(_) -> None:
    raise Interrupted


def watch(trainer) -> list[tuple[float, dict[str, float]]]:
    """The factor and the logged parts of every batch, and how often the teacher was asked."""
    seen: list = []

    def note(t) -> None:
        model = unwrap_model(t.model)
        seen.append((model.factor, {k: float(v) for k, v in t.loss_items.items()}, model.instances is not None))

    trainer.add_callback("on_train_batch_end", note)
    return seen


def test_the_terms_fall_and_the_teacher_is_left_out(data, teacher, tmp_path):
    trainer = make(data, teacher, tmp_path / "run", distill_until=0.5, distill_decay="linear", gradients=1)
    seen, asked = watch(trainer), []

    def count(t) -> None:
        unwrap_model(t.model).teacher_model.register_forward_pre_hook(lambda *_: None)
        original = unwrap_model(t.model).taught
        unwrap_model(t.model).__dict__["taught"] = lambda images: (asked.append(t.iteration), original(images))[1]

    trainer.add_callback("on_train_start", count)
    trainer.train()
    factors = [factor for factor, *_ in seen]
    # 4 epochs of 2 batches; a batch's middle lies at (i + 1/2) / 8 of the run, and the line ends at 1/2
    assert factors == pytest.approx([1 - (i + 0.5) / 4 for i in range(4)] + [0] * 4)
    assert asked == [0, 1, 2, 3]
    assert all(items["feat_loss"] > 0 for factor, items, _ in seen if factor)
    assert all(items[name] == 0 for factor, items, _ in seen if not factor for name in ("feat_loss", "gi_pos"))
    assert [there for *_, there in seen] == [True] * 4 + [False] * 4
    rows = list(csv.DictReader((trainer.save_dir / "gradients.csv").open()))
    assert {row["iteration"] for row in rows} == {"1", "2", "3", "4"}


def test_by_default_the_teacher_is_let_go_at_half(data, teacher, tmp_path):
    given = {key: value for key, value in FAST.items() if key != "distill_until"} | {"epochs": 2, "val": False}
    given |= {"model": "retina_nano", "data": str(data), "save_dir": str(tmp_path / "run"), "teacher": str(teacher)}
    trainer = GIDTrainer(overrides=given)
    seen = watch(trainer)
    trainer.train()
    assert [factor for factor, *_ in seen] == [1, 1, 0, 0]  # 2 epochs of 2 batches
    assert told(trainer) == "until iteration 2 of 4, then the student alone"
    assert override(DEFAULTS, {"time": 1.0})["distill_until"] is None  # of a run of unknown length there is no half


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"distill_until": 1.0}, "to the end"),
        ({"distill_until": 0.6}, "until iteration 5 of 8, then the student alone"),  # (4 + 1/2) / 8 <= 0.6
        (
            {"distill_decay": "linear", "distill_warmup": 0.25},
            "to the end; .*fall.*linear.; they rise over 0.25 of the",
        ),
    ],
)
def test_the_preflight_says_for_how_long(data, teacher, tmp_path, monkeypatch, settings, text):
    trainer = make(data, teacher, tmp_path / "run", **settings)
    lines = []
    monkeypatch.setattr(LOGGER, "info", lambda text="", *args, **kwargs: lines.append(str(text)))
    trainer.add_callback("on_train_start", interrupt)
    with pytest.raises(Interrupted):
        trainer.train()
    assert re.search(rf"^ +taught +{text}", "\n".join(lines), re.MULTILINE)


def test_a_run_of_one_batch_has_a_teacher(data, teacher, tmp_path):
    trainer = make(data, teacher, tmp_path / "run", iterations=1, distill_until=0.5)
    seen = watch(trainer)
    trainer.train()
    assert [factor for factor, *_ in seen] == [1]


def test_the_optimiser_starts_anew_without_the_teacher(data, teacher, tmp_path):
    """Or its averages of the feature loss's gradients would divide those of the task for a thousand steps."""
    trainer, steps = make(data, teacher, tmp_path / "run", distill_until=0.5, nbs=4), []
    trainer.add_callback(
        "on_train_batch_end", lambda t: steps.append({int(x["step"]) for x in t.optimizer.state.values()})
    )
    trainer.train()
    assert trainer.args.optimizer == "AdamW"
    assert steps == [{1}, {2}, {3}, {4}] * 2  # 4 epochs of 2 batches


@pytest.mark.parametrize("optimizer", ["SGD", "MuSGD"])
def test_momentum_starts_anew_too(data, teacher, tmp_path, optimizer):
    trainer, kept = make(data, teacher, tmp_path / "run", distill_until=0.5, nbs=4, optimizer=optimizer), []

    def watch_optimizer(t) -> None:  # after the callback that lets the teacher go
        t.add_callback("on_train_batch_start", lambda t: kept.append(bool(t.optimizer.state)))

    trainer.add_callback("on_train_start", watch_optimizer)
    trainer.train()
    assert kept == [False, True, True, True] * 2  # 4 epochs of 2 batches


def test_no_gradient_under_the_teacher_waits_beyond_its_end(data, teacher, tmp_path):
    """Three batches make a step, and the fourth of eight is the last under the teacher."""
    trainer, waiting = make(data, teacher, tmp_path / "run", distill_until=0.5, nbs=12, warmup_epochs=0), []

    def watch_gradients(t) -> None:  # after the callback that lets the teacher go, which is there already
        student = unwrap_model(t.model).student_model

        def note(_) -> None:
            waiting.append(any(x.grad is not None for x in student.parameters()))

        t.add_callback("on_train_batch_start", note)

    trainer.add_callback("on_train_start", watch_gradients)
    trainer.train()
    # Steps end batches 3 and 6, so gradients wait where 2, 3, 6 and 8 begin; 5 is the first without the teacher
    assert waiting == [False, True, True, False, False, True, False, True]


def test_the_factor_multiplies_the_terms(data, teacher, tmp_path):
    runs = []
    for name, settings in (("whole", {}), ("half", {"distill_warmup": 1.0})):
        trainer = make(data, teacher, tmp_path / name, epochs=1, **settings)
        runs.append(watch(trainer))
        trainer.train()
    (_, whole, _), (factor, half, _) = runs[0][0], runs[1][0]
    assert factor == fading(0.25, warmup=1.0) == 0.25  # the middle of the first of two batches
    for name in ("feat_loss", "rel_loss", "resp_loss"):
        assert half[name] == pytest.approx(0.25 * whole[name])


def test_without_the_teacher_the_loss_is_the_plain_one():
    model, batch = make_pair("retina_nano"), make_batch("cpu")
    model.factor = 0.0
    plain = copy.deepcopy(model.student_model)
    loss, items = model.loss(batch)
    expected, parts = plain.loss(batch)
    assert torch.equal(loss, expected)
    assert {name: value for name, value in items.items() if name in parts} == parts
    assert all(items[name] == 0 for name in (*model.term_names, *model.count_names))


FADING = {"distill_until": 0.6, "distill_decay": "cosine"}
AT_ONCE = {"distill_until": 0.5, "nbs": 12, "warmup_epochs": 0}  # three of the eight batches make a step


@pytest.mark.parametrize(
    ("epochs", "settings"),
    [
        pytest.param(1, FADING, id="in the middle of the fading"),
        pytest.param(3, FADING, id="after its end"),
        pytest.param(2, AT_ONCE, id="where the teacher is let go, and the gradients of a batch wait"),
    ],
)
def test_a_resumed_run_fades_on_where_it_was(data, teacher, tmp_path, epochs, settings):
    whole = make(data, teacher, tmp_path / "whole", **settings, val=True)
    expected = watch(whole)
    whole.train()
    first = make(data, teacher, tmp_path / "run", **settings, val=True)
    seen = watch(first)

    def interrupt(t) -> None:
        if t.epoch + 1 == epochs:
            raise Interrupted

    first.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        first.train()
    assert torch.load(first.last, weights_only=True)[KEY]["gradients"] or settings is not AT_ONCE
    resumed = GIDTrainer(overrides={"model": str(first.last), "resume": str(first.last)})
    rest = watch(resumed)
    resumed.train()
    assert seen + rest == expected
    ours, theirs = (load_model(run.last)[0].state_dict() for run in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("distill_until", 0, "distill_until=0 would distil nothing"),
        ("distill_until", 1.5, "distill_until=1.5 must be a number from 0 to 1"),
        ("time", 1, r"time=1 leaves the run's length open, of which distill_until=0\.5 is a share"),
        ("distill_warmup", 0.8, r"distill_warmup=0\.8 is longer than distill_until=0\.5"),
        ("distill_decay", "step", "distill_decay=step is unknown: choose from constant, linear, cosine"),
    ],
)
def test_a_fading_that_cannot_be_is_refused(data, teacher, tmp_path, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        make(data, teacher, tmp_path / "run", **{"distill_until": 0.5, key: value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distill_until": 0.05}, r"8 iterations is too short for distill_until=0\.05 with distill_decay=constant"),
        (  # of one iteration, the middle is at a half, where a line has come down to 0
            {"iterations": 1, "distill_until": 0.5, "distill_decay": "linear"},
            r"1 iterations is too short for distill_until=0\.5 with distill_decay=linear",
        ),
    ],
)
def test_a_fading_that_ends_before_the_first_step_is_refused(data, teacher, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make(data, teacher, tmp_path / "run", **changes).train()
