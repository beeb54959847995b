"""Data that a file of weights names: it is used where it is at hand, and never fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_file

from gid_yolo.errors import UserError, printable

_UNUSABLE = (OSError, SyntaxError, RuntimeError, AssertionError, TypeError, LookupError, ValueError, AttributeError)


def check_named(data: Any, by: str) -> None:
    """Refuse data that would be downloaded, by whatever program its yaml holds: only who runs it may say so.

    Args:
        data: As the arguments of a checkpoint name it, None for nothing.
        by: What names it, e.g. `model=best.pt`.

    Raises:
        UserError: It is not at hand, and its yaml says how to get it.
    """
    if data is None or Path(str(data)).is_dir():
        return
    name = str(data)
    try:
        if "://" not in name and Path(name).suffix in {".yaml", ".yml"}:
            contents = YAML.load(check_file(name))
            if contents.get("download"):
                for split in {"train", "val", "test"} & {key for key, value in contents.items() if value}:
                    check_det_dataset(name, autodownload=False, split=split)
            return
    except _UNUSABLE:
        pass
    raise UserError(f"{by} names data that is not here or would be downloaded ({printable(name)}): give data=.")
