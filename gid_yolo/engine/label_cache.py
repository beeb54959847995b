"""Where the labels that Ultralytics has read are kept: with us, not in the data set.

Its caches are pickles, which run code where they are opened: none that came with a data set is. And nothing is written
beside images that may belong to others, or lie on a disk that cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultralytics.data import dataset

from gid_yolo.data.cache import cache_dir


def place_of(path: Path) -> Path:
    """Where our cache of a folder of labels is, for the path that Ultralytics gives it beside that folder."""
    path = path.resolve()
    return cache_dir() / "labels" / f"{path.stem}-{hashlib.sha256(bytes(path)).hexdigest()[:16]}{path.suffix}"


@contextlib.contextmanager
def own_label_caches() -> Iterator[None]:
    """Let Ultralytics' data sets that are made meanwhile read and write caches of labels in our place for them."""
    read, write = dataset.load_dataset_cache_file, dataset.save_dataset_cache_file

    def write_ours(prefix: str, path: Path, x: dict[str, Any], version: str) -> None:
        ours = place_of(path)
        with contextlib.suppress(OSError):  # Ultralytics says that it cannot be written
            ours.parent.mkdir(parents=True, exist_ok=True)
        write(prefix, ours, x, version)

    dataset.load_dataset_cache_file = lambda path: read(place_of(path))
    dataset.save_dataset_cache_file = write_ours
    try:
        yield
    finally:
        dataset.load_dataset_cache_file, dataset.save_dataset_cache_file = read, write
