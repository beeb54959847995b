"""Every term's gradient at the pyramid: against autograd in every precision, and in runs that it does not change."""

import csv
import math

import pytest
import torch
from engine_helpers import FAST, train_one_epoch
from torch import nn

from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.gradients import pulls, read_gradients
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError


def test_gradients_too_small_for_half_precision() -> None:
    # d(mean) = 1 / N = 1e-5, times 1e-4: each of N elements is 1e-9, and fp16 ends at 6e-8
    count = 10**5
    features = [torch.ones(count, dtype=torch.float16, requires_grad=True)]
    term = features[0].float().mean() * 1e-4
    assert not torch.autograd.grad(term, features, retain_graph=True)[0].any()
    value, norm, *_ = pulls({"a": term}, features)["a"]
    assert value == pytest.approx(1e-4)
    assert norm == pytest.approx(1e-9 * math.sqrt(count), rel=1e-2)


def test_gradients_that_overflow_when_scaled() -> None:
    features = [torch.ones(4, dtype=torch.float16, requires_grad=True)]
    # Each element is 10; times 2^16 it would be over fp16's 65504
    assert pulls({"a": features[0].float().sum() * 10}, features)["a"] == (40.0, 20.0, 1.0, 1.0)


def test_what_is_not_finite_stays_so() -> None:
    features = [torch.ones(4, requires_grad=True)]
    assert math.isinf(pulls({"a": (features[0] * math.inf).sum()}, features)["a"].norm)


def test_full_precision_is_unchanged() -> None:
    features = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    term = features[0].square().sum() + features[1].exp().sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(term, features, retain_graph=True)])
    found = pulls({"a": term, "b": torch.ones(1, requires_grad=True).sum()}, features)
    assert found["a"].value == term.item()
    assert found["a"].norm == float(gradient.norm())
    assert found["b"] == (1.0, 0.0, 0.0, 0.0)


def test_cosines_and_shares_equal_the_definitions() -> None:
    features = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    terms = {
        "task": features[0].square().sum() + features[1].sum(),
        "with": 3 * features[0].square().sum(),
        "against": -0.5 * features[1].sum(),
    }
    vectors = []
    for term in terms.values():
        grads = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True, materialize_grads=True)
        vectors.append(torch.cat([g.flatten() for g in grads]).double())
    total = sum(vectors)
    found = pulls(terms, features)
    for vector, (name, pull) in zip(vectors, found.items(), strict=True):
        assert pull.norm == pytest.approx(vector.norm().item(), rel=1e-5)
        cosine = torch.dot(vector, vectors[0]) / vector.norm() / vectors[0].norm()
        assert pull.cosine == pytest.approx(cosine.item(), abs=1e-6)
        assert pull.share == pytest.approx((torch.dot(vector, total) / total.square().sum()).item(), abs=1e-6), name
    assert sum(pull.share for pull in found.values()) == pytest.approx(1.0)
    assert found["against"].cosine < 0
    alone = pulls(terms, features, angles=False)
    assert {name: x[:2] for name, x in alone.items()} == {name: x[:2] for name, x in found.items()}
    assert all(math.isnan(value) for x in alone.values() for value in x[2:])
    assert all(x.grad is None for x in features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_agrees_with_full_precision(dtype: torch.dtype) -> None:
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    images = torch.rand(1, 3, 32, 32)
    norms = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            features = [first(images)]
            term = second(features[0]).float().square().mean() * 1e-4
        assert features[0].dtype == (dtype if enabled else torch.float32)
        norms.append(pulls({"a": term, "b": term * 0.5}, features)["a"].norm)
    # Gradients are rounded to 2^-8 of themselves at worst
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert norms[1] > 0


TERMS = ["task", "feat_loss", "rel_loss", "resp_loss"]


def run(data, folder, teacher, **overrides) -> GIDTrainer:
    own = {"model": "retina_nano", "data": str(data), "epochs": 3, "save_dir": str(folder)}
    trainer = GIDTrainer(overrides={**FAST, **own, "teacher": teacher and str(teacher), **overrides})
    trainer.train()
    return trainer


def test_the_statistics_change_no_weight(data, teacher, tmp_path, monkeypatch) -> None:
    log = []
    monkeypatch.setattr("gid_yolo.engine.gradients.LOGGER.info", log.append)
    runs = [run(data, tmp_path / str(every), teacher, gradients=every) for every in (0, 1, 4)]
    states = [load_model(trainer.last)[0].state_dict() for trainer in runs]
    for state in states[1:]:
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())
    assert not (runs[0].save_dir / "gradients.csv").exists()
    for trainer, iterations in ((runs[1], [1, 2, 3, 4, 5, 6]), (runs[2], [1, 5])):  # 2 iterations an epoch
        rows = read_gradients(trainer.save_dir / "gradients.csv")
        assert [row[:2] for row in rows] == [(i, name) for i in iterations for name in TERMS]
        for i in iterations:
            assert sum(row[5] for row in rows if row[0] == i) == pytest.approx(1.0, abs=1e-4)
        assert all(row[3] > 0 for row in rows)
        assert all(row[4] == pytest.approx(1.0, abs=1e-4) for row in rows if row[1] == "task")
    text = [line for line in log if "medians of" in line]
    assert len(text) == 3 + 2  # no row, no summary
    assert "epoch 3, medians of 2" in "".join(text)


def test_values_are_those_of_the_log(data, teacher, tmp_path) -> None:
    trainer = run(data, tmp_path / "run", teacher, gradients=1)
    rows = read_gradients(tmp_path / "run" / "gradients.csv")
    with trainer.csv.open() as file:
        logged = list(csv.DictReader(file))
    for epoch, line in enumerate(logged):
        for name in TERMS[1:]:
            values = [row[2] for row in rows if row[1] == name and (row[0] - 1) // 2 == epoch]
            assert sum(values) / len(values) == pytest.approx(float(line[f"train/{name}"]), rel=1e-4)


def test_a_resumed_run_goes_on_with_the_file(data, teacher, tmp_path) -> None:
    whole = run(data, tmp_path / "whole", teacher, gradients=1)
    own = {"model": "retina_nano", "data": str(data), "teacher": str(teacher), "epochs": 3, "gradients": 1}
    trainer = GIDTrainer(overrides={**FAST, **own, "save_dir": str(tmp_path / "cut")})
    train_one_epoch(trainer)
    path = tmp_path / "cut" / "gradients.csv"
    with path.open("a") as file:
        file.write("3,task,1,1,1,1\n")  # of the epoch that is made again
    GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)}).train()
    assert path.read_text() == (whole.save_dir / "gradients.csv").read_text()


def test_plain_training_has_nothing_to_compare(data, tmp_path, monkeypatch) -> None:
    log = []
    monkeypatch.setattr("gid_yolo.engine.distillation_trainer.LOGGER.warning", log.append)
    run(data, tmp_path / "run", None, gradients=1, epochs=1)
    assert any("gradients= is off" in line for line in log)
    assert not (tmp_path / "run" / "gradients.csv").exists()


@pytest.mark.parametrize("value", [-1, 2.5, True, "often"])
def test_a_wrong_number_is_refused(data, value) -> None:
    with pytest.raises(UserError, match=f"gradients={value} must be a whole number of iterations, or 0 for never"):
        GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data), "gradients": value})
