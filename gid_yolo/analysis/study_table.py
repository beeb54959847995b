"""What a study found: its table as Markdown, CSV and JSON, with the paper's figures beside, and the verdict."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gid_yolo.analysis.statistics import CONFIDENCE, Gain, Spread, paired_gain, seeds_needed, spread
from gid_yolo.analysis.study_file import LONGER
from gid_yolo.analysis.study_plan import Row, Run, Study
from gid_yolo.engine.preflight import LEAD
from gid_yolo.export.report import align
from gid_yolo.export.rows import signed
from gid_yolo.files import replaced

Results = Callable[[Run], dict[str, float] | None]
Seconds = Callable[[Run], float | None]
LEARNT = 1.0  # percent, which a model that learns nothing does not reach
SAME = 1.05  # times as long, which counts as the same: the clock of a shared machine is no better


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
    """A row with its cells by column, why runs of it failed, and for how many minutes each seed's was trained."""

    row: Row
    cells: dict[str, Cell]
    failures: tuple[str, ...]
    minutes: dict[int, float]


def tabulate(study: Study, results: Results, failed: dict[str, str], seconds: Seconds = lambda run: None) -> list[Line]:
    """The rows with what is done so far."""
    lines = []
    for row in study.rows:
        plain = next(other for other in study.rows if other.group == row.group and other.kind == "plain")
        cells = {column: _cell(column, row, plain, results) for column in study.file.columns}
        failures = tuple(sorted({failed[run.name] for run in row.runs.values() if run.name in failed}))
        done = {seed: seconds(run) for seed, run in row.runs.items() if results(run) is not None}
        lines.append(Line(row, cells, failures, {seed: x / 60 for seed, x in done.items() if x is not None}))
    return lines


def _cell(column: str, row: Row, plain: Row, results: Results) -> Cell:
    values, baseline = _values(column, row, results), _values(column, plain, results)
    compared = row.kind in {"distilled", LONGER}
    paper, papers_plain = row.paper.get(column), plain.paper.get(column)
    return Cell(
        values,
        spread(list(values.values())),
        paired_gain(values, baseline) if compared else None,
        paper,
        paper - papers_plain if compared and paper is not None and papers_plain is not None else None,
    )


def _values(column: str, row: Row, results: Results) -> dict[int, float]:
    found = {seed: results(run) for seed, run in row.runs.items()}
    return {seed: columns[column] for seed, columns in found.items() if columns and columns[column] >= 0}


def markdown(study: Study, lines: Sequence[Line]) -> str:
    """The table with what has to be known to read it; aligned, so that a terminal shows it well too."""
    columns = study.file.columns
    head = ["", *columns, f"gain in {columns[0]}", "seeds", "minutes"]
    body: list[list[str]] = []
    groups = list(dict.fromkeys(row.group for row in study.rows))
    for group in groups:
        if len(groups) > 1:
            body.append([f"**{group}**", *[""] * (len(head) - 1)])
        own = [line for line in lines if line.row.group == group]
        body += [_body(line, columns) for line in own]
        if len(columns) > 1:
            body.append(["gain of the last", *(_gain(own[-1].cells[c]) for c in columns), "", "", ""])
    table = align([head, *body], [False] * len(head))
    return "\n\n".join([f"## {study.file.title}", _legend(study), table, *_notes(study, lines)]) + "\n"


def _legend(study: Study) -> str:
    s, percent = study.settings, f"{CONFIDENCE:.0%}"
    models = "; ".join(f"{group}: {pair}" if len(s["models"]) > 1 else pair for group, pair in s["models"].items())
    trained = ", ".join(f"{key}={value}" for key, value in s["arguments"].items()) or "default arguments"
    text = (
        f"{models}, on {Path(s['data']).name}, {trained}; AP in percent on {s['split']}, of each run's best.pt. Mean ± "
        f"standard deviation over seeds; gain over the plain student, paired by seed, with its {percent} interval; "
        "minutes of training, the median of the seeds."
    )
    if any(row.paper for row in study.rows):
        text += f" In brackets the paper's figure ({study.file.paper})."
    return text


