"""The pyramid levels that teacher and student have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gid_yolo.distill.levels import LevelRules
from gid_yolo.engine.distillable import Distillable
from gid_yolo.errors import UserError, some


@dataclass(frozen=True)
class SharedLevels:
    """The pyramid levels that teacher and student have in common: features are compared on these alone.

    Attributes:
        student: Indices of the student's levels.
        teacher: The teacher's level for each of them.
        strides: Their pixels per cell.
    """

    student: list[int]
    teacher: list[int]
    strides: list[int]

    def rules(self, own: LevelRules, strides: Sequence[int]) -> LevelRules:
        """The student's rules, of a pyramid of these strides, as rules of the shared levels alone.

        A level that is not shared gives way to the nearest in stride, of equal ones the first.
        """
        # (L,) of each of the student's levels
        places = [
            self.student.index(i)
            if i in self.student
            else min(range(len(self.strides)), key=lambda at: abs(math.log2(self.strides[at] / stride)))
            for i, stride in enumerate(strides)
        ]

        def shared(level: Tensor) -> Tensor:
            found = torch.zeros_like(level)
            for i, place in enumerate(places):  # one number at a time: a tensor of them would have to be copied
                found = torch.where(level == i, place, found)
            return found

        of_boxes = own.of_boxes
        return LevelRules(
            lambda indices: shared(own.of_predictions(indices)),
            None if of_boxes is None else lambda boxes: shared(of_boxes(boxes)),
        )

    def read_by_head(self, teacher: Distillable) -> bool:
        """Whether these are all that the teacher's head reads."""
        return self.teacher == list(range(len(teacher.strides)))

    def channels(self, student: Distillable, teacher: Distillable) -> tuple[int, int] | tuple[list[int], list[int]]:
        """Channels of both pyramids: one number each, or one a level each where a pyramid's levels differ."""
        if isinstance(student.channels, int) and isinstance(teacher.channels, int):
            return student.channels, teacher.channels
        return _channels(student, self.student), _channels(teacher, self.teacher)


def share_levels(student: Distillable, teacher: Distillable) -> SharedLevels:
    """The levels of equal stride, finest first; of levels that share a stride, the first goes with the first.

    Raises:
        UserError: There are none.
    """
    free, pairs = list(enumerate(teacher.strides)), []
    for i, stride in enumerate(student.strides):
        if match := next(((j, s) for j, s in free if s == stride), None):
            free.remove(match)
            pairs.append((i, match[0], stride))
    if not pairs:
        own, theirs = (some(map(str, view.strides)) for view in (student, teacher))
        raise UserError(
            f"the student's pyramid has strides {own} and the teacher's {theirs}: they have no level in common to "
            "compare features on."
        )
    return SharedLevels(*(list(column) for column in zip(*pairs, strict=True)))


def _channels(view: Distillable, levels: list[int]) -> list[int]:
    return [view.channels if isinstance(view.channels, int) else view.channels[i] for i in levels]
