"""Whether two checkpoints were trained alike: without that, a gain is not the teacher's."""

from __future__ import annotations

from typing import Any

# What decides a comparison; the others are told, but small runs differ in them with reason
_DECIDING = ("data", "fraction", "epochs", "iterations", "lr_steps", "imgsz", "initialised_from")
_TOLD = ("batch", "seed")
_ABSENT = {"iterations": None, "lr_steps": None}  # what a record from before these arguments means


def distilled(record: dict[str, Any]) -> bool:
    """True for a model whose record names a teacher."""
    return bool(record.get("teacher")) and record.get("distill", "gid") != "none"


def budget_notes(model: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Footnotes on differences between the records of the distilled model and of its plain twin."""
    records = {"model": model, "baseline": baseline}
    if empty := [role for role, record in records.items() if not record]:
        whose = " and ".join(empty)
        return [f"WARNING: EQUAL BUDGET UNKNOWN: the checkpoint of {whose} does not say how it was trained."]
    notes = []
    counted = any(record.get("iterations") for record in records.values())  # then a batch decides what a run sees
    for key in (*_DECIDING, *_TOLD):
        values = {role: record.get(key, _ABSENT.get(key, "unknown")) for role, record in records.items()}
        if values["model"] != values["baseline"]:
            kind = "WARNING: UNEQUAL BUDGET" if key in _DECIDING or (counted and key == "batch") else "note"
            notes.append(f"{kind}: {key} is {values['model']} for model, but {values['baseline']} for baseline.")
    if not distilled(model):
        notes.append("WARNING: model was not distilled: its record names no teacher.")
    if distilled(baseline):
        notes.append(f"WARNING: baseline is not plain: it was distilled from {baseline['teacher']}.")
    return notes


def comparable(model: dict[str, Any], baseline: dict[str, Any]) -> bool:
    """True where a gain of the model over its plain twin can be the teacher's: nothing that decides it differs."""
    return not any(note.startswith("WARNING") for note in budget_notes(model, baseline))
