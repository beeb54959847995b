"""What Ultralytics leaves out of a data set, and why: it names a file once, and none of its lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultralytics.data.utils import img2label_paths
from ultralytics.utils import LOGGER, remove_colorstr

from gid_yolo.data.labels import label_problems
from gid_yolo.engine.label_cache import own_label_caches
from gid_yolo.engine.teacher import image_files
from gid_yolo.errors import UserError, printable

MOST = 20  # lines in the log

UNUSABLE = (OSError, SyntaxError, RuntimeError, AssertionError, TypeError, LookupError, ValueError, AttributeError)


@contextlib.contextmanager
def reading(data: Any, split: str) -> Iterator[None]:
    """Read images and labels of a split meanwhile, with our label caches.

    Raises:
        UserError: Why there are none, in place of Ultralytics' errors.
    """
    try:
        with own_label_caches():
            yield
    except UserError:
        raise
    except UNUSABLE as error:
        raise UserError(f"split={split} of data={data} cannot be read: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What an error of Ultralytics' says, in a line."""
    error = error.__cause__ or error  # Ultralytics says less in the error that it makes of another
    return printable(remove_colorstr(str(error)).replace("\N{CROSS MARK}", ""), 300).rstrip(".") + "."


def check_class_names(names: Any, data: Any) -> None:
    """Refuse names that would move a terminal, or break a line of a table.

    Raises:
        UserError: The first of them.
    """
    for index, name in names.items():
        if not name.isprintable():
            raise UserError(f"class {index} of data={data} is called {ascii(name)[:80]}: leave control characters out.")


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
