"""All runs of a study have seen the same images and labels: what each noted of them in its `run.json` is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gid_yolo.analysis.study_plan import Run
from gid_yolo.engine.provenance import CHOOSING, same_images
from gid_yolo.errors import UserError

_CHOOSING = ("data", *CHOOSING)  # what a row may have otherwise, and so see others


class SameData:
    """The data of the runs that were looked at.

    Args:
        folder: Of all runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, list[tuple[dict[str, Any], Run]]] = {}  # by what chooses the data, the runs that had them

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
            data = {split: dict(noted[-1]["data"][split]) for split in ("train", "val")}
            known = all("digest" in split for split in data.values())
        except (LookupError, TypeError, ValueError):
            return False
        if not known or len(noted) <= after:
            return False
        seen = self._seen.setdefault(json.dumps({key: run.args.get(key) for key in _CHOOSING}, default=str), [])
        for before, other in seen:
            for split in data:
                if _comparable(split, before, data, other, run) and not same_images(before[split], data[split]):
                    raise UserError(
                        f"{self.folder / run.name} and {other.name} beside it were trained on other {split} images, "
                        f"boxes or classes, though both on data={run.args.get('data')}, so they cannot be compared: "
                        "put the data back, remove the runs of the old ones, or give another project=."
                    )
        seen.append((data, run))
        return True

    def _noted(self, run: Run) -> list[Any]:
        try:
            return list(json.loads((self.folder / run.name / "run.json").read_text(encoding="utf-8"))["starts"])
        except (OSError, ValueError, LookupError, TypeError):
            return []


def _comparable(split: str, one: dict[str, Any], other: dict[str, Any], first: Run, second: Run) -> bool:
    """Whether two entries can tell: older ones count the images' order, which of training images `rect` decides."""
    unordered = "contents" in one[split] and "contents" in other[split]
    return unordered or split == "val" or first.args.get("rect") == second.args.get("rect")
