"""Runs the steps: rows of each step, rate, log, validation, checkpoints, interruption, resume.

Everything a step depends on is either in the checkpoint (adapter, optimizer, random states, counters) or a pure
function of the step number (rows, learning rate), so a resumed run takes the same steps to the same bits.
"""

import logging
import math
import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from qlora_trainer.data.batches import Batch, BatchPlan, collate, collate_packed, training_micro_batches
from qlora_trainer.data.store import row_lengths
from qlora_trainer.errors import Interrupted, RunFolderError, TrainingError
from qlora_trainer.numerics.schedule import learning_rate_scale
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import ChosenCut
from qlora_trainer.runners.causal_lm import LossPath
from qlora_trainer.runtime import bnb, checkpoint
from qlora_trainer.runtime.device import World, allocated_bytes
from qlora_trainer.runtime.interruption import StoppedAtOnce, StopRequest, stop_requests
from qlora_trainer.runtime.memory import resident_bytes
from qlora_trainer.runtime.progress import TrainingProgress
from qlora_trainer.stages.train import mends
from qlora_trainer.stages.train.inputs import TrainingInputs
from qlora_trainer.stages.train.progress import Progress
from qlora_trainer.stages.train.recovery import MicroBatchTooLargeError, release_memory, smaller_micro_batch
from qlora_trainer.stages.train.resuming import optimizer_family, require_own
from qlora_trainer.stages.train.saving import Saving
from qlora_trainer.stages.train.step import StepResult, optimizer_step
from qlora_trainer.stages.train.watchdog import Alarm, UnsoundStepError, watch

logger = logging.getLogger(__name__)


def run_steps(
    model: nn.Module,
    recipe: Recipe,
    inputs: TrainingInputs,
    *,
    trainable: dict[str, nn.Parameter],
    path: LossPath,
    chosen: ChosenCut | None = None,
) -> Progress:
    """Trains ``trainable`` in place, from the newest checkpoint where there is one, to the last step.

    Args:
        model: the adapted model; changed in place and left in eval mode.
        recipe: its training section and ``run.seed``.
        inputs: rows, folders, callbacks.
        trainable: the adapter's parameters by name; only they are stepped and saved.
        path: how this model's loss is taken.
        chosen: what was tried out before, where the recipe said ``auto``; checkpoints keep it.

    Returns:
        Counters and curve of the whole run.

    Raises:
        TrainingError: the watchdog stops the run, or a single row does not fit into memory; names step and rows. The
            last checkpoint stays.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        RunFolderError: the checkpoints are damaged or belong to another recipe, or the disk is nearly full.
    """
    loop = _Loop(model, recipe, inputs, trainable, path)
    loop.progress.chosen = chosen
    loop.resume()
    with stop_requests() as stop:
        loop.look_around(stop)  # a run that was stopped while it validated has that before it
        while loop.progress.step < loop.steps:
            loop.step()
            loop.look_around(stop)
    model.eval()
    return loop.progress


