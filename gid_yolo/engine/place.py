"""Where a run is written: never over what it is made of, and over another run only where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.cfg import get_save_dir

from gid_yolo.errors import UserError

_WEIGHTS = ("last.pt", "best.pt")
_MADE_OF = ("teacher", "model", "pretrained", "backbone_weights", "data")


def check_place(args: Mapping[str, Any]) -> None:
    """Refuse a new run that would write over weights that are still needed.

    A run gets a folder of its own unless `save_dir=` or `exist_ok=True` names one that may be there already.

    Args:
        args: All arguments of the run.

    Raises:
        UserError: A file that the run begins with lies there, or another run that nobody gave up.
    """
    if not (args.get("save_dir") or args.get("exist_ok")):
        return
    weights = get_save_dir(SimpleNamespace(**args)) / "weights"
    for key in _MADE_OF:
        value = args.get(key)
        # Anywhere in it: before it starts several processes, Ultralytics empties the folder
        if isinstance(value, str | Path) and Path(value).is_file() and weights.parent in Path(value).resolve().parents:
            raise UserError(
                f"{key}={value} lies in the folder that this run would be written to, {weights.parent}, and would be "
                "replaced: give name= or save_dir= another one."
            )
    if not args.get("exist_ok") and (there := [weights / name for name in _WEIGHTS if (weights / name).is_file()]):
        unfinished = there[0].name == _WEIGHTS[0] and not (weights.parent / "coco_metrics.json").is_file()
        instead = f", or go on with it by resume=True model={there[0]}" if unfinished else ""
        raise UserError(
            f"save_dir={args['save_dir']} holds a run already: give another folder, or exist_ok=True to replace "
            f"it{instead}."
        )
