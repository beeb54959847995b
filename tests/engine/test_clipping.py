"""Under a teacher the features' part of the gradient is clipped by itself, so that the heads learn on."""

import math

import pytest
import torch
from engine_helpers import FAST, Interrupted
from test_no_waiting import PAIRS, make_batch, make_pair
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.engine.clipping import MAX_NORM, clip_taught
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.distillable import distillable, heads_of
from gid_yolo.engine.trainer import GIDTrainer


def norm_of(parameters) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))


def parts_of(model) -> tuple[list, list]:
    """Parameters of what makes features, the adaptation among it, and of the heads."""
    heads = [p for head in heads_of(model.student_model) for p in head.parameters()]
    own = {id(p) for p in heads}
    return [p for p in model.parameters() if id(p) not in own], heads


@pytest.mark.parametrize("name", [*PAIRS, "yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_heads_are_what_no_comparison_of_features_reaches(name: str) -> None:
    build = DetectionModel if name.startswith("yolo") else GIDDetectionModel
    student = build(name, nc=3, verbose=False).train()
    features, _ = distillable(student).raw(torch.rand(2, 3, 64, 64))
    sum(x.square().sum() for x in features).backward()
    reached = {n for n, p in student.named_parameters() if p.grad is not None}
    heads = {id(p) for head in heads_of(student) for p in head.parameters()}
    assert heads
    assert reached == {n for n, p in student.named_parameters() if p.requires_grad and id(p) not in heads}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", PAIRS)
def test_features_are_clipped_and_heads_are_not(name: str, scale: float | None) -> None:
    torch.manual_seed(0)
    model = make_pair(name, gid_feature=1.0)  # 2000 times the paper's
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(model.loss(make_batch("cpu"))[0].sum()).backward()
    features, heads = parts_of(model)
    before, grads = norm_of(features) / (scale or 1.0), [p.grad.clone() for p in heads if p.grad is not None]
    clip_taught(model, model.student_model, scaler)
    assert before > 10 * MAX_NORM  # so that it is tested
    assert norm_of(features) / (scale or 1.0) == pytest.approx(MAX_NORM, rel=1e-4)
    left = [p.grad for p in heads if p.grad is not None]
    assert grads
    assert all(torch.equal(a, b) for a, b in zip(grads, left, strict=True))


def test_a_small_gradient_stays() -> None:
    torch.manual_seed(0)
    model = make_pair("retina_nano", gid_feature=1e-9, gid_relation=0)
    (1e-3 * model.loss(make_batch("cpu"))[0].sum()).backward()
    features, _ = parts_of(model)
    grads = [p.grad.clone() for p in features if p.grad is not None]
    assert norm_of(features) < MAX_NORM
    clip_taught(model, model.student_model, torch.amp.GradScaler("cpu", enabled=False))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (p for p in features if p.grad is not None), strict=True))


def first_step(data, folder, **overrides) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Gradients of the heads in a run's first step, before anything is clipped and after, and the norm of all then."""
    settings = {**FAST, "model": "retina_nano", "optimizer": "SGD", "lr0": 0.01, "nbs": 4, "val": False}
    trainer = GIDTrainer(overrides={**settings, "data": str(data), "save_dir": str(folder), **overrides})
    made, found = trainer.optimizer_step, []

    def of_heads() -> dict[str, torch.Tensor]:
        model = getattr(trainer.model, "student_model", trainer.model)
        return {n: p.grad.clone() for n, p in model.detector.head.named_parameters() if p.grad is not None}

    def look(optimizer, *_) -> None:
        found.extend([of_heads(), norm_of(p for group in optimizer.param_groups for p in group["params"])])
        raise Interrupted

    def step() -> None:
        found.append(of_heads())
        made()

    trainer.optimizer_step = step
    trainer.add_callback("on_train_start", lambda t: t.optimizer.register_step_pre_hook(look))
    with pytest.raises(Interrupted):
        trainer.train()
    return tuple(found)


def test_the_heads_of_a_taught_student_step_as_far_as_their_task_asks(data, teacher, tmp_path) -> None:
    # Alike in weights and images; without the response loss the heads' gradients are those of the task alone
    asked, _, _ = first_step(data, tmp_path / "plain")
    heavy = {"teacher": str(teacher), "gid_feature": 10.0, "gid_response": 0}
    theirs, clipped, norm = first_step(data, tmp_path / "taught", **heavy)
    assert asked.keys() == theirs.keys() == clipped.keys()
    assert all(torch.allclose(theirs[n], asked[n], rtol=1e-4, atol=1e-6) for n in asked)
    # The features' part fills a norm of 10; Ultralytics' clip of the whole then multiplies by 10 / sqrt(100 + heads^2)
    heads = math.sqrt(sum(float(x.double().square().sum()) for x in asked.values()))
    factor = MAX_NORM / math.sqrt(MAX_NORM**2 + heads**2)
    assert factor > 0.5  # clipped with the features it would be a hundredth
    assert norm == pytest.approx(MAX_NORM, rel=1e-3)
    assert all(torch.allclose(clipped[n], factor * asked[n], rtol=1e-3, atol=1e-6) for n in asked)


def test_without_the_teacher_nothing_is_clipped_apart(data, teacher, tmp_path, monkeypatch) -> None:
    clipped: list[float] = []
    monkeypatch.setattr(
        "gid_yolo.engine.distillation_trainer.clip_taught", lambda model, *_: clipped.append(model.factor)
    )
    settings = {**FAST, "model": "retina_nano", "nbs": 4, "val": False, "epochs": 2, "distill_until": 0.5}
    settings |= {"data": str(data), "teacher": str(teacher), "save_dir": str(tmp_path / "run")}
    GIDTrainer(overrides=settings).train()
    assert clipped == [1.0, 1.0]  # 2 epochs of 2 batches, half of them under the teacher
