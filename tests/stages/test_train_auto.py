"""``auto``: the micro-batch and checkpointing are tried out before step 1, and nothing of it shows in the training."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.data.batches import BatchPlan
from qlora_trainer.errors import Interrupted, TrainingError
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Cut, TrainedAdapter
from qlora_trainer.stages import train
from qlora_trainer.stages.train import Fitting
from qlora_trainer.stages.train.choosing import longest_micro_batch, with_cut
from tests.stages.test_train import ROWS, Watcher, assert_same_adapter, inputs_for
from tests.stages.test_train_recovery import Memory
from tests.stages.workbench import bench_for, recipe_for

ALL = tuple(Cut(rows, policy) for policy in ("none", "selective", "full") for rows in (4, 2, 1))
AUTO = {"micro_batch_size": "auto", "gradient_accumulation_steps": None, "rows_per_step": 4, "checkpointing": "auto"}


def auto_recipe(base: Path, folder: Path, **training: object) -> Recipe:
    return recipe_for(base, folder, lora={"rank": 32, "dropout": 0.1}, training={**AUTO, **training})


def trained(
    recipe: Recipe,
    folder: Path,
    *,
    predict: Callable[[Cut], int] = lambda cut: 1,
    evaluate: Callable[[nn.Module], object] = lambda model: None,
    watcher: Watcher | None = None,
    memory: Memory | None = None,
) -> TrainedAdapter:
    torch.manual_seed(1)
    model: nn.Module = bench_for(recipe).adapted()
    fitting = Fitting(ALL, predict, evaluate)
    inputs = replace(inputs_for(folder, watcher), fitting=fitting)
    return train.train(memory.put_into(model) if memory else model, recipe, inputs)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_training_after_a_choice_has_the_bits_of_one_that_was_told_the_numbers(
    optimizer: str, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = auto_recipe(llama_folder, tmp_path, optimizer=optimizer)
    chosen = trained(recipe, tmp_path / "auto")
    assert chosen.chosen is not None
    told = trained(with_cut(recipe, chosen.chosen.cut), tmp_path / "told")
    assert told.chosen is None
    assert_same_adapter(chosen.folder, told.folder)
    assert chosen.curve == told.curve


def test_the_choice_is_the_fastest_of_what_was_measured_and_said_aloud(llama_folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    found = trained(auto_recipe(llama_folder, tmp_path), tmp_path / "run", watcher=watcher).chosen
    assert found is not None
    best = max(found.trials, key=lambda trial: trial.tokens_per_second or 0.0)
    assert found.cut == best.cut
    assert found.trials[0].cut == Cut(4, "none")
    assert all(trial.peak_bytes is not None and trial.peak_bytes <= found.budget_bytes for trial in found.trials)
    assert watcher.notes[-1] == f"chosen: {found.cut}; a step has 4 rows"
    # One line before the trials, one for each, one for the choice.
    assert len(watcher.notes) == len(found.trials) + 2


def test_what_is_predicted_not_to_fit_is_not_tried(llama_folder: Path, tmp_path: Path) -> None:
    def predict(cut: Cut) -> int:
        return 2**60 if cut.micro_batch_size > 1 or cut.checkpointing == "none" else 1

    found = trained(auto_recipe(llama_folder, tmp_path), tmp_path / "run", predict=predict).chosen
    assert found is not None
    assert [trial.cut for trial in found.trials] == [Cut(1, "selective")]


def test_what_runs_out_of_memory_when_tried_is_not_chosen(llama_folder: Path, tmp_path: Path) -> None:
    recipe = auto_recipe(llama_folder, tmp_path, batching="padded")
    found = trained(recipe, tmp_path / "run", memory=Memory(limit=2))
    assert found.chosen is not None
    tried = {trial.cut.micro_batch_size: trial.peak_bytes for trial in found.chosen.trials}
    assert tried[4] is None
    assert found.chosen.cut.micro_batch_size <= 2
    assert found.smaller_micro_batches == ()


def test_a_resumed_run_keeps_the_choice(llama_folder: Path, tmp_path: Path) -> None:
    recipe = auto_recipe(llama_folder, tmp_path)
    watcher = Watcher(at_step={2: lambda: signal.raise_signal(signal.SIGTERM)})
    with pytest.raises(Interrupted):
        trained(recipe, tmp_path / "run", watcher=watcher)

    def refuse(cut: Cut) -> int:
        raise AssertionError(f"{cut} is tried again")

    resumed = Watcher()
    with pytest.raises(AssertionError, match="tried again"):
        trained(recipe, tmp_path / "new", predict=refuse)
    found = trained(recipe, tmp_path / "run", predict=lambda cut: 7, watcher=resumed)
    assert resumed.notes[0].startswith("as chosen before: ")
    assert found.predicted_peak_bytes == 7
    assert found.chosen is not None
    whole = trained(with_cut(recipe, found.chosen.cut), tmp_path / "whole")
    assert_same_adapter(found.folder, whole.folder)


def test_where_nothing_fits_the_error_names_the_mends(llama_folder: Path, tmp_path: Path) -> None:
    recipe = auto_recipe(llama_folder, tmp_path, memory_budget="1MiB")
    with pytest.raises(TrainingError, match=r"not even one row at a time.*Lower data\.window"):
        trained(recipe, tmp_path / "run", predict=lambda cut: 2**21)


def test_without_a_prediction_the_numbers_are_asked_for(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Give the numbers"):
        trained(auto_recipe(llama_folder, tmp_path), tmp_path / "run", predict=lambda cut: 0)


def test_an_evaluation_batch_that_does_not_fit_is_told_before_the_first_step(
    llama_folder: Path, tmp_path: Path
) -> None:
    def evaluate(model: nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match=r"Lower evaluation\.batch_size"):
        trained(auto_recipe(llama_folder, tmp_path), tmp_path / "run", evaluate=evaluate)


def test_the_batch_that_is_tried_is_the_longest_of_the_training() -> None:
    lengths = [len(row.token_ids) for row in ROWS]
    plan = BatchPlan(micro_batch_size=1, gradient_accumulation_steps=4, seed=0)
    assert longest_micro_batch(lengths, plan, steps=100) == [lengths.index(max(lengths))]
    packed = replace(plan, micro_batch_size=2, gradient_accumulation_steps=2, longest_row=max(lengths))
    found = longest_micro_batch(lengths, packed, steps=100)
    assert max(lengths) < sum(lengths[index] for index in found) <= 2 * max(lengths)
