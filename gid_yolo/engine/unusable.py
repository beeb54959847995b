"""What Ultralytics leaves out of a data set, and why: it names a file once, and none of its lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.data.utils import img2label_paths
from ultralytics.utils import LOGGER

from gid_yolo.data.labels import label_problems
from gid_yolo.engine.teacher import image_files

MOST = 20  # lines in the log


def tell_unusable(split: Any, used: list[str], classes: int | None) -> int:
    """Log why images of a split are not used.

    Args:
        split: As in the data yaml.
        used: The files that are.
        classes: How many there are; None where all are taken for one.

    Returns:
        How many are not.
    """
    known = {Path(file) for file in used}
    left = [str(file) for file in image_files(split) if file not in known]
    problems: list[str] = []
    for image, label in zip(left, map(Path, img2label_paths(left)), strict=True):
        found = label_problems(label, classes) if label.is_file() else []
        problems += found or [f"{image}: the image cannot be read"]
    if problems:
        more = [f"... and {len(problems) - MOST} more"] if len(problems) > MOST else []
        LOGGER.warning("\n".join([f"images left out: {len(left)}", *problems[:MOST], *more]))
    return len(left)
