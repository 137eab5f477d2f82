"""``micro_batch_size: auto`` and ``checkpointing: auto``: which cut of a step fits and is fastest, before step 1.

Prediction says which cuts can fit; of these the promising ones are tried out on the longest micro-batch of the whole
training. A policy that computes more again pays only if more rows fit under it, and of one policy fewer rows pay only
if more were not faster: so few cuts have to be tried. The rows of an optimizer step stay the same under every cut.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from qlora_trainer.data.batches import Batch, BatchPlan, collate, collate_packed, training_micro_batches
from qlora_trainer.data.store import row_lengths
from qlora_trainer.errors import TrainingError
from qlora_trainer.numerics.stored_bytes import optimizer_state_bytes
from qlora_trainer.recipe import Recipe, bytes_of
from qlora_trainer.records import ChosenCut, Cut, Trial
from qlora_trainer.runners.causal_lm import LossPath
from qlora_trainer.runtime.device import World, usable_bytes
from qlora_trainer.stages.train.inputs import Fitting, TrainingInputs
from qlora_trainer.stages.train.probing import evaluation_fits, probe

logger = logging.getLogger(__name__)

MARGIN = 0.1
"""Share of the usable memory that a choice leaves alone where the recipe names no budget: what checkpoints,
validation and other programs may take."""
GIB = 2**30


def with_cut(recipe: Recipe, cut: Cut) -> Recipe:
    """The recipe with the cut's numbers in it, as if they had been written there."""
    training = recipe.training
    numbers = {
        "micro_batch_size": cut.micro_batch_size,
        "checkpointing": cut.checkpointing,
        "rows_per_step": training.batch_size,
        "gradient_accumulation_steps": training.batch_size // cut.micro_batch_size,
        "memory_budget": None,
    }
    return recipe.model_copy(update={"training": training.model_copy(update=numbers)})


def cut_of(recipe: Recipe) -> Cut:
    """The cut that a recipe names.

    Raises:
        ValueError: it leaves something to be chosen.
    """
    training = recipe.training
    if training.checkpointing == "auto":
        raise ValueError("checkpointing: auto is still to be chosen")
    return Cut(training.rows_at_a_time, training.checkpointing)


def choose(model: nn.Module, recipe: Recipe, inputs: TrainingInputs, path: LossPath) -> ChosenCut:
    """Tries out what the recipe leaves open; leaves the model, and all chance, as they were.

    Raises:
        TrainingError: nothing fits, or there is no prediction to begin with, or several processes train.
    """
    if World.current().size > 1:
        raise TrainingError(
            "training.micro_batch_size: auto and checkpointing: auto are for one process, because several would have "
            "to agree. Give the numbers; a run of one process says which it chose"
        )
    fitting = inputs.fitting
    if fitting is None:
        raise ValueError("a recipe that leaves something to be chosen needs TrainingInputs.fitting")
    if not all(fitting.predict(cut) for cut in fitting.cuts):
        raise TrainingError(
            "training.micro_batch_size: auto and checkpointing: auto begin with a prediction, and this model is of a "
            "kind that cannot be predicted (`qlora-trainer check` says why). Give the numbers"
        )
    budget = _budget(model, recipe)
    inputs.observer.note(f"trying out how many rows fit into {budget / GIB:.2f} GiB at a time, and are fastest")
    trials = tuple(_Choosing(model, recipe, inputs, fitting, path, budget).trials())
    usable = [trial for trial in trials if trial.peak_bytes is not None and trial.peak_bytes <= budget]
    for trial in trials:
        _say(inputs, _in_words(trial, budget))
    if not usable:
        raise TrainingError(_nothing_fits(recipe, trials, budget))
    best = max(usable, key=lambda trial: trial.tokens_per_second or 0.0)
    if not evaluation_fits(model, fitting.evaluate):
        raise TrainingError(
            "the longest validation rows do not fit into memory as one batch. Lower evaluation.batch_size (now "
            f"{recipe.evaluation.batch_size}) or data.window"
        )
    _say(inputs, f"chosen: {best.cut}; a step has {recipe.training.batch_size} rows")
    return ChosenCut(best.cut, budget, trials)


def _budget(model: nn.Module, recipe: Recipe) -> int:
    asked = recipe.training.memory_budget
    if asked is not None:
        return bytes_of(asked)
    return int((1 - MARGIN) * usable_bytes(next(model.parameters()).device))


