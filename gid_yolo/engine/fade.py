"""How much a run's distillation weighs, batch by batch, and what happens where it ends."""

from __future__ import annotations

from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.distill.fading import fading
from gid_yolo.engine.watched_trainer import WatchedTrainer


def set_factor(trainer: WatchedTrainer) -> None:
    """Before a batch: how much the distillation terms weigh in it. Where they have just ended, the optimiser forgets.

    AdamW divides a step by an average size of past gradients, which it keeps for about a thousand steps. Those of an
    unbalanced feature loss are hundreds of times the task's, and would make the steps without them small.
    """
    factor = factor_of(trainer, trainer.iteration)
    unwrap_model(trainer.model).factor = factor
    if not factor and trainer.iteration and factor_of(trainer, trainer.iteration - 1):
        trainer.optimizer.state.clear()
        trainer.optimizer.zero_grad()  # of batches under the teacher that wait for a step, where several make one
        trainer.waits = False
        if RANK in {-1, 0}:
            LOGGER.info(f"the teacher is let go from iteration {trainer.iteration + 1} on; the optimiser starts anew.")


def told(trainer: WatchedTrainer) -> str:
    """For how long a run is distilled, in words: what is logged as 0 afterwards has not failed."""
    iterations, until = trainer.schedule.iterations, trainer.own("distill_until") or 1.0
    last = sum(factor_of(trainer, i) > 0 for i in range(iterations)) if until < 1 else iterations
    decay, warmup = trainer.own("distill_decay") or "constant", trainer.own("distill_warmup") or 0.0
    text = "to the end" if last == iterations else f"until iteration {last} of {iterations}, then the student alone"
    text += "" if decay == "constant" else f"; the weights fall until then ({decay})"
    return text + (f"; they rise over {warmup:g} of the run" if warmup else "")


def factor_of(trainer: WatchedTrainer, iteration: int) -> float:
    """How much the distillation terms weigh in an iteration of a run; beyond its length as in its last."""
    iterations = trainer.schedule.iterations  # with time= an estimate, which a run may pass
    return fading(
        (min(iteration, iterations - 1) + 0.5) / iterations,  # the middle of the batch: a rise does not begin at 0
        until=trainer.own("distill_until") or 1.0,
        decay=trainer.own("distill_decay") or "constant",
        warmup=trainer.own("distill_warmup") or 0.0,
    )
