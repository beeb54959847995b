"""Where a model's first weights come from, and how many of them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, RANK

from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError

_PART = re.compile(r"^\d+ of \d+ tensors ")


def shared_tensors(weights: nn.Module, model: nn.Module) -> tuple[int, int]:
    """How many of a model's tensors weights have by name and shape, and how many the model has."""
    held, wanted = weights.state_dict(), model.state_dict()
    return sum(key in held and held[key].shape == value.shape for key, value in wanted.items()), len(wanted)


def note_origin(weights: nn.Module, model: nn.Module) -> None:
    """Keep with a model how many of its tensors come from weights, and say where they are few."""
    model.taken = held, total = shared_tensors(weights, model)  # type: ignore[assignment]
    if held < total / 2 and RANK in {-1, 0}:
        LOGGER.warning(f"ONLY {held} OF {total} TENSORS COME FROM THE CHECKPOINT: it is of another model.")


def check_kind(weights: Any, family: str, pretrained: Any) -> None:
    """Refuse weights, `pretrained=`, that a model of another kind would take nothing of, or not know how to open.

    Raises:
        UserError: Another kind of detector.
    """
    if (other := distillable(weights).family) != family:
        raise UserError(f"pretrained={pretrained} is a {other} and the model a {family}: give weights of its own kind.")


def told_origin(model: Any) -> str:
    """The checkpoint that a model began with, and how much of it; random where it is none."""
    held, total = getattr(model, "taken", (0, 0))
    part = "" if held == total else f"{held} of {total} tensors "
    path = getattr(model, "pt_path", None)
    return f"{part}from the checkpoint {path}" if path else "random"


def origin_alone(told: str) -> str:
    """What `told_origin` says without how much it is: earlier records do not count."""
    return _PART.sub("", told)