@dataclass(frozen=True)
class _Choosing:
    """What trials are made with."""

    model: nn.Module
    recipe: Recipe
    inputs: TrainingInputs
    fitting: Fitting
    path: LossPath
    budget: int

    def trials(self) -> Iterator[Trial]:
        """Trials of the cuts that may be the fastest, most promising first."""
        largest_measured = 0
        for _, cuts in groupby(self.fitting.cuts, key=lambda cut: cut.checkpointing):
            fitting = [cut for cut in cuts if self.fitting.predict(cut) <= self.budget]
            if not fitting or fitting[0].micro_batch_size <= largest_measured:
                continue
            best = 0.0
            for cut in fitting:
                trial = self._try(cut)
                yield trial
                fits = trial.peak_bytes is not None and trial.peak_bytes <= self.budget
                if fits and (trial.tokens_per_second or 0.0) <= best:
                    break
                if fits:
                    best = trial.tokens_per_second or 0.0
                    largest_measured = max(largest_measured, cut.micro_batch_size)

    def _try(self, cut: Cut) -> Trial:
        found = probe(self.model, self._longest_batch(cut), self.path, cut.checkpointing)
        predicted = self.fitting.predict(cut)
        if found is None:
            return Trial(cut, predicted, None, None)
        return Trial(cut, predicted, found.peak_bytes + self._state_bytes(), found.tokens / found.seconds)

    def _state_bytes(self) -> int:
        """What the optimizer, which is not there yet, will hold on the device."""
        name = self.recipe.training.optimizer
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if name.startswith("paged_") and trained[0].device.type == "cuda":
            return 0
        sizes = [parameter.numel() for parameter in trained]
        return optimizer_state_bytes(sizes, has_8bit_state=name.endswith("8bit"))

    def _longest_batch(self, cut: Cut) -> Batch:
        settings, rows = self.recipe.training, self.inputs.rows
        lengths = row_lengths(rows)
        plan = BatchPlan(
            micro_batch_size=cut.micro_batch_size,
            gradient_accumulation_steps=settings.batch_size // cut.micro_batch_size,
            seed=self.recipe.run.seed,
            longest_row=max(lengths) if settings.batching == "packed" and self.path.packs else None,
        )
        indexes = longest_micro_batch(lengths, plan, steps=settings.steps(len(rows)))
        return collate(rows, indexes, self.inputs.pad_id) if plan.capacity is None else collate_packed(rows, indexes)


def longest_micro_batch(lengths: Sequence[int], plan: BatchPlan, *, steps: int) -> list[int]:
    """Row indexes of the micro-batch with the most tokens, padding included, of all steps, or of two epochs.

    Args:
        lengths: tokens of each row.
        plan: of the training.
        steps: that will be taken.
    """
    two_epochs = -(-2 * len(lengths) // plan.batch_size)

    def tokens(indexes: list[int]) -> int:
        if plan.capacity is None:
            return len(indexes) * max(lengths[index] for index in indexes)
        return sum(lengths[index] for index in indexes)

    return max(
        (batch for step in range(min(steps, two_epochs)) for batch in training_micro_batches(step, lengths, plan)),
        key=tokens,
    )


def _say(inputs: TrainingInputs, text: str) -> None:
    logger.info(text)
    inputs.observer.note(text)


def _in_words(trial: Trial, budget: int) -> str:
    if trial.peak_bytes is None:
        return f"{trial.cut}: memory ran out (predicted {trial.predicted_bytes / GIB:.2f} GiB)"
    beyond = "" if trial.peak_bytes <= budget else ", more than there is"
    return (
        f"{trial.cut}: {trial.tokens_per_second:,.0f} tokens/s, peak {trial.peak_bytes / GIB:.2f} GiB "
        f"(predicted {trial.predicted_bytes / GIB:.2f}){beyond}"
    )


def _nothing_fits(recipe: Recipe, trials: Sequence[Trial], budget: int) -> str:
    if trials:
        found = "; ".join(_in_words(trial, budget) for trial in trials)
    else:
        found = "by prediction, not even one row at a time with every layer computed again"
    return (
        f"nothing that the recipe allows fits into {budget / GIB:.2f} GiB: {found}. Lower data.window "
        f"(now {recipe.data.window}) or lora.rank (now {recipe.lora.rank}), allow more with training.micro_batch_size: "
        "auto and training.checkpointing: auto, or raise training.memory_budget where it is set"
    )
