"""Files of a run's folder that a resumed run goes on with, beside its checkpoint: one that is damaged ends no run."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ultralytics.utils import LOGGER

from gid_yolo.errors import printable

_T = TypeVar("_T")


def read_or_set_aside(path: Path, read: Callable[[Path], _T]) -> _T | None:
    """What `read` makes of a file; None where there is none, and of a damaged one.

    A damaged one keeps its contents under another name, and a warning says so.
    """
    if not path.is_file():
        return None
    try:
        return read(path)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:  # not as it was written
        names = (path.with_name(f"{path.name}.damaged{i or ''}") for i in itertools.count())
        aside = next(name for name in names if not name.exists())
        path.replace(aside)
        LOGGER.warning(f"{path} is damaged ({printable(error)}): it is begun anew, what it held is in {aside.name}.")
        return None