def _notes(study: Study, lines: Sequence[Line]) -> Iterable[str]:
    for line in lines:
        for reason in line.failures:
            yield f"FAILED: {line.row.group}, {line.row.name}: {reason}"
    if study.left_out:
        yield f"Left out: {', '.join(study.left_out)}; give model= and teacher= of that kind too, e.g. model=[a,b]."
    if any(len(line.cells[study.file.columns[0]].values) < len(line.row.runs) for line in lines):
        first = "mend what failed, and " if any(line.failures for line in lines) else ""
        yield f"Not all runs are done: {first}the same command goes on."


def _body(line: Line, columns: Sequence[str]) -> list[str]:
    first = line.cells[columns[0]]
    done, wanted = len(first.values), len(line.row.runs)
    seeds = "" if line.row.kind == "teacher" else str(done) if done == wanted else f"{done} of {wanted}"
    minutes = _told_minutes(median(line.minutes.values())) if line.minutes else ""
    return [line.row.name, *(_mean(line.cells[c]) for c in columns), _gain(first), seeds, minutes]


def _told_minutes(minutes: float) -> str:
    return f"{minutes:.{0 if minutes >= 10 else 1}f}"


def _mean(cell: Cell) -> str:
    text = "-" if cell.spread is None else f"{cell.spread.mean:.1f}"
    if cell.spread and cell.spread.std is not None:
        text += f" ± {cell.spread.std:.1f}"
    return text if cell.paper is None else f"{text} ({cell.paper:.1f})"


def _gain(cell: Cell) -> str:
    text = ""
    if gain := cell.gain:
        text = signed(gain.mean)
        if gain.low is not None and gain.high is not None:
            text += f" [{signed(gain.low)}, {signed(gain.high)}]"
    return text if cell.paper_gain is None else f"{text} ({signed(cell.paper_gain)})".strip()


