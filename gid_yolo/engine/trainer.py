"""Ultralytics' training loop for our detectors, plain or under a teacher."""

from __future__ import annotations

import math
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo._version import __version__
from gid_yolo.distill import GIDLoss
from gid_yolo.engine import preflight
from gid_yolo.engine.checkpoint import fingerprint, load_any, load_model
from gid_yolo.engine.config import check_keys, check_values, configured_model, model_defaults
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.teacher import map_classes
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.validator import GIDValidator
from gid_yolo.errors import UserError


class GIDTrainer(DetectionTrainer):
    """Trains a detector; under `teacher=`, by general instance distillation.

    Data, augmentation, EMA, logging, plots, early stop, resume and checkpoints are Ultralytics'. Added here: our
    defaults, the teacher, the preflight checks, a learning rate for the backbone, and an EMA that fits short runs.

    Args:
        cfg: Not used (Ultralytics' launcher passes its own defaults); the defaults come from `cfg/` and the model.
        overrides: Arguments of the run.
        _callbacks: Ultralytics' callbacks.
    """

    model: Any  # a name before setup_model, then the network

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        overrides = dict(overrides or {})
        check_keys(overrides)
        self.model_record: dict[str, Any] = {}
        self.adaptation_state: dict[str, torch.Tensor] | None = None
        defaults = model_defaults({} if overrides.get("resume") else _model_settings(overrides.get("model")))
        try:
            check_values(vars(get_cfg(defaults, overrides)))
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, UserError) else UserError(" ".join(str(error).split())) from error
        super().__init__(defaults, overrides, _callbacks)
        if RANK in {-1, 0} and not self.resume:  # its presence says that a run is finished
            (self.save_dir / "coco_metrics.json").unlink(missing_ok=True)
        if self.distilling and self.batch_size < 1:
            raise UserError(f"batch={self.batch_size} cannot be found automatically with a teacher: give a number.")

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Ultralytics' check; besides, `teacher=` may name the file's new place (its fingerprint is compared)."""
        super().check_resume(overrides)
        if self.resume and overrides.get("teacher"):
            self.args.teacher = overrides["teacher"]

    # Data -------------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict[str, Any]:
        """Ultralytics' data description; a UserError where there is none."""
        try:
            return super().get_dataset()
        except RuntimeError as error:
            raise UserError(f"data={self.args.data} cannot be used: {' '.join(str(error).split())}") from error

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        if not any(len(label["cls"]) for label in self.train_loader.dataset.labels):
            raise UserError(
                f"data={self.args.data} has no boxes in its train split ({self.data['train']}): check that labels/ "
                "lies beside images/ and that its files are not empty."
            )

    # Model ------------------------------------------------------------------------------------------------------------

    @property
    def distilling(self) -> bool:
        """True where a teacher is given and not turned off."""
        teacher = getattr(self.args, "teacher", None)  # a finished run's checkpoint has lost our arguments
        return bool(teacher) and self.args.distill != "none"

    def setup_model(self) -> dict[str, Any] | None:
        """Build the student, from the checkpoint where one is given or resumed.

        Returns:
            The checkpoint to resume from, or None.
        """
        if isinstance(self.model, nn.Module):
            return None
        cfg, weights, ckpt = self.model, None, None
        if str(self.model).endswith(".pt"):
            weights, ckpt = load_any(self.model)
            if isinstance(weights, DistillationModel):  # an interrupted distillation
                self.adaptation_state = weights.projector.state_dict()
                weights = weights.student_model
            cfg = weights.yaml
            if self.resume and ckpt.get("optimizer") is None:
                raise UserError(f"resume={self.model} is a finished run, there is nothing to resume: start a new one.")
            if self.resume:
                self.model_record = weights.record
        if not self.resume:
            if isinstance(self.args.pretrained, str | Path):
                weights, _ = load_model(self.args.pretrained, "pretrained")
            elif self.args.pretrained is False:
                weights = None
        self.model = self.get_model(cfg=cfg, weights=weights, verbose=RANK in {-1, 0})
        return ckpt

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> GIDDetectionModel:
        """Build a detector for the data's classes and load `weights` or the backbone's."""
        config = configured_model(cfg, vars(self.args))
        channels, classes = self.data["channels"], self.data["nc"]
        model = GIDDetectionModel(config, channels, classes, verbose, load_backbone=weights is None)
        if weights is not None:
            model.load(weights)
            return model
        source = model.detector.backbone.source
        if not source.loaded and (config.get("freeze_bn") or config.get("frozen_stages")):
            if self.args.freeze_bn or self.args.frozen_stages:
                LOGGER.warning("freeze_bn or frozen_stages freezes random weights: they will never be trained.")
                return model
            LOGGER.warning("the yaml's freeze_bn and frozen_stages are off: the backbone's weights are random.")
            config.update(freeze_bn=False, frozen_stages=0)
            model = GIDDetectionModel(config, channels, classes, verbose=False)
            model.detector.backbone.source = source
        return model

    def set_model_attributes(self) -> None:
        """Attach the data's names and the arguments, freeze what the settings freeze, and wrap for distillation."""
        student = self.model
        if self.device.type == "cpu":  # Ultralytics does this on CUDA only; here it saves a quarter of a step
            student.to(memory_format=torch.channels_last)
        super().set_model_attributes()
        self.args.freeze = sorted({*_freeze_names(self.args.freeze, student), *student.frozen_names}) or None
        student.record = self._record(student)
        if self.distilling:
            self.model = self._with_teacher(student)

    def _with_teacher(self, student: GIDDetectionModel) -> TeacherStudentModel:
        """Student and teacher side by side.

        Raises:
            UserError: The teacher is missing, changed since the run began, or does not fit the student.
        """
        teacher, _ = load_model(self.args.teacher, "teacher")
        digest = fingerprint(teacher)
        if (before := student.record.get("teacher_fingerprint")) not in (None, digest):
            raise UserError(
                f"teacher={self.args.teacher} is not the teacher this run began with (fingerprint {digest}, "
                f"then {before}): put the old file back, or start a new run."
            )
        student.record["teacher_fingerprint"] = digest
        preflight.check_alignment(teacher, student)
        args = self.args
        projector = GIDLoss(
            student.detector.fpn_channels,
            teacher.detector.fpn_channels,
            top_k=args.gid_top_k,
            iou_threshold=args.gid_iou,
            weights={"feature": args.gid_feature, "relation": args.gid_relation, "response": args.gid_response},
            alpha=args.gid_alpha,
            beta=args.gid_beta,
            roi_size=args.gid_roi_size,
            feature_normalize=args.gid_normalize,
            relation_reduction=args.gid_reduction,
            adapt_kernel=args.gid_adapt_kernel,
        )
        if self.adaptation_state is not None:
            projector.load_state_dict(self.adaptation_state)
        model = TeacherStudentModel(student, teacher, projector, map_classes(teacher.names, student.names))
        return model.to(self.device)

    def _record(self, student: GIDDetectionModel) -> dict[str, Any]:
        """What makes this run what it is, kept in the checkpoint; a resumed run keeps the record it began with."""
        if self.model_record:
            return self.model_record
        keys = (
            "model",
            "data",
            "epochs",
            "batch",
            "imgsz",
            "seed",
            "optimizer",
            "lr0",
            "fraction",
            "teacher",
            "distill",
        )
        record = {key: getattr(self.args, key) for key in keys}
        started_from = getattr(student, "pt_path", None) or student.detector.backbone.source.text
        return {**record, "initialised_from": str(started_from), "version": __version__}

    def get_validator(self) -> GIDValidator:
        """The validator of the training loop and of the final evaluation."""
        return GIDValidator(self.test_loader, save_dir=self.save_dir, args=copy(self.args), _callbacks=self.callbacks)

    # Loop -------------------------------------------------------------------------------------------------------------

    def _setup_train(self) -> None:
        super()._setup_train()
        self._fit_ema()
        if RANK in {-1, 0}:
            preflight.report(self)
            if self.distilling:
                unwrap_model(self.model).probe = {}
                self.add_callback("on_train_batch_end", preflight.first_step)

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
        steps = max(1, round(len(self.train_loader) * self.epochs / self.accumulate))
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


