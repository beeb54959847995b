"""The classes of a model against those of a data set: by name, or in their order where they have no names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from gid_yolo.engine import foreign
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError, some


@dataclass(frozen=True)
class SharedClasses:
    """The classes that teacher and student have in common: one compares the other's scores of these alone.

    Attributes:
        student: Indices of the student's classes.
        teacher: The teacher's class for each of them.
    """

    student: list[int]
    teacher: list[int]


def match_classes(own: Mapping[int, str], wanted: Mapping[int, str], role: str) -> dict[int, int]:
    """The class of a model for each of the wanted ones that it knows.

    Args:
        own: Names of the model's classes.
        wanted: Names of the data's or of another model's.
        role: What the model is (`teacher`, `model`), to name it in a warning.
    """
    if order := _in_order(own, len(wanted), role):
        return dict(zip(wanted, order, strict=True))
    exact = {name: i for i, name in own.items()}
    known = {name.strip().lower(): i for i, name in own.items()}
    found: dict[int, int] = {}
    for i, name in wanted.items():
        j = exact.get(name, known.get(name.strip().lower()))
        if j is not None and j not in found.values():  # a class stands for one name alone
            found[i] = j
    return found


def _in_order(own: Mapping[int, str], count: int, role: str) -> list[int]:
    """The classes of a model without names, if they are `count`, or labels one more, of which 0 is nothing's."""
    first = len(own) - count
    for pattern, allowed in ((foreign.UNNAMED, (0,)), (foreign.UNNAMED_LABEL, (0, 1))):
        unnamed = list(own.values()) == [pattern.format(i) for i in range(len(own))]
        if unnamed and first in allowed:
            LOGGER.warning(f"the {role}'s {len(own)} classes have no names: they are taken in the data's order.")
            return list(range(first, len(own)))
    return []


def fit_classes(model: DetectionModel, names: Mapping[int, str], role: str, data: Any) -> DetectionModel:
    """The model as it is to be measured on a data set: with its classes, in their order, and no others.

    Args:
        model: Returned as it is where its classes are the data's; else a copy that predicts those alone.
        names: Of the data's classes.
        role: What the model is, with its path, to name it in an error.
        data: Likewise.

    Raises:
        UserError: The model lacks a class, or it is a YOLO, whose classes are not reordered.
    """
    if list(model.names.values()) == list(names.values()):
        return model
    if isinstance(model, GIDDetectionModel):
        index = match_classes(model.names, names, role.partition("=")[0])
        if len(index) == len(names):
            return model.with_classes([index[i] for i in names], names)
    raise UserError(
        f"{role} knows {len(model.names)} classes ({some(model.names.values())}), but data={data} has {len(names)} "
        f"({some(names.values())}): give data whose classes the model was trained on, by the same names."
    )


def check_classes(classes: Any, names: Mapping[int, str]) -> None:
    """Refuse a choice of classes, `classes=`, that is not of the data.

    Raises:
        UserError: Not whole numbers, or not among the ids that exist.
    """
    if classes is None:
        return
    chosen = classes if isinstance(classes, list | tuple) else [classes]
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) or i not in names for i in chosen):
        ids = some(f"{i} ({name})" for i, name in names.items())
        raise UserError(f"classes={classes} must be ids of the classes that exist: {ids}.")
