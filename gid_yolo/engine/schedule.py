"""Length and learning rate of a run: by epochs or by iterations, with multi-step decay.

An iteration is one batch, of all processes together, as in the paper and in detectron2; where a batch has fewer images
than `nbs`, several iterations make one step of the optimiser.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gid_yolo.errors import UserError

# Where the user gives the first, the second of the defaults, a recipe or a model's yaml is void: another way to say the
# same, or a share of what is not known then
_SAME = {"epochs": "iterations", "warmup_epochs": "warmup_iterations", "time": "distill_until"}
# Shares of a run, with the values that ask for none
_SHARES = {"distill_until": 1, "distill_decay": "constant", "distill_warmup": 0}


@dataclass(frozen=True)
class Schedule:
    """When a run ends and when its learning rate falls.

    Attributes:
        batches: Iterations of an epoch.
        iterations: Iterations of the run; the last epoch may be partial.
        milestones: Iterations, counted from 0, from which on the learning rate is `gamma` times what it was.
        gamma: The factor of each milestone.
    """

    batches: int
    iterations: int
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    @property
    def epochs(self) -> int:
        """Epochs of the run, the last of which may be partial."""
        return math.ceil(self.iterations / self.batches)

    def factor(self, iteration: int) -> float:
        """Learning rate in an iteration over the initial one, without warm-up."""
        return self.gamma ** bisect_right(self.milestones, iteration)

    def describe(self) -> str:
        """The schedule in one line."""
        parts = [f"{self.iterations} iterations, {self.iterations / self.batches:.3g} epochs of {self.batches}"]
        if self.milestones:
            parts.append(f"learning rate x {self.gamma:g} at iteration {', '.join(map(str, self.milestones))}")
        return "; ".join(parts)


def schedule_of(args: Mapping[str, Any], batches: int, epochs: int) -> Schedule:
    """The schedule that arguments ask for.

    Args:
        args: Arguments of the run; those that are missing ask for nothing.
        batches: Iterations of an epoch.
        epochs: Epochs of a run that has no `iterations=`.
    """
    iterations, steps = args.get("iterations"), _steps(args)
    if not iterations:
        steps = [round(step * batches) for step in steps]
    return Schedule(batches, iterations or epochs * batches, tuple(steps), args.get("lr_gamma") or 0.1)


def override(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the arguments of `own` over it; `epochs` also voids the base's `iterations`, and so on."""
    void = {
        second
        for first, second in _SAME.items()
        if own.get(first) is not None and second not in own and base.get(second) is not None
    }
    return {**base, **dict.fromkeys(void), **own}


def check_schedule(args: Mapping[str, Any]) -> None:
    """Check the arguments of the schedule as far as they are given.

    Raises:
        UserError: One sentence about the first value that cannot work.
    """
    iterations, warmup, gamma = (args.get(key) for key in ("iterations", "warmup_iterations", "lr_gamma"))
    if iterations is not None and not _whole(iterations, 1):
        raise UserError(f"iterations={iterations} must be a whole number of at least 1.")
    if warmup is not None and not _whole(warmup, 0):
        raise UserError(f"warmup_iterations={warmup} must be a whole number that is not negative.")
    if iterations is not None and warmup is not None:
        check_warmup(warmup, iterations)
    if gamma is not None and not (_number(gamma) and 0 < gamma <= 1):
        raise UserError(f"lr_gamma={gamma} must be a number over 0 and at most 1.")
    if args.get("lr_steps") is not None:
        _check_steps(args)
    if args.get("time") is not None and (iterations is not None or args.get("lr_steps")):
        key = "lr_steps" if iterations is None else "iterations"
        raise UserError(f"time={args['time']} leaves the run's length open and {key}= fixes it: leave one of them out.")


def check_shares(args: Mapping[str, Any]) -> None:
    """Refuse what is said in shares of a new run whose length is not known.

    Raises:
        UserError: Which of them.
    """
    for key, nothing in _SHARES.items() if args.get("time") is not None else ():
        if args.get(key) not in (None, nothing):
            raise UserError(
                f"time={args['time']} leaves the run's length open, of which {key}={args[key]} is a share: leave one "
                "of them out."
            )


def stretched(args: Mapping[str, Any], times: float) -> dict[str, Any]:
    """The arguments of the same schedule drawn out to `times` its length; its warm-up, in numbers, is as it was.

    Args:
        args: Checked arguments of a run, defaults among them.
        times: Of its length, above 1; what is no whole number of epochs, or of iterations, becomes the next one.

    Returns:
        Those that change.
    """
    length = "epochs" if args.get("iterations") is None else "iterations"
    long = math.ceil(times * args[length] - 1e-6)  # 1.1 x 10 is a little over 11
    steps = [long * step / args[length] for step in _steps(args)]  # all inside the run; of epochs, parts of one too
    if length == "iterations":
        steps = [round(step) for step in steps]
    return {length: long, **({"lr_steps": steps} if steps else {})}


def check_warmup(warmup: int, iterations: int) -> None:
    """Refuse a warm-up that the run does not outlast.

    Raises:
        UserError: It does not.
    """
    if warmup >= iterations:
        raise UserError(f"warmup_iterations={warmup} must be under the {iterations} iterations of the run: lower it.")


def _check_steps(args: Mapping[str, Any]) -> None:
    given, iterations = args["lr_steps"], args.get("iterations")
    unit, end = ("epochs", args.get("epochs")) if iterations is None else ("iterations", iterations)
    steps = _steps(args)
    if not all(_number(step) and step > 0 for step in steps):
        raise UserError(f"lr_steps={given} must be a list of numbers over 0, e.g. lr_steps=[8,11].")
    if iterations is not None and not all(_whole(step, 1) for step in steps):
        raise UserError(f"lr_steps={given} must be whole numbers where iterations= is given, which they count.")
    if any(a >= b for a, b in pairwise(steps)):
        raise UserError(f"lr_steps={given} must increase from step to step.")
    if steps and _number(end) and steps[-1] >= end:
        raise UserError(
            f"lr_steps={given} must lie inside the run of {end} {unit}: they count iterations where iterations= is "
            "given and epochs where it is not; lr_steps=None turns them off."
        )


def _steps(args: Mapping[str, Any]) -> list[Any]:
    given = args.get("lr_steps")
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