class _Decay:
    """EMA decay at update x, ramping up from 0 with time constant tau; a class, so that an EMA stays picklable."""

    def __init__(self, decay: float, tau: float) -> None:
        self.decay, self.tau = decay, tau

    def __call__(self, x: int) -> float:
        return self.decay * (1 - math.exp(-x / self.tau))


def _freeze_names(freeze: Any, student: GIDDetectionModel) -> list[str]:
    """Names of parts from `freeze=`, which the command line passes as text.

    Raises:
        UserError: A number, which would count YOLO layers, or a part that the model does not have.
    """
    if not freeze and freeze != 0:
        return []
    names = freeze.strip("[]").split(",") if isinstance(freeze, str) else freeze
    names = [
        n.strip(" '\"") if isinstance(n, str) else n for n in (names if isinstance(names, list | tuple) else [names])
    ]
    for name in names:
        if not isinstance(name, str) or name.isdigit():
            raise UserError(f"freeze={freeze} counts YOLO layers: name parts, e.g. freeze=0.backbone.")
        if not any(f"model.{name}." in key for key, _ in student.named_parameters()):
            raise UserError(f"freeze={freeze}: there is no part '{name}'; e.g. 0.backbone, 0.neck, 0.head.")
    return names


def _model_settings(model: Any) -> dict[str, Any]:
    """Settings of the model a run names; a checkpoint carries its own."""
    if model is None:
        raise UserError("model= is missing: give a name such as retina_nano, a yaml, or a checkpoint.")
    if str(model).endswith(".pt"):
        return load_model(model)[0].yaml
    return configured_model(model, {})
