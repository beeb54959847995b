"""What a conversion gives: settings that build a detector, and weights that fit it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gid_yolo.detectors.build import build_detector
from gid_yolo.detectors.detector import Detector


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
        own = detector.state_dict()
        counters = {key for key in own if key.endswith("num_batches_tracked")}  # no part of a frozen batch norm
        missing = sorted(set(own) - set(self.state) - counters)
        extra = sorted(set(self.state) - set(own))
        misfits = sorted(k for k in set(own) & set(self.state) if own[k].shape != self.state[k].shape)
        if missing or extra or misfits:
            raise ValueError(
                f"the weights do not fit {self.config['detector']} on {self.config['backbone']}: missing "
                f"{some_of(missing)}; left over {some_of(extra)}; of another shape {some_of(misfits)}."
            )
        detector.load_state_dict(self.state, strict=False)
        return detector


def some_of(names: list[str], most: int = 8) -> str:
    """The first names of a list for a message, and how many more there are; `none` for an empty one."""
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def renamed(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """The tensors whose name begins with one of `prefixes`, under its replacement; the rest is left out."""
    return {
        new + key[len(old) :]: value
        for key, value in state.items()
        for old, new in prefixes.items()
        if key.startswith(old)
    }
