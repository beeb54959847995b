"""The runs of a study: what each row of its table trains, and with what seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ultralytics.utils import LOGGER

from gid_yolo.analysis.study_file import LONGER, Group, StudyFile, Template
from gid_yolo.analysis.study_models import defaults_of, family_of, identity_of, label_of, settings_of, yolo_settings
from gid_yolo.detectors.build import model_config
from gid_yolo.distill.methods import parse_methods
from gid_yolo.engine.checkpoint import fingerprint, is_checkpoint, load_model
from gid_yolo.engine.config import (
    DEFAULTS,
    checked_args,
    compares_features,
    without_none,
)
from gid_yolo.engine.recipe import expand
from gid_yolo.engine.schedule import override, stretched
from gid_yolo.engine.teacher import check_teacher_name, find_finished_run, teacher_args
from gid_yolo.engine.trainer import GIDTrainer, with_anchors_of
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError

ONLY_DISTILLING = ("gid_", "distill", "teacher", "fitnet_", "fine_grained_", "mimicking_")  # a plain run has none
# What a teacher trained for a study takes over besides, and what of the schedule where it trains as long
OF_DATA = ("classes", "single_cls", "fraction", "recipe")
SCHEDULE = ("lr_steps", "lr_gamma", "warmup_iterations", "warmup_epochs")
WITH_P7 = ("retinanet", "fcos")
OF_WEIGHTS = ("backbone_weights", "pretrained")  # files that are told apart by what they hold
OF_EVALUATION = ("imgsz", "classes", "single_cls", "batch", "conf", "iou", "max_det", "half")
# Settings of GID by the terms that they are about, without which the trainer refuses them
ABOUT = {"gid_level": ("gid_feature", "gid_relation"), "gid_weighting": ("gid_feature",)}
UNTRAINED = frozenset(  # they do not change what is learnt
    {"device", "workers", "cache", "plots", "verbose", "save", "save_period", "gid_visualize_every", "gradients"}
    | {"teacher_min_ap", "teacher_sample", "teacher_epochs", "trust"}
)


@dataclass(frozen=True)
class Run:
    """One training, or the evaluation of a finished checkpoint.

    Attributes:
        name: Folder of the run; it ends in a digest of what is trained, so that tables share their common runs.
        args: Of `gid-train`; of `gid-val` where there is a `checkpoint`.
        checkpoint: What is only evaluated, or None.
        needs: The run whose `best.pt` is this one's teacher, or None.
    """

    name: str
    args: dict[str, Any]
    checkpoint: Path | None = None
    needs: Run | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        group: Name of the group it stands in.
        name: Its own.
        kind: `teacher`, `plain`, `longer` or `distilled`.
        runs: By seed; a teacher has a single one.
        paper: The paper's figures by column.
    """

    group: str
    name: str
    kind: str
    runs: dict[int, Run]
    paper: dict[str, float]


@dataclass(frozen=True)
class Study:
    """A table to be filled.

    Attributes:
        file: What the yaml says.
        rows: In their order.
        settings: What all runs have in common, for the report.
        left_out: Groups of the yaml that none of the given models belongs to.
    """

    file: StudyFile
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    left_out: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Run]:
        """Every run once: teachers first, then seed by seed, so that a table fills evenly."""
        seeds = sorted({seed for row in self.rows for seed in row.runs})
        ordered = [row.runs[seed] for seed in seeds for row in self.rows if seed in row.runs]
        needed = [run.needs for run in ordered if run.needs]
        return list({run.name: run for run in [*needed, *ordered]}.values())


