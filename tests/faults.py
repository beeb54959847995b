"""Faults in the middle of a real run: a NaN in its data, its teacher, a term or a gradient."""

import json
import math

import torch
from engine_helpers import FAST
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer

from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.views import dense_head

# 8 images in batches of 4, a step each: iterations 3 and 4 are the second epoch
SETTINGS = {**FAST, "model": "retina_nano", "epochs": 3, "nbs": 4}


class Fault:
    """Breaks one thing in one iteration (from 1) of a run, by default in its first attempt alone."""

    def __init__(self, kind: str, iteration: int, value: float = math.nan, always: bool = False) -> None:
        self.kind, self.iteration, self.value, self.always = kind, iteration, value, always
        self.files: list[str] = []
        self.active = False
        self.hooks: list = []

    def attach(self, trainer, monkeypatch) -> None:
        prepare = DetectionTrainer.preprocess_batch
        trainer.add_callback("on_train_batch_start", self.begin)
        trainer.add_callback("on_train_batch_end", self.end)

        def broken(this, batch):
            batch = prepare(this, batch)
            if self.active:
                self.files = list(batch["im_file"])
                if self.kind in {"images", "targets"}:
                    batch["img" if self.kind == "images" else "bboxes"].view(-1)[1] = self.value
            return batch

        monkeypatch.setattr(DetectionTrainer, "preprocess_batch", broken)

    def spoil(self, parameter) -> None:
        """A gradient."""
        if self.active:
            parameter.grad.mul_(self.value)

    def end(self, _) -> None:
        """Checkpoints hold hooks."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def begin(self, trainer) -> None:
        first = trainer.nan_recovery_attempts == 0
        now = trainer.iteration + 1 == self.iteration
        self.active = (now and first) or (self.always and trainer.iteration + 1 >= self.iteration)
        model = trainer.model
        if self.kind == "feat_loss":
            model.projector.gid.weights["feature"] = self.value if self.active else 5e-4
        if self.kind == "teacher" and self.active:
            nn.init.constant_(model.teacher_model.detector.head.box_deltas.bias, self.value)
        if self.kind == "features" and self.active:  # of the head's input
            head = dense_head(getattr(model, "student_model", model))
            self.hooks.append(head.register_forward_pre_hook(lambda _, given: ([x * self.value for x in given[0]],)))
        if self.kind == "gradient" and self.active:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self.spoil))


def make(fault, monkeypatch, data, tmp_path, kind=GIDTrainer, **overrides):
    trainer = kind(overrides={**SETTINGS, "data": str(data), "save_dir": str(tmp_path / "run"), **overrides})
    if fault:
        fault.attach(trainer, monkeypatch)
    return trainer


def report(trainer) -> dict:
    return json.loads((trainer.save_dir / "nonfinite.json").read_text())


def weights(path) -> dict[str, torch.Tensor]:
    return load_model(path)[0].state_dict()


def finite(path) -> bool:
    return all(torch.isfinite(x).all() for x in weights(path).values())
