"""How much the distillation terms weigh over a run: a student that outgrows its teacher must be let go.

The paper's weights are constant. A distilled student that trains for long comes to what its teacher knows, and is then
held back there; Cho and Hariharan (On the Efficacy of Knowledge Distillation, 2019) stop distilling before the end.
"""

from __future__ import annotations

import math

DECAYS = ("constant", "linear", "cosine")


def fading(progress: float, *, until: float = 1.0, decay: str = "constant", warmup: float = 0.0) -> float:
    """Factor of all distillation terms.

    Args:
        progress: Share of the run's iterations that are done, from 0 to under 1.
        until: Share of the run after which the factor is 0.
        decay: How it gets there: `constant` (at once), `linear`, or `cosine` (half a wave).
        warmup: Share of the run over which it rises from 0, along a line.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: Another decay.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay={decay} must be one of {', '.join(DECAYS)}.")
    if progress > until:  # at it counts, so that a run of one batch has a teacher
        return 0.0
    rise = min(1.0, progress / warmup) if warmup else 1.0
    if decay == "constant":
        return rise
    gone = progress / until
    return rise * (1 - gone if decay == "linear" else (1 + math.cos(math.pi * gone)) / 2)