@dataclass
class Planner:
    """Makes the rows of a group.

    Args:
        data: Path of the data yaml.
        folder: Of all runs.
        common: Arguments of `gid-train` for every run.
        seeds: Of the students.
    """

    data: Path
    folder: Path
    common: dict[str, Any]
    seeds: Sequence[int]
    models: dict[str, str] = field(default_factory=dict)  # as the report names them

    @property
    def trust(self) -> bool:
        """Open checkpoints even if that can run code."""
        return self.common.get("trust", False)

    def rows(self, group: Group) -> list[Row]:
        """The rows of a group whose model and teacher are known."""
        if group.model is None or group.teacher is None:
            raise UserError("model= and teacher= are both needed: the study compares a student with and without one.")
        teacher, needs, identity = self._teacher(group.teacher)
        student = self._student(group.model, teacher if needs is None else group.teacher)
        check_pair(group, student, self.common)
        self.models[group.name] = f"{label_of(group.model)} under {label_of(group.teacher)}"
        return [self._row(group, row, student, teacher, needs, identity) for row in group.rows]

    def _row(self, group: Group, row: Template, student: str, teacher: Path, needs: Run | None, identity: str) -> Row:
        if row.kind == "teacher":
            runs = {self.seeds[0]: needs or self._evaluation(str(group.teacher), teacher, identity, student)}
        elif row.kind in {"plain", LONGER}:
            given = self.common if row.kind == "plain" else self._longer(student, row.times)
            runs = {seed: self._run(student, {**given, "seed": seed}) for seed in self.seeds}
        else:
            idle = {key for key, terms in ABOUT.items() if _off(terms, row.args, self.common)}
            if _compares_none(row.args, self.common):
                idle.add("distill_clip")
            idle -= set(row.args)
            common = {key: value for key, value in self.common.items() if key not in idle}
            args = {**common, **row.args, "teacher": str(teacher)}
            runs = {seed: self._run(student, {**args, "seed": seed}, needs, identity) for seed in self.seeds}
        return Row(group.name, row.name, row.kind, runs, row.paper)

    def _run(self, model: str, given: dict[str, Any], needs: Run | None = None, identity: str = "") -> Run:
        """A training, named by what differs from the model's defaults; without a teacher among `given`, a plain one."""
        args = expand({"data": str(self.data), **given}, family_of(model, self.trust))
        if "teacher" not in given:
            args = {key: value for key, value in args.items() if not key.startswith(ONLY_DISTILLING)}
        defaults = defaults_of(model, self.trust)
        (YOLOTrainer if family_of(model, self.trust) == "yolo" else GIDTrainer).check_given({**args, "model": model})
        check_run(defaults, args)
        telling = {k: v for k, v in args.items() if k not in UNTRAINED and (k == "data" or v != defaults.get(k))}
        if "teacher" in telling:
            telling["teacher"] = identity  # a file of the same weights may lie elsewhere
        for key in OF_WEIGHTS:
            if key in telling and Path(str(telling[key])).is_file():
                telling[key] = hashlib.sha256(Path(telling[key]).read_bytes()).hexdigest()
        varied = [f"{key}={value}" for key, value in telling.items() if key.startswith(("gid_", "distill"))]
        words = [label_of(model), *(varied or (["gid"] if "teacher" in telling else []))]
        name = _name(words, args.get("seed", 0), {"model": identity_of(model, self.trust), **telling})
        return Run(name, {"model": model, "patience": 0, **args}, None, needs)  # no run stops before another

    def _longer(self, model: str, times: float) -> dict[str, Any]:
        """The arguments of all runs, but of a schedule that is drawn out to `times` its length."""
        whole = override(defaults_of(model, self.trust), expand(self.common, family_of(model, self.trust)))
        return self.common | stretched(whole, times)

    def _teacher(self, name: str) -> tuple[Path, Run | None, str]:
        """The teacher's checkpoint, the run that trains it if there is none yet, and what tells it from others."""
        if not is_checkpoint(name):
            check_teacher_name(name)
            too = OF_DATA if "teacher_epochs" in self.common else OF_DATA + SCHEDULE
            args = {**teacher_args(self.common), **{key: self.common[key] for key in too if key in self.common}}
            if "teacher_epochs" in self.common:  # a recipe's steps are of a run of its own length
                args |= {"lr_steps": None, "warmup_iterations": None}
            own, found = self._run(name, args), Path(f"{name}.pt")
            if not found.is_file():
                anew = any(key in args for key in OF_DATA) or (self.folder / own.name).exists()
                run = None if anew else find_finished_run(name, self.data, self.common)
                if run is None:
                    LOGGER.info(f"teacher={name} is trained for this study, as {own.name}.")
                    return self.folder / own.name / "weights" / "best.pt", own, own.name
                found = run
            LOGGER.info(f"teacher={name}: {found.resolve()} is used.")
            name = str(found)
        network = load_model(name, "teacher", self.trust)[0]
        return Path(network.pt_path).resolve(), None, fingerprint(network)

    def _student(self, model: str, teacher: str | Path) -> str:
        """The student to train plainly and distilled alike: with the teacher's anchors where its own are others."""
        if is_checkpoint(model):
            return str(Path(model).resolve())
        if yolo_settings(model) is not None:
            return model
        config = model_config(model)
        known = is_checkpoint(teacher)
        theirs = load_model(teacher, "teacher", self.trust)[0].yaml if known else settings_of(str(teacher))
        changed = with_anchors_of(theirs, config)
        if changed is None:
            return model
        changed.pop("yaml_file", None)
        text = yaml.safe_dump(changed, sort_keys=False)
        path = self.folder / f"{label_of(model)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def _evaluation(self, name: str, checkpoint: Path, identity: str, student: str) -> Run:
        """The teacher, measured as the students are."""
        given = expand(self.common, family_of(student, self.trust))
        args: dict[str, Any] = {"data": str(self.data), "imgsz": defaults_of(student, self.trust)["imgsz"]}
        args |= {key: given[key] for key in OF_EVALUATION if key in given}
        run = _name([label_of(name), "teacher"], None, {**args, "teacher": identity})
        return Run(run, {**args, "trust": True} if self.trust else args, checkpoint)


