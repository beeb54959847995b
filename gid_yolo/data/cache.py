"""Where generated data sets live, and how a folder is written so that it is either whole or absent."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from gid_yolo.errors import UserError

DATA_YAML = "data.yaml"


def cache_dir() -> Path:
    """Return ``$GID_CACHE``, else ``$XDG_CACHE_HOME/gid_yolo``, else ``~/.cache/gid_yolo``; it need not exist yet."""
    if chosen := os.environ.get("GID_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").absolute() / "gid_yolo"


def write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Make the data set folder `target` unless it is there, and return the path of its ``data.yaml``.

    `write` fills an empty folder beside `target`, which is renamed when `write` has returned: the name `target` never
    stands for half a data set, whatever interrupts the writer. Of several callers at once the first to rename wins
    and the others use its folder.

    Raises:
        UserError: the cache cannot be written, or `target` exists without a ``data.yaml`` (no writer leaves it so).

    """
    yaml = target / DATA_YAML
    if yaml.is_file():
        return yaml
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write a data set under {target.parent} ({error.strerror}): "
            "set GID_CACHE to a folder that can be written."
        ) from error
    try:
        write(draft)
        draft.chmod(0o755)  # mkdtemp makes private folders; a cache may be shared
        try:
            draft.rename(target)
        except OSError:
            if not yaml.is_file():
                raise UserError(f"{target} is in the way and has no {DATA_YAML}: delete it and try again.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return yaml
