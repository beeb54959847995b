"""How long a run took, and how the mAP on the validation images rose meanwhile."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def read_curve(file: Path) -> list[tuple[int, float, float]]:
    """Epoch, seconds since the run began, and mAP in percent, of every line of a `results.csv`.

    The mAP is Ultralytics' own, which lies a little above COCO's.

    Raises:
        OSError: There is no such file.
        ValueError: It is none of a run's, or damaged.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]
        epochs = [int(row["epoch"]) for row in rows]
        times = elapsed([float(row["time"]) for row in rows])
        aps = [round(100 * float(row["metrics/mAP50-95(B)"]), 2) for row in rows]
    except (AttributeError, TypeError, LookupError, csv.Error) as error:  # lines that are too long, or too short
        raise ValueError(f"{file} is not as Ultralytics writes it: {type(error).__name__}: {error}") from error
    return list(zip(epochs, times, aps, strict=True))


def elapsed(times: Sequence[float]) -> list[float]:
    """Seconds since a run began, of a clock that began anew where the run was resumed, as Ultralytics' own does.

    It is noticed where the clock falls: of a start whose first epoch lasted longer than all epochs before, it is not.
    """
    found, before, last = [], 0.0, 0.0
    for time in times:
        if time < last:
            before += last
        found.append(round(before + time, 1))
        last = time
    return found
