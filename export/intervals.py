"""How certain the gain of a comparison is: what it would be on other images than those of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gid_yolo.engine.resample import Resampled, over_images, resampled_run
from gid_yolo.export.contenders import Contender
from gid_yolo.export.rows import Row, settings_of


def rows_of(cells: Sequence[Contender], compared: bool = True) -> tuple[Row, ...]:
    """The row of each file; of the model, with the interval over images of what it is ahead of its baseline.

    Args:
        cells: As they were measured.
        compared: False where model and baseline are none to be compared: no interval then.
    """
    rows = [cell.row() for cell in cells]
    files = [cell.matches if row.ap is not None else None for cell, row in zip(cells, rows, strict=True)]
    baselines = {row.setting: i for i, row in enumerate(rows) if row.role == "baseline" and compared}
    pairs = [
        (i, baselines[row.setting]) for i, row in enumerate(rows) if row.role == "model" and row.setting in baselines
    ]
    drawn: dict[Path, Resampled | None] = {}  # settings that differ in the batch share a file
    for i in dict.fromkeys(i for pair in pairs for i in pair):
        if (file := files[i]) and file not in drawn:
            drawn[file] = resampled_run(file, rows[i].ap or 0.0)
    for i, j in pairs:
        own, plain = (drawn[file] if (file := files[k]) else None for k in (i, j))
        if own and plain and (found := over_images({0: own}, {0: plain}, [0])):
            rows[i] = replace(rows[i], gain_low=found.low, gain_high=found.high, gain_certain=found.certain)
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
