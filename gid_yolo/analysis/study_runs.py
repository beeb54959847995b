"""Runs of a study as processes of `gid-train` and `gid-val`, side by side, going on where they were stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from ultralytics.utils import LOGGER

from gid_yolo.analysis.study_data import SameData
from gid_yolo.analysis.study_folder import StudyFolder
from gid_yolo.analysis.study_plan import Run
from gid_yolo.engine.teacher import duration
from gid_yolo.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two studies in one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]

POLL = 0.5  # seconds


@dataclass
class Runner(StudyFolder):
    """Brings every run of a study to its end: one with results is left as it is, one with a `last.pt` is resumed.

    Args:
        folder: Of all runs.
        split: Part of the data that results are of.
        slots: Devices, one for each process that runs at a time; None leaves the choice to Ultralytics.
    """

    slots: Sequence[str | None]
    failed: dict[str, str] = field(default_factory=dict)
    waited: set[str] = field(default_factory=set)

    def execute(self, runs: Sequence[Run], report: Callable[[], Any]) -> None:
        """Run all that is not done, and call `report` after each that ends; failures are kept in `failed`."""
        self.failed.clear()
        same_data = SameData(self.folder)
        for run in runs:
            self.check_defaults(run)
            if self.results(run) is not None:
                same_data.check(run)
        waiting = deque(run for run in runs if self.results(run) is None)
        total, done, began = len(waiting), 0, time.time()
        LOGGER.info(f"{len(runs) - total} of {len(runs)} runs are done, {total} are left, {len(self.slots)} at a time.")
        free = list(self.slots)
        running: list[_Process] = []
        noting: list[_Process] = []  # of those, the ones that have yet to say what data they have
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"project={self.folder.parent} cannot be written to: {error}.") from error
        with _stopped_by_signals(), contextlib.ExitStack() as stack:
            stack.callback(_stop, running)
            while waiting or running:
                for _ in range(len(waiting) if free else 0):
                    run = waiting.popleft()
                    if process := self._start(run, free[-1], same_data.starts(run)):
                        running.append(process)
                        noting.append(process)
                        free.pop()
                        break  # start the next one after a look at those that run
                    if not self._over(run):
                        waiting.append(run)
                time.sleep(POLL)
                noting = [p for p in noting if p in running and not same_data.check(p.run, p.starts)]
                for process in [p for p in running if p.popen.poll() is not None]:
                    running.remove(process)
                    free.append(process.device)
                    self._judge(process)
                    if not self._over(process.run):
                        waiting.appendleft(process.run)  # trained; its results on another split are to come
                        continue
                    done = total - len(waiting) - len(running)
                    left = (time.time() - began) / done * (total - done)
                    LOGGER.info(f"[{done}/{total}] {self._say(process)}; about {duration(left)} left")
                    report()

    def _start(self, run: Run, device: str | None, starts: int = 0) -> _Process | None:
        """A run's next process, after so many starts.

        None where there is none, it waits for its teacher, or another study trains it.
        """
        if run.needs and run.needs.name in self.failed:
            self.failed[run.name] = "its teacher could not be trained"
        if run.name in self.failed or (run.needs and self.results(run.needs) is None):
            return None
        log = (self.folder / f"{run.name}.log").open("a", encoding="utf-8")
        with log:
            if not _locked(log):
                if run.name not in self.waited:
                    LOGGER.info(f"{run.name}: another study is at it; its results are waited for.")
                self.waited.add(run.name)
                return None
            words = self.command(run)
            if words is None:
                return None
            if device is not None:
                words.append(f"device={device}")
            log.write(f"\n$ gid-{' '.join(words)}\n")
            log.flush()
            command = [sys.executable, "-m", "gid_yolo.cli", *words]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        return _Process(run, words, device, process, Path(log.name), starts)

    def _judge(self, process: _Process) -> None:
        """Note a run as failed whose process ended badly, or well without doing what it was for."""
        code = process.popen.returncode
        if self.results(process.run) is not None:
            if reason := self.set_aside_smaller(process.run):
                self.failed[process.run.name] = reason
        elif code:
            self.failed[process.run.name] = _reason(process.log) or f"exit status {code}"
        elif (again := self.command(process.run)) and again[:2] == process.words[:2]:
            self.failed[process.run.name] = f"gid-{process.words[0]} ended without results"

    def _over(self, run: Run) -> bool:
        return run.name in self.failed or self.results(run) is not None

    def _say(self, process: _Process) -> str:
        found = self.results(process.run)
        end = (
            f"FAILED: {self.failed.get(process.run.name)} ({process.log})"
            if found is None
            else f"mAP {found['mAP']:.1f}"
        )
        return f"{process.run.name}: {end}"


@dataclass
class _Process:
    run: Run
    words: list[str]
    device: str | None
    popen: subprocess.Popen[bytes]
    log: Path
    starts: int  # that the run noted before this one


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a closed terminal) end a study as Ctrl-C does, with the runs it started."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before: dict[int, Any] = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(running: Sequence[_Process]) -> None:
    """End what runs: an interrupted study leaves no process behind."""
    for process in running:
        process.popen.terminate()
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(timeout=20)
        process.popen.kill()


def devices_of(device: Any, jobs: int) -> list[str | None]:
    """A slot for each process that may run at a time: `jobs` on each of the devices (`0,1`, `[0, 1]`, `cpu`).

    Raises:
        UserError: `jobs` is no positive number.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise UserError(f"jobs={jobs} must be a whole number of at least 1: the runs that share a device.")
    if isinstance(device, list | tuple):
        names: list[str | None] = [str(d) for d in device]
    else:
        names = [None] if device is None else [part.strip() for part in str(device).strip("[]()").split(",")]
    if None in names and torch.cuda.is_available():
        names = ["0"]
    return names * jobs


def _locked(log: IO[str]) -> bool:
    """Whether the run is this study's: the lock lives on in the process that writes to the file, until it ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _reason(log: Path) -> str | None:
    """The last sentence that a command ended with."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        lines = [line.strip() for line in file.read().decode(errors="replace").replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line]
    return lines[-1][:300] if lines else None
