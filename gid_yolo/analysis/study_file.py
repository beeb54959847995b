"""The yaml of a study: title, columns, and groups of rows, each a difference in arguments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gid_yolo.cfg import STUDIES_DIR, load_yaml, study_names
from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.engine.config import check_keys
from gid_yolo.engine.values import check_values
from gid_yolo.errors import UserError

KINDS = ("teacher", "plain", "distilled")
LONGER = "longer"  # the kind of a row that no yaml has: a plain student that trains for longer than the others
_FILE_KEYS = {"title", "paper", "columns", "groups", "class"}
_GROUP_KEYS = {"name", "detector", "model", "teacher", "rows"}
_ROW_KEYS = {"name", "kind", "args", "paper"}


@dataclass(frozen=True)
class Template:
    """A row: what it is called, what is trained, the paper's figures by column, how many times as long it trains."""

    name: str
    kind: str
    args: dict[str, Any]
    paper: dict[str, float]
    times: float = 1.0


@dataclass(frozen=True)
class Group:
    """Rows of one student and teacher; of tables that compare kinds of detector, `detector` says which."""

    name: str
    detector: str | None
    model: str | None
    teacher: str | None
    rows: tuple[Template, ...]


@dataclass(frozen=True)
class StudyFile:
    """A study as its yaml has it; `paper` says what the paper's figures were measured on."""

    name: str
    title: str
    paper: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    class_name: str | None = None

    @property
    def varied(self) -> set[str]:
        """Arguments that its rows differ in, which cannot be given for all of them."""
        return {key for group in self.groups for row in group.rows for key in row.args}


def read_study(name: str | Path) -> StudyFile:
    """A study that ships with the package (`table6`, `verdict`), or a yaml of one's own.

    Raises:
        UserError: No such study, or a yaml that is none.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = STUDIES_DIR / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(str(name), study_names(), n=2) or study_names()
        raise UserError(f"the study '{name}' is not known: give {', '.join(close)}, or a yaml of your own.")
    try:
        contents = load_yaml(path)
        _check(contents, {"title", "columns", "groups"}, _FILE_KEYS, "the study")
        columns = tuple(contents["columns"])
        if not columns or not set(columns) <= set(COLUMNS):
            raise ValueError(f"columns: {contents['columns']} must be some of {', '.join(COLUMNS)}.")
        groups = tuple(_group(group, columns) for group in contents["groups"])
        if len({group.name for group in groups}) < len(groups):
            raise ValueError("two groups have one name.")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a study: {error}") from error
    return StudyFile(
        path.stem, str(contents["title"]), str(contents.get("paper", "")), columns, groups, contents.get("class")
    )


def with_longer(groups: Sequence[Group], times: Any) -> list[Group]:
    """The groups with another row each, after the plain student's: one that trains plainly, but longer.

    Raises:
        UserError: `times` is no number above 1.
    """
    if isinstance(times, bool) or not isinstance(times, int | float) or not 1 < times < float("inf"):
        raise UserError(
            f"longer={times} must be a number above 1: how many times as long the plain student trains too."
        )
    found = []
    for group in groups:
        at = [row.kind for row in group.rows].index("plain") + 1
        row = Template(f"plain, {times:g} times as long", LONGER, {}, {}, float(times))
        found.append(replace(group, rows=(*group.rows[:at], row, *group.rows[at:])))
    return found


def _group(contents: Any, columns: tuple[str, ...]) -> Group:
    _check(contents, {"name", "rows"}, _GROUP_KEYS, "a group")
    rows = tuple(_row(row, columns) for row in contents["rows"])
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"two rows of the group {contents['name']} have one name.")
    if sum(row.kind == "plain" for row in rows) != 1:
        raise ValueError(f"the group {contents['name']} needs one row of kind: plain, which gains are measured from.")
    detector, model, teacher = (contents.get(key) for key in ("detector", "model", "teacher"))
    return Group(str(contents["name"]), detector, model, teacher, rows)


def _row(contents: Any, columns: tuple[str, ...]) -> Template:
    _check(contents, {"name"}, _ROW_KEYS, "a row")
    kind, args, paper = contents.get("kind", "distilled"), contents.get("args") or {}, contents.get("paper") or {}
    if kind not in KINDS:
        raise ValueError(f"kind: {kind} of the row {contents['name']} must be one of {', '.join(KINDS)}.")
    if args and kind != "distilled":
        raise ValueError(f"the row {contents['name']} has args:, which only rows of kind: distilled take.")
    _check(paper, set(), set(columns), f"paper: of the row {contents['name']}")
    if not all(isinstance(figure, int | float) for figure in paper.values()):
        raise ValueError(f"paper: of the row {contents['name']} must hold numbers, but holds {list(paper.values())}.")
    check_keys(args)
    check_values(args, training=True)
    return Template(str(contents["name"]), kind, dict(args), dict(paper))


def _check(contents: Any, needed: set[str], known: set[str], what: str) -> None:
    if not isinstance(contents, Mapping):
        raise ValueError(f"{what} must hold 'key: value' lines.")
    if missing := sorted(needed - set(contents)):
        raise ValueError(f"{what} lacks '{missing[0]}:'.")
    if unknown := sorted(set(contents) - known):
        raise ValueError(f"{what} has '{unknown[0]}:', which is none of {', '.join(sorted(known))}.")


def with_models(file: StudyFile, models: list[tuple[str, str, str]]) -> tuple[list[Group], list[str]]:
    """The groups to be trained with models of one's own in place of the paper's, and the names of those left out.

    Args:
        file: The study.
        models: (kind, student, teacher) of each pair; none to take the paper's own.

    Raises:
        UserError: A pair that no group, or more than one pair that the same group, is for.
    """
    if not models:
        return list(file.groups), []
    chosen: list[Group] = []
    for kind, model, teacher in models:
        places = [group for group in file.groups if group.detector in (None, kind)]
        if not places:
            kinds = ", ".join(str(group.detector) for group in file.groups)
            raise UserError(f"model={model} is a {kind}, and {file.name} compares {kinds}: use gid-study verdict.")
        group = places[0]
        if any(group.name == other.name for other in chosen):
            raise UserError(f"{file.name} has one place for model={model} and another: give one pair at a time.")
        chosen.append(replace(group, model=model, teacher=teacher))
    names = [group.name for group in chosen]
    order = [group.name for group in file.groups]
    return sorted(chosen, key=lambda group: order.index(group.name)), [name for name in order if name not in names]
