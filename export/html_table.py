"""The rows of a benchmark as an HTML table that a script can sort."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.export.points import colours
from gid_yolo.export.report import number
from gid_yolo.export.rows import Row, short


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        key: In a row's `flat`.
        head: Its title.
        hint: What it is, in words.
        digits: After the point; None for words.
        main: Shown before all columns are asked for.
    """

    key: str
    head: str
    hint: str
    digits: int | None = None
    main: bool = False


_PLACE = (
    Column("precision", "precision", "of the ONNX file", None, True),
    Column("provider", "provider", "onnxruntime's execution provider", None, True),
    Column("batch", "batch", "images per run", 0, True),
    Column("size", "size", "height x width of the input in pixels", None, True),
)
_COLUMNS = (
    Column("title", "model", "what it is, and its network", None, True),
    Column("backbone", "backbone", "timm's name"),
    *_PLACE,
    *(Column(name, name, "in percent, by pycocotools", 1, name in {"mAP", "AP50"}) for name in COLUMNS),
    Column("ap_drop", "mAP lost", "against the same model's fp32 file, in points", 2, True),
    Column("preprocess", "pre ms", "preprocessing, median milliseconds per batch", 2),
    Column("p50", "p50 ms", "the network, median milliseconds per batch", 2, True),
    Column("p95", "p95 ms", "the network: 95 of 100 batches are as fast", 2, True),
    Column("p99", "p99 ms", "the network: 99 of 100 batches are as fast", 2),
    Column("postprocess", "post ms", "postprocessing, median milliseconds per batch", 2),
    Column("per_image", "ms/img", "the network, median milliseconds for one image", 2),
    Column("images_per_second", "img/s", "images per second of the network", 1, True),
    Column("end_to_end", "e2e img/s", "images per second with preprocessing and postprocessing", 1, True),
    Column("memory", "RAM MB", "peak memory of the network's process above its start", 0, True),
    Column("file_size", "file MB", "size of the ONNX file", 2, True),
    Column("parameters", "params M", "millions of parameters, batch normalisation folded", 2),
    Column("gflops", "GFLOPs", "billions of operations for one image", 2),
    Column("ap_difference", "ΔmAP", "ONNX file minus checkpoint, in points", 3),
    Column("box_difference", "Δbox px", "largest difference from PyTorch's boxes, in pixels", 5),
    Column("score_difference", "Δscore", "largest difference from PyTorch's scores", 7),
    Column("parity", "parity", "fp32: the checkpoint's equal; lower: lost no more mAP than allowed", None, True),
)
_SIGNED = {"ap_drop", "ap_difference"}  # may be negative; of the others -1 says that there is nothing
_WORDS = {"title", "backbone", "precision", "provider", "size", "parity"}


def html_table(rows: Sequence[Row], marks: Mapping[int, str]) -> str:
    """The rows as an HTML table, without columns that no row has a value for.

    Args:
        rows: All rows.
        marks: Attributes of each line, by the number of its row.
    """
    if not rows:
        return '<p class="empty">There are no rows.</p>'
    lines = [row.flat() | {"title": row.title, "size": row.size} for row in rows]
    shared = {column.key for column in _PLACE if len({line[column.key] for line in lines}) == 1}
    columns = [
        column._replace(main=column.main and column.key not in shared)
        for column in _COLUMNS
        if any(_present(column, line[column.key]) for line in lines)
    ]
    head = "".join(
        f'<th scope="col" aria-sort="none" class="{_kind(column)}" data-key="{column.key}">'
        f'<button type="button" title="{escape(column.hint)}">{escape(column.head)}</button></th>'
        for column in columns
    )
    names, body = colours(rows), []
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        cells = "".join(_cell(column, row, line[column.key]) for column in columns)
        kind = f"c-{names[row.role, row.label]}{' failed' if row.failed else ''}"
        body.append(f'<tr class="{kind}" {marks[i]}>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _kind(column: Column) -> str:
    return f"{'' if column.key in _WORDS else 'number '}{'' if column.main else 'more'}".strip()


def _present(column: Column, value: Any) -> bool:
    if isinstance(value, float | int):
        return column.key in _SIGNED or not value < 0
    return value not in (None, "")


def _cell(column: Column, row: Row, value: Any) -> str:
    """The number as the JSON file has it in `data-value`, for sorting; rounded for the eye."""
    if not _present(column, value) or (column.key == "ap_drop" and row.failed):
        empty = (
            '<span class="bad">failed</span>' if row.failed and column.key == "mAP" else '<span class="none">–</span>'
        )
        return f'<td class="{_kind(column)}" data-value="">{empty}</td>'
    stored = row.height * row.width if column.key == "size" else value
    words = str(value)
    if isinstance(value, float) and math.isfinite(value) and column.digits is not None:
        words = number(value, column.digits) if column.key not in _SIGNED else _difference(value, column.digits)
    data = stored if isinstance(stored, str) else json.dumps(stored)
    shown = escape(short(words) if column.key == "provider" else words)
    tag, scope = ("th", ' scope="row"') if column.key == "title" else ("td", "")
    if column.key == "title":
        shown = f'<span class="dot"></span>{shown}'
    elif column.key == "parity":
        reason = f' title="{escape(row.failed)}"' if row.failed else ""
        kind = "bad" if row.failed else "good" if row.compared and row.judged else "open"
        shown = f'<span class="parity {kind}"{reason}>{shown}</span>'
    return f'<{tag}{scope} class="{_kind(column)}" data-value="{escape(data)}">{shown}</{tag}>'


def _difference(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # adding 0 turns -0.0 into 0.0
