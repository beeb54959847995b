"""How certain the gain of a comparison is: what it would be on other images than those of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from gid_yolo.engine.resample import over_images, resampled_run
from gid_yolo.export.contenders import Contender
from gid_yolo.export.rows import Row, settings_of


def rows_of(cells: Sequence[Contender], compared: bool) -> tuple[Row, ...]:
    """The row of each file; of the model, with the interval over images of what it is ahead of its baseline.

    Args:
        cells: As they were measured.
        compared: False where there is no baseline, or none to be compared with: no interval then.
    """
    rows = [cell.row() for cell in cells]
    draw = cache(resampled_run)  # settings that differ in the batch alone share a file
    drawn = {
        (row.role, row.setting): draw(cell.matches, row.ap)
        for cell, row in zip(cells, rows, strict=True)
        if compared and row.role in {"model", "baseline"} and cell.matches and row.ap is not None
    }
    for i, row in enumerate(rows):
        own, plain = (drawn.get((role, row.setting)) for role in ("model", "baseline"))
        if row.role == "model" and own and plain and (found := over_images({0: own}, {0: plain}, [0])):
            rows[i] = replace(row, gain_low=found.low, gain_high=found.high, gain_certain=found.certain)
    return tuple(rows)


def few_images_notes(rows: Sequence[Row]) -> list[str]:
    """A footnote for each setting in which on other images the baseline could as well be ahead."""
    several = len(settings_of(rows)) > 1
    return [
        f"WARNING: UNDECIDED: on other images {row.label} would be {row.gain_interval} mAP ahead of its baseline"
        f"{f' ({row.setting})' if several else ''}: the split has too few to tell, measure on more."
        for row in rows
        if row.gain_certain is False and row.gain_interval and row.gain_low != row.gain_high
    ]
