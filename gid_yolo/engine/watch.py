"""What is finite in a training step: noted on the device, and read by the host when nothing waits for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.engine.instance_counts import COUNT_NAMES
from gid_yolo.engine.views import dense_head

# What the terms are made of, in the order in which data flows; the teacher, which does not learn, before the student
INPUTS = (
    *("images", "targets", "teacher features", "teacher predictions"),
    *("student features", "student predictions"),
)


@dataclass
class Reading:
    """What the host has read of one batch.

    Attributes:
        iteration: Of the run, from 1; likewise `epoch`, and `batch` within the epoch.
        attempt: How often the epoch had been tried before.
        files: The images.
        lr: Learning rate of each parameter group.
        terms: Value of every loss term; the sum under `loss`.
        inputs: Whether each of `INPUTS` was finite, as far as there are such.
        scale: The gradient scaler's; None where there is none.
        gradients: Parameters whose gradient, of this batch and those since the last step, is not finite.
        stepped: The optimiser made a step with them.
        pulled: Terms whose own gradient at the student's pyramid is not finite, of a batch that is asked for `pulls`.
    """

    iteration: int
    epoch: int
    batch: int
    attempt: int
    files: list[str] = field(default_factory=list)
    lr: dict[str, float] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, bool] = field(default_factory=dict)
    scale: float | None = None
    gradients: list[str] = field(default_factory=list)
    stepped: bool = False
    pulled: list[str] = field(default_factory=list)

    @property
    def bad_inputs(self) -> list[str]:
        """What was not finite of them; the first is where it began."""
        return [name for name, finite in self.inputs.items() if not finite]

    @property
    def bad_terms(self) -> list[str]:
        """Terms that are not finite; `loss` alone where finite ones have a sum that is not."""
        found = [name for name, value in self.terms.items() if not isfinite(value)]
        return [name for name in found if name != "loss"] or found


@dataclass
class _Note:
    """One batch on the device: scalars by name, and the largest number of each parameter's gradient."""

    reading: Reading
    inputs: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    norms: Tensor | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    copy: Tensor | None = None  # on the host, once `ready`
    ready: Any = None


