"""What Ultralytics leaves out of a data set, and why: it names a file once, and none of its lines."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ultralytics.data import base, utils
from ultralytics.data.utils import img2label_paths
from ultralytics.utils import LOGGER, remove_colorstr

from gid_yolo.data.labels import label_problems
from gid_yolo.engine.label_cache import own_label_caches
from gid_yolo.errors import UserError, printable

MOST = 20  # lines in the log

_NO_LABELS = "No labels found in"  # Ultralytics' words
UNUSABLE = (OSError, SyntaxError, RuntimeError, AssertionError, TypeError, LookupError, ValueError, AttributeError)


@contextlib.contextmanager
def reading(data: Any, split: str) -> Iterator[None]:
    """Read images and labels of a split meanwhile, with our label caches.

    Raises:
        UserError: Why there are none, in place of Ultralytics' errors.
    """
    try:
        with own_label_caches(), images_unchanged():
            yield
    except UserError:
        raise
    except UNUSABLE as error:
        if _NO_LABELS in str(error):  # in a cache, it says, which is not there
            raise UserError(
                f"split={split} of data={data} has no labels: check that labels/ lies beside images/, with a .txt for "
                "each image that shows an object."
            ) from error
        raise UserError(f"split={split} of data={data} cannot be read: {reason_of(error)}") from error


@contextlib.contextmanager
def images_unchanged() -> Iterator[None]:
    """Let Ultralytics check images meanwhile without writing one, and only those that are files.

    It would replace a JPEG whose last bytes are not its end, where the folder can be written, by one that it encodes
    anew, and leave it out elsewhere; a pipe it would wait for. Here the image is decoded all the same, so that one that
    is cut off is left out, and stays as it is.
    """
    check, replace, speeds = utils.check_image, utils._replace_image, base.check_file_speeds

    def check_file(file: str) -> tuple[str, tuple[int, int]]:
        if not Path(file).is_file():
            raise OSError("it is no file")
        message, shape = check(file)
        return message and f"{file}: bytes follow the JPEG's end; it is read as it is", shape

    def check_speeds(files: list[str], **kwargs: Any) -> None:
        sample = random.sample(files, min(len(files), 5))  # of which it would read five
        speeds([file for file in sample if Path(file).is_file()], **kwargs)

    utils.check_image, base.check_file_speeds = check_file, check_speeds
    utils._replace_image = lambda file, write: write(io.BytesIO())
    try:
        yield
    finally:
        utils.check_image, utils._replace_image, base.check_file_speeds = check, replace, speeds


def reason_of(error: BaseException) -> str:
    """What an error of Ultralytics' says, in a line."""
    error = error.__cause__ or error  # Ultralytics says less in the error that it makes of another
    text = remove_colorstr(str(error)).replace("\N{CROSS MARK}", "").partition("\nNote dataset download")[0].strip()
    return printable(text or type(error).__name__, 300).rstrip(".") + "."


def check_class_names(names: Any, data: Any) -> None:
    """Refuse names that would move a terminal, or break a line of a table.

    Raises:
        UserError: The first of them.
    """
    for index, name in names.items():
        if not name.isprintable():
            raise UserError(f"class {index} of data={data} is called {ascii(name)[:80]}: leave control characters out.")


@images_unchanged()
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
    lines = [printable(reason, 400) for reason in reasons]
    return lines[:MOST] + [f"... and {len(lines) - MOST} more"] * (len(lines) > MOST)


def _reasons(image: str, classes: int | None) -> list[str]:
    """Why Ultralytics left an image out: by its own check of the file, or else line by line of the labels."""
    try:
        utils.check_image(image)
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
        what = "a folder" if label.is_dir() else "no file" if label.exists() else "a link to nothing"
        return f"{label}: it is {what}, so it holds no labels"
    for other in (label.with_suffix(".TXT"), label.with_suffix(".Txt")):
        if other.is_file():
            return f"{other}: it must be called {label.name} to be read"
    return None