class _Loop:
    """The loop's state: model, optimizer, counters."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        inputs: TrainingInputs,
        trainable: dict[str, nn.Parameter],
        path: LossPath,
    ) -> None:
        settings = recipe.training
        self.path = path
        self.model, self.settings, self.inputs, self.trainable = model, settings, inputs, trainable
        self.watchdog = recipe.watchdog
        self.steps = settings.steps(len(inputs.rows))
        self.world = World.current()
        self.lengths = row_lengths(inputs.rows)
        self.plan = BatchPlan(
            micro_batch_size=settings.rows_at_a_time,
            gradient_accumulation_steps=settings.batch_size // settings.rows_at_a_time,
            seed=recipe.run.seed,
            longest_row=max(self.lengths) if settings.batching == "packed" and path.packs else None,
        )
        self.optimizer = bnb.make_optimizer(
            settings.optimizer,
            list(trainable.values()),
            learning_rate=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.progress = Progress(recipe_key=inputs.recipe_key, optimizer=optimizer_family(self.optimizer))
        self.saving = Saving(inputs.checkpoints, keep=settings.keep_checkpoints)

    def resume(self) -> None:
        """Goes back to the newest whole checkpoint; changes model, optimizer, counters and random states."""
        found = checkpoint.latest(self.inputs.checkpoints)
        if found is None:
            self.inputs.tracker.resume_from(0)
            return
        progress = Progress.from_json(found.state.progress)
        require_own(
            progress,
            found.state.adapter,
            folder=self.inputs.checkpoints,
            recipe_key=self.inputs.recipe_key,
            optimizer=self.optimizer,
            trainable=self.trainable,
        )
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(found.state.adapter[name])
        self.optimizer.load_state_dict(found.state.optimizer)
        checkpoint.restore_random(found.state.random)
        self.progress = progress
        for _, rows in progress.smaller_micro_batches:
            self._cut_into(rows)
        self.saving.saved_step = found.step
        for what in found.damaged:
            self._tell(f"{what}; training goes on from the checkpoint before it, of step {found.step}")
            progress.damaged_checkpoints.append((found.step, what))
        if found.step < self.steps or found.damaged:
            progress.resumed_at.append(found.step)
            self._tell(f"resuming at step {found.step} of {self.steps}")
        self.inputs.tracker.resume_from(found.step, progress.metrics_bytes)

    def step(self) -> None:
        """One optimizer step on the rows that belong to its number."""
        began = time.perf_counter()
        self.model.train()
        scale = learning_rate_scale(
            self.progress.step,
            warmup_steps=self.settings.warmup_steps,
            total_steps=self.steps,
            schedule=self.settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * scale
        alarm, gradient_norm = None, None
        try:
            batches, result = self._step_that_fits()
        except UnsoundStepError as error:
            self._heed_unsound(error, seconds=time.perf_counter() - began)
        else:
            nats, gradient_norm = float(result.nats), result.gradient_norm
            self.progress.add(
                nats=nats,
                tokens=sum(self.lengths[index] for batch in batches for index in batch.row_indexes),
                label_tokens=result.label_tokens,
                seconds=time.perf_counter() - began,
            )
            alarm = watch(self.progress.losses, nats / result.label_tokens, self.watchdog)
        if self.progress.step % self.settings.log_every_steps == 0 or self.progress.step == self.steps:
            self._log(gradient_norm)
        if alarm is not None:
            self._heed_alarm(alarm)

    def look_around(self, stop: StopRequest) -> None:
        """Between two steps: validates and saves where it is due, heeds a request to stop and a disk that fills."""
        step, last = self.progress.step, self.progress.step == self.steps
        if self._is_validation_due() and not stop:
            self._validate(stop)
        self._require_room()
        if step > 0 and (last or stop or step % self.settings.checkpoint_every_steps == 0):
            self._save()
        if stop and (not last or self._is_validation_due()):
            raise Interrupted(
                f"stopped by {stop.signal_name} after step {step} of {self.steps}; the state is saved in "
                f"{self.inputs.checkpoints}. Run the same command again to go on from there."
            )

    def _is_validation_due(self) -> bool:
        step, every = self.progress.step, self.settings.validate_every_steps
        is_wanted = step == self.steps or (every is not None and step % every == 0)
        return step > 0 and is_wanted and not self.progress.is_validated()

    def _heed_unsound(self, error: UnsoundStepError, *, seconds: float) -> None:
        """Skips the step where the recipe says so, and else stops the run with the state before that step saved."""
        number, losses = self.progress.step + 1, self.progress.losses
        self.optimizer.zero_grad(set_to_none=True)
        chosen = {"non_finite": self.watchdog.non_finite, "zero_gradients": self.watchdog.zero_gradients}[error.fault]
        is_one_too_many = losses.skips_in_a_row == self.watchdog.skips_in_a_row
        if chosen == "stop" or is_one_too_many:
            if number > 1 and self._is_sound():
                self._save()
            mend = mends.unsound_step(error, learning_rate=self.settings.learning_rate, may_be_skipped=chosen == "stop")
            before = f", and {losses.skips_in_a_row} steps before it were skipped" if losses.skips_in_a_row else ""
            raise TrainingError(
                f"step {number} of {self.steps}: {error}{before}. The state of step {self._saved_step} is saved "
                f"({self.inputs.checkpoints}). {mend}"
            ) from error
        losses.skips_in_a_row += 1
        self.progress.skip(str(error), seconds=seconds)
        self.inputs.tracker.log(
            {"train/skipped_steps": len(self.progress.skipped_steps), "train/skipped_because": str(error)}, number
        )
        self._tell(f"step {number} of {self.steps} is skipped: {error}")

    def _heed_alarm(self, alarm: Alarm) -> None:
        step = self.progress.step
        if alarm.action == "stop":
            # Not saved: it would push out what was saved while all was well.
            raise TrainingError(
                f"step {step} of {self.steps}: {alarm.text}. The last saved state is that of step "
                f"{self._saved_step} ({self.inputs.checkpoints}). {alarm.mend}, and give the run a new "
                "name."
            )
        self._warn(f"{alarm.text}. {alarm.mend}")

    def _warn(self, text: str) -> None:
        self.progress.incidents.append((self.progress.step, text))
        self.inputs.tracker.log({"train/incident": text}, self.progress.step)
        self._tell(f"step {self.progress.step} of {self.steps}: {text}")

    def _tell(self, text: str) -> None:
        logger.info("%s", text)
        self.inputs.observer.note(text)

    def _step_that_fits(self) -> tuple[list[Batch], StepResult]:
        """Takes the step; where it does not fit into memory, once more on the same rows, fewer at a time."""
        random_before = checkpoint.capture_random()
        while True:
            batches = self._batches()
            try:
                return batches, self._step_on(batches)
            except MicroBatchTooLargeError as error:
                too_large = error
            self._shrink_micro_batches(too_large)
            checkpoint.restore_random(random_before)

    def _shrink_micro_batches(self, too_large: MicroBatchTooLargeError) -> None:
        number, many = self.progress.step + 1, self.plan.micro_batch_size
        fewer = smaller_micro_batch(many, batch_size=self.settings.batch_size)
        # Processes that train together would have to agree on the new size; the others already wait for this one.
        if fewer is None or self.world.size > 1:
            why = mends.does_not_fit(
                too_large, self.inputs.rows, self.settings, micro_batch_size=many, checkpoints=self.inputs.checkpoints
            )
            raise TrainingError(f"step {number} of {self.steps}: {why}")
        self.optimizer.zero_grad(set_to_none=True)
        release_memory(next(self.model.parameters()).device)
        self._cut_into(fewer)
        self.progress.shrink_micro_batches(fewer)
        self.inputs.tracker.log({"train/micro_batch_size": fewer}, number)
        self._tell(
            f"step {number} of {self.steps}: {many} rows at a time do not fit into memory; the step is repeated, and "
            f"all that follow are taken, with {fewer} at a time. A step still has {self.settings.batch_size} rows"
        )

    def _cut_into(self, rows: int) -> None:
        self.plan = replace(
            self.plan, micro_batch_size=rows, gradient_accumulation_steps=self.settings.batch_size // rows
        )

    def _batches(self) -> list[Batch]:
        share = (self.world.rank, self.world.size)
        rows = self.inputs.rows
        micro_batches = training_micro_batches(self.progress.step, self.lengths, self.plan, share=share)
        if self.plan.capacity is None:
            return [collate(rows, indexes, self.inputs.pad_id) for indexes in micro_batches]
        return [collate_packed(rows, indexes) for indexes in micro_batches]

    def _step_on(self, batches: list[Batch]) -> StepResult:
        return optimizer_step(
            self.model,
            batches,
            self.optimizer,
            path=self.path,
            max_gradient_norm=self.settings.max_gradient_norm,
            world=self.world,
            name_rows=partial(mends.name_rows, self.inputs.rows),
        )

    def _log(self, gradient_norm: float | None) -> None:
        """One record of the steps since the last; ``gradient_norm`` of the last step, None where it was skipped."""
        window = self.progress.close_window()
        if window is None:
            return
        nats, label_rate = window
        step = self.progress.step
        self.progress.curve.append((step, nats, None))
        rate = self.optimizer.param_groups[0]["lr"]
        memory = allocated_bytes(next(self.model.parameters()).device) or resident_bytes()
        self.inputs.tracker.log(
            {
                "train/nats_per_token": nats,
                "train/learning_rate": rate,
                "train/gradient_norm": gradient_norm,
                "train/label_tokens_per_second": label_rate,
                "train/memory_bytes": memory,
                "train/tokens": self.progress.tokens,
            },
            step,
        )
        self.inputs.observer.training(
            TrainingProgress(
                step=step,
                steps=self.steps,
                nats_per_token=nats,
                learning_rate=rate,
                label_tokens_per_second=label_rate,
                memory_bytes=memory,
                seconds_left=self.progress.seconds / step * (self.steps - step),
            )
        )

    def _validate(self, stop: StopRequest) -> None:
        """Takes the validation loss; a request to stop leaves it at once, because a resumed run takes it anew."""
        try:
            with stop.at_once():
                nats = self.inputs.validate(self.model)
        except StoppedAtOnce:
            return
        self.progress.curve.append((self.progress.step, None, nats))
        self.inputs.tracker.log({"validation/nats_per_token": nats}, self.progress.step)
        if not math.isfinite(nats):
            self._warn(f"the validation loss is {nats}")

    def _require_room(self) -> None:
        """Stops while the newest state can still be saved, and not at the write that finds the disk full."""
        if self.progress.step == 0:
            return
        if not self.saving.is_size_known:
            self.saving.expect(self._state())
        lack = self.saving.lack_of_room()
        if lack is None:
            return
        if self.saving.fits():
            self._save()
        raise RunFolderError(
            f"stopped after step {self.progress.step} of {self.steps}, before a write could fail: {lack}. The state of "
            f"step {self._saved_step} is saved. Make room and run the same command again to go on."
        )

    def _save(self) -> None:
        if self.progress.step == self.saving.saved_step or not self.world.is_main:
            return
        if not self._is_sound():
            raise TrainingError(
                f"step {self.progress.step} of {self.steps}: the adapter holds values that are not finite, which the "
                f"last update made. The state of step {self._saved_step} is saved ({self.inputs.checkpoints}). Lower "
                f"training.learning_rate (now {self.settings.learning_rate}) and give the run a new name."
            )
        # Before the state that refers to it: a power cut must not leave a checkpoint whose metrics are lost.
        self.progress.metrics_bytes = self.inputs.tracker.flush()
        self.saving.save(self.progress.step, self._state())

    def _is_sound(self) -> bool:
        """Whether the state may be saved: one that is spoilt would push out what was saved while all was well."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trainable.values())

    @property
    def _saved_step(self) -> int:
        """Step of the newest checkpoint, 0 where there is none."""
        return max(0, self.saving.saved_step)

    def _state(self) -> checkpoint.CheckpointState:
        return checkpoint.CheckpointState(
            adapter={name: parameter.detach().cpu() for name, parameter in self.trainable.items()},
            optimizer=self.optimizer.state_dict(),
            random=checkpoint.capture_random(),
            progress=self.progress.to_json(),
        )
