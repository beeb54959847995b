"""Ultralytics' trainer in several processes, which its own launcher starts or `torchrun`, on one machine or on many."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed as dist
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK

from gid_yolo.engine.place import Start, undone_if_refused
from gid_yolo.engine.seeding import seed_all
from gid_yolo.errors import UserError

_TIMEOUT = timedelta(hours=3)  # Ultralytics'


class ParallelTrainer(DetectionTrainer):
    """Adds to Ultralytics' trainer processes that `torchrun` starts, several machines, and the CPU.

    Every process trains on `batch` / processes images; the gradients are those of the whole batch.
    """

    save_dir: Path
    wdir: Path
    csv: Path
    last: Path
    best: Path
    start: Start | None = None  # what this start found in its folder, of the process that writes there
    saved: bool = False  # this start has saved an epoch

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, overrides, _callbacks)
        if self.ddp or (self.start and self.start.folder != self.save_dir):
            self.start = None  # the processes that this one launches have the folder, or another run took it meanwhile
        if self.start:
            self.add_callback("on_train_start", self.start.begin)
        if LOCAL_RANK == -1:
            return
        _end_with_a_sentence()
        seed_all(self.args.seed)  # the first weights are those of one process; Ultralytics adds the process's number
        # Ultralytics counts the devices of this machine
        self.world_size = int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UserError(f"batch={self.batch_size} must be a multiple of the {self.world_size} processes.")
        if self.device.type == "cuda":
            devices = [x for x in str(self.args.device or "").split(",") if x]
            if len(devices) < local:  # none is named, or the one that Ultralytics chose
                devices = [str(i) for i in range(local)]
            self.args.device = ",".join(devices)

    def train(self) -> None:
        """Ultralytics' training.

        Raises:
            UserError: One of the processes that its launcher started failed.
            KeyboardInterrupt: As it came, with what is left to do.
        """
        with undone_if_refused(self):
            try:
                super().train()
            except subprocess.CalledProcessError as error:
                left = f"{self.last} is whole: go on with gid-train resume=True model={self.last}"
                raise UserError(
                    f"a process of the training ended with status {error.returncode}, and so all did; what it said "
                    f"stands above. {left if self.last.exists() else 'No epoch was saved yet'}."
                ) from error
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._what_is_left()) from None

    def _what_is_left(self) -> str:
        """How a run goes on that was stopped by hand."""
        if self.saved or (self.ddp and self.last.exists()):
            return f"gid-train resume=True model={self.last} goes on from the last epoch"
        if self.resume:
            return f"gid-train resume=True model={self.args.resume} goes on as before"
        return "no epoch was saved yet"

    def _setup_ddp(self) -> None:
        if self.device.type == "cpu":
            dist.init_process_group("gloo", timeout=_TIMEOUT, rank=RANK, world_size=self.world_size)
        else:
            super()._setup_ddp()
        place = [str(self.save_dir)]  # each process chose a folder that did not exist; the first one's is made
        dist.broadcast_object_list(place, 0)
        self.save_dir = Path(place[0])
        self.args.save_dir, self.args.name = str(self.save_dir), self.save_dir.name
        self.wdir, self.csv = self.save_dir / "weights", self.save_dir / "results.csv"
        self.last, self.best = self.wdir / self.last.name, self.wdir / self.best.name

    def _do_train(self) -> None:
        if LOCAL_RANK != -1 and self.world_size == 1:  # whose group Ultralytics' loop asks for, but does not make
            self._setup_ddp()
        super()._do_train()

    def _setup_train(self) -> None:
        with _parallel_on_cpu() if self.device.type == "cpu" else nullcontext():
            super()._setup_train()


def _end_with_a_sentence() -> None:
    """Let a `UserError` end this process, which a launcher started, without a traceback, as the command line does."""
    other = sys.excepthook

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(f"gid train: {error}", file=sys.stderr)
        else:
            other(kind, error, trace)

    sys.excepthook = say


class _OnCPU(nn.parallel.DistributedDataParallel):
    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)


@contextmanager
def _parallel_on_cpu() -> Iterator[None]:
    """Ultralytics names a device to PyTorch's wrapper, which takes none for the CPU."""
    wrapper = nn.parallel.DistributedDataParallel
    nn.parallel.DistributedDataParallel = _OnCPU  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = wrapper  # type: ignore[misc]
