"""`freeze=`: the parts of a detector that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gid_yolo.errors import UserError


def parts_of(freeze: Any) -> list[Any]:
    """Names or numbers of parts, which the command line passes as text."""
    if not freeze and freeze != 0:
        return []
    parts = freeze.strip("[]").split(",") if isinstance(freeze, str) else freeze
    parts = parts if isinstance(parts, list | tuple) else [parts]
    return [part.strip(" '\"") if isinstance(part, str) else part for part in parts]


def check_parts(parts: Sequence[Any], model: nn.Module, freeze: Any, examples: str) -> None:
    """Refuse parts that a model does not have, which would silently train all of it, or that leave nothing.

    Args:
        parts: As Ultralytics looks for them: in the names of parameters, behind `model.`.
        model: The detector.
        freeze: What was given, for the message.
        examples: Of parts, likewise.

    Raises:
        UserError: Which is not there, or all of them.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        whole = isinstance(part, int) and not isinstance(part, bool)  # a layer of its number, which may have none
        if not whole and not any(f"model.{part}." in name for name in names):
            raise UserError(f"freeze={freeze}: there is no part '{part}'; e.g. {examples}.")
    if parts and all(any(f"model.{part}." in name for part in parts) for name in names):
        raise UserError(f"freeze={freeze} leaves nothing to train: name fewer parts.")