def verdict(study: Study, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Whether the last row of a study with one group gained, by how much, and how certain that is.

    Returns:
        `verdict` (helped, harmed, undecided, or one seed), a sentence, and the numbers; None while a run is missing.
    """
    column, line = study.file.columns[0], lines[-1]
    gain = line.cells[column].gain
    compared = [other for other in lines if other.row.kind != LONGER]
    missing = any(len(other.cells[column].values) < len(other.row.runs) for other in compared)
    if gain is None or missing or len({row.group for row in study.rows}) > 1:
        return None
    size = f"{signed(gain.mean)} {column}"
    baseline = next(other for other in lines if other.row.kind == "plain")
    reached = [found.mean for x in (line, baseline) if (found := x.cells[column].spread)]
    if max(reached) < LEARNT:
        word, text = "undecided", f"Neither student reached {LEARNT:g} {column}: train longer, epochs=, before asking."
    elif gain.low is None or gain.high is None:
        word, text = "one seed", f"One seed says {size}, and nothing about how certain that is: give seeds=3 or more."
    else:
        size += f" ({CONFIDENCE:.0%} interval {signed(gain.low)} to {signed(gain.high)}, {gain.count} seeds)"
        if gain.certain:
            word = "helped" if gain.mean > 0 else "harmed"
            text = f"Distillation {word}: {size}."
        else:
            word, needed = "undecided", seeds_needed(gain)
            more = f"about {needed} seeds" if needed else "more than 1000 seeds"
            text = f"Undecided: {size}. A gain of this size and spread would take {more} to be certain of."
    teacher = next((other for other in lines if other.row.kind == "teacher"), None)
    mean, best = line.cells[column].spread, teacher.cells[column].spread if teacher else None
    if mean and best and best.mean > 0:
        text += f" The distilled student has {mean.mean / best.mean:.0%} of its teacher's {column}."
    longer = next((other for other in lines if other.row.kind == LONGER), None)
    lead = paired_gain(line.cells[column].values, longer.cells[column].values) if longer else None
    if longer and lead:
        text += _beside_longer(line, longer, lead, column)
    elif (times := _times(line, baseline)) is not None and times >= SAME:
        text += (
            f" It trained {times:.1f} times as long as the plain student{_own_training(teacher)}: longer={times:.1f} "
            "compares it with one that trains for as long."
        )
    plain = baseline.cells[column].spread
    if plain and best and best.mean - plain.mean < LEAD:
        text += (
            f" The teacher is too weak to judge by: it is {best.mean - plain.mean:.1f} {column} ahead of the plain "
            f"student at this schedule, and should be {LEAD:g}; train it to its plateau, or take a larger one."
        )
    said = {"verdict": word, "sentence": text, "column": column, **asdict(gain)}
    return said if longer is None or lead is None else {**said, "over_longer": {"row": longer.row.name, **asdict(lead)}}


def _beside_longer(line: Line, longer: Line, lead: Gain, column: str) -> str:
    """How the distilled student stands beside the plain one that trained for longer."""
    side = "ahead of" if round(lead.mean, 1) >= 0 else "behind"
    text = f" It is {abs(lead.mean):.1f} {column} {side} the row '{longer.row.name}'"
    if lead.low is not None and lead.high is not None:
        text += f" ({CONFIDENCE:.0%} interval {signed(lead.low)} to {signed(lead.high)}, {lead.count} seeds)"
    if (times := _times(longer, line)) is not None:
        text += f", which trained {times:.1f} times as long as it did"
    return f"{text}."


def _times(line: Line, other: Line) -> float | None:
    """How many times as long as another row's its runs trained, the median over the seeds of which both are known."""
    ratios = [minutes / other.minutes[seed] for seed, minutes in line.minutes.items() if other.minutes.get(seed)]
    return median(ratios) if ratios else None


def _own_training(teacher: Line | None) -> str:
    """That the teacher's own training is left out, and how long that was where it is known."""
    known = (
        f"'s {_told_minutes(median(teacher.minutes.values()))} minutes"
        if teacher and teacher.minutes
        else "'s own training"
    )
    return f", without the teacher{known}"


def write_files(study: Study, lines: Sequence[Line], folder: Path, results: Results) -> list[Path]:
    """The table as `.md`, `.csv` (a line for each row and column) and `.json` (with every seed's result)."""
    folder.mkdir(parents=True, exist_ok=True)
    said = verdict(study, lines) if study.file.name == "verdict" else None
    text = markdown(study, lines) + (f"\n**{said['sentence']}**\n" if said else "")
    contents = {
        "study": study.file.name,
        "title": study.file.title,
        "paper": study.file.paper,
        "settings": study.settings,
        "left_out": study.left_out,
        "verdict": said,
        "rows": [_json(line, results) for line in lines],
    }
    stem = free_name(folder, study)
    files = [folder / f"{stem}.{suffix}" for suffix in ("md", "csv", "json")]
    dumped = json.dumps(contents, indent=2, default=str) + "\n"
    with replaced(files[0]) as part:
        part.write_text(text, encoding="utf-8")
    with replaced(files[1]) as part:
        _write_csv(lines, part)
    with replaced(files[2]) as part:
        part.write_text(dumped, encoding="utf-8")
    return files


def free_name(folder: Path, study: Study) -> str:
    """Name of a study's files: its own, or `table6-2` and so on where a study of other settings has that."""
    mine = json.loads(json.dumps(_told(study.settings), default=str))
    number = 1
    while True:
        name = study.file.name if number == 1 else f"{study.file.name}-{number}"
        try:
            other = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError:
            return name
        except (ValueError, KeyError, TypeError):
            other = {}  # of another making
        if _told(other) == mine:
            return name
        number += 1


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a table another one; more seeds do not."""
    return {key: value for key, value in settings.items() if key not in {"seeds", "version"}}


def _json(line: Line, results: Results) -> dict[str, Any]:
    runs = {seed: {"run": run.name, "args": run.args, "results": results(run)} for seed, run in line.row.runs.items()}
    row = {"group": line.row.group, "name": line.row.name, "kind": line.row.kind, "failures": line.failures}
    return {
        **row,
        "minutes": line.minutes,
        "columns": {column: asdict(cell) for column, cell in line.cells.items()},
        "runs": runs,
    }


def _write_csv(lines: Sequence[Line], path: Path) -> None:
    numbers = ("mean", "std", "seeds", "gain", "gain_low", "gain_high", "paper", "paper_gain")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("group", "row", "kind", "column", *numbers))
        for line in lines:
            for column, cell in line.cells.items():
                mean = (cell.spread.mean, cell.spread.std, cell.spread.count) if cell.spread else (None, None, 0)
                gain = (cell.gain.mean, cell.gain.low, cell.gain.high) if cell.gain else (None, None, None)
                values = [None if x is None else round(x, 4) for x in (*mean, *gain, cell.paper, cell.paper_gain)]
                writer.writerow((line.row.group, line.row.name, line.row.kind, column, *values))
