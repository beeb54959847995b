"""What a study found: its table as Markdown, CSV and JSON, with the paper's figures beside."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from gid_yolo.analysis.study_lines import RESAMPLED, Cell, Line, Results, minutes_as_text
from gid_yolo.analysis.study_plan import Study
from gid_yolo.analysis.study_verdict import verdict
from gid_yolo.engine.resample import CONFIDENCE, OverImages
from gid_yolo.export.report import align
from gid_yolo.export.rows import signed
from gid_yolo.files import replaced

CHOSEN = " These images chose each best.pt too: those of split=test say more."


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
    yield from _over_images(study, lines)
    for line in lines:
        for reason in line.failures:
            yield f"FAILED: {line.row.group}, {line.row.name}: {reason}"
    if study.left_out:
        yield f"Left out: {', '.join(study.left_out)}; give model= and teacher= of that kind too, e.g. model=[a,b]."
    done = [line for line in lines if line.done]
    if empty := [column for column in study.file.columns if done and not any(x.cells[column].values for x in done)]:
        yield f"{', '.join(empty)}: {study.settings['split']} has no objects to measure that on."
    if not all(line.whole for line in lines):
        first = "mend what failed, and " if any(line.failures for line in lines) else ""
        yield f"Not all runs are done: {first}the same command goes on."


def _over_images(study: Study, lines: Sequence[Line]) -> Iterable[str]:
    """What the gains would be on other images, of the rows of which that is known."""
    found = [(line.row, images) for line in lines if (images := _images(line.cells.get(RESAMPLED)))]
    if not found:
        return
    groups = len({row.group for row in study.rows}) > 1
    told = (
        f"{row.group + ', ' if groups else ''}{row.name} {signed(images.low)} to {signed(images.high)}"
        for row, images in found
    )
    count, split = found[0][1].count, study.settings["split"]
    yield (
        f"Gain in {RESAMPLED} over other images ({CONFIDENCE:.0%} interval, by a bootstrap of the {count} of {split}): "
        f"{'; '.join(told)}.{CHOSEN if split == 'val' else ''}"
    )


def _images(cell: Cell | None) -> OverImages | None:
    return cell.gain.images if cell and cell.gain else None


def _body(line: Line, columns: Sequence[str]) -> list[str]:
    first = line.cells[columns[0]]
    seeds = "" if line.row.kind == "teacher" else str(line.done)
    if not line.whole and seeds:
        seeds += f" of {len(line.row.runs)}"
    minutes = minutes_as_text(median(line.minutes.values())) if line.minutes else ""
    return [line.row.name, *(_mean(line.cells[c]) for c in columns), _gain(first), seeds, minutes]


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
    gains = ("gain", "gain_low", "gain_high", "gain_images_low", "gain_images_high")
    numbers = ("mean", "std", "seeds", *gains, "paper", "paper_gain")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("group", "row", "kind", "column", *numbers))
        for line in lines:
            for column, cell in line.cells.items():
                mean = (cell.spread.mean, cell.spread.std, cell.spread.count) if cell.spread else (None, None, 0)
                gain = (cell.gain.mean, cell.gain.low, cell.gain.high) if cell.gain else (None, None, None)
                images = (over.low, over.high) if (over := _images(cell)) else (None, None)
                told = (*mean, *gain, *images, cell.paper, cell.paper_gain)
                values = [None if x is None else round(x, 4) for x in told]
                writer.writerow((line.row.group, line.row.name, line.row.kind, column, *values))
