"""What a conversion gives: settings that build a detector, and weights that fit it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gid_yolo.detectors.build import build_detector
from gid_yolo.detectors.detector import Detector
from gid_yolo.errors import some


@dataclass(frozen=True)
class Converted:
    """A detector as settings and weights.

    Attributes:
        config: As a model yaml, `nc` included.
        state: Every tensor of the detector by our names.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]

    def build(self) -> Detector:
        """The detector.

        Raises:
            ValueError: The weights do not fit the settings: what is missing or left over is named.
        """
        detector = build_detector(self.config)
        load_exactly(
            detector, self.state, f"the weights do not fit {self.config['detector']} on {self.config['backbone']}"
        )
        return detector


def load_exactly(model: nn.Module, state: dict[str, Tensor], problem: str) -> None:
    """Load weights that must fit a model without remainder, but for the counters that a frozen batch norm lacks.

    Raises:
        ValueError: They do not: `problem`, and what is missing, left over, or of another shape.
    """
    own = model.state_dict()
    missing = sorted(key for key in set(own) - set(state) if not key.endswith("num_batches_tracked"))
    extra = sorted(set(state) - set(own))
    misfits = sorted(key for key in set(own) & set(state) if own[key].shape != state[key].shape)
    if missing or extra or misfits:
        lists = (some(names, 8) or "none" for names in (missing, extra, misfits))
        raise ValueError("{}: missing {}; left over {}; of another shape {}.".format(problem, *lists))
    model.load_state_dict(state, strict=False)


def renamed(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """The tensors whose name begins with one of `prefixes`, under its replacement; the rest is left out."""
    return {
        new + key[len(old) :]: value
        for key, value in state.items()
        for old, new in prefixes.items()
        if key.startswith(old)
    }
