"""Ultralytics' loop with a length in iterations and a learning rate that falls in steps."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from ultralytics.utils import LOGGER, RANK, YAML

from gid_yolo.engine.config import BEFORE
from gid_yolo.engine.resumable_trainer import ResumableTrainer
from gid_yolo.engine.schedule import Schedule, check_schedule, check_warmup, schedule_of
from gid_yolo.engine.unusable import reason_of
from gid_yolo.errors import UserError
from gid_yolo.files import replaced


class ScheduledTrainer(ResumableTrainer):
    """Adds `iterations=`, `lr_steps=`, `lr_gamma=` and `warmup_iterations=` to Ultralytics' trainer.

    With `iterations=` the run ends after exactly so many batches: `epochs` becomes their number of epochs, and the last
    one, which may be partial, is validated and saved like every other. With `lr_steps=` the learning rate of every
    parameter group in iteration i is its initial one x gamma^(milestones up to i), also in the middle of an epoch.
    """

    _cut: bool = False  # the loop was stopped because the iterations ended within an epoch

    def own(self, key: str) -> Any:
        """The value of an argument of ours; in a run that was begun without it, what it was in effect."""
        return vars(self.args).get(key, BEFORE.get(key))  # an older checkpoint that is resumed lacks these arguments

    @property
    def schedule(self) -> Schedule:
        """The schedule by the present data loader, which a retry with a smaller batch replaces."""
        return schedule_of(vars(self.args), len(self.train_loader), self.epochs)

    # Setup ------------------------------------------------------------------------------------------------------------

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Ultralytics' check; besides, what it lets a resumed run change must not contradict the schedule."""
        super().check_resume(overrides)
        if self.resume:
            check_schedule(vars(self.args))

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Ultralytics' loader; that of the training set says how many epochs `iterations=` are."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if mode == "train" and (iterations := self.own("iterations")):
            # Before anything else reads it: the number of optimiser steps, the scheduler, close_mosaic, the last epoch
            self.epochs = self.args.epochs = math.ceil(iterations / len(loader))
        return loader

    def _build_train_pipeline(self) -> None:
        retry = self.optimizer is not None
        try:
            super()._build_train_pipeline()
        except ValueError as error:
            if "final batch=" not in str(error):  # Ultralytics' words, of batch, imgsz and multi_scale
                raise
            raise UserError(f"batch={self.args.batch} cannot be trained: {reason_of(error)}") from error
        if (warmup := self.own("warmup_iterations")) is not None:
            check_warmup(warmup, self.schedule.iterations)
        if iterations := self.own("iterations"):
            self.accumulate = min(self.accumulate, iterations)  # or the optimiser would make no step at all
            if retry:
                LOGGER.warning(f"iterations={iterations} and lr_steps= now count batches of {self.batch_size} images.")
                self._setup_scheduler()  # of as many epochs as they are now
        self._note_length()

    def _note_length(self) -> None:
        """Let args.yaml, which is older than the data loader, say the epochs and the batch that are trained."""
        path = self.save_dir / "args.yaml"
        if RANK in {-1, 0} and path.is_file():
            with replaced(path) as part:
                YAML.save(part, {**YAML.load(path), "epochs": self.epochs, "batch": self.args.batch})

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        """Ultralytics' optimiser; `optimizer=auto` chooses by the real number of steps."""
        if (iterations := self.own("iterations")) and "iterations" in kwargs:
            kwargs["iterations"] = math.ceil(iterations * self.batch_size / max(self.batch_size, self.args.nbs))
        try:
            return super().build_optimizer(model, *args, **kwargs)
        except NotImplementedError as error:
            raise UserError(f"optimizer={self.args.optimizer} is unknown: {error}") from error

    def _setup_scheduler(self) -> None:
        if not self.own("lr_steps"):
            super()._setup_scheduler()
            return
        self.lf = self._factor
        self.scheduler = LambdaLR(self.optimizer, lr_lambda=self.lf)

    def _factor(self, epoch: int) -> float:
        """Learning rate over the initial one: in the present iteration if it lies in `epoch`, else where that begins.

        Ultralytics' warm-up asks in every iteration for the epoch's, and so aims at what holds in that iteration.
        """
        schedule = self.schedule
        inside = self.iteration // schedule.batches == epoch
        return schedule.factor(self.iteration if inside else epoch * schedule.batches)

    def _get_warmup_iterations(self, num_batches: int) -> int:
        own = self.own("warmup_iterations")
        return super()._get_warmup_iterations(num_batches) if own is None else own

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Ultralytics' resumption.

        Raises:
            UserError: Other batches than the run began with, by which its iterations are not those that remain.
        """
        if ckpt is not None and self.resume and self.own("iterations"):
            before = ckpt["train_args"]
            if (before["batch"], before["epochs"]) != (self.args.batch, self.epochs):
                raise UserError(
                    f"the run counts iterations and began with batch={before['batch']}, {before['epochs']} epochs; "
                    f"with batch={self.args.batch} and this data it has {self.epochs}: resume it as it began."
                )
        super().resume_training(ckpt)

    # Loop -------------------------------------------------------------------------------------------------------------

    def _setup_train(self) -> None:
        super()._setup_train()
        if not (self.own("iterations") or self.own("lr_steps")):
            return
        LOGGER.info(f"schedule: {self.schedule.describe()}")
        self.add_callback("on_train_epoch_start", self._begin_epoch)
        self.add_callback("on_train_batch_start", self._begin_batch)
        self.add_callback("on_train_batch_end", self._end_batch)

    def _begin_epoch(self, _: Any) -> None:
        """Clear what ended an epoch that is tried again after a NaN."""
        if self._cut:
            self.stop = self._cut = False

    def _begin_batch(self, _: Any) -> None:
        """Set the learning rate of this iteration; a warm-up that is not over does so again afterwards."""
        if self.own("lr_steps"):
            factor = self.schedule.factor(self.iteration)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def _end_batch(self, _: Any) -> None:
        """Leave the last epoch where the iterations end inside it."""
        if self.iteration == self.own("iterations") and self.iteration % len(self.train_loader):
            self.stop = self._cut = True