class Watch:
    """Notes every batch of a trainer, and hands over what it noted as `Reading`s.

    A step of the GPU is not waited for. What is noted are sums: one is not finite where a summand is not, at the cost
    of a pass over features and predictions and nothing written. The sums of a batch go to the host as one vector behind
    the batch's own kernels, and are read one batch later, when the device has the next one queued already; at the end
    of an epoch, where Ultralytics waits anyway, the last is. The delay is the same in all processes, so that what they
    share, the averaged gradients, is seen by all of them after the same iteration. On a CPU there is no delay.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.delay = 1 if trainer.device.type == "cuda" else 0
        self.waiting: deque[_Note] = deque()
        self.note: _Note | None = None
        self.hooks: list[Any] = []

    def start(self) -> None:
        """Before a batch: look at what the heads are given and what they give.

        The hooks stay no longer than the batch, for averages and checkpoints are copies of the model.
        """
        self._unhook()
        trainer = self.trainer
        first = trainer.epoch * len(trainer.train_loader)
        self.note = _Note(
            Reading(
                iteration=trainer.iteration + 1,
                epoch=trainer.epoch + 1,
                batch=trainer.iteration - first + 1,
                attempt=trainer.nan_recovery_attempts,
            )
        )
        if trainer.args.compile:  # a hook would have the graph compiled anew
            return
        model = unwrap_model(trainer.model)
        teacher = getattr(model, "teacher_model", None)
        if teacher is not None:
            self._hook(teacher, "teacher")
        self._hook(getattr(model, "student_model", model), "student")

    def see(self, batch: dict[str, Any]) -> None:
        """Images and ground truth as the model gets them."""
        if self.note is None:
            return
        self.note.reading.files = list(batch.get("im_file", ()))
        self.note.inputs = {"images": checksum([batch["img"]]), "targets": checksum([batch["bboxes"], batch["cls"]])}

    def step(self) -> None:
        """Before a step of the optimiser: its gradients, which a scaler may have scaled and so made infinite."""
        if self.note is None:
            return
        self.note.reading.stepped = True
        self._see_gradients(self.note)

    def _see_gradients(self, note: _Note) -> None:
        groups = self.trainer.optimizer.param_groups
        note.parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if note.parameters:
            grads = [p.grad for p in note.parameters if p.grad is not None]
            # The largest of each, as a scaler looks at them: squares of finite ones can overflow
            note.norms = torch.stack([x.float() for x in torch._foreach_norm(grads, torch.inf)])
        if self.trainer.scaler.is_enabled():
            note.scale = self.trainer.scaler.scale(torch.ones((), device=self.trainer.device))
        note.reading.lr = {f"pg{i}": group["lr"] for i, group in enumerate(groups)}

    def end(self) -> list[Reading]:
        """After a batch.

        Returns:
            What can be read by now.
        """
        self._unhook()
        if self.note is None:
            return []
        note, trainer, self.note = self.note, self.trainer, None
        if not note.reading.stepped:
            self._see_gradients(note)
        note.inputs = {name: note.inputs[name] for name in INPUTS if name in note.inputs}
        pulls = getattr(unwrap_model(trainer.model), "pulls", None) or {}
        note.reading.pulled = [name for name, pull in pulls.items() if not isfinite(pull.norm)]
        terms = {name: value for name, value in trainer.loss_items.items() if name not in COUNT_NAMES}
        terms["loss"] = trainer.loss
        note.reading.terms = dict.fromkeys(terms, 0.0)
        scale = [] if note.scale is None else [note.scale]
        scalars = [*note.inputs.values(), *terms.values(), *scale]
        parts = [torch.stack([torch.as_tensor(x, device=trainer.device).detach().float().sum() for x in scalars])]
        if note.norms is not None:
            parts.append(note.norms)
        note.copy = torch.cat(parts)
        if note.copy.is_cuda:
            note.copy = note.copy.to("cpu", non_blocking=True)  # PyTorch takes pinned memory for it
            note.ready = torch.cuda.Event()
            note.ready.record()
        self.waiting.append(note)
        return self.read(self.delay)

    def read(self, left: int = 0) -> list[Reading]:
        """All but the last `left` batches that are noted."""
        return [self._read(self.waiting.popleft()) for _ in range(len(self.waiting) - left)]

    def forget(self) -> None:
        """Drop what was noted, as of an epoch that is tried again."""
        self._unhook()
        self.note = None
        self.waiting.clear()

    def _read(self, note: _Note) -> Reading:
        if note.ready is not None:
            note.ready.synchronize()
        reading, values = note.reading, iter(note.copy.tolist() if note.copy is not None else ())
        reading.inputs = {name: isfinite(next(values)) for name in note.inputs}
        reading.terms = {name: next(values) for name in reading.terms}
        reading.scale = None if note.scale is None else next(values)
        if note.norms is not None:
            bad = {id(p) for p, norm in zip(note.parameters, values, strict=True) if not isfinite(norm)}
            named = unwrap_model(self.trainer.model).named_parameters() if bad else ()
            reading.gradients = [name for name, p in named if id(p) in bad]
        return reading

    def _hook(self, model: nn.Module, who: str) -> None:
        def look(_: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if self.note is None or f"{who} features" in self.note.inputs:
                return
            features = tree_leaves(given)
            known = {id(x) for x in features}
            predictions = [x for x in tree_leaves(made) if isinstance(x, Tensor) and id(x) not in known]
            self.note.inputs |= {f"{who} features": checksum(features), f"{who} predictions": checksum(predictions)}

        self.hooks.append(dense_head(model).register_forward_hook(look))

    def _unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A float32 scalar that is not finite where one of the numbers is not; 10^33 of float16's would overflow it."""
    return torch.stack([x.detach().sum(dtype=torch.float32) for x in tensors]).sum()


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Parameters and buffers of a model that hold NaN or infinite values."""
    named = [(name, x) for name, x in unwrap_model(model).state_dict().items() if x.is_floating_point()]
    sums = torch.stack([x.sum(dtype=torch.float32) for _, x in named]).isfinite().tolist()
    return [name for (name, _), finite in zip(named, sums, strict=True) if not finite]
