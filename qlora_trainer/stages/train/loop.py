"""Runs the steps: rows of each step, rate, log, validation, checkpoints, interruption, resume.

Everything a step depends on is either in the checkpoint (adapter, optimizer, random states, counters) or a pure
function of the step number (rows, learning rate), so a resumed run takes the same steps to the same bits.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from qlora_trainer.data.batches import Batch, BatchPlan, collate, collate_packed, training_micro_batches
from qlora_trainer.errors import Interrupted, RunFolderError, TrainingError
from qlora_trainer.numerics.schedule import learning_rate_scale
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import ChosenCut
from qlora_trainer.runners.causal_lm import LossPath
from qlora_trainer.runtime import bnb, checkpoint
from qlora_trainer.runtime.device import World, allocated_bytes
from qlora_trainer.runtime.interruption import StopRequest, stop_requests
from qlora_trainer.runtime.memory import resident_bytes
from qlora_trainer.runtime.progress import TrainingProgress
from qlora_trainer.stages.train.inputs import TrainingInputs
from qlora_trainer.stages.train.progress import Progress
from qlora_trainer.stages.train.recovery import MicroBatchTooLargeError, release_memory, smaller_micro_batch
from qlora_trainer.stages.train.step import StepResult, optimizer_step


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
        TrainingError: loss or gradients are not finite, or a single row does not fit into memory; names step and
            rows. The last checkpoint stays.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        RunFolderError: the checkpoints belong to another recipe, or the disk is full.
    """
    loop = _Loop(model, recipe, inputs, trainable, path)
    loop.progress.chosen = chosen
    loop.resume()
    with stop_requests() as stop:
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
        self.steps = settings.steps(len(inputs.rows))
        self.world = World.current()
        self.lengths = tuple(len(row.token_ids) for row in inputs.rows)
        self.plan = BatchPlan(
            micro_batch_size=settings.rows_at_a_time,
            gradient_accumulation_steps=settings.batch_size // settings.rows_at_a_time,
            seed=recipe.run.seed,
            is_packed=settings.batching == "packed" and path.packs,
        )
        self.optimizer = bnb.make_optimizer(
            settings.optimizer,
            list(trainable.values()),
            learning_rate=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.progress = Progress(recipe_key=inputs.recipe_key)
        self.saved_step = -1

    def resume(self) -> None:
        """Goes back to the newest whole checkpoint; changes model, optimizer, counters and random states."""
        found = checkpoint.latest(self.inputs.checkpoints)
        if found is None:
            self.inputs.tracker.resume_from(0)
            return
        step, state = found
        progress = Progress.from_json(state.progress)
        if progress.recipe_key != self.inputs.recipe_key:
            raise RunFolderError(
                f"{self.inputs.checkpoints} holds checkpoints of a training with other settings or rows. "
                "Give the run another run.name, or delete that folder."
            )
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state.adapter[name])
        self.optimizer.load_state_dict(state.optimizer)
        checkpoint.restore_random(state.random)
        self.progress = progress
        for _, rows in progress.smaller_micro_batches:
            self._cut_into(rows)
        self.saved_step = step
        if step < self.steps:
            self.progress.resumed_at.append(step)
            self.inputs.observer.note(f"resuming at step {step} of {self.steps}")
        self.inputs.tracker.resume_from(step)

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
        batches, result = self._step_that_fits()
        self.progress.add(
            nats=float(result.nats),
            tokens=sum(self.lengths[index] for batch in batches for index in batch.row_indexes),
            label_tokens=result.label_tokens,
            seconds=time.perf_counter() - began,
        )
        if self.progress.step % self.settings.log_every_steps == 0 or self.progress.step == self.steps:
            self._log(result)

    def look_around(self, stop: StopRequest) -> None:
        """Between two steps: validates and saves where it is due, and heeds a request to stop."""
        step, last = self.progress.step, self.progress.step == self.steps
        every = self.settings.validate_every_steps
        if last or (every is not None and step % every == 0):
            self._validate()
        if last or stop or step % self.settings.checkpoint_every_steps == 0:
            self._save()
        if stop and not last:
            raise Interrupted(
                f"stopped by {stop.signal_name} after step {step} of {self.steps}; the state is saved in "
                f"{self.inputs.checkpoints}. Run the same command again to go on from there."
            )

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
            raise TrainingError(self._does_not_fit(too_large))
        self.optimizer.zero_grad(set_to_none=True)
        release_memory(next(self.model.parameters()).device)
        self._cut_into(fewer)
        self.progress.shrink_micro_batches(fewer)
        self.inputs.tracker.log({"train/micro_batch_size": fewer}, number)
        self.inputs.observer.note(
            f"step {number} of {self.steps}: {many} rows at a time do not fit into memory; the step is repeated, and "
            f"all that follow are taken, with {fewer} at a time. A step still has {self.settings.batch_size} rows"
        )

    def _cut_into(self, rows: int) -> None:
        self.plan = replace(
            self.plan, micro_batch_size=rows, gradient_accumulation_steps=self.settings.batch_size // rows
        )

    def _does_not_fit(self, too_large: MicroBatchTooLargeError) -> str:
        longest = max(self.lengths[index] for index in too_large.row_indexes)
        mends = ["lower data.window"]
        if self.settings.checkpointing != "full":
            mends.append("set training.checkpointing: full")
        if self.plan.micro_batch_size > 1:
            mends.append(f"lower training.micro_batch_size (now {self.plan.micro_batch_size})")
        return (
            f"step {self.progress.step + 1} of {self.steps}: training {self._name_rows(too_large.row_indexes)} of up "
            f"to {longest} tokens do not fit into memory ({too_large.reason.splitlines()[0]}). The last checkpoint is "
            f"whole ({self.inputs.checkpoints}). To mend it: {', or '.join(mends)}; then give the run a new name."
        )

    def _batches(self) -> list[Batch]:
        share = (self.world.rank, self.world.size)
        rows = self.inputs.rows
        micro_batches = training_micro_batches(self.progress.step, self.lengths, self.plan, share=share)
        if self.plan.is_packed:
            return [collate_packed(rows, indexes) for indexes in micro_batches]
        return [collate(rows, indexes, self.inputs.pad_id) for indexes in micro_batches]

    def _step_on(self, batches: list[Batch]) -> StepResult:
        try:
            return optimizer_step(
                self.model,
                batches,
                self.optimizer,
                path=self.path,
                max_gradient_norm=self.settings.max_gradient_norm,
                world=self.world,
                name_rows=self._name_rows,
            )
        except TrainingError as error:
            raise TrainingError(
                f"step {self.progress.step + 1} of {self.steps}: {error}. The last checkpoint is whole "
                f"({self.inputs.checkpoints}). Look at those rows, or lower training.learning_rate "
                f"(now {self.settings.learning_rate}) and give the run a new name."
            ) from error

    def _name_rows(self, indexes: Sequence[int]) -> str:
        shown = ", ".join(f"{index} ({self.inputs.rows[index].prompt[:40]!r})" for index in indexes[:4])
        more = f" and {len(indexes) - 4} more" if len(indexes) > 4 else ""
        return f"rows {shown}{more}"

    def _log(self, result: StepResult) -> None:
        nats, label_rate = self.progress.close_window()
        step = self.progress.step
        self.progress.curve.append((step, nats, None))
        rate = self.optimizer.param_groups[0]["lr"]
        memory = allocated_bytes(next(self.model.parameters()).device) or resident_bytes()
        self.inputs.tracker.log(
            {
                "train/nats_per_token": nats,
                "train/learning_rate": rate,
                "train/gradient_norm": result.gradient_norm,
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

    def _validate(self) -> None:
        nats = self.inputs.validate(self.model)
        self.progress.curve.append((self.progress.step, None, nats))
        self.inputs.tracker.log({"validation/nats_per_token": nats}, self.progress.step)

    def _save(self) -> None:
        if self.progress.step == self.saved_step or not self.world.is_main:
            return
        state = checkpoint.CheckpointState(
            adapter={name: parameter.detach().cpu() for name, parameter in self.trainable.items()},
            optimizer=self.optimizer.state_dict(),
            random=checkpoint.capture_random(),
            progress=self.progress.to_json(),
        )
        checkpoint.save(self.inputs.checkpoints, self.progress.step, state, keep=self.settings.keep_checkpoints)
        self.saved_step = self.progress.step
