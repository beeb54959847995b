"""The rows of a study with what was found of them, from which its table and its verdict are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gid_yolo.analysis.statistics import Gain, Spread, paired_gain, spread
from gid_yolo.analysis.study_file import LONGER
from gid_yolo.analysis.study_plan import Row, Run, Study
from gid_yolo.engine.resample import Resampled, over_images

Results = Callable[[Run], dict[str, float] | None]
Seconds = Callable[[Run], float | None]
Draws = Callable[[Run], Resampled | None]
RESAMPLED = "mAP"  # the column whose gain is known over images too


@dataclass(frozen=True)
class Cell:
    """One column of one row.

    Attributes:
        values: Result of each seed that is done, in percent; a size range without objects has none.
        spread: Of those.
        gain: Over the plain student of the group; None for itself, the teacher, and where one of both is missing.
        paper: The paper's figure.
        paper_gain: Over its plain student.
    """

    values: dict[int, float]
    spread: Spread | None
    gain: Gain | None
    paper: float | None
    paper_gain: float | None


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        row: As it was planned.
        cells: By column.
        failures: Why runs of it failed.
        minutes: For how many each seed's was trained, where that is known.
        drawn: The mAP of each seed's on other images, likewise.
        done: Runs that have results, whatever columns those have a value in.
    """

    row: Row
    cells: dict[str, Cell]
    failures: tuple[str, ...]
    minutes: dict[int, float]
    drawn: dict[int, Resampled]
    done: int

    @property
    def whole(self) -> bool:
        """Every run has its results."""
        return self.done == len(self.row.runs)


def minutes_as_text(minutes: float) -> str:
    """Without a digit behind the point from 10 on."""
    return f"{minutes:.{0 if minutes >= 10 else 1}f}"


def tabulate(
    study: Study,
    results: Results,
    failed: dict[str, str],
    seconds: Seconds = lambda run: None,
    draws: Draws = lambda run: None,
) -> list[Line]:
    """The rows with what is done so far.

    Args:
        study: As it was planned.
        results: The ten columns of a run, or None.
        failed: The reason, by the name of a run.
        seconds: How long a run trained, or None.
        draws: The mAP of a run on other images, or None.
    """
    lines = [_line(study, row, results, failed, seconds, draws) for row in study.rows]
    plain = {line.row.group: line for line in lines if line.row.kind == "plain"}
    return [_compared(line, plain[line.row.group]) for line in lines]


def _line(study: Study, row: Row, results: Results, failed: dict[str, str], seconds: Seconds, draws: Draws) -> Line:
    """A row that is not compared yet."""
    found = {seed: columns for seed, run in row.runs.items() if (columns := results(run)) is not None}
    cells = {}
    for column in study.file.columns:
        values = {seed: columns[column] for seed, columns in found.items() if columns[column] >= 0}
        cells[column] = Cell(values, spread(list(values.values())), None, row.paper.get(column), None)
    failures = tuple(sorted({failed[run.name] for run in row.runs.values() if run.name in failed}))
    minutes = {seed: x / 60 for seed in found if (x := seconds(row.runs[seed])) is not None}
    asked = RESAMPLED in cells and row.kind != "teacher"
    drawn = {seed: own for seed in found if asked and (own := draws(row.runs[seed])) is not None}
    return Line(row, cells, failures, minutes, drawn, len(found))


def _compared(line: Line, plain: Line) -> Line:
    if line.row.kind not in {"distilled", LONGER}:
        return line
    cells = {}
    for column, cell in line.cells.items():
        paper, papers_plain = cell.paper, plain.cells[column].paper
        ahead = paper - papers_plain if paper is not None and papers_plain is not None else None
        cells[column] = replace(cell, gain=gain_over(line, plain, column), paper_gain=ahead)
    return replace(line, cells=cells)


def gain_over(line: Line, other: Line, column: str) -> Gain | None:
    """The gain of a row over another one; None where they have no seed in common."""
    values, baseline = line.cells[column].values, other.cells[column].values
    gain = paired_gain(values, baseline)
    if gain is None or column != RESAMPLED:
        return gain
    return replace(gain, images=over_images(line.drawn, other.drawn, values.keys() & baseline.keys()))
