"""Whether two checkpoints were trained alike: without that, a gain is not the teacher's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from gid_yolo.engine.checkpoint import fingerprint, record_of
from gid_yolo.engine.origin import origin_alone

# What decides a comparison: the first must be known of both, the others are compared where they are
_NEEDED = ("data", "fraction", "epochs", "imgsz", "initialised_from")
_RUN = ("network", "epochs_done", "iterations", "lr_steps", "lr_gamma", "optimizer", "lr0", "lrf", "momentum")
_OPTIMISER = ("weight_decay", "cos_lr", "nbs", "warmup_epochs", "warmup_iterations", "backbone_lr", "ema_decay")
_FROZEN = ("freeze", "freeze_bn", "frozen_stages", "single_cls", "classes")
_AUGMENTATION = (
    *("mosaic", "close_mosaic", "mixup", "cutmix", "copy_paste", "scale", "translate", "degrees", "shear"),
    *("perspective", "flipud", "fliplr", "bgr", "hsv_h", "hsv_s", "hsv_v", "multi_scale"),
)
_WHERE_KNOWN = (*_RUN, *_OPTIMISER, *_FROZEN, *_AUGMENTATION)
_TOLD = ("batch", "seed")  # small runs differ in them with reason
_ABSENT = {"iterations": None, "lr_steps": None}  # what a record from before these arguments means


def training_of(network: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """How a checkpoint was trained: its record, its other arguments, its network, and the epochs that were really done.

    Args:
        network: Of the checkpoint.
        checkpoint: Its dict, whose table of results has a line an epoch: of a finished run, of all of them.
    """
    if not (record := record_of(network)):
        return {}
    arguments = checkpoint.get("train_args") or {}
    shapes = [(name, tuple(value.shape)) for name, value in sorted(network.state_dict().items())]
    parameters = sum(p.numel() for p in network.parameters())
    done = (checkpoint.get("train_results") or {}).get("epoch")
    return {
        **{key: arguments[key] for key in _WHERE_KNOWN if key in arguments},
        **record,
        **({"initialised_from": origin_alone(str(record["initialised_from"]))} if "initialised_from" in record else {}),
        "network": f"{parameters} parameters ({hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]})",
        "weights": fingerprint(network),
        **({"epochs_done": len(done)} if isinstance(done, list) and done else {}),
    }


def distilled(record: Mapping[str, Any]) -> bool:
    """True for a model whose record names a teacher."""
    return bool(record.get("teacher")) and record.get("distill", "gid") != "none"


def budget_notes(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """Footnotes on differences between the trainings (`training_of`) of the distilled model and of its plain twin."""
    records = {"model": model, "baseline": baseline}
    if empty := [role for role, record in records.items() if not record]:
        whose = " and ".join(empty)
        return [f"WARNING: EQUAL BUDGET UNKNOWN: the checkpoint of {whose} does not say how it was trained."]
    notes = []
    counted = any(record.get("iterations") for record in records.values())  # then a batch decides what a run sees
    for key in (*_compared(model, baseline), *_TOLD):
        values = {role: record.get(key, _ABSENT.get(key, "unknown")) for role, record in records.items()}
        if values["model"] != values["baseline"]:
            kind = "note" if key in _TOLD and not (counted and key == "batch") else "WARNING: UNEQUAL BUDGET"
            notes.append(f"{kind}: {key} is {values['model']} for model, but {values['baseline']} for baseline.")
    for role, record in records.items():
        if (done := record.get("epochs_done", record.get("epochs"))) != record.get("epochs"):
            notes.append(f"note: {role} ended after {done} of {record.get('epochs')} epochs.")
    if model.get("weights", "model's") == baseline.get("weights", "baseline's"):
        notes.append("WARNING: model and baseline have the same weights: one of the two is the wrong file.")
    if not distilled(model):
        notes.append("WARNING: model was not distilled: its record names no teacher.")
    if distilled(baseline):
        notes.append(f"WARNING: baseline is not plain: it was distilled from {baseline['teacher']}.")
    return notes


def _compared(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What decides: of the data their contents where both records have them, and not where they lay."""
    known = set(model) & set(baseline) | set(_ABSENT)
    contents = next((key for key in ("train_contents", "train_images") if key in known), "data")  # from the newest on
    needed = [contents if key == "data" else key for key in _NEEDED]
    return [*needed, *(key for key in _WHERE_KNOWN if key in known)]


def comparable(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """True where a gain of the model over its plain twin can be the teacher's: nothing that decides it differs."""
    return not any(note.startswith("WARNING") for note in budget_notes(model, baseline))
