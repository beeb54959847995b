"""All runs of a study have seen the same images and labels: what each noted of them in its `run.json` is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gid_yolo.analysis.study_plan import Run
from gid_yolo.engine.provenance import CHOOSING
from gid_yolo.errors import UserError

_CHOOSING = ("data", *CHOOSING)  # what a row may have otherwise, and so see others
_ORDERING = ("rect",)  # in which training images lie, and were noted before there was a digest without order


class SameData:
    """The data of the runs that were looked at.

    Args:
        folder: Of all runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[str, str]] = {}  # by what chooses the data: a digest, and the run that had it first

    def starts(self, run: Run) -> int:
        """How often a run was started, as far as it noted its data."""
        return len(self._noted(run))

    def check(self, run: Run, after: int = 0) -> bool:
        """Compare a run's data with those of the runs before; False where it has noted none yet.

        Args:
            run: The run.
            after: Starts that do not count: what those saw need not be what this one sees.

        Raises:
            UserError: They are others.
        """
        noted = self._noted(run)
        try:
            digests = {split: self._digest(noted[-1]["data"][split]) for split in ("train", "val")}
        except (LookupError, TypeError):
            return False
        if len(noted) <= after:
            return False
        for split, (kind, digest) in digests.items():
            telling = (*_CHOOSING, *_ORDERING) if (kind, split) == ("digest", "train") else _CHOOSING
            key = json.dumps([split, kind, {name: run.args.get(name) for name in telling}], default=str)
            before, other = self._seen.setdefault(key, (digest, run.name))
            if before != digest:
                raise UserError(
                    f"{self.folder / run.name} and {other} beside it were trained on other {split} images, boxes or "
                    f"classes, though both on data={run.args.get('data')}, so they cannot be compared: put the data "
                    "back, remove the runs of the old ones, or give another project=."
                )
        return True

    def _noted(self, run: Run) -> list[Any]:
        try:
            return list(json.loads((self.folder / run.name / "run.json").read_text(encoding="utf-8"))["starts"])
        except (OSError, ValueError, LookupError, TypeError):
            return []

    @staticmethod
    def _digest(split: dict[str, Any]) -> tuple[str, str]:
        """What a split is told by, and its kind: without the images' order where that was noted."""
        kind = "contents" if "contents" in split else "digest"
        return kind, split[kind]
