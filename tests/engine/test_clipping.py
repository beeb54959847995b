"""Under a teacher the features' part of the gradient is clipped by itself, so that the heads learn on."""

import math

import pytest
import torch
from engine_helpers import FAST, Interrupted
from faults import make, report
from test_no_waiting import PAIRS, OneDevice, make_batch, make_pair
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.engine.clipping import MAX_NORM, clip_features
from gid_yolo.engine.config import BEFORE, DEFAULTS, yolo_defaults
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.views import distillable, heads_of
from gid_yolo.errors import UserError


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
    clip_features(model, model.student_model, scaler)
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
    clip_features(model, model.student_model, torch.amp.GradScaler("cpu", enabled=False))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (p for p in features if p.grad is not None), strict=True))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_it_waits_for_nothing(name: str, scaled: bool) -> None:
    model = make_pair(name).to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler._scale = torch.ones((), device="meta") if scaled else None  # as a GPU's, which the host does not know
    with OneDevice():
        clip_features(model, model.student_model, scaler)


def step_of(data, folder, **overrides) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Gradients of the heads in a run's first step, before a clip and after, and the norm of the features' before."""
    settings = {**FAST, "model": "retina_nano", "optimizer": "SGD", "lr0": 0.01, "nbs": 4, "val": False}
    trainer = GIDTrainer(overrides={**settings, "data": str(data), "save_dir": str(folder), **overrides})
    made, found = trainer.optimizer_step, []

    def heads_and_rest() -> tuple[dict[str, torch.Tensor], float]:
        student = getattr(trainer.model, "student_model", trainer.model)
        heads = {n: p.grad.clone() for n, p in student.detector.head.named_parameters() if p.grad is not None}
        own = {id(p) for p in student.detector.head.parameters()}
        return heads, norm_of(p for p in trainer.model.parameters() if id(p) not in own)

    def look(*_) -> None:
        found.append(heads_and_rest())
        raise Interrupted

    def step() -> None:
        found.append(heads_and_rest())
        made()

    trainer.optimizer_step = step
    trainer.add_callback("on_train_start", lambda t: t.optimizer.register_step_pre_hook(look))
    with pytest.raises(Interrupted):
        trainer.train()
    (before, features), (after, _) = found
    return before, after, features


@pytest.mark.parametrize(
    ("clip", "optimizer", "response", "apart"),
    [
        ("auto", "SGD", 0, True),
        ("auto", "AdamW", 0, False),
        ("apart", "AdamW", 1, True),
        ("together", "SGD", 0, False),
        ("auto", "SGD", None, False),
    ],
)
def test_how_much_of_their_gradient_the_heads_keep(data, teacher, tmp_path, clip, optimizer, response, apart) -> None:
    weights = {"gid_feature": 10.0, "gid_response": response}
    if response is None:  # responses alone, which features and heads learn by alike
        weights = {"gid_feature": 0, "gid_relation": 0, "gid_response": 1e4}
    before, after, features = step_of(
        data, tmp_path / "run", teacher=str(teacher), distill_clip=clip, optimizer=optimizer, **weights
    )
    heads = math.sqrt(sum(float(x.double().square().sum()) for x in before.values()))
    # Ultralytics divides all by their norm over 10; apart, the features' has been brought to 10 before that
    factor = min(1.0, MAX_NORM / math.hypot(min(features, MAX_NORM) if apart else features, heads))
    assert features > 20 * MAX_NORM
    assert all(torch.allclose(after[n], factor * before[n], rtol=1e-3, atol=1e-6) for n in before)


def test_the_heads_of_a_taught_student_are_asked_what_the_plain_ones_are(data, teacher, tmp_path) -> None:
    plain, _, _ = step_of(data, tmp_path / "plain")
    taught, _, _ = step_of(data, tmp_path / "taught", teacher=str(teacher), gid_feature=10.0, gid_response=0)
    assert plain.keys() == taught.keys()
    assert all(torch.allclose(plain[n], taught[n], rtol=1e-4, atol=1e-6) for n in plain)


def test_without_the_teacher_nothing_is_clipped_apart(data, teacher, tmp_path, monkeypatch) -> None:
    clipped: list[float] = []
    monkeypatch.setattr(
        "gid_yolo.engine.distillation_trainer.clip_features", lambda model, *_: clipped.append(model.factor)
    )
    settings = {**FAST, "model": "retina_nano", "nbs": 4, "val": False, "epochs": 2, "distill_until": 0.5}
    settings |= {"distill_clip": "apart", "data": str(data), "teacher": str(teacher), "save_dir": str(tmp_path / "run")}
    GIDTrainer(overrides=settings).train()
    assert clipped == [1.0, 1.0]  # 2 epochs of 2 batches, half of them under the teacher


def test_a_yolo_and_a_run_from_before_are_clipped_together() -> None:
    assert yolo_defaults()["distill_clip"] == BEFORE["distill_clip"] == "together"
    assert DEFAULTS["distill_clip"] == "auto"


def test_the_parameter_whose_gradient_is_nan_is_named(data, teacher, tmp_path, monkeypatch) -> None:
    # A norm that is NaN makes every gradient of the features NaN; what is noted is what was there before
    trainer = make(None, monkeypatch, data, tmp_path, teacher=str(teacher))
    name = "student_model.model.0.neck.fpn.layer_blocks.0.0.weight"

    def spoil(parameter) -> None:
        parameter.grad[:1].fill_(math.nan)

    def begin(t) -> None:
        if t.iteration == 0:
            dict(t.model.named_parameters())[name].register_post_accumulate_grad_hook(spoil)

    trainer.add_callback("on_train_batch_start", begin)
    with pytest.raises(UserError, match="the gradient of "):
        trainer.train()
    (event,) = report(trainer)["events"]
    assert event["not_finite"]["gradients"] == 1
    assert event["not_finite"]["first_gradients"] == [name]
