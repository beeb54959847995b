"""What a run needs to go on as if it had never stopped, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import strip_optimizer, unwrap_model

from gid_yolo.engine.side_files import read_or_set_aside
from gid_yolo.files import replaced

KEY = "run_state"  # in a checkpoint, beside Ultralytics' entries, which are rounded to half precision


def capture(
    model: nn.Module,
    ema: Any,
    optimizer: Any,
    *,
    last_step: int,
    iteration: int,
    ended: bool,
    counts: Mapping[str, int],
) -> dict:
    """The state of a run after an epoch, in full precision.

    Args:
        model: What is trained; its EMA is Ultralytics' `ModelEMA`.
        ema: Its average.
        optimizer: Of the run.
        last_step: Iteration of the last step of the optimiser, from 0; -1 before the first.
        iteration: Iterations done.
        ended: Nothing is left but the final evaluation.
        counts: What the run counts.

    Returns:
        Tensors and plain values: `model`, `ema`, `optimizer`, `gradients` that wait for a step, `last_step`, `ended`,
        `counts`.
    """
    network = unwrap_model(model)
    waiting = last_step < iteration - 1
    gradients = {name: p.grad for name, p in network.named_parameters() if waiting and p.grad is not None}
    return {
        "model": network.state_dict(),
        "ema": ema.ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "gradients": {name: grad.clone() for name, grad in gradients.items()},
        "last_step": last_step,
        "ended": ended,
        "counts": dict(counts),
    }


def restore(state: dict[str, Any], model: nn.Module, ema: Any, optimizer: Any) -> None:
    """Put back what `capture` took, but the gradients, into a run that has been set up."""
    network = unwrap_model(model)
    network.load_state_dict(state["model"])
    ema.ema.load_state_dict(state["ema"])
    own = {name: [g.get(name) for g in optimizer.param_groups] for name in ("fused", "foreach", "capturable")}
    optimizer.load_state_dict(state["optimizer"])
    for name, values in own.items():  # the device here chooses the kernel, not the checkpoint
        for group, value in zip(optimizer.param_groups, values, strict=True):
            if name in group:
                group[name] = value


def restore_gradients(gradients: dict[str, Tensor], model: nn.Module) -> None:
    """Put back gradients that wait for a step of the optimiser."""
    for name, parameter in unwrap_model(model).named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)


def save(contents: dict[str, Any], path: Path) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        OSError: It cannot be written; `torch.save` into a file would not say why.
    """
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with replaced(path) as part:
        part.write_bytes(buffer.getbuffer())


def strip(path: Path, updates: dict[str, Any]) -> None:
    """Ultralytics' `strip_optimizer` of a checkpoint that this run wrote, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with replaced(path) as part:
        contents = torch.load(path, "cpu", weights_only=False)
        contents.pop(KEY, None)
        try:
            torch.save(contents, part)
            with _unsaid():  # the name of what is being written
                strip_optimizer(part, updates=updates)
        except RuntimeError as error:  # torch.save does not say why
            raise OSError(f"{path.name} could not be written anew: {' '.join(str(error).split())[:100]}") from error


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Log nothing of Ultralytics' meanwhile but warnings."""
    level = LOGGER.level
    LOGGER.setLevel("WARNING")
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def _rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0][:1] != ["epoch"]:
        raise ValueError(f"its first line is {','.join(rows[0]) if rows else 'missing'}")
    return rows


def forget_epochs(path: Path, first: int) -> None:
    """Take the rows of epochs from `first` on (from 0) out of `results.csv`: they are about to be written again."""
    if not path.is_file():
        if first:
            LOGGER.warning(f"{path} is gone: it begins anew with epoch {first + 1}.")
        return
    rows = read_or_set_aside(path, _rows_of) or []
    kept = rows[:1] + [row for row in rows[1:] if row and row[0].strip().isdigit() and int(row[0]) <= first]
    if len(kept) < len(rows):
        with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(kept)
