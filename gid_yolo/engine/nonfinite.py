"""What is said of a step that was not finite, and the file it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from gid_yolo.engine.side_files import read_or_set_aside
from gid_yolo.engine.watch import Reading
from gid_yolo.errors import some
from gid_yolo.files import replaced

MOST_EVENTS = 20  # in the file, the first of the run: what follows a NaN is NaN
_OF_TEACHER = "its weights or these images are damaged; see what gid-val says of it"
_TOO_LARGE = "or its numbers are too large for half precision, which teacher_precision=fp32 keeps it from"


def sentence_of(reading: Reading, distilled: bool, half: bool, half_terms: bool, half_teacher: bool = False) -> str:
    """Where it began, when, on which images, and what to do; without the full stop.

    Args:
        reading: Something in it is not finite.
        distilled: There is a teacher.
        half: The networks compute in half precision.
        half_terms: So do the terms that are not finite.
        half_teacher: The teacher computes in float16, whose largest number is 65504.
    """
    event, remedy = _origin(reading, distilled, half, half_terms, half_teacher)
    where = f"in epoch {reading.epoch} on a batch of {some(reading.files)} (iteration {reading.iteration})"
    return f"{event} {where}: {remedy}"


def _origin(reading: Reading, distilled: bool, half: bool, half_terms: bool, half_teacher: bool) -> tuple[str, str]:
    """The first thing in the flow of data that was not finite, and what can be done about it."""
    slower = "lower lr0, lengthen warmup_epochs, or set amp=False" if half else "lower lr0, or lengthen warmup_epochs"
    first = reading.bad_inputs[0] if reading.bad_inputs else None
    if first == "images":
        return "the images hold NaN or infinite values", "look at these files, and at what augments them"
    if first == "targets":
        return "the labels hold NaN or infinite values", "mend the label files of these images"
    if first is not None:
        who = first.split()[0]
        of_teacher = f"{_OF_TEACHER}; {_TOO_LARGE}" if half_teacher else _OF_TEACHER
        return f"the {who} predicted NaN or infinite values", of_teacher if who == "teacher" else slower
    if reading.bad_terms:
        whose = "predictions of both models" if distilled else "predictions"
        lower = "lower lr0 or the weight of the term"
        return (
            f"{', '.join(reading.bad_terms)} became NaN or infinite, of finite {whose},",
            f"the numbers are too large for half precision: set amp=False, or {lower}" if half_terms else lower,
        )
    through = f" through {', '.join(reading.pulled)}" if reading.pulled else ""
    lower = " or the weight of the term" if reading.pulled and reading.pulled != ["task"] else ""
    if distilled and not reading.pulled:
        slower = f"{slower}; gradients=1 names the term"
    return (
        f"the gradient of {some(reading.gradients, 2)} became NaN or infinite{through}, of a finite loss,",
        slower.replace("lower lr0", f"lower lr0{lower}"),
    )


def event_of(reading: Reading, sentence: str, precision: str, rank: int) -> dict[str, Any]:
    """A reading as it stands in the file."""
    return {
        "sentence": f"{sentence}.",
        "iteration": reading.iteration,
        "epoch": reading.epoch,
        "batch": reading.batch,
        "attempt": reading.attempt,
        "process": max(rank, 0),
        "not_finite": {
            "inputs": reading.bad_inputs,
            "terms": reading.bad_terms,
            "gradients": len(reading.gradients),
            "first_gradients": reading.gradients[:5],
            "terms_of_gradients": reading.pulled,
        },
        "terms": {name: value if isfinite(value) else str(value) for name, value in reading.terms.items()},
        "inputs_finite": reading.inputs,
        "precision": precision,
        "scale": reading.scale,
        "lr": reading.lr,
        "files": reading.files,
    }


_KEY = ("iteration", "attempt", "process")  # what makes an event the same one


def _events_of(path: Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text(encoding="utf-8"))["events"]
    return [{**event, **{k: int(event[k]) for k in _KEY}} for event in events]


class Report:
    """`nonfinite.json`: how often something was not finite, and the first times; there is none where nothing was.

    Args:
        path: Of the file; what it holds already, of a run that is resumed, stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = read_or_set_aside(path, _events_of) or []

    def add(self, event: dict[str, Any]) -> bool:
        """Note an event; in place of the same one where an interrupted epoch is made again.

        Returns:
            There was room for it.
        """
        kept = [old for old in self.events if any(old[k] != event[k] for k in _KEY)]
        self.events = [*kept, event][:MOST_EVENTS]
        return event in self.events

    def write(self, counts: Mapping[str, int]) -> None:
        """Replace the file."""
        with replaced(self.path) as part:
            part.write_text(json.dumps({**counts, "events": self.events}, indent=2) + "\n", encoding="utf-8")
