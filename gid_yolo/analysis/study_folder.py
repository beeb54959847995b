"""The folder of a study's runs: what their files say has been done, what is next, and whether they may stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from gid_yolo.analysis.study_models import defaults_of, family_of
from gid_yolo.analysis.study_plan import ABOUT, OF_EVALUATION, ONLY_DISTILLING, UNTRAINED, Run
from gid_yolo.cfg import load_yaml
from gid_yolo.distill.methods import parse_methods
from gid_yolo.engine.checkpoint import load_any, load_model, record_of
from gid_yolo.engine.clipping import clips_apart
from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.engine.config import BEFORE, OWN_KEYS, compares_features, without_none
from gid_yolo.engine.curves import read_curve
from gid_yolo.engine.matches import FILE as MATCHES
from gid_yolo.engine.resample import Resampled, resampled_run
from gid_yolo.errors import UserError


@dataclass
class StudyFolder:
    """What is done is read from the files alone: a study that was stopped goes on by being started again.

    Args:
        folder: Of all runs.
        split: Part of the data that results are of.
    """

    folder: Path
    split: str
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

    def check_defaults(self, run: Run) -> None:
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

    def set_aside_smaller(self, run: Run) -> str | None:
        """Set a run aside that Ultralytics went on with in smaller batches when the memory was full.

        A distilled run holds the teacher too and would meet that first: its budget is then not the plain one's.

        Returns:
            What to do, or None where the run may stay.
        """
        home = self.folder / run.name
        best = home / "weights" / "best.pt"
        if run.checkpoint is not None or not best.is_file():
            return None
        trust = run.args.get("trust", False)
        asked = run.args.get("batch", defaults_of(run.args["model"], trust)["batch"])
        batch = record_of(load_model(best, trust=trust)[0]).get("batch", asked)
        if batch == asked:
            return None
        again = chain([""], (f"-{i}" for i in count(2)))  # the same command may have tried before
        places = (home.with_name(f"{home.name}.batch{batch}{suffix}") for suffix in again)
        home.rename(next(place for place in places if not place.exists()))
        return f"the memory was too small for batch={asked}: give a smaller batch= or fewer jobs="

    def _results_file(self, run: Run) -> Path:
        """Where `gid-train` (of the validation split) or `gid-val` writes a run's ten columns."""
        home = self.folder / run.name
        other = run.checkpoint is None and self.split != "val"
        return (home / self.split if other else home) / "coco_metrics.json"


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
