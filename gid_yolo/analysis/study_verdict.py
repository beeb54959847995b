"""The verdict: whether distillation helped, by how much, and how certain that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from gid_yolo.analysis.statistics import Gain, seeds_needed
from gid_yolo.analysis.study_file import LONGER
from gid_yolo.analysis.study_lines import Line, gain_over, minutes_as_text
from gid_yolo.analysis.study_plan import Study
from gid_yolo.engine.preflight import LEAD
from gid_yolo.engine.resample import CONFIDENCE
from gid_yolo.export.rows import signed

LEARNT = 1.0  # percent, which a model that learns nothing does not reach
UNKNOWN = " On other images it is not known: not every run has a coco_matches.npz of the same ones."
SAME = 1.05  # times as long, which counts as the same: the clock of a shared machine is no better


def verdict(study: Study, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Whether the last row of a study with one group gained, by how much, and how certain that is.

    Returns:
        `verdict` (helped, harmed, undecided, or one seed), a sentence, and the numbers; None while a run is missing.
    """
    column, line = study.file.columns[0], lines[-1]
    gain = line.cells[column].gain
    compared = [other for other in lines if other.row.kind != LONGER]
    if not all(other.whole for other in compared) or len({row.group for row in study.rows}) > 1:
        return None
    if gain is None:
        text = f"Undecided: {study.settings['split']} has no objects to measure {column} on; give split= another one."
        return {"verdict": "undecided", "sentence": text, "column": column}
    size = f"{signed(gain.mean)} {column}"
    baseline = next(other for other in lines if other.row.kind == "plain")
    reached = [found.mean for x in (line, baseline) if (found := x.cells[column].spread)]
    if max(reached) < LEARNT:
        word, text = "undecided", f"Neither student reached {LEARNT:g} {column}: train longer, epochs=, before asking."
    elif gain.low is None or gain.high is None:
        word, text = "one seed", f"One seed says {size}, and nothing about how certain that is: give seeds=3 or more."
    else:
        word, text = _judged(gain, size, study.settings["split"])
    teacher = next((other for other in lines if other.row.kind == "teacher"), None)
    mean, best = line.cells[column].spread, teacher.cells[column].spread if teacher else None
    if mean and best and best.mean > 0:
        text += f" The distilled student has {mean.mean / best.mean:.0%} of its teacher's {column}."
    longer = next((other for other in lines if other.row.kind == LONGER), None)
    lead = gain_over(line, longer, column) if longer else None
    if longer and lead:
        text += _beside_longer(line, longer, lead, column)
    elif (times := _times(line, baseline)) is not None and times >= SAME:
        text += (
            f" It trained {times:.1f} times as long as the plain student{_own_training(teacher)}: longer={times:.1f} "
            "compares it with one that trains for as long."
        )
    plain = baseline.cells[column].spread
    if plain and best and best.mean - plain.mean < LEAD:
        text += (
            f" The teacher is too weak to judge by: it is {best.mean - plain.mean:.1f} {column} ahead of the plain "
            f"student at this schedule, and should be {LEAD:g}; train it to its plateau, or take a larger one."
        )
    said = {"verdict": word, "sentence": text, "column": column, **asdict(gain)}
    return said if longer is None or lead is None else {**said, "over_longer": {"row": longer.row.name, **asdict(lead)}}


def _judged(gain: Gain, size: str, split: str) -> tuple[str, str]:
    """The word and the sentence of a gain over several seeds, which is certain if it is so over seeds and images."""
    few = gain.images is not None and not gain.images.certain
    low, high = gain.joint or (0.0, 0.0)
    size += _interval(gain)
    if (low > 0 or high < 0) and not few:
        word = "helped" if gain.mean > 0 else "harmed"
        return word, f"Distillation {word}: {size}." + ("" if gain.images else UNKNOWN)
    text = f"Undecided: {size}."
    if not gain.certain:
        needed = seeds_needed(gain)
        more = f"about {needed} seeds" if needed else "more than 1000 seeds"
        text += f" A gain of this size and spread would probably take {more} to be certain of."
    if gain.images and few:
        text += f" The {gain.images.count} images of {split} are too few to be certain of it: measure on more."
    if gain.certain and not few:
        text += " Either error alone leaves 0 out, both together do not: give more seeds, or measure on more images."
    return "undecided", text


def _interval(gain: Gain) -> str:
    """In brackets; nothing of a single seed."""
    if gain.low is None or gain.high is None or gain.joint is None:
        return ""
    text = f"{signed(gain.low)} to {signed(gain.high)} of {gain.count} seeds"
    if gain.images:
        low, high = gain.joint
        images = f"{signed(gain.images.low)} to {signed(gain.images.high)} of other images"
        text = f"{signed(low)} to {signed(high)}: {text}, {images}"
    return f" ({CONFIDENCE:.0%} interval {text})"


def _beside_longer(line: Line, longer: Line, lead: Gain, column: str) -> str:
    """How the distilled student stands beside the plain one that trained for longer."""
    side = "ahead of" if round(lead.mean, 1) >= 0 else "behind"
    text = f" It is {abs(lead.mean):.1f} {column} {side} the row '{longer.row.name}'"
    text += _interval(lead)
    if (times := _times(longer, line)) is not None:
        text += f", which trained {times:.1f} times as long as it did"
    return f"{text}."


def _times(line: Line, other: Line) -> float | None:
    """How many times as long as another row's its runs trained, the median over the seeds of which both are known."""
    ratios = [minutes / other.minutes[seed] for seed, minutes in line.minutes.items() if other.minutes.get(seed)]
    return median(ratios) if ratios else None


def _own_training(teacher: Line | None) -> str:
    """That the teacher's own training is left out, and how long that was where it is known."""
    known = (
        f"'s {minutes_as_text(median(teacher.minutes.values()))} minutes"
        if teacher and teacher.minutes
        else "'s own training"
    )
    return f", without the teacher{known}"
