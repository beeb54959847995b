"""Runs of a study as processes of `gid-train` and `gid-val`, side by side, going on where they were stopped."""

from __future__ import annotations

import contextlib
import json
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
from gid_yolo.analysis.study_plan import ABOUT, OF_EVALUATION, ONLY_DISTILLING, UNTRAINED, Run, defaults_of, family_of
from gid_yolo.cfg import load_yaml
from gid_yolo.distill.methods import parse_methods
from gid_yolo.engine.checkpoint import load_any, load_model, record_of
from gid_yolo.engine.clipping import clips_apart
from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.engine.config import BEFORE, OWN_KEYS, compares_features, without_none
from gid_yolo.engine.curves import read_curve
from gid_yolo.engine.matches import FILE as MATCHES
from gid_yolo.engine.resample import Resampled, resampled_run
from gid_yolo.engine.teacher import duration
from gid_yolo.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two studies in one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]

POLL = 0.5  # seconds


@dataclass
class Runner:
    """Brings every run of a study to its end.

    What is done is read from the files alone, so that a study that was stopped goes on by being started again: a run
    with results is left as it is, one with a `last.pt` is resumed, any other is trained.

    Args:
        folder: Of all runs.
        split: Part of the data that results are of.
        slots: Devices, one for each process that runs at a time; None leaves the choice to Ultralytics.
    """

    folder: Path
    split: str
    slots: Sequence[str | None]
    failed: dict[str, str] = field(default_factory=dict)
    waited: set[str] = field(default_factory=set)
    _resampled: dict[str, Resampled | None] = field(default_factory=dict, init=False, repr=False)

    def results(self, run: Run) -> dict[str, float] | None:
        """The ten columns in percent of a finished run, or None."""
        try:
            found = json.loads(self._results_file(run).read_text())
        except (OSError, ValueError):
            return None
        return {name: found[name] for name in COLUMNS} if found.get("split") == self.split else None

    def resampled(self, run: Run) -> Resampled | None:
        """The mAP of a finished run on resamples of its images, or None without its matches, as an older one has it."""
        if (results := self.results(run)) is None:
            return None
        if run.name not in self._resampled:  # once: every table asks again
            file = self._results_file(run).with_name(MATCHES)
            self._resampled[run.name] = resampled_run(file, results["mAP"])
        return self._resampled[run.name]

    def seconds(self, run: Run) -> float | None:
        """How long a run has trained, all its starts together; None of one that was trained elsewhere."""
        try:
            return read_curve(self.folder / run.name / "results.csv")[-1][1]
        except (OSError, ValueError, IndexError):
            return None

    def command(self, run: Run) -> list[str] | None:
        """What is to be done next for a run, as words of a command; None where it has its results."""
        if self.results(run) is not None:
            return None
        home, args = self.folder / run.name, dict(run.args)
        place = {"project": home.parent, "name": home.name, "exist_ok": True}
        best, last = home / "weights" / "best.pt", home / "weights" / "last.pt"
        if run.checkpoint is not None:
            return ["val", *_words({"model": run.checkpoint, "split": self.split, "plots": False, **args, **place})]
        trusted = {key: args[key] for key in ("trust",) if key in args}
        finished = True if (home / "coco_metrics.json").is_file() else _finished(last, **trusted)
        if finished:
            file = self._results_file(run)
            place |= {"project": file.parents[1], "name": file.parent.name}
            measured = {key: args[key] for key in ("data", *OF_EVALUATION) if key in args}
            return [
                "val",
                *_words({"model": best, "split": self.split, "plots": False, **measured, **trusted, **place}),
            ]
        if finished is False:
            moved = trusted | ({"teacher": args["teacher"]} if "teacher" in args else {})
            return ["train", "resume=True", *_words({"model": last, "save_dir": home, **moved})]
        return ["train", *_words({"plots": False, **args, **place})]

    def execute(self, runs: Sequence[Run], report: Callable[[], Any]) -> None:
        """Run all that is not done, and call `report` after each that ends; failures are kept in `failed`."""
        self.failed.clear()
        same_data = SameData(self.folder)
        for run in runs:
            self._check_defaults(run)
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

    def _check_defaults(self, run: Run) -> None:
        """Refuse a run that another version of this package began, whose defaults were others: its name has none.

        Raises:
            UserError: Which argument is another one.
        """
        file = self.folder / run.name / "args.yaml"
        if run.checkpoint is not None or not file.is_file():
            return
        try:
            began = without_none(load_yaml(file))
        except ValueError as error:
            raise UserError(f"{error} Remove {file.parent}, so that the run begins anew.") from error
        model, trust = run.args["model"], run.args.get("trust", False)
        wanted = without_none({**defaults_of(model, trust), **run.args})
        began = {**BEFORE, **began}
        crops = "gid" in parse_methods(str(wanted["distill"])) and any(wanted[x] for x in ABOUT["gid_level"])
        by_size = family_of(model, trust) in {"retinanet", "fcos"}  # whose `detector` is by size
        if not crops or (by_size and (began["gid_level"], wanted["gid_level"]) == ("size", "detector")):
            began["gid_level"] = wanted["gid_level"]
        apart = [clips_apart(args["distill_clip"], str(wanted["optimizer"])) for args in (began, wanted)]
        if not compares_features(wanted) or apart[0] == apart[1]:
            began["distill_clip"] = wanted["distill_clip"]
        plain = "teacher" not in run.args
        for key in sorted(OWN_KEYS - UNTRAINED - {"teacher", "recipe", "backbone_weights"}):
            if key not in began or key not in wanted or (plain and key.startswith(ONLY_DISTILLING)):
                continue
            if began[key] != wanted[key]:
                raise UserError(
                    f"{file.parent} was begun with {key}={began[key]}, which is {wanted[key]} in this version: give "
                    "another project=, or the old value, so that the rows of a table are trained alike."
                )

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
            self._refuse_smaller_batch(process.run)
        elif code:
            self.failed[process.run.name] = _reason(process.log) or f"exit status {code}"
        elif (again := self.command(process.run)) and again[:2] == process.words[:2]:
            self.failed[process.run.name] = f"gid-{process.words[0]} ended without results"

    def _refuse_smaller_batch(self, run: Run) -> None:
        """Set a run aside that Ultralytics went on with in smaller batches when the memory was full.

        A distilled run holds the teacher too and would meet that first: its budget is then not the plain one's.
        """
        home = self.folder / run.name
        best = home / "weights" / "best.pt"
        if run.checkpoint is not None or not best.is_file():
            return
        trust = run.args.get("trust", False)
        asked = run.args.get("batch", defaults_of(run.args["model"], trust)["batch"])
        batch = record_of(load_model(best, trust=trust)[0]).get("batch", asked)
        if batch != asked:
            home.rename(home.with_name(f"{home.name}.batch{batch}"))
            self.failed[run.name] = f"the memory was too small for batch={asked}: give a smaller batch= or fewer jobs="

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

    def _results_file(self, run: Run) -> Path:
        """Where `gid-train` (of the validation split) or `gid-val` writes a run's ten columns."""
        home = self.folder / run.name
        other = run.checkpoint is None and self.split != "val"
        return (home / self.split if other else home) / "coco_metrics.json"


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


def _words(arguments: dict[str, Any]) -> Iterator[str]:
    return (f"{key}={value}" for key, value in arguments.items())


def _finished(last: Path, trust: bool = False) -> bool | None:
    """Whether training came to its end, when Ultralytics takes the optimiser out of the file; None without a file."""
    if not last.is_file():
        return None
    try:
        return load_any(last, trust=trust)[1].get("optimizer") is None
    except UserError as error:  # half a file: the machine went down while it was written
        LOGGER.warning(f"{error} The run begins anew.")
        return None


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
