"""What a benchmark found: a table, a sentence, and the files that keep them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gid_yolo.export.gains import gains
from gid_yolo.export.rows import Example, Row, settings_of, short, signed
from gid_yolo.files import replaced

_AP_COLUMNS = ("mAP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
_SETTING_COLUMNS = ("precision", "provider", "batch", "size")
# Left out of the table where no row has them
_OPTIONAL = ("backbone", "params M", "GFLOPs", "e2e img/s", "RAM MB", "mAP lost")


@dataclass(frozen=True)
class BenchmarkReport:
    """All rows with what they were measured under.

    Attributes:
        rows: In the order to show: model, baseline, teacher, others; of each its settings.
        settings: Arguments, versions, machine, and each checkpoint's record; `summary` is the head line.
        notes: Footnotes of the table: failures, and differences that make the comparison unfair.
        save_dir: Where the files are.
        examples: Images of the split with what the models find, for the page.
        comparable: Whether model and baseline had equal budgets; False, also where a checkpoint does not say, takes
            their comparison out of the sentence (the notes say why); None where there is no baseline, or where it was
            told to be a comparison all the same.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    save_dir: Path | None = None
    examples: tuple[Example, ...] = ()
    comparable: bool | None = None

    def __post_init__(self) -> None:
        keys = [row.key for row in self.rows]
        if twice := [key for key in keys if keys.count(key) > 1]:
            role, label, setting = twice[0]
            raise ValueError(f"two rows are {role} {label} in {setting}")

    def __str__(self) -> str:
        return text(self)


def conditions(rows: Sequence[Row]) -> str:
    """Precision, size, batch and provider of the rows, as the head line says them: each value once."""
    values = zip(*settings_of(rows), strict=True)
    precisions, providers, batches, *_ = ("/".join(dict.fromkeys(map(str, each))) for each in values)
    sizes = "/".join(dict.fromkeys(row.size for row in rows))
    return f"ONNX {precisions} {sizes}, batch {batches}; {providers}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, aligned so that a terminal shows it well too; without settings that all rows share."""
    cells = [_cells(row) for row in rows]
    if not cells:
        return "no rows"
    same = {name for name in _SETTING_COLUMNS if len({line[name] for line in cells}) == 1}
    empty = {name for name in _OPTIONAL if all(line[name] == "-" for line in cells)}
    if len(same) < len(_SETTING_COLUMNS):
        empty.add("backbone")  # so many columns have no room for it, and the name says the network
    head = [name for name in cells[0] if name not in same | empty]
    left = {"model", "backbone", "precision", "provider", "parity"}
    return align([head, *([line[name] for name in head] for line in cells)], [name not in left for name in head])


def align(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A Markdown table of a head and a body, padded to columns; which of them stand to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(right))]
    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]

    def join(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    return "\n".join(join(cells) for cells in [lines[0], rule, *lines[1:]])


def _cells(row: Row) -> dict[str, str]:
    found = row.flat()
    return {
        "model": row.title.replace("|", "\\|"),
        "backbone": (row.backbone or "-").replace("|", "\\|"),
        "precision": row.precision,
        "provider": short(row.provider),
        "batch": str(row.batch),
        "size": row.size,
        "params M": number(row.parameters, 2),
        "GFLOPs": number(row.gflops, 2),
        "MB": number(row.file_size, 2),
        "p50 ms": number(found["p50"], 2),
        "p95 ms": number(found["p95"], 2),
        "img/s": number(found["images_per_second"], 1),
        "e2e img/s": number(found["end_to_end"], 1),
        "RAM MB": number(found["memory"], 0),
        **{name: number(found[name], 1) for name in _AP_COLUMNS},
        "mAP lost": "-" if row.ap_drop is None or row.failed else signed(row.ap_drop),
        "parity": row.parity,
    }


def number(value: float | None, digits: int) -> str:
    """A number that is never negative, rounded; a dash for none, and for the -1 of a size range without objects."""
    return "-" if value is None or value < 0 else f"{value + 0.0:.{digits}f}"  # adding 0 turns -0.0 into 0.0


def text(report: BenchmarkReport) -> str:
    """The table with its head line, the sentence, and the footnotes."""
    lines = [report.settings["summary"], ""] if "summary" in report.settings else []
    lines.append(table(report.rows))
    if sentence := gains(report.rows, report.comparable):
        lines += ["", sentence]
    if report.notes:
        lines += ["", *report.notes]
    return "\n".join(lines)


def contents(report: BenchmarkReport) -> dict[str, Any]:
    """What the JSON file holds; the page shows the same values."""
    return {
        "settings": report.settings,
        "rows": [row.record() for row in report.rows],
        "gains": gains(report.rows, report.comparable),
        "comparable": report.comparable,
        "notes": list(report.notes),
    }


def write_json(report: BenchmarkReport, path: Path) -> None:
    """Everything but the examples, for programs."""
    body = json.dumps(_standard(contents(report)), indent=2, default=str, allow_nan=False)
    with replaced(path) as part:
        part.write_text(body + "\n", encoding="utf-8")


def _standard(value: Any) -> Any:
    """JSON has no infinity and no NaN, which a failed comparison may come to: they become the words for them."""
    if isinstance(value, dict):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(report: BenchmarkReport, path: Path) -> None:
    """The rows, one a line; an empty cell is a number that was not measured."""
    rows = [row.flat() for row in report.rows]
    with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(report: BenchmarkReport, path: Path) -> None:
    """What the terminal showed; two line ends keep the notes apart."""
    body = text(report).replace("\nnote:", "\n\nnote:").replace("\nWARNING:", "\n\nWARNING:")
    with replaced(path) as part:
        part.write_text(body + "\n", encoding="utf-8")
