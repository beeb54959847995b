"""`gid-study`: a table of the paper, or a verdict on one's own models, trained on any data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, SETTINGS

from gid_yolo._version import __version__
from gid_yolo.analysis.study_file import StudyFile, read_study, with_longer, with_models
from gid_yolo.analysis.study_lines import Line, tabulate
from gid_yolo.analysis.study_models import family_of
from gid_yolo.analysis.study_plan import Planner, Row, Study
from gid_yolo.analysis.study_plot import draw_study
from gid_yolo.analysis.study_runs import Runner, devices_of
from gid_yolo.analysis.study_table import markdown, write_files
from gid_yolo.analysis.study_verdict import verdict
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.classes import check_classes, fit_classes
from gid_yolo.engine.config import check_keys, without_none
from gid_yolo.engine.device import check_device
from gid_yolo.engine.recipe import read_recipe
from gid_yolo.engine.values import check_texts, check_values
from gid_yolo.errors import UserError, some
from gid_yolo.export.evaluate import read_data
from gid_yolo.scalars import as_python

OF_A_RUN = ("seed", "name", "exist_ok", "resume", "cfg", "save_dir", "mode", "task", "val")  # the study sets them


def study(
    name: str | Path,
    *,
    model: str | Sequence[str] | None = None,
    teacher: str | Sequence[str] | None = None,
    data: Any = None,
    seeds: int | Sequence[int] = 3,
    split: str = "val",
    device: Any = None,
    jobs: int = 1,
    project: str | Path | None = None,
    plan: bool = False,
    longer: float | None = None,
    **common: Any,
) -> list[Line]:
    """Train every cell of a table, all students for as many epochs, and write it as Markdown, CSV, JSON and PNG.

    Started again, it goes on where it was stopped; runs that several tables have in common are trained once.

    Args:
        name: `table1` to `table7`, `verdict`, or a yaml in the form of those in `cfg/studies`.
        model: The student, or one of each kind of detector that the table compares; the paper's where None.
        teacher: Its teacher, or theirs: checkpoints, or names as `gid-train` takes them.
        data: Data set; where None, that of `recipe=`, or else the embedded one.
        seeds: How many seeds, counted from 0, or which.
        split: Part of the data that results are of.
        device: Devices, e.g. `0,1`: each trains a cell at a time.
        jobs: Cells that share a device.
        project: Folder of the tables and, under `runs`, of all runs; `runs/study` by default.
        plan: Only show the runs.
        longer: Train the plain student once more, this many times as long, in a row of its own.
        **common: Arguments of `gid-train` for all of them.

    Returns:
        The rows with their cells, as far as runs succeeded.

    Raises:
        UserError: What is asked for cannot be done, or a run failed; the tables are written all the same.
    """
    seeds, jobs, longer, common = as_python(seeds), as_python(jobs), as_python(longer), as_python(common)
    file, numbers = read_study(name), seeds_of(seeds)
    common = _check_common(file, common)
    if not isinstance(plan, bool):
        raise UserError(f"plan={plan} must be True or False.")
    check_texts({"data": data, "project": project})
    root = Path(SETTINGS["runs_dir"]) / str(project or "study")
    folder = root.resolve() / "runs"
    whole = _laid_out(file, (model, teacher), data, numbers, split, longer, common, folder)
    devices = devices_of(device, jobs)
    for slot in set(devices):
        check_device(slot)
    runner = Runner(folder, split, devices)

    def table() -> list[Line]:
        return tabulate(whole, runner.results, runner.failed, runner.seconds, runner.resampled)

    if plan:
        for run in whole.runs:
            words = runner.command(run)
            LOGGER.info(f"gid-{' '.join(words)}" if words else f"{run.name} is done")
        return table()

    def write() -> list[Path]:
        files = write_files(whole, table(), root, runner.results)
        picture = files[0].with_suffix(".png")
        return [*files, picture] if draw_study(whole, runner.folder, picture) else files

    runner.execute(whole.runs, write)
    files, lines = write(), table()
    LOGGER.info(f"\n{markdown(whole, lines)}")
    if file.name == "verdict" and (said := verdict(whole, lines)):
        LOGGER.info(f"{said['sentence']}\n")
    LOGGER.info(f"Table: {', '.join(str(file) for file in files)}")
    if runner.failed:
        raise UserError(
            f"{len(runner.failed)} of {len(whole.runs)} runs failed, the first with: "
            f"{next(iter(runner.failed.values()))} The logs are in {folder}; the same command tries again."
        )
    return lines


def _laid_out(
    file: StudyFile,
    models: tuple[Any, Any],
    data: Any,
    seeds: tuple[int, ...],
    split: str,
    longer: float | None,
    common: dict[str, Any],
    folder: Path,
) -> Study:
    """The study's runs and rows, of the students and the teachers in `models`, as they will lie in `folder`.

    Raises:
        UserError: What is asked for cannot be done.
    """
    if data is None and common.get("recipe"):
        data = read_recipe(common["recipe"], "").get("data")
    data_path, contents = read_data(data, split, common.get("trust", False))
    common = _one_class(file, common, contents["names"])
    where = data_path.absolute() if data_path.is_file() else data_path  # a name of Ultralytics' stays one
    planner = Planner(where, folder, common, seeds)
    groups, left_out = with_models(file, _pairs(*models, planner.trust))
    if longer is not None:
        groups = with_longer(groups, longer)
    rows = [row for group in groups for row in planner.rows(group)]
    _check_measurable(rows, contents["names"], where, planner.trust)
    settings = {
        "name": file.name, "models": planner.models, "data": str(where), "split": split, "seeds": seeds,
        "arguments": common, "version": __version__, "runs": sorted({row.runs[seeds[0]].name for row in rows}),
    }  # fmt: skip
    return Study(file, tuple(rows), settings, tuple(left_out))


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """The seeds that `seeds=3` (0, 1, 2) or `seeds=[3,7]` mean.

    Raises:
        UserError: Not a positive number, or a list that is not of different whole numbers.
    """
    numbers = [seeds] if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    whole = isinstance(numbers, list | tuple) and all(type(n) is int and n >= 0 for n in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers) or (numbers is not seeds and seeds < 1):
        raise UserError(f"seeds={seeds} must be how many, e.g. seeds=3, or a list of different ones, e.g. seeds=[3,7].")
    return tuple(range(seeds)) if isinstance(seeds, int) else tuple(numbers)


def _check_common(file: StudyFile, common: dict[str, Any]) -> dict[str, Any]:
    """Refuse arguments that would undo what the study compares.

    Raises:
        UserError: An unknown argument, or one that belongs to the study or to its rows.
    """
    common = without_none(common)
    check_keys(common)
    check_values(common, training=True)
    if own := [key for key in OF_A_RUN if key in common]:
        raise UserError(f"{own[0]}= is what gid-study sets for each run: leave it out.")
    if file.name == "verdict" and common.get("distill") == "none":
        raise UserError("distill=none leaves nothing to judge: name a method, or leave it out.")
    if "distill" in common and any(key.startswith("gid_") for key in file.varied):
        raise UserError(f"distill= does not go with {file.name}, whose rows differ in the terms of GID: leave it out.")
    if varied := sorted(file.varied & set(common)):
        raise UserError(f"{varied[0]}= is what the rows of {file.name} differ in: leave it out.")
    return common


def _one_class(file: StudyFile, common: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """The arguments with the only class that the study is of, where it is of one.

    Raises:
        UserError: The data has no class of that name, and no other was asked for.
    """
    check_classes(common.get("classes"), names)
    if file.class_name is None or "classes" in common:
        return common
    index = [i for i, name in names.items() if name == file.class_name]
    if not index:
        raise UserError(
            f"{file.name} is of the class {file.class_name}, which the data ({some(names.values())}) does not have: "
            "choose one by its number, e.g. classes=[0]."
        )
    return {**common, "classes": index}


def _check_measurable(rows: Sequence[Row], names: Mapping[int, str], data: Any, trust: bool) -> None:
    """Refuse now, before students are trained, a teacher that could not be measured beside them.

    Raises:
        UserError: It lacks a class of the data.
    """
    runs = (run for row in rows for run in row.runs.values() if run.checkpoint and not run.args.get("single_cls"))
    for file in {str(run.checkpoint) for run in runs}:
        fit_classes(load_model(file, "teacher", trust)[0], names, f"teacher={file}", data)


def _pairs(model: Any, teacher: Any, trust: bool) -> list[tuple[str, str, str]]:
    """(kind, student, teacher) of each pair.

    Raises:
        UserError: One without the other.
    """
    models, teachers = _listed(model), _listed(teacher)
    pairs = []
    if bool(models) != bool(teachers):
        key = "teacher" if models else "model"
        raise UserError(f"{key}= is missing: a study compares a student with and without a teacher.")
    for student, its_teacher in itertools.zip_longest(models, teachers):
        if student is None or its_teacher is None:
            raise UserError(
                f"model={model} and teacher={teacher} must be pairs: a student and a teacher, or as many of both."
            )
        pairs.append((family_of(str(student), trust), str(student), str(its_teacher)))
    return pairs


def _listed(value: Any) -> list[str]:
    """`a`, `[a, b]`, or the text "[a,b]" that the command line makes of the latter."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [part.strip(" '\"") for part in value.strip("[]() ").split(",")]
    return [str(part) for part in (value if isinstance(value, list | tuple) else [value])]
