"""The trainer of our detectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.detectors.backbone import Backbone
from gid_yolo.detectors.build import PRIOR_SETTINGS, model_config
from gid_yolo.engine.checkpoint import is_checkpoint, load_model
from gid_yolo.engine.config import configured_model, model_defaults
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.distillation_trainer import DistillationTrainer
from gid_yolo.engine.donor import donor_of
from gid_yolo.engine.freezing import check_parts, parts_of
from gid_yolo.engine.origin import note_origin
from gid_yolo.errors import UserError

_OF_YOLO = ("box", "cls", "dfl", "cls_pw")


class GIDTrainer(DistillationTrainer):
    """Trains one of our detectors, plainly or under `teacher=`.

    Added to `DistillationTrainer`: the defaults that suit these detectors, their backbones' weights and frozen parts,
    a learning rate for the backbone, and an EMA that fits short runs.
    """

    _given_freeze: list[str] | None = None  # of `freeze=`, without what the settings freeze

    @staticmethod
    def check_given(given: Mapping[str, Any]) -> None:
        """Refuse what these detectors have no use for."""
        if given.get("resume"):
            return
        for key in _OF_YOLO:
            if given.get(key, nothing := DEFAULT_CFG_DICT[key]) != nothing:
                raise UserError(f"{key}= weighs a loss of YOLO's, which the detectors of gid-yolo do not have.")
        trained = is_checkpoint(given.get("model", "")) or isinstance(given.get("pretrained"), str | Path)
        if trained and given.get("backbone_weights") is not None:
            raise UserError(
                f"backbone_weights={given['backbone_weights']} would be replaced by the weights of the checkpoint that "
                "the model begins with: leave one of them out."
            )

    @staticmethod
    def defaults_for(model: Any, trust: bool = False) -> dict[str, Any]:
        """Ultralytics' defaults, those of `cfg/` over them, and the model's own over all."""
        if model is None:
            return model_defaults({})
        if not is_checkpoint(model):
            return model_defaults(configured_model(model, {}))
        return model_defaults(load_model(model, trust=trust)[0].yaml)

    @staticmethod
    def family_of(cfg: Any) -> str:
        """Kind of detector that the settings of a model make."""
        return str(model_config(cfg)["detector"])

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> GIDDetectionModel:
        """Build a detector for the data's classes and load `weights` or the backbone's."""
        config = configured_model(cfg, vars(self.args))
        if weights is None and self.distilling:
            config = self._with_teachers_anchors(config)
        channels, classes = self.data["channels"], self.data["nc"]
        donor = donor_of(config.get("backbone_weights")) if weights is None else None
        load_backbone = weights is None and donor is None
        model = GIDDetectionModel(config, channels, classes, verbose, load_backbone=load_backbone)
        if weights is not None:
            model.load(weights)
            note_origin(weights, model)
            return model
        if donor is not None:
            self._begin_with(model, donor)
        source = model.detector.backbone.source
        if source.failed:
            LOGGER.warning(
                f"THE BACKBONE STARTS FROM RANDOM WEIGHTS: {source.text}. "
                "Give backbone_weights=FILE to load them from disk, or backbone_weights=False if this is meant."
            )
        if not source.loaded and (config.get("freeze_bn") or config.get("frozen_stages")):
            if self.args.freeze_bn or self.args.frozen_stages:
                LOGGER.warning("freeze_bn or frozen_stages freezes random weights: they will never be trained.")
                return model
            LOGGER.warning("the yaml's freeze_bn and frozen_stages are off: the backbone's weights are random.")
            config.update(freeze_bn=False, frozen_stages=0)
            model = GIDDetectionModel(config, channels, classes, verbose=False)
            model.detector.backbone.source = source
        return model

    def _begin_with(self, model: GIDDetectionModel, donor: Backbone) -> None:
        """Let a new detector begin with the backbone of another, trained one.

        Raises:
            UserError: They are not alike.
        """
        try:
            model.detector.backbone.take(donor, model.yaml["backbone_weights"])
        except ValueError as error:
            raise UserError(str(error)) from error

    def _with_teachers_anchors(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings of a new student with the teacher's anchors, without which nothing can be compared."""
        with torch.random.fork_rng(devices=[]):  # a new student draws the weights of its plain twin
            teacher = self.load_teacher().yaml
        changed = with_anchors_of(teacher, config)
        if changed is None:
            return config
        theirs = changed["settings"]
        LOGGER.warning(
            "the student's anchors become the teacher's, so that their predictions correspond: "
            f"{ {key: theirs[key] for key in PRIOR_SETTINGS if key in theirs} }. "
            "Train a plain student to compare with from the distilled one's yaml settings."
        )
        return changed

    def set_model_attributes(self) -> None:
        """Freeze what the settings freeze, besides what every trainer attaches."""
        student = self.model
        if self.device.type == "cpu":  # Ultralytics does this on CUDA only; here it saves a quarter of a step
            student.to(memory_format=torch.channels_last)
        super().set_model_attributes()
        self._given_freeze = _freeze_names(self.args.freeze, student) or None
        self.args.freeze = sorted({*(self._given_freeze or ()), *student.frozen_names}) or None

    def initialised_from(self, student: GIDDetectionModel) -> str:
        """Where the student's first weights come from, in one line."""
        if self.resume or getattr(student, "pt_path", None):
            return super().initialised_from(student)
        return f"backbone {student.detector.backbone.source.text}, the rest random"

    # Loop -------------------------------------------------------------------------------------------------------------

    def _setup_train(self) -> None:
        super()._setup_train()
        self.args.freeze = self._given_freeze  # what a checkpoint says was asked for: the rest is its settings'
        self._fit_ema()

    def _model_train(self) -> None:
        """Ultralytics' training mode; a batch norm that is a frozen part itself keeps its statistics too."""
        super()._model_train()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and any(part in f"{name}." for part in self.freeze_layer_names):
                module.eval()

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)  # builds a new EMA
        self._fit_ema()

    def _setup_scheduler(self) -> None:
        super()._setup_scheduler()
        if self.ema:  # with time=, Ultralytics corrects the number of epochs as it goes
            self._fit_ema()

    def _fit_ema(self) -> None:
        """Fit the EMA to the run: Ultralytics' ramp is meant for tens of thousands of steps.

        Without `ema_decay=`, the average spans the last tenth of the run (1 - 10 / steps) and at most 5,000 steps.
        """
        steps = max(1, round(self.schedule.iterations / self.accumulate))
        decay = self.args.ema_decay
        decay = min(max(0.0, 1 - 10 / steps), 0.9998) if decay is None else decay
        self.ema.decay = _Decay(decay, tau=max(1.0, steps / 20))

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Ultralytics' optimiser, with the backbone's parameters in groups of their own learning rate."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        factor = self.args.backbone_lr
        if factor == 1.0:
            return optimizer
        inner = unwrap_model(model)
        backbone = {id(p) for p in getattr(inner, "student_model", inner).detector.backbone.parameters()}
        for group in list(optimizer.param_groups):
            slow = [p for p in group["params"] if id(p) in backbone]
            group["params"] = [p for p in group["params"] if id(p) not in backbone]
            if slow:
                optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] * factor})
        LOGGER.info(f"optimizer: the backbone learns at {factor} x lr0")
        return optimizer


