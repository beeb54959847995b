"""What is wrong with a label file in YOLO's format, by its lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_TOLERANCE = 0.01  # that Ultralytics grants coordinates


def label_problems(path: Path, classes: int | None) -> list[str]:
    """Why Ultralytics leaves an image out because of its labels, line by line; it names the file alone.

    Args:
        path: A file of lines `class x y width height`, or all `class x1 y1 x2 y2 x3 y3 ...`, in parts of the image.
        classes: How many there are; None where all are taken for one.

    Returns:
        `file:line: reason`, one for each line that is not as it should be; none exactly where Ultralytics takes the
        file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return [f"{path}: it is no text in UTF-8"]
    except OSError as error:
        return [f"{path}: it cannot be read ({error.strerror})"]
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    polygons = any(len(words) > 6 for _, words in rows)
    found = ((number, _problem(words, polygons, classes)) for number, words in rows)
    return [f"{path}:{number}: {problem}" for number, problem in found if problem]


def read_boxes(path: Path) -> list[list[float]]:
    """The boxes of a label file, as Ultralytics reads them: polygons become the boxes around them.

    Returns:
        x and y of the centre, width and height of each, in parts of the image.

    Raises:
        ValueError: A line is neither a box nor a polygon.
    """
    rows = [[float(x) for x in line.split()] for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    if not any(len(row) > 6 for row in rows):
        if wrong := [row for row in rows if len(row) != 5]:
            raise ValueError(f"{len(wrong[0])} values in a line")
        return [row[1:] for row in rows]
    boxes = []
    for row in rows:
        if len(row) < 7 or len(row) % 2 == 0:
            raise ValueError(f"{len(row)} values in a line, where others are polygons")
        (x1, x2), (y1, y2) = ((min(side), max(side)) for side in (row[1::2], row[2::2]))
        boxes.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    return boxes


def _problem(words: Sequence[str], polygons: bool, classes: int | None) -> str | None:
    """Of one line; in a file with a polygon every line must be one."""
    if polygons and (len(words) == 5 or len(words) < 3 or len(words) % 2 == 0):
        return f"{len(words)} values, where other lines of the file are polygons (class x1 y1 x2 y2 x3 y3 ...)"
    if not polygons and len(words) != 5:
        return f"{len(words)} values, not the 5 of class x y width height"
    try:
        values = np.array(words, dtype=np.float32)
    except ValueError:
        return f"{' '.join(words)[:60]!r} are no numbers"
    if not np.isfinite(values).all():
        return f"{' '.join(words)[:60]!r} holds NaN or infinite values"
    if values[0] < 0 or values[0] % 1:
        return f"class {words[0]} is no whole number of at least 0"
    if classes is not None and values[0] >= classes:
        return f"class {words[0]} does not exist: the data names 0 to {classes - 1}"
    box = values[1:]
    if polygons:
        corners = values[1:].reshape(-1, 2)
        low, high = corners.min(0), corners.max(0)
        box = np.concatenate([(low + high) / 2, high - low])
    if box.max() > 1 + _TOLERANCE:
        return f"{box.max():g} is outside the image: coordinates are parts of its width and height, 0 to 1"
    if box.min() < -_TOLERANCE or box[2:].min() < 0:
        return f"{box.min():g} is negative: coordinates are parts of the image's width and height, 0 to 1"
    return None
