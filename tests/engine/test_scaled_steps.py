"""Half precision and gradient scalers: what a scaler skips is no error, unless it skips on and on."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from engine_helpers import FAST
from torch import nn
from ultralytics.engine import trainer as ultralytics_trainer

from gid_yolo.engine import watched_trainer
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

# 8 images in batches of 4, a step each
SETTINGS = {**FAST, "model": "retina_nano", "nbs": 4}


def make(data, tmp_path, scale: float | None = None, **overrides) -> GIDTrainer:
    """A run with PyTorch's scaler for the CPU, where a scale is given; Ultralytics makes one on a GPU alone."""
    trainer = GIDTrainer(overrides={**SETTINGS, "data": str(data), "save_dir": str(tmp_path / "run"), **overrides})

    def scaled(t) -> None:
        t.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    if scale:
        trainer.add_callback("on_train_start", scaled)
    return trainer


def report(trainer) -> dict:
    return json.loads((trainer.save_dir / "nonfinite.json").read_text())


def test_a_scale_that_is_too_large_is_lowered_and_counted(data, teacher, tmp_path):
    # Losses are over 1, so that their gradients times 2^127 are beyond float32's 2^128; every skipped step halves it
    trainer = make(data, tmp_path, 2.0**127, epochs=6, teacher=str(teacher))
    trainer.train()
    skipped = report(trainer)["steps_skipped"]
    assert report(trainer) == {"steps_skipped": skipped, "events": []}
    assert 0 < skipped < 12
    assert trainer.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert all(torch.isfinite(x).all() for x in load_model(trainer.best)[0].state_dict().values())


def test_a_loss_that_stays_infinite_ends_the_run_after_so_many_steps(data, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(watched_trainer, "MOST_SKIPPED", 2)
    trainer = make(data, tmp_path, 2.0**16, epochs=6, teacher=str(teacher), gid_feature=1e38)
    with pytest.raises(
        UserError,
        match=r"feat_loss became .* \(iteration 3\).*; 3 steps in succession were skipped, .* to 1.64e\+04",
    ):
        trainer.train()  # 2^16, halved twice, is 16384 in the third step
    found = report(trainer)
    assert [event["iteration"] for event in found["events"]] == [1, 2, 3]
    assert [event["scale"] for event in found["events"]] == [2.0**16, 2.0**15, 2.0**14]
    assert found["steps_skipped"] == 3


@pytest.mark.parametrize("epoch", [1, 2])
def test_statistics_that_are_lost_are_recovered(data, tmp_path, epoch):
    # A scaler skips the step, but the batch norms have already averaged the infinite activations; Ultralytics looks at
    # the last loss and at the fitness alone, both of which are finite
    trainer = make(data, tmp_path, 2.0**16, epochs=3)
    iteration = 2 * epoch - 1

    def spoil(t) -> None:
        body = t.model.detector.backbone.body
        norm = next(m for m in body.modules() if isinstance(m, nn.BatchNorm2d))
        if t.iteration + 1 == iteration and not t.nan_recovery_attempts:
            nn.init.constant_(norm.running_mean, math.inf)

    trainer.add_callback("on_train_batch_start", spoil)
    if epoch == 1:
        with pytest.raises(UserError, match=r"running_mean became NaN or infinite in epoch 1; "):
            trainer.train()
        return
    trainer.train()
    assert trainer.counts["recoveries"] == 1
    assert all(torch.isfinite(x).all() for x in load_model(trainer.best)[0].state_dict().values())


@pytest.fixture
def half(monkeypatch):
    """Ultralytics' loop in half precision on the CPU, which it refuses by itself."""

    def force(dtype: torch.dtype) -> None:
        @contextmanager
        def autocast(enabled, device="cuda"):
            with torch.autocast(device, dtype=dtype):
                yield

        monkeypatch.setattr(ultralytics_trainer, "autocast", autocast)

    return force


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, None), (torch.float16, 2.0**16)])
def test_a_distillation_learns_in_half_precision(data, teacher, tmp_path, half, dtype, scale):
    half(dtype)
    types, losses = set(), []
    # PyTorch's convolution of stride 2 gives no numbers for a map of 1 x 1 in bfloat16 on a CPU, which P6 of 64 px is
    settings = {"epochs": 10, "imgsz": 128, "optimizer": "AdamW", "lr0": 2e-3}
    trainer = make(data, tmp_path, scale, **settings, teacher=str(teacher))

    def hook(t) -> None:
        t.model.student_model.detector.head.cls_logits.register_forward_hook(lambda *x: types.add(x[2].dtype))

    trainer.add_callback("on_train_batch_start", lambda t: hook(t) if t.iteration == 0 else None)
    trainer.add_callback("on_train_epoch_end", lambda t: losses.append({k: float(v) for k, v in t.tloss.items()}))
    trainer.train()
    assert dtype in types
    assert all(math.isfinite(value) for row in losses for value in row.values())
    for name in ("cls_loss", "resp_loss"):  # the other terms depend on which instances are chosen as well
        assert losses[-1][name] < 0.8 * losses[0][name], name
    assert not (trainer.save_dir / "nonfinite.json").exists() or report(trainer)["events"] == []


def test_bfloat16_without_a_gpu_is_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"amp=bf16 needs a GPU that computes in bfloat16, which cpu does not"):
        make(data, tmp_path, amp="bf16").train()
