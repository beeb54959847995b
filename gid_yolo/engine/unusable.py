"""What Ultralytics leaves out of a data set, and why: it names a file once, and none of its lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_image, img2label_paths
from ultralytics.utils import LOGGER, remove_colorstr

from gid_yolo.data.labels import label_problems
from gid_yolo.engine.label_cache import own_label_caches
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


def tell_unusable(images: Any, classes: int | None) -> int:
    """Log which images of a split are not used, and which are used without their labels, and why.

    Args:
        images: Ultralytics' data set of the split.
        classes: How many there are; None where all are taken for one.

    Returns:
        How many are not used.
    """
    left: list[str] = []
    if len(images.label_files) != len(images.im_files):  # one was expected of every file that was found
        used = set(images.im_files)
        left = [file for file in images.get_img_files(images.img_path) if file not in used]
    lines: list[str] = []
    if left:
        lines += [f"images left out: {len(left)}", *_first(why for file in left for why in _reasons(file, classes))]
    empty = [label["im_file"] for label in images.labels if not len(label["cls"])]
    if missed := [why for file in empty if (why := _label_missed(file))]:
        lines += [f"images used as if they showed no object: {len(missed)}", *_first(missed)]
    if lines:
        LOGGER.warning("\n".join(lines))
    return len(left)


def _first(reasons: Iterable[str]) -> list[str]:
    """As many as are read, and how many more there are."""
    lines = list(reasons)
    return lines[:MOST] + [f"... and {len(lines) - MOST} more"] * (len(lines) > MOST)


def _reasons(image: str, classes: int | None) -> list[str]:
    """Why Ultralytics left an image out: by its own check of the file, or else line by line of the labels."""
    try:
        check_image(image)
    except Exception as error:  # of any reader of images: Ultralytics takes them all for a reason
        return [f"{image}: the image cannot be read ({reason_of(error).rstrip('.')})"]
    (label,) = img2label_paths([image])
    return label_problems(Path(label), classes) or [f"{label}: Ultralytics cannot use it"]


def _label_missed(image: str) -> str | None:
    """What stands in the place of a label file that Ultralytics did not find, or beside it."""
    (label,) = map(Path, img2label_paths([image]))
    if label.is_file():
        return None
    if os.path.lexists(label):
        return f"{label}: it is {'a folder' if label.is_dir() else 'a link to nothing'}, not a file of labels"
    for other in (label.with_suffix(".TXT"), label.with_suffix(".Txt")):
        if other.is_file():
            return f"{other}: it must be called {label.name} to be read"
    return None
