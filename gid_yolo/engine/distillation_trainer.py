"""What training under a teacher adds to Ultralytics' loop, for our detectors and for YOLO."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.cfg import get_save_dir
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.checks import check_file as find
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo._version import __version__
from gid_yolo.engine import preflight
from gid_yolo.engine.checkpoint import fingerprint, is_checkpoint, load_any, load_model, record_of
from gid_yolo.engine.classes import check_classes
from gid_yolo.engine.clipping import clip_features, clips_apart
from gid_yolo.engine.config import BEFORE, DEFAULTS, check_keys, checked_args, compares_features, without_none
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.fade import set_factor
from gid_yolo.engine.figure4 import Figure4
from gid_yolo.engine.first_step import FirstStep
from gid_yolo.engine.gradients import GradientStatistics
from gid_yolo.engine.instance_counts import InstanceCounts, draw_counts
from gid_yolo.engine.named_data import check_class_count, check_named, check_program
from gid_yolo.engine.origin import check_kind, told_origin
from gid_yolo.engine.place import Start, check_place, undone_if_refused
from gid_yolo.engine.provenance import check_goes_on, split_of, write_provenance
from gid_yolo.engine.safe_load import check_file, safely
from gid_yolo.engine.schedule import override
from gid_yolo.engine.teacher import share_classes
from gid_yolo.engine.teacher_student import PRECISIONS, TeacherStudentModel, check_precision
from gid_yolo.engine.unusable import check_class_names, reason_of
from gid_yolo.engine.validator import GIDValidator
from gid_yolo.engine.watched_trainer import WatchedTrainer
from gid_yolo.errors import UserError

_RECORDED = (
    *("model", "data", "epochs", "iterations", "lr_steps", "lr_gamma", "batch", "imgsz", "seed", "optimizer", "lr0"),
    *("fraction", "warmup_iterations", "backbone_lr", "ema_decay", "freeze_bn", "frozen_stages", "teacher", "distill"),
)

# What no resumption changes, or only where the run lies
_OF_A_START = frozenset({"model", "resume", "save_dir", "project", "name", "exist_ok", "trust"})

# What a resumption takes by itself, so that Ultralytics must not say that it is ignored
_OURS_TO_RESUME = frozenset({"teacher", "trust", "save_dir"})

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

# What tensors and numbers of any kind raise in place of an optimiser's
_UNFIT = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError)


class DistillationTrainer(WatchedTrainer):
    """Trains a detector; under `teacher=`, by general instance distillation.

    Data, augmentation, EMA, logging, plots, early stop, resume and checkpoints are Ultralytics'. Added here: the
    teacher, the preflight checks, the record of a run, and clear errors.

    Args:
        cfg: Not used (Ultralytics' launcher passes its own defaults); the defaults are `defaults_for`'s.
        overrides: Arguments of the run.
        _callbacks: Ultralytics' callbacks.
    """

    model: Any  # a name before setup_model, then the network
    _teacher: DetectionModel | None = None

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        overrides = without_none(overrides or {})
        check_keys(overrides)
        self.check_given(overrides)
        if overrides.get("model") is None and not overrides.get("resume"):
            raise UserError("model= is missing: give a name such as retina_nano, a yaml, or a checkpoint.")
        if overrides.get("distill_model"):
            raise UserError("distill_model= is Ultralytics' own distillation: give teacher= here, or use yolo train.")
        if overrides.get("recipe"):
            raise UserError(f"recipe={overrides['recipe']} is read by gid-train and GID.train: train with one of them.")
        self.model_record: dict[str, Any] = {}
        self.changed_arguments: dict[str, Any] = {}  # by whoever resumed the run
        self.adaptation_state: dict[str, torch.Tensor] | None = None
        self.trust = overrides.get("trust") is True
        defaults = self.defaults_for(None if overrides.get("resume") else overrides.get("model"), self.trust)
        defaults = override(defaults, overrides)
        merged = checked_args(defaults, overrides)
        if RANK in {-1, 0} and not overrides.get("resume"):
            check_place(merged)
        with undone_if_refused(self):
            super().__init__(defaults, overrides, _callbacks)
            if self.distilling and self.batch_size < 1:
                raise UserError(f"batch={self.batch_size} cannot be found automatically with a teacher: give a number.")
        if self.distilling and self.args.compile:
            LOGGER.warning("compile= is off: under a teacher the features must stay apart from the compiled graph.")
            self.args.compile = False

    @staticmethod
    def defaults_for(model: Any, trust: bool = False) -> dict[str, Any]:
        """Default arguments for training a model; of a resumed run (None) the checkpoint's replace them."""
        raise NotImplementedError

    @staticmethod
    def check_given(given: Mapping[str, Any]) -> None:
        """Refuse arguments that this kind of detector has no use for."""
        raise NotImplementedError

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Ultralytics' check; besides, `teacher=` may name the file's new place (its fingerprint is compared).

        Raises:
            UserError: A file that is no checkpoint, or that could run code.
        """
        resumed, data = self.args.resume, self.args.data
        named = isinstance(resumed, str | Path)
        exists = named and Path(resumed).exists()
        if named and not exists:  # Ultralytics would go on with the latest run
            raise UserError(f"resume={resumed} does not exist: give the last.pt of a run.")
        if named and Path(resumed).is_dir():
            raise UserError(f"resume={resumed} is a folder: give the weights/last.pt of the run.")
        if exists and not self.trust:
            check_file(Path(find(str(resumed))), "resume")  # by the name under which it will be opened
        try:
            with safely(self.trust):
                super().check_resume({key: value for key, value in overrides.items() if key not in _OURS_TO_RESUME})
        except FileNotFoundError:  # which Ultralytics makes of every error
            if exists:
                load_any(resumed, "resume", self.trust)  # which says what it is
            raise
        if self.resume and not (self.trust or data):
            check_named(self.args.data, f"resume={resumed}")
        if self.resume:
            place = Path(self.args.resume).resolve().parent
            own = place.parent if place.name == "weights" else place
            self.args.save_dir = str(overrides.get("save_dir") or own)  # no file says where a run is written
            self.args.trust = self.trust  # no file says that others are to be trusted
            began = {**BEFORE, **vars(self.args)}
            if not (began.get("gid_feature") or began.get("gid_relation")):
                began["gid_level"] = DEFAULTS["gid_level"]  # of no effect, and another is refused
            if began["distill_clip"] == "apart" and not compares_features(began):
                began["distill_clip"] = DEFAULTS["distill_clip"]  # likewise
            self.args.__dict__.update(began)  # so that the run's args.yaml says them
            self.args.teacher = overrides.get("teacher") or vars(self.args).get("teacher")
        self.start = Start(get_save_dir(self.args)) if RANK in {-1, 0} else None

    # Data -------------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict[str, Any]:
        """Ultralytics' data description; a UserError where there is none, or where a program would fetch it."""
        if not self.trust:
            check_program(self.args.data, "val")
        check_class_count(self.args.data)
        try:
            data = super().get_dataset()
        except RuntimeError as error:
            raise UserError(f"data={self.args.data} cannot be used: {reason_of(error)}") from error
        check_class_names(data["names"], self.args.data)
        if not self.args.single_cls:  # which replaces the names, after `classes=` has chosen
            check_classes(self.args.classes, data["names"])
        return data

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        if not any(len(label["cls"]) for label in self.train_loader.dataset.labels):
            raise UserError(
                f"data={self.args.data} has no boxes in its train split ({self.data['train']}): check that labels/ "
                "lies beside images/ and that its files are not empty."
            )
        # With iterations= the epochs are known only now; with too little memory Ultralytics comes back, batch halved
        self.train_split = now = split_of(self.train_loader.dataset.labels, self.data["names"])
        check_goes_on(self.model_record, now, self.args.data)
        if self.model_record:
            return
        trained = [unwrap_model(self.model), *([self.ema.ema] if self.ema else [])]  # the average is what is kept
        for model in trained:
            record = getattr(model, "student_model", model).record
            record.update(epochs=self.epochs, batch=self.args.batch)
            record.update(train_images=now["digest"], train_contents=now["contents"])

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
        if is_checkpoint(self.model):
            weights, ckpt = load_any(self.model, trust=self.trust)
            if isinstance(weights, DistillationModel):  # an interrupted distillation
                self.adaptation_state = weights.projector.state_dict()
                weights = weights.student_model
            cfg = weights.yaml
            if self.resume and ckpt.get("optimizer") is None:
                raise UserError(f"resume={self.model} is a finished run, there is nothing to resume: start a new one.")
            if self.resume:
                self.model_record = record_of(weights)
                before = ckpt.get("train_args") or {}
                now = vars(self.args).items()
                self.changed_arguments = {k: v for k, v in now if k not in _OF_A_START and before.get(k, v) != v}
        if not self.resume:
            if isinstance(self.args.pretrained, str | Path):
                weights, _ = load_model(self.args.pretrained, "pretrained", self.trust)
                check_kind(weights, self.family_of(cfg), self.args.pretrained)
            elif self.args.pretrained is False:
                weights = None
        self.model = self.get_model(cfg=cfg, weights=weights, verbose=RANK in {-1, 0})
        return ckpt

    @staticmethod
    def family_of(cfg: Any) -> str:
        """Kind of detector that the settings of a model make."""
        raise NotImplementedError

    def set_model_attributes(self) -> None:
        """Attach the data's names and the arguments, note what the run is, and wrap for distillation."""
        student = self.model
        super().set_model_attributes()
        student.record = self._record(student)
        if self.distilling:
            with torch.random.fork_rng(devices=[]):  # a distilled run draws the numbers of its plain twin
                self.model = self._with_teacher(student)

    def load_teacher(self) -> DetectionModel:
        """The teacher as its file has it, read once while the run is set up."""
        if self._teacher is None:
            self._teacher, _ = load_model(self.args.teacher, "teacher", self.trust)
        return self._teacher

    def _with_teacher(self, student: Any) -> TeacherStudentModel:
        """Student and teacher side by side.

        Raises:
            UserError: The teacher is missing, changed since the run began, or does not fit the student or the device.
        """
        precision = self.own("teacher_precision")
        check_precision(precision, self.device)
        teacher = self.load_teacher()
        digest = fingerprint(teacher)
        if (before := student.record.get("teacher_fingerprint")) not in (None, digest):
            raise UserError(
                f"teacher={self.args.teacher} is not the teacher this run began with (fingerprint {digest}, "
                f"then {before}): put the old file back, or start a new run."
            )
        student.record["teacher_fingerprint"] = digest
        projector, args = make_projector(self.args, student, teacher), self.args
        if self.adaptation_state is not None:
            projector.load_state_dict(self.adaptation_state)
        classes = [args.classes] if isinstance(args.classes, int) else args.classes
        shared = share_classes(teacher.names, student.names, None if args.single_cls else classes)
        model = TeacherStudentModel(student, teacher, projector, shared, PRECISIONS.get(precision))
        return model.to(self.device)

    def _record(self, student: Any) -> dict[str, Any]:
        """What makes this run what it is, kept in the checkpoint; a resumed run keeps the record it began with."""
        if self.model_record:
            return self.model_record
        record = {key: getattr(self.args, key) for key in _RECORDED}
        return {**record, "initialised_from": self.initialised_from(student), "version": __version__}

    def initialised_from(self, student: Any) -> str:
        """Where the student's first weights come from, in one line."""
        return f"resumed from {self.args.model}" if self.resume else told_origin(student)

    def get_validator(self) -> GIDValidator:
        """The validator of the training loop and of the final evaluation."""
        return GIDValidator(self.test_loader, save_dir=self.save_dir, args=copy(self.args), _callbacks=self.callbacks)

    # Loop -------------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train, also in a process of Ultralytics' launcher; what it opens is read as data.

        Raises:
            UserError: Besides all that is said of the arguments: the disk is full, or cannot be written.
        """
        try:
            with safely(self.trust):
                super().train()
        except OSError as error:
            if error.errno not in _DISK:
                raise
            what = f"a file ({error.filename})" if error.filename else "a file of the run"
            raise UserError(self._unwritten(what, error)) from error

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Ultralytics' resumption.

        Raises:
            UserError: The state of the run does not fit its model.
        """
        try:
            super().resume_training(ckpt)
        except UserError:
            raise
        except _UNFIT as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"resume={self.args.resume} cannot go on ({type(error).__name__}: {reason}).") from error

    def final_eval(self) -> None:
        """Ultralytics' final evaluation, of files that are still this run's.

        Raises:
            UserError: One beside them is no checkpoint, or could run code.
        """
        for path in (self.best, self.last):
            if path.exists() and not self.trust and RANK in {-1, 0}:
                check_file(path, "model")
        super().final_eval()

    def _setup_train(self) -> None:
        super()._setup_train()
        if self.distilling:
            set_factor(self)
            if self.start_epoch == 0 and not unwrap_model(self.model).factor:
                until, decay = self.own("distill_until") or 1.0, self.own("distill_decay") or "constant"
                raise UserError(
                    f"a run of {self.schedule.iterations} iterations is too short for distill_until={until} with "
                    f"distill_decay={decay}: nothing would be distilled in its first; train longer, or give "
                    "distill_until=1 distill_decay=constant."
                )
            self.add_callback("on_train_batch_start", set_factor)
        if RANK in {-1, 0}:
            write_provenance(self)
            with torch.random.fork_rng(devices=[]):
                preflight.report(self)
            if self.distilling:
                first = FirstStep()
                self.add_callback("on_train_batch_start", first.ask)
                self.add_callback("on_train_batch_end", first.check)
            if every := self.own("gradients"):
                self._add_gradients(every)
            if self.distilling and unwrap_model(self.model).projector.gid is not None:
                counts = InstanceCounts(self.save_dir / "gi_types.csv")
                self.add_callback("on_train_epoch_start", counts.start)
                self.add_callback("on_train_batch_end", counts.add)
                self.add_callback("on_train_epoch_end", counts.write)
                if every := self.args.gid_visualize_every:
                    drawer = Figure4(self.save_dir / "gi", every)
                    self.add_callback("on_train_epoch_start", drawer.start)
                    self.add_callback("on_train_batch_start", drawer.ask)
                    self.add_callback("on_train_batch_end", drawer.end)
        self._teacher = None

    def _add_gradients(self, every: int) -> None:
        if not self.distilling:
            LOGGER.warning("gradients= is off: without a teacher there is one loss, and nothing to compare it with.")
            return
        statistics = GradientStatistics(self.save_dir / "gradients.csv", every)
        self.add_callback("on_train_epoch_start", statistics.start)
        self.add_callback("on_train_batch_start", statistics.ask)
        self.add_callback("on_train_batch_end", statistics.add)
        self.add_callback("on_train_epoch_end", statistics.write)

    @property
    def clips_apart(self) -> bool:
        """Whether the gradients of features that are compared are clipped by themselves."""
        apart = clips_apart(self.own("distill_clip"), type(self.optimizer).__name__)
        return apart and self.distilling and compares_features(vars(self.args))

    def clip_gradients(self) -> None:
        """While features are compared, those of the features by themselves, where `distill_clip=` asks for it."""
        if self.clips_apart:
            model = unwrap_model(self.model)
            if model.factor:
                clip_features(model, model.student_model, self.scaler)

    def plot_metrics(self) -> None:
        """Ultralytics' curves, and figure 5 of a distillation."""
        super().plot_metrics()
        draw_counts(self.save_dir / "gi_types.csv")