def _off(terms: Sequence[str], row: dict[str, Any], common: dict[str, Any]) -> bool:
    """Whether terms of GID are off because of what a row of a table is."""
    return any(term in row for term in terms) and not any({**DEFAULTS, **common, **row}[term] for term in terms)


def _compares_none(row: dict[str, Any], common: dict[str, Any]) -> bool:
    """Whether no features are compared because of what a row of a table is."""
    alone, changed = compares_features({**DEFAULTS, **common}), compares_features({**DEFAULTS, **common, **row})
    return alone and not changed


def check_run(defaults: dict[str, Any], args: dict[str, Any]) -> None:
    """Refuse now what the trainer would refuse after other runs have been trained.

    Raises:
        UserError: The trainer's sentence.
    """
    given = without_none(args)
    merged = checked_args(override(defaults, given), given)
    if merged["batch"] < 1 or merged["time"]:
        key = "time" if merged["time"] else "batch"
        raise UserError(
            f"{key}={merged[key]} would give every run another budget: give epochs= and a batch= of images."
        )


def check_pair(group: Group, student: str, common: dict[str, Any]) -> None:
    """Refuse rows of two kinds of detector that compare their responses, or cross other levels.

    Raises:
        UserError: Which row does.
    """
    trust = common.get("trust", False)
    own, theirs = family_of(student, trust), family_of(str(group.teacher), trust)
    for row in group.rows if own != theirs else ():
        args = {**DEFAULTS, **common, **row.args}
        if row.kind != "distilled" or "gid" not in parse_methods(str(args["distill"])):
            continue
        if args["gid_cross"] and lacks_levels(own, theirs):
            raise UserError(
                f"the teacher is a {theirs} whose head reads levels that the student, a {own}, has not, but the row "
                f"'{row.name}' has gid_cross={args['gid_cross']}: give a pair of one kind, or gid_cross=0."
            )
        if args["gid_response"]:
            raise UserError(
                f"the teacher is a {theirs} and the student a {own}, whose responses the row '{row.name}' compares: "
                "give a pair of one kind, or gid_response=0 to gid-study verdict."
            )


def lacks_levels(student: str, teacher: str) -> bool:
    """Whether a student of one kind has surely not all pyramid levels of a teacher of another.

    Those of retinanet and fcos are P3 to P7. The other kinds have theirs by settings: the trainer looks.
    """
    return teacher in WITH_P7 and student not in WITH_P7


def _name(words: Sequence[str], seed: int | None, telling: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(telling, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name = "-".join([*words, *([] if seed is None else [f"seed{seed}"]), digest])
    return "".join(c if c.isalnum() or c in "-_+=." else "_" for c in name)
