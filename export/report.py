"""What a benchmark found: rows, a table, a sentence, and the files that keep them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gid_yolo.engine.coco_eval import COLUMNS

SAME_LATENCY = 5.0  # percent between two medians that are called the same
_TABLE_COLUMNS = ("mAP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


@dataclass(frozen=True)
class Row:
    """One model. What was measured after a failed comparison with PyTorch is None: it would be no result.

    Attributes:
        role: `model`, `baseline` or `teacher`, the argument that named it.
        label: What it is: `distilled`, `plain`, `teacher`, or `model` where it was not distilled.
        name: Its yaml.
        backbone: timm's name.
        parameters: Millions, batch normalisation folded.
        gflops: Of one image; 0 where they could not be counted.
        file_size: Of the ONNX file, in MB (1e6 bytes).
        p50: Median milliseconds per batch; p95 and p99 likewise.
        images_per_second: Over all timed runs.
        columns: The paper's ten columns in percent, by onnxruntime; -1 for a size range without objects.
        box_difference: Largest difference from PyTorch's boxes in pixels.
        score_difference: Likewise of class probabilities.
        ap_difference: mAP of the ONNX file minus that of the checkpoint; None where it was not reached.
        failed: Why the ONNX file is not the checkpoint's equal, or None.
        compared: False where there was no detection to compare, so that nothing is known of that.
    """

    role: str
    label: str
    name: str
    backbone: str
    parameters: float
    gflops: float
    file_size: float
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    images_per_second: float | None = None
    columns: dict[str, float] | None = None
    box_difference: float | None = None
    score_difference: float | None = None
    ap_difference: float | None = None
    failed: str | None = None
    compared: bool = True

    @property
    def ap(self) -> float | None:
        """The mAP in percent, or None where there is none to compare."""
        return self.columns["mAP"] if self.columns and self.columns["mAP"] >= 0 else None

    def flat(self) -> dict[str, Any]:
        """Every number under a name of its own, as in the CSV file."""
        values: dict[str, Any] = {}
        for part in fields(self):
            if part.name == "columns":
                values |= {name: self.columns[name] if self.columns else None for name in COLUMNS}
            else:
                values[part.name] = getattr(self, part.name)
        return values


@dataclass(frozen=True)
class BenchmarkReport:
    """All rows with what they were measured under.

    Attributes:
        rows: In the order model, baseline, teacher.
        settings: Arguments, versions, machine, and each checkpoint's record.
        notes: Footnotes of the table: failures, and differences that make the comparison unfair.
        save_dir: Where the files are.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    save_dir: Path | None = None

    def __str__(self) -> str:
        return text(self)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, aligned so that a terminal shows it well too."""
    numbers = ("params M", "GFLOPs", "MB", "p50 ms", "p95 ms", "img/s", *_TABLE_COLUMNS)
    head = ("model", "backbone", *numbers, "parity")
    lines = [[*_cells(row)] for row in rows]
    return align([head, *lines], [name in numbers for name in head])


def align(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A Markdown table of a head and a body, padded to columns; which of them stand to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(right))]
    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]

    def join(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    return "\n".join(join(cells) for cells in [lines[0], rule, *lines[1:]])


def _cells(row: Row) -> list[str]:
    name = row.name if row.label == row.role == "model" else f"{row.label} {row.name}"
    found = [row.columns[c] if row.columns else None for c in _TABLE_COLUMNS]
    parity = "FAILED" if row.failed else "ok" if row.compared else "not compared"
    return [
        *(name, row.backbone, f"{row.parameters:.2f}", f"{row.gflops:.2f}", f"{row.file_size:.2f}"),
        *(_number(value, 2) for value in (row.p50, row.p95)),
        *(_number(value, 1) for value in (row.images_per_second, *found)),
        parity,
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or value < 0 else f"{value:.{digits}f}"


def gains(rows: Sequence[Row]) -> str | None:
    """What distillation won, as one sentence of the rows that passed; None where nothing can be compared."""
    passed = {row.role: row for row in rows if row.failed is None and row.ap is not None and row.p50}
    if "model" not in passed:
        return None
    model, parts = passed["model"], []
    if plain := passed.get("baseline"):
        slower = 100 * (model.p50 / plain.p50 - 1)  # type: ignore[operator]
        place = (
            f"at the same latency ({signed(slower)} %)"
            if abs(slower) <= SAME_LATENCY
            else f"at {signed(slower)} % latency"
        )
        parts.append(f"{model.label} vs {plain.label}: {signed(model.ap - plain.ap)} mAP {place}")  # type: ignore[operator]
    if (teacher := passed.get("teacher")) and teacher.ap:
        share, speed = 100 * model.ap / teacher.ap, teacher.p50 / model.p50  # type: ignore[operator]
        parts.append(f"{model.label} keeps {share:.0f} % of the teacher's mAP at {speed:.1f} x its speed")
    return "; ".join(parts) or None


def noise_note(rows: Sequence[Row]) -> str | None:
    """A footnote where one network, measured twice, came out at two latencies: the machine was busy."""
    twins = [row for row in rows if row.role in {"model", "baseline"} and row.p50]
    if len(twins) < 2 or len({(row.name, row.backbone, row.parameters, row.gflops) for row in twins}) > 1:
        return None
    apart = 100 * (twins[0].p50 / twins[1].p50 - 1)  # type: ignore[operator]
    if abs(apart) <= SAME_LATENCY:
        return None
    return (
        f"WARNING: NOISY LATENCY: {twins[0].label} and {twins[1].label} are the same network, so that the "
        f"{signed(apart)} % between them is the noise of this machine: leave it idle, or ask for more rounds."
    )


def signed(value: float) -> str:
    """A difference with its sign and one digit; no minus in front of 0."""
    return f"{round(value, 1) + 0.0:+.1f}"  # adding 0 turns -0.0 into 0.0


def text(report: BenchmarkReport) -> str:
    """The table with its head line, the sentence, and the footnotes."""
    lines = [report.settings["summary"], ""] if "summary" in report.settings else []
    lines.append(table(report.rows))
    if sentence := gains(report.rows):
        lines += ["", sentence]
    if report.notes:
        lines += ["", *report.notes]
    return "\n".join(lines)


def write_json(report: BenchmarkReport, path: Path) -> None:
    """Everything, for programs."""
    contents = {
        "settings": report.settings,
        "rows": [asdict(row) for row in report.rows],
        "gains": gains(report.rows),
        "notes": report.notes,
    }
    replace_file(
        path, lambda part: part.write_text(json.dumps(contents, indent=2, default=str) + "\n", encoding="utf-8")
    )


def write_csv(report: BenchmarkReport, path: Path) -> None:
    """The rows, one a line; an empty cell is a number that was not measured."""

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(report.rows[0].flat()))
            writer.writeheader()
            writer.writerows(row.flat() for row in report.rows)

    replace_file(path, write)


def write_markdown(report: BenchmarkReport, path: Path) -> None:
    """What the terminal showed; two line ends keep the notes apart."""
    body = text(report).replace("\nnote:", "\n\nnote:").replace("\nWARNING:", "\n\nWARNING:")
    replace_file(path, lambda part: part.write_text(body + "\n", encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
