"""The methods that can be distilled by, alone or together: the paper's, and those it compares with (tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gid_yolo.distill.feature import Adaptation, PyramidAdaptation, adaptation_settings, plan_rois, roi_features
from gid_yolo.distill.fine_grained import fine_grained_loss, imitation_mask
from gid_yolo.distill.fitnet import fitnet_loss
from gid_yolo.distill.gid import GIDLoss
from gid_yolo.distill.levels import LevelRules
from gid_yolo.distill.mimicking import mimicking_loss
from gid_yolo.distill.response import ResponseFunctions, TeachersHead
from gid_yolo.ops.structures import GeneralInstances, RawPredictions, Targets

METHODS = ("gid", "fitnet", "fine_grained", "mimicking")
MIMIC_CROP = 7  # RoIAlign's size in front of a box head

Channels = int | Sequence[int]
Proposals = Callable[[], tuple[Tensor, Tensor]]  # boxes (B, N, 4) and which of them are real (B, N)


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods of a setting such as `gid+fitnet`; none for `none`.

    Raises:
        ValueError: A method that does not exist.
    """
    if text == "none":
        return ()
    names = tuple(dict.fromkeys(text.split("+")))
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(
            f"distill={text} names {', '.join(unknown) or 'nothing'}: give none, or some of {', '.join(METHODS)} "
            "joined by +."
        )
    return names


class FitNet(nn.Module):
    """Whole maps are compared through an adaptation of every level."""

    def __init__(self, student_channels: Channels, teacher_channels: Channels, weight: float) -> None:
        super().__init__()
        self.weight, self.adapt = weight, PyramidAdaptation(student_channels, teacher_channels)

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """The weighted loss of two pyramids."""
        return self.weight * fitnet_loss(teacher, self.adapt(student))


class FineGrained(nn.Module):
    """Maps are compared near objects, through a 3x3 adaptation as in their release."""

    def __init__(self, student_channels: Channels, teacher_channels: Channels, weight: float) -> None:
        super().__init__()
        self.weight, self.adapt = weight, PyramidAdaptation(student_channels, teacher_channels, kernel_size=3)

    def forward(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], anchors: Tensor, targets: Targets
    ) -> Tensor:
        """The weighted loss of two pyramids whose cells have the (R, 4) anchors."""
        locations = sum(x.shape[-2] * x.shape[-1] for x in student)
        mask = imitation_mask(anchors, targets, locations)
        return self.weight * fine_grained_loss(teacher, self.adapt(student), mask)


class Mimicking(nn.Module):
    """The features of the student's sampled proposals are compared."""

    def __init__(self, student_channels: int, teacher_channels: int, weight: float) -> None:
        super().__init__()
        self.weight, self.adapt = weight, Adaptation(student_channels, teacher_channels)

    def forward(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        proposals: tuple[Tensor, Tensor],
        strides: Sequence[int],
        image_size: tuple[int, int],
        levels: LevelRules | None = None,
    ) -> Tensor:
        """The weighted loss of two pyramids at proposals (B, N, 4), of which (B, N) are real.

        They are cropped from the levels that the student's second stage crops them from; without `levels` by size.
        """
        boxes, valid = proposals
        level = levels.of_boxes(boxes) if levels and levels.of_boxes else None
        plan = plan_rois(boxes, strides, image_size, level)
        crops_t = roi_features(teacher, plan, strides, size=MIMIC_CROP)
        crops_s = self.adapt(roi_features(student, plan, strides, size=MIMIC_CROP))
        return self.weight * mimicking_loss(crops_t, crops_s, valid)


class Distillation(nn.Module):
    """The terms of the chosen methods; each has an adaptation of its own, and what is None is off."""

    def __init__(
        self,
        gid: GIDLoss | None = None,
        fitnet: FitNet | None = None,
        fine_grained: FineGrained | None = None,
        mimicking: Mimicking | None = None,
    ) -> None:
        super().__init__()
        self.gid, self.fitnet, self.fine_grained, self.mimicking = gid, fitnet, fine_grained, mimicking

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """For each method that is on, the arguments that make another of its kind."""
        found = {} if self.gid is None else {"gid": self.gid.settings}
        for name, method in (
            ("fitnet", self.fitnet),
            ("fine_grained", self.fine_grained),
            ("mimicking", self.mimicking),
        ):
            if method is not None:
                channels = adaptation_settings(method.adapt)
                channels.pop("adapt_kernel")  # a method's own
                found[name] = {**channels, "weight": method.weight}
        return found

    @classmethod
    def from_settings(cls, settings: Mapping[str, dict[str, Any]]) -> Distillation:
        """A distillation of the same methods as that whose `settings` these are, with weights of its own."""
        kinds: dict[str, Any] = {"gid": GIDLoss, "fitnet": FitNet, "fine_grained": FineGrained, "mimicking": Mimicking}
        return cls(**{name: kinds[name](**arguments) for name, arguments in settings.items()})

    @property
    def term_names(self) -> list[str]:
        """Names of the terms that `forward` gives."""
        names = [] if self.gid is None else self.gid.term_names
        others = {"fitnet": self.fitnet, "fine_grained": self.fine_grained, "mimicking": self.mimicking}
        return names + [f"{name}_loss" for name, method in others.items() if method is not None]

    def forward(
        self,
        teacher_pyramid: Sequence[Tensor],
        student_pyramid: Sequence[Tensor],
        teacher: RawPredictions,
        student: RawPredictions,
        *,
        functions: ResponseFunctions,
        strides: Sequence[int],
        image_size: tuple[int, int],
        targets: Targets,
        proposals: Proposals,
        levels: LevelRules | None = None,
        head: TeachersHead | None = None,
    ) -> tuple[dict[str, Tensor], GeneralInstances | None]:
        """The weighted terms by name, and the general instances, None without GID.

        Args:
            teacher_pyramid: L maps, without a graph.
            student_pyramid: L maps.
            teacher: Predictions without a graph.
            student: Predictions.
            functions: The detector's mask and losses of response distillation.
            strides: Pixels per cell of each level.
            image_size: (height, width) of the input.
            targets: Ground truth.
            proposals: Gives the student's sampled proposals; called only for mimicking.
            levels: The student's, of instances and proposals; needed where GID crops by its predictions.
            head: The teacher's, for GID's term `cross`.
        """
        terms: dict[str, Tensor] = {}
        instances = None
        if self.gid is not None:
            terms, instances = self.gid(
                teacher_pyramid,
                student_pyramid,
                teacher,
                student,
                functions=functions,
                strides=strides,
                image_size=image_size,
                levels=levels,
                targets=targets,
                head=head,
            )
        if self.fitnet is not None:
            terms["fitnet_loss"] = self.fitnet(teacher_pyramid, student_pyramid)
        if self.fine_grained is not None:
            terms["fine_grained_loss"] = self.fine_grained(teacher_pyramid, student_pyramid, student.priors, targets)
        if self.mimicking is not None:
            terms["mimicking_loss"] = self.mimicking(
                teacher_pyramid, student_pyramid, proposals(), strides, image_size, levels
            )
        return terms, instances
