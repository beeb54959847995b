"""How strongly each loss term pulls at the student's pyramid, and where to: `gradients.csv`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.engine.side_files import read_or_set_aside
from gid_yolo.files import replaced

if TYPE_CHECKING:
    from gid_yolo.engine.distillation_trainer import DistillationTrainer

_SCALES = (2.0**16, 2.0**8, 1.0)
_COLUMNS = ("iteration", "term", "value", "norm", "cosine", "share")


class Pull(NamedTuple):
    """A term at the student's pyramid, whose maps every term has its gradient through.

    Where the pyramid is frozen, at the student's predictions.

    Attributes:
        value: The weighted term.
        norm: L2 norm of its gradient with respect to all maps together.
        cosine: To the first term's gradient, the task's.
        share: Of the sum of all gradients, along that sum: <g, sum> / |sum|^2. They add up to 1; a negative one pulls
            against the others.
    """

    value: float
    norm: float
    cosine: float
    share: float


def pulls(terms: Mapping[str, Tensor], pyramid: Sequence[Tensor], angles: bool = True) -> dict[str, Pull]:
    """What every term does at the pyramid, of a graph that stays as it is: parameters get no gradient here.

    Half precision rounds small gradients to 0, so that a term is scaled up before, as a gradient scaler does, by the
    largest of `_SCALES` that overflows nowhere. Being powers of two, they change nothing in fp32.

    Args:
        terms: The weighted terms by name, the task's first.
        pyramid: Maps that they were computed from.
        angles: Compute `cosine` and `share`, which keeps the gradients of all terms at once; NaN without it.
    """
    if not angles:
        found = {name: float(_gradient(term, pyramid).norm()) for name, term in terms.items()}
        return {name: Pull(float(terms[name].detach()), norm, math.nan, math.nan) for name, norm in found.items()}
    gradients = [_gradient(term, pyramid) for term in terms.values()]
    norms = [float(x.norm()) for x in gradients]
    units = [x.div_(norm or 1.0) for x, norm in zip(gradients, norms, strict=True)]
    with torch.autocast(pyramid[0].device.type, enabled=False):  # which would round the products
        cosines = [[float(x @ y) for y in units] for x in units]
    along = [
        sum(norm * other * cosine for other, cosine in zip(norms, row, strict=True))
        for norm, row in zip(norms, cosines, strict=True)
    ]
    total = sum(along)  # the squared norm of the sum
    return {
        name: Pull(float(term.detach()), norms[i], cosines[i][0], along[i] / total if total else 0.0)
        for i, (name, term) in enumerate(terms.items())
    }


def _gradient(term: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
    """(N,) of all maps, in float32."""
    flat = torch.zeros(0)
    for scale in _SCALES:
        found = torch.autograd.grad(
            term * scale, list(pyramid), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([x.float().flatten() for x in found]) / scale
        if flat.isfinite().all():
            break
    return flat


class GradientStatistics:
    """Writes what each term does in every n-th iteration, and sums up an epoch.

    With several processes it is what it does to the first one's images.

    Args:
        path: Of the file.
        every: Iterations from one row to the next; the run's first is one.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.rows: list[tuple[Any, ...]] = []

    def start(self, trainer: DistillationTrainer) -> None:
        """Begin an epoch, which may be one that is tried again."""
        self.rows = []

    def ask(self, trainer: DistillationTrainer) -> None:
        """Before a batch whose turn it is."""
        if trainer.iteration % self.every == 0:
            unwrap_model(trainer.model).asked = "pulls"

    def add(self, trainer: DistillationTrainer) -> None:
        """After a batch."""
        found: dict[str, Pull] | None = unwrap_model(trainer.model).pulls
        done = trainer.iteration  # the batch is counted by now
        if found is not None and (done - 1) % self.every == 0:
            self.rows += [(done, name, *pull) for name, pull in found.items()]

    def write(self, trainer: DistillationTrainer) -> None:
        """Append the epoch's rows to the file, which a resumed run goes on with, and log their medians."""
        first = trainer.epoch * len(trainer.train_loader)
        rows = read_or_set_aside(self.path, read_gradients) or []
        old = [row for row in rows if row[0] <= first]  # not what an interrupted epoch left
        with replaced(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((i, name, *(f"{x:.6g}" for x in pull)) for i, name, *pull in [*old, *self.rows])
        if self.rows:
            LOGGER.info(summary(self.rows, trainer.epoch + 1, unwrap_model(trainer.model).pulled_at))


def read_gradients(path: Path) -> list[tuple[Any, ...]]:
    """Rows (iteration, term, value, norm, cosine, share) of a `gradients.csv`; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if tuple(header) != _COLUMNS:
        raise ValueError(f"its first line is {','.join(header)}")
    return [(int(i), name, *map(float, (a, b, c, d))) for i, name, a, b, c, d in rows]


def summary(rows: Sequence[tuple[Any, ...]], epoch: int, place: str = "pyramid") -> str:
    """The medians of the finite values, a line a term."""
    names = list(dict.fromkeys(row[1] for row in rows))
    middle = {
        name: [_median([row[k] for row in rows if row[1] == name]) for k in range(2, len(_COLUMNS))] for name in names
    }
    task = middle[names[0]][1]
    lines = [
        f"  {name:<17} {value:>11.4g} {norm:>11.4g} {norm / task if task else math.nan:>9.3g} "
        f"{cosine:>7.2f} {100 * share:>7.1f} %"
        for name, (value, norm, cosine, share) in middle.items()
    ]
    count = len({row[0] for row in rows})
    head = f"  {'':<17} {'value':>11} {'gradient':>11} {'x task':>9} {'cosine':>7} {'share':>9}"
    return "\n".join([f"\nGradients at the student's {place}, epoch {epoch}, medians of {count}", head, *lines, ""])


def _median(values: Sequence[float]) -> float:
    finite = [x for x in values if math.isfinite(x)]
    return median(finite) if finite else math.nan
