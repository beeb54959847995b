"""Ultralytics' trainer, in which no NaN is silent: it is traced, written down, and recovered from or an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.engine.detection_model import count_objects
from gid_yolo.engine.nonfinite import Report, event_of, sentence_of
from gid_yolo.engine.scheduled_trainer import ScheduledTrainer
from gid_yolo.engine.watch import Reading, Watch, not_finite
from gid_yolo.errors import UserError, some

# Steps in succession that a gradient scaler may skip. Each halves its scale: after so many, from its first 2^16, it is
# 2^-16, so that no gradient was too large for float16 because of it
MOST_SKIPPED = 32


class WatchedTrainer(ScheduledTrainer):
    """Adds to Ultralytics' trainer what says where a NaN or an infinite value came from (`nonfinite.json`).

    - A step that a gradient scaler skips because of a finite loss whose scaled gradient overflows is counted, no more;
      where the scaler has come to 1 or less it was no overflow of its making, and is an event.
    - After any other one the run goes on where it can: the scaler skips it, or Ultralytics goes back to `last.pt` at
      the end of the epoch, as it does for a loss that is NaN; here also for batch statistics that are.
    - Where it cannot, it stops with the sentence: in the first epoch, which Ultralytics would train to its end; where
      the teacher is the cause; and where the epoch was tried in vain.

    In several processes each one writes what it saw, and they stop together: on what all of them see, which are the
    averaged gradients of a step, and at the end of an epoch.
    """

    terms_in_half: tuple[str, ...] = ()  # loss terms that compute in half precision where the network does
    loss: Tensor | None
    watch: Watch | None = None
    report: Report
    _lost: bool = False  # the weights are: until the epoch is tried again nothing else can be said
    waits: bool = False  # a gradient that is not finite waits for a step
    _in_succession: int = 0  # steps that were skipped
    _scale: float | None = None  # the scaler's in the last of them
    _stop_reason: tuple[bool, str] | None = None  # whether it is a gradient that says so, which all processes share
    _last_sentence: str = ""
    _asks: bool = False  # which term has a gradient that is not finite, in the epoch that is tried again because of one

    # Set-up -----------------------------------------------------------------------------------------------------------

    def _setup_train(self) -> None:
        native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.args.amp == "bf16" and not native:
            raise UserError(
                f"amp=bf16 needs a GPU that computes in bfloat16, which {self.device} does not: set amp=False."
            )
        self.add_callback("on_train_epoch_start", self._start_watch)
        self.add_callback("on_train_batch_start", self._start_note)
        self.add_callback("on_train_batch_end", self._judge_batch)
        self.add_callback("on_train_epoch_end", self._judge_epoch)
        super()._setup_train()
        if RANK in {-1, 0} and not self.resume:
            for old in self.save_dir.glob("nonfinite*.json"):
                old.unlink()
        name = "nonfinite.json" if RANK in {-1, 0} else f"nonfinite_rank{RANK}.json"
        self.report = Report(self.save_dir / name)
        self.watch = Watch(self)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ultralytics' preparation, of which the result is noted."""
        count_objects(batch)
        batch = super().preprocess_batch(batch)
        if self.watch:
            self.watch.see(batch)
        return batch

    def optimizer_step(self) -> None:
        """Ultralytics' step, of which the gradients are noted."""
        if self.watch:
            self.watch.step()
        self.clip_gradients()
        super().optimizer_step()

    def clip_gradients(self) -> None:
        """What is done to gradients that were noted before Ultralytics clips the whole: nothing here."""

    # Judgement --------------------------------------------------------------------------------------------------------

    def _start_watch(self, _: Any) -> None:
        self._lost = self.waits = False
        if not self.nan_recovery_attempts:  # else it is the epoch of the last sentence that is tried again
            self._last_sentence = ""
        if self.watch:
            self.watch.forget()  # what a pass that ran out of memory has left
        self._skipped_before = self.counts["steps_skipped"]

    def _start_note(self, _: Any) -> None:
        if self.watch:
            self.watch.start()
        if self._asks and self.nan_recovery_attempts and self.distilling:
            unwrap_model(self.model).asked = "pulls"

    def _judge_batch(self, _: Any) -> None:
        for reading in self.watch.end() if self.watch else ():
            self._judge(reading)

    def _judge(self, reading: Reading) -> None:
        """Count, report, and stop where the run cannot go on."""
        scaled = self.scaler.is_enabled()
        forward = bool(reading.bad_inputs or reading.bad_terms)
        stepped, backward = reading.stepped, bool(reading.gradients)
        unscaled = reading.scale is None or reading.scale <= 1
        if self._lost:
            self.counts["batches_not_finite"] += 1
        elif forward or (backward and unscaled and not self.waits):
            self._note_event(reading)
        self.waits = (self.waits or forward or (backward and unscaled)) and not stepped
        if stepped:
            self._in_succession = self._in_succession + 1 if backward and scaled else 0
        if backward and scaled and stepped:
            self.counts["steps_skipped"] += 1
            self._scale = reading.scale
            if self._in_succession > MOST_SKIPPED:
                self._must_stop(
                    f"{self._sentence(reading)}; {self._in_succession} steps in succession were skipped, "
                    f"until the gradient scaler came to {reading.scale:.3g}",
                    shared=not forward,
                )
        elif backward and stepped:
            self._lost = True
        if self.world_size <= 1 or backward:  # a gradient is everyone's
            self._stop_together()

    def _note_event(self, reading: Reading) -> None:
        self.counts["batches_not_finite"] += 1
        self._last_sentence = sentence = self._sentence(reading)
        precision = "float32" if not self.amp else "bfloat16" if self.args.amp == "bf16" else "float16"
        self._asks = self._asks or not (reading.bad_inputs or reading.bad_terms)
        noted = self.report.add(event_of(reading, sentence, precision, RANK))
        self.report.write(self.counts)
        of_teacher = bool(reading.bad_inputs) and reading.bad_inputs[0].startswith("teacher")
        if of_teacher or (self.epoch == self.start_epoch and not self.scaler.is_enabled()):
            self._must_stop(sentence, shared=not (reading.bad_inputs or reading.bad_terms))
        elif noted:
            LOGGER.warning(f"{sentence}.")

    def _judge_epoch(self, _: Any) -> None:
        """Read the rest; look at the weights and at the statistics of batch norms, which skip no step."""
        if self.watch is None:
            return
        for reading in self.watch.read():
            self._judge(reading)
        self._lost = self._lost or (self.waits and not self.scaler.is_enabled())
        if not self._lost and (damaged := not_finite(self.model)):
            self._lost = True
            if not self._last_sentence:
                self._last_sentence = f"{some(damaged, 2)} became NaN or infinite in epoch {self.epoch + 1}"
                LOGGER.warning(f"{self._last_sentence}.")
        self._asks = self._asks and self._lost
        if self._lost and self.epoch == self.start_epoch:
            self._must_stop(self._last_sentence, shared=True)
        skipped = self.counts["steps_skipped"] - self._skipped_before
        if skipped:
            LOGGER.info(
                f"{skipped} steps of epoch {self.epoch + 1} were skipped: their gradients, times the scaler's "
                f"{self._scale:.3g} in the last of them, were not finite."
            )
            self.report.write(self.counts)
        self._stop_together()

    def _sentence(self, reading: Reading) -> str:
        own = bool(self.amp) and set(reading.bad_terms) <= set(self.terms_in_half)
        half_teacher = self.teacher_in_float16
        return sentence_of(reading, self.distilling, half=bool(self.amp), half_terms=own, half_teacher=half_teacher)

    @property
    def teacher_in_float16(self) -> bool:
        """Whether a teacher computes in float16, whose largest number is 65504: by its own precision, or by `amp=`."""
        precision = getattr(unwrap_model(self.model), "precision", None)
        return precision == torch.float16 or (precision is None and bool(self.amp) and self.args.amp != "bf16")

    def _must_stop(self, reason: str, *, shared: bool) -> None:
        self._stop_reason = self._stop_reason or (shared, reason)

    def _stop_together(self) -> None:
        """End the run where one of its processes must; in several, all of them are here.

        Raises:
            UserError: One must.
        """
        states = [(self._stop_reason, self._lost)]
        if self.world_size > 1:
            states = [(None, False)] * self.world_size
            dist.all_gather_object(states, (self._stop_reason, self._lost))
        self._lost = any(lost for _, lost in states)
        if reasons := [reason for reason, _ in states if reason]:
            self.report.write(self.counts)
            raise UserError(f"{min(reasons)[1]}{self._says_more()}.")

    def _says_more(self) -> str:
        text = f"; {self.save_dir / ('nonfinite*.json' if self.world_size > 1 else 'nonfinite.json')} says more"
        return (
            f"{text}, and {self.last} is whole: gid-train resume=True model={self.last}" if self.last.exists() else text
        )

    # Recovery ---------------------------------------------------------------------------------------------------------

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Ultralytics' way back to `last.pt`, for which it looks at the last loss and the fitness alone.

        Raises:
            UserError: There is none.
        """
        if self._lost and self.loss is not None:
            self.loss = torch.full_like(self.loss.detach(), torch.nan)
        try:
            recovered = bool(super()._handle_nan_recovery(epoch))
        except RuntimeError as error:
            because = f"{self._last_sentence}; " if self._last_sentence else ""
            reason = f"{because}Ultralytics gave up ({' '.join(str(error).split()).rstrip('.')})"
            raise UserError(f"{reason}{self._says_more()}.") from error
        if recovered:
            self.counts["recoveries"] += 1
            self._in_succession = 0
            self.report.write(self.counts)
        return recovered