def with_anchors_of(teacher: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """A student's settings with the teacher's anchors; None where they are the same, or not of one kind."""
    if teacher.get("detector") != config["detector"]:
        return None  # refused by the preflight
    own, theirs = config.get("settings") or {}, teacher.get("settings") or {}
    if all(own.get(key) == theirs.get(key) for key in PRIOR_SETTINGS):
        return None
    settings = {key: value for key, value in own.items() if key not in PRIOR_SETTINGS}
    return {**config, "settings": settings | {key: theirs[key] for key in PRIOR_SETTINGS if key in theirs}}


class _Decay:
    """EMA decay at update x, ramping up from 0 with time constant tau; a class, so that an EMA stays picklable."""

    def __init__(self, decay: float, tau: float) -> None:
        self.decay, self.tau = decay, tau

    def __call__(self, x: int) -> float:
        return self.decay * (1 - math.exp(-x / self.tau))


def _freeze_names(freeze: Any, student: GIDDetectionModel) -> list[str]:
    """Names of parts from `freeze=`.

    Older checkpoints have those among them that the settings froze, of which fixed batch norms have no parameters.

    Raises:
        UserError: A number, which would count YOLO layers, a part that the model does not have, or all of them.
    """
    names = [name for name in parts_of(freeze) if name not in student.frozen_names]
    for name in names:
        if not isinstance(name, str) or name.isdigit():
            raise UserError(f"freeze={freeze} counts YOLO layers: name parts, e.g. freeze=0.backbone.")
    check_parts(names, student, freeze, "0.backbone, 0.neck, 0.head")
    return names
