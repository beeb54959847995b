"""How certain the gain of a comparison is: what it would be on other images than those of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gid_yolo.engine.resample import Resampled, over_images, resampled_run
from gid_yolo.export.contenders import Contender
from gid_yolo.export.rows import Row, settings_of


def rows_of(cells: Sequence[Contender], compared: bool = True) -> tuple[Row, ...]:
    """The row of each file; of the model, with the interval over images of what it is ahead of its baseline.

    Args:
        cells: As they were measured.
        compared: False where model and baseline are none to be compared: no interval then.
    """
    baselines = {cell.row().setting: cell for cell in cells if cell.role == "baseline" and compared}
    return tuple(_with_interval(cell, baselines.get(cell.row().setting)) for cell in cells)


def _with_interval(cell: Contender, baseline: Contender | None) -> Row:
    row = cell.row()
    if cell.role != "model" or baseline is None:
        return row
    own, plain = _drawn(cell), _drawn(baseline)
    found = over_images({0: own}, {0: plain}, [0]) if own and plain else None
    return replace(row, gain_low=found.low, gain_high=found.high) if found else row


def _drawn(cell: Contender) -> Resampled | None:
    """Its mAP on resamples of the images; None of one without results."""
    if cell.matches is None or cell.columns is None or cell.failed:
        return None
    return resampled_run(cell.matches, cell.columns["mAP"])


def few_images_note(rows: Sequence[Row]) -> str | None:
    """A footnote where on other images the baseline could as well be ahead."""
    several = len(settings_of(rows)) > 1
    for row in rows:
        low, high = row.gain_low, row.gain_high
        if low is not None and high is not None and low <= 0 <= high and row.gain_interval:
            place = f" ({row.setting})" if several else ""
            return (
                f"WARNING: UNDECIDED: on other images {row.label} would be {row.gain_interval} mAP ahead of its "
                f"baseline{place}: the split has too few to tell, measure on more."
            )
    return None
