"""Where a run is written: never over what it is made of, and over another run only where that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.cfg import get_save_dir

from gid_yolo.engine.matches import FILE
from gid_yolo.errors import UserError
from gid_yolo.files import replaced

_WEIGHTS = ("last.pt", "best.pt")
_OF_A_TRAINING = ("results.csv", "nonfinite.json")
_RECORDS = ("*.yaml", "*.csv", "*.json", FILE)
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


class Start:
    """What a start finds where its run will lie, so that one that is refused leaves it so.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, not folder.exists()
        self.empty = not any(folder.glob("*"))
        # The records of the run that is there; Ultralytics replaces or removes some before anything is checked
        self.records = {x: x.read_bytes() for suffix in _RECORDS for x in folder.glob(suffix) if x.is_file()}

    def begin(self, _: Any) -> None:
        """Training begins: what is there from now on is this run's, whose final evaluation says that it is finished."""
        self.records = {}
        for name in ("coco_metrics.json", FILE):
            (self.folder / name).unlink(missing_ok=True)

    def undo(self) -> None:
        """Leave nothing where nothing was and nothing was trained; else bring back the records of the run there."""
        if self.empty:
            kept = any((self.folder / name).exists() for name in _OF_A_TRAINING)
            if not kept and not any((self.folder / "weights").glob("*.pt")):
                self._clear()
            return
        for file, contents in self.records.items():
            if file.parent.is_dir() and (not file.is_file() or file.read_bytes() != contents):
                with replaced(file) as part:
                    part.write_bytes(contents)

    def _clear(self) -> None:
        """Remove the folder that this start made, or what it wrote into one that was empty."""
        if self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def undone_if_refused(trainer: Any) -> Iterator[None]:
    """Undo the `start` of a trainer whose run is refused, or stopped by hand, before anything was trained."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        start = vars(trainer).get("start")
        if start is not None and vars(trainer).get("save_dir") == start.folder:  # else another run took it meanwhile
            start.undo()
        raise
