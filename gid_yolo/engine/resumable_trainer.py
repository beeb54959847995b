"""Ultralytics' trainer, whose runs survive: killed at any moment and resumed, they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import LOGGER, RANK

from gid_yolo.engine.curves import read_curve
from gid_yolo.engine.parallel_trainer import ParallelTrainer
from gid_yolo.engine.run_state import KEY, capture, forget_epochs, restore, restore_gradients, save, strip
from gid_yolo.engine.safe_load import check_file
from gid_yolo.engine.seeding import mixed_seed, seed_all, seed_loader, start_epoch
from gid_yolo.engine.unusable import reading
from gid_yolo.errors import UserError
from gid_yolo.files import replaced

_FOLDER = ".saving"  # in weights/: what is being written


class _NothingLeft(Exception):
    """The run had ended but for its final evaluation."""


class ResumableTrainer(ParallelTrainer):
    """Adds to Ultralytics' trainer what exact resumption needs.

    - Every epoch begins with seeds of its own, and every image is augmented from one of its own (`seeding`).
    - `last.pt` holds the whole state in full precision beside Ultralytics' entries (`run_state`), and is replaced in
      one move; rows that an interrupted epoch left in `results.csv` are written anew, and its clock goes on.
    - Steps of the optimiser that span the end of an epoch are made where they would have been.

    Two things stay Ultralytics': mosaic reads images that its process has in memory (exact with `cache=ram`), and
    batch norms that are not frozen are those of the first process.

    Attributes:
        iteration: Iterations before the present one, of this run and of those it resumes.
        counts: What the run counts by name, likewise.
    """

    iteration: int = 0
    counts: Counter[str]
    train_time_start: float  # Ultralytics' own
    _last_step: int = -1  # iteration of the optimiser's last step
    _behind: int = 0  # how far Ultralytics' own count of steps, which begins anew, lies before the run's
    _accumulate: int = 1
    _earlier: float = 0.0  # seconds that the run trained for before this start
    _gradients: dict[str, Tensor] | None = None  # that wait for a step, of a resumed run
    _given: int | None = None  # the last epoch that the loader gave to its end

    @property
    def accumulate(self) -> int:
        """Batches a step of the optimiser; after a resumption Ultralytics counts them from -1, hence the rest."""
        return self._accumulate + self._behind

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    # Set-up -----------------------------------------------------------------------------------------------------------

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Ultralytics' loader; that of the training set draws by seed, epoch and image."""
        with reading(self.args.data, "train" if mode == "train" else self.args.split):
            loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if mode == "train":
            seed_loader(loader, self.args.seed)
        return loader

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Ultralytics' resumption, and then the exact state; a file of Ultralytics' own lacks that."""
        if ckpt is None or not self.resume:
            return
        state = ckpt.get(KEY)
        if state is not None and state["ended"]:
            self.epoch = ckpt["epoch"]
            raise _NothingLeft
        super().resume_training(ckpt)
        if RANK in {-1, 0}:
            forget_epochs(self.csv, self.start_epoch)
            with contextlib.suppress(OSError, ValueError, IndexError):  # gone or damaged, as was said
                self._earlier = read_curve(self.csv)[-1][1]
        if state is None:
            LOGGER.warning(
                f"{self.args.model} holds weights in half precision alone: the run goes on, but not exactly."
            )
            return
        restore(state, self.model, self.ema, self.optimizer)
        self._last_step, self._gradients = state["last_step"], state["gradients"]
        if RANK in {-1, 0}:  # it is the first process's that are kept
            self.counts.update(state.get("counts", {}))

    def _setup_train(self) -> None:
        self.counts = Counter()
        self.add_callback("on_train_start", self._begin_run)
        self.add_callback("on_train_epoch_start", self._seed_epoch)
        self.add_callback("on_train_batch_end", self._count_batch)
        self.add_callback("on_train_epoch_end", self._note_epoch)
        if RANK in {-1, 0}:
            shutil.rmtree(self.wdir / _FOLDER, ignore_errors=True)  # what a killed process left
        super()._setup_train()

    # Loop -------------------------------------------------------------------------------------------------------------

    def _do_train(self) -> None:
        try:
            super()._do_train()
        except _NothingLeft:
            LOGGER.info(f"{self.args.model}: every epoch is done, what is left is the final evaluation.")
            self.final_eval()
            if RANK in {-1, 0}:
                if self.args.plots:
                    self.plot_metrics()
                self.run_callbacks("on_train_end")

    def _begin_run(self, _: Any) -> None:
        """Let Ultralytics' loop, whose count of steps begins with -1, make its next step where the run would have."""
        self._behind = self._last_step + 1

    def _seed_epoch(self, _: Any) -> None:
        self.iteration = self.epoch * len(self.train_loader)  # it may be an epoch that is tried again after a NaN
        attempt = self.nan_recovery_attempts
        goes_on = self._given == self.epoch - 1 and attempt == 0
        start_epoch(self.train_loader, self.epoch, attempt, goes_on)
        seed_all(mixed_seed(self.args.seed, self.epoch, attempt, RANK + 1))
        self._given = None
        if self._gradients is not None:  # not before: Ultralytics clears them at the start
            restore_gradients(self._gradients, self.model)
            self._gradients = None

    def _count_batch(self, _: Any) -> None:
        self.iteration += 1

    def _note_epoch(self, _: Any) -> None:
        if self.iteration == (self.epoch + 1) * len(self.train_loader):
            self._given = self.epoch

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Ultralytics' row, whose clock goes on from where it stood when the run was interrupted."""
        began = self.train_time_start
        self.train_time_start = began - self._earlier
        try:
            super().save_metrics(metrics)
        finally:
            self.train_time_start = began  # by which Ultralytics measures `time=`

    def optimizer_step(self) -> None:
        """Ultralytics' step, noted for the checkpoint."""
        self._behind, self._last_step = 0, self.iteration
        super().optimizer_step()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save_model(self) -> bool:
        """Ultralytics' checkpoints, with the exact state in `last.pt`, each whole or as it was.

        `best.pt` comes first: a process killed between the two makes the epoch again.

        Raises:
            UserError: A file cannot be written.
        """
        folder = self.wdir / _FOLDER
        try:
            self._save(folder)
        except OSError as error:
            raise UserError(self._unwritten(f"epoch {self.epoch + 1}", error)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.saved = True
        return True

    def _save(self, folder: Path) -> None:
        places = self.wdir, self.last, self.best
        self.wdir, self.last, self.best = folder, folder / self.last.name, folder / self.best.name
        try:
            super().save_model()
        finally:
            self.wdir, self.last, self.best = places
        contents = torch.load(folder / self.last.name, "cpu", weights_only=False)  # this process wrote it
        contents[KEY] = capture(
            self.model,
            self.ema,
            self.optimizer,
            last_step=self._last_step,
            iteration=self.iteration,
            ended=bool(self.stop),
            counts=self.counts,
        )
        contents["optimizer"] = contents[KEY]["optimizer"]
        for path in sorted(folder.iterdir(), key=lambda path: path.name == self.last.name):
            if path.name == self.best.name:
                with replaced(self.best) as part:
                    path.replace(part)
            else:
                save(contents, self.wdir / path.name)

    def _unwritten(self, what: str, error: OSError) -> str:
        advice = "there is no checkpoint yet; make room, and start again"
        if self.last.exists():
            advice = f"{self.last} is whole, as before; make room, and go on: gid-train resume=True model={self.last}"
        return f"{what} could not be saved in {self.wdir} ({error.strerror or error}): {advice}."

    def final_eval(self) -> None:
        """Ultralytics' final evaluation of `best.pt`; after it, not before, files lose what only a resumption needs.

        Raises:
            UserError: A file cannot be written.
        """
        if self.best.exists():
            LOGGER.info(f"\nValidating {self.best}...")
            self.validator.args.plots = self.args.plots
            self.validator.args.compile = False
            self.metrics = self.validator(model=self.best)
            self.metrics.pop("fitness", None)
            self.epoch += 1  # loggers note the best epoch's metrics beside the last's
            self.run_callbacks("on_fit_epoch_end")
            self.epoch -= 1
        if RANK not in {-1, 0}:
            return
        results = {"train_results": self.read_results_csv()}
        for path in (self.best, self.last):  # the last one says that the run is finished
            if path.exists():
                if not getattr(self, "trust", False):
                    check_file(path, "model")  # again: it is opened plainly
                try:
                    strip(path, results)
                except OSError as error:
                    raise UserError(self._unwritten("the finished run", error)) from error
