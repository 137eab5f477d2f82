"""Training as one stage: the loop, and the adapter on disk that comes of it."""

from torch import nn

from qlora_trainer.errors import TrainingError
from qlora_trainer.formats.peft_adapter import AdapterSettings, factors_of, write
from qlora_trainer.recipe import Lora, Recipe
from qlora_trainer.records import ChosenCut, TrainedAdapter
from qlora_trainer.runners.causal_lm import LossPath, find_loss_path, set_checkpointing
from qlora_trainer.runtime import checkpoint
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.runtime.device import peak_allocated_bytes, reset_peak_allocated
from qlora_trainer.runtime.memory import PeakMemory
from qlora_trainer.stages.train.choosing import choose, cut_of, with_cut
from qlora_trainer.stages.train.inputs import TrainingInputs
from qlora_trainer.stages.train.loop import run_steps
from qlora_trainer.stages.train.progress import Progress
from qlora_trainer.stages.train.recovery import release_memory


def train(model: nn.Module, recipe: Recipe, inputs: TrainingInputs) -> TrainedAdapter:
    """Trains the model's adapter in place and writes it; errors are those of ``run_steps``."""
    device = next(model.parameters()).device
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    path = _told(find_loss_path(model), recipe, inputs)
    chosen = _chosen(model, recipe, inputs, path)
    if chosen is not None:
        recipe = with_cut(recipe, chosen.cut)
    set_checkpointing(model, cut_of(recipe).checkpointing)
    release_memory(device)
    reset_peak_allocated(device)
    with PeakMemory() as memory:
        progress = run_steps(model, recipe, inputs, trainable=trainable, path=path, chosen=chosen)
    set_checkpointing(model, "none")
    with writing_folder(inputs.adapter) as partial:
        write(partial, factors_of(model), _settings(recipe.lora, inputs.base_name))
    return TrainedAdapter(
        folder=inputs.adapter,
        steps=progress.step,
        tokens=progress.tokens,
        label_tokens=progress.label_tokens,
        tokens_per_second=progress.tokens / progress.seconds,
        label_tokens_per_second=progress.label_tokens / progress.seconds,
        peak_bytes=peak_allocated_bytes(device) or memory.peak_bytes(),
        predicted_peak_bytes=_predicted(inputs, chosen),
        final_nats_per_token=_last_validation(progress),
        curve=tuple(progress.curve),
        seconds=progress.seconds,
        resumed_at=tuple(progress.resumed_at),
        trainable_parameters=sum(parameter.numel() for parameter in trainable.values()),
        smaller_micro_batches=tuple(progress.smaller_micro_batches),
        skipped_steps=tuple(progress.skipped_steps),
        incidents=tuple(progress.incidents),
        damaged_checkpoints=tuple(progress.damaged_checkpoints),
        chosen=chosen,
    )


def _chosen(model: nn.Module, recipe: Recipe, inputs: TrainingInputs, path: LossPath) -> ChosenCut | None:
    """What was chosen before the interruption, or is chosen now; None where the recipe leaves nothing open."""
    if not recipe.training.is_to_be_chosen:
        return None
    found = checkpoint.latest(inputs.checkpoints)
    earlier = None if found is None else Progress.from_json(found[1].progress)
    if earlier is not None and earlier.recipe_key == inputs.recipe_key and earlier.chosen is not None:
        inputs.observer.note(f"as chosen before: {earlier.chosen.cut}")
        return earlier.chosen
    return choose(model, recipe, inputs, path)


def _predicted(inputs: TrainingInputs, chosen: ChosenCut | None) -> int:
    if chosen is None or inputs.fitting is None:
        return inputs.predicted_peak_bytes
    return inputs.fitting.predict(chosen.cut)


def _told(path: LossPath, recipe: Recipe, inputs: TrainingInputs) -> LossPath:
    """The path, after what it does not allow was said aloud."""
    if recipe.training.batching == "packed" and not path.packs:
        inputs.observer.note(f"rows are padded, not packed (training.batching): {path.why_not}")
    if path.head is None:
        inputs.observer.note(f"the logits of a whole micro-batch are held at once: {path.why_not}")
    return path


def _settings(lora: Lora, base_name: str) -> AdapterSettings:
    return AdapterSettings(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        base_model=base_name,
    )


def _last_validation(progress: Progress) -> float:
    """Validation loss after the last step, which the loop always takes."""
    found = [validation for _, _, validation in progress.curve if validation is not None]
    if not found:
        raise TrainingError(
            "training ended without a validation; the checkpoints folder is not of this program's making"
        )
    return found[-1]
