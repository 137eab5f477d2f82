import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.data.batches import collate, collate_packed
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.errors import Interrupted, RunFolderError, TrainingError
from qlora_trainer.formats.peft_adapter import factors_of, read
from qlora_trainer.numerics.loss import IGNORE_INDEX
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import TrainedAdapter
from qlora_trainer.runners.causal_lm import find_loss_path
from qlora_trainer.runtime.device import World
from qlora_trainer.runtime.progress import TrainingProgress, WorkProgress
from qlora_trainer.runtime.tracking import Tracker
from qlora_trainer.stages import evaluate, train
from qlora_trainer.stages.train import TrainingInputs
from qlora_trainer.stages.train.step import optimizer_step
from tests.stages.workbench import Bench, bench_for, random_rows, recipe_for

ROWS = random_rows(10)
VALIDATION = random_rows(4, seed=1)


@dataclass
class Watcher:
    """Observes a run and, when a step is reached, does what the test asks for."""

    at_step: Mapping[int, Callable[[], None]] = field(default_factory=dict)
    seen: list[TrainingProgress] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def training(self, progress: TrainingProgress) -> None:
        self.seen.append(progress)
        self.at_step.get(progress.step, lambda: None)()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def work(self, progress: WorkProgress) -> None: ...

    def stage_started(self, name: str) -> None: ...

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None: ...


def inputs_for(folder: Path, watcher: Watcher | None = None, rows: Sequence[EncodedRow] = ROWS) -> TrainingInputs:
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingInputs(
        rows=rows,
        pad_id=2,
        checkpoints=folder / "checkpoints",
        adapter=folder / "adapter",
        base_name="tiny",
        recipe_key="key",
        predicted_peak_bytes=1,
        validate=lambda model: evaluate.held_out_nats(model, VALIDATION, batch_size=2, pad_id=2),
        tracker=Tracker(folder),
        observer=watcher or Watcher(),
    )


def trained(bench: Bench, recipe: Recipe, folder: Path, watcher: Watcher | None = None) -> TrainedAdapter:
    torch.manual_seed(1)
    return train.train(bench.adapted(), recipe, inputs_for(folder, watcher))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    factors, _ = read(folder)
    return {f"{name}.{part}": getattr(found, part) for name, found in factors.items() for part in ("lora_a", "lora_b")}


def assert_same_adapter(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def gradients(bench: Bench, split: Sequence[Sequence[int]], *, is_packed: bool = False) -> tuple[float, Tensor]:
    """Mean loss and gradients of one step over the rows in ``split``, nothing stepped but by a rate of zero."""
    model = bench.adapted().train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept: list[Tensor] = []

    class Keep(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes what it is given and keeps it
            kept.extend(parameter.grad.clone().flatten() for parameter in parameters if parameter.grad is not None)

    result = optimizer_step(
        model,
        [collate_packed(ROWS, indexes) if is_packed else collate(ROWS, indexes, 2) for indexes in split],
        Keep(parameters, lr=1.0),
        path=find_loss_path(model),
        max_gradient_norm=1e9,
        world=World(),
        name_rows=str,
    )
    return float(result.nats) / result.label_tokens, torch.cat(kept)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[5], [3, 0], [4, 2, 1]], [[0], [1], [2], [3], [4], [5]]])
def test_every_split_into_micro_batches_packed_or_padded_has_the_same_loss_and_gradient(
    split: list[list[int]], is_packed: bool, llama_folder: Path, tmp_path: Path
) -> None:
    bench = bench_for(recipe_for(llama_folder, tmp_path))
    whole_loss, whole = gradients(bench, [[0, 1, 2, 3, 4, 5]])
    loss, parts = gradients(bench, split, is_packed=is_packed)
    # float32 sums of about 60 tokens in another order.
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert (parts - whole).norm() < 1e-4 * whole.norm()
    assert whole.norm() > 0


def test_the_loss_is_the_mean_over_label_tokens_of_the_plain_models_loss(llama_folder: Path, tmp_path: Path) -> None:
    bench = bench_for(recipe_for(llama_folder, tmp_path))
    loss, _ = gradients(bench, [[0, 1], [2]])
    model = bench.adapted()
    nats, count = 0.0, 0
    for row in ROWS[:3]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
        for place in range(1, len(row.token_ids)):
            if row.labels[place] != IGNORE_INDEX:
                nats -= float(logits[place - 1, row.labels[place]])
                count += 1
    assert loss == pytest.approx(nats / count, rel=1e-5)


def test_training_lowers_the_loss_and_reports_its_counts(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, training={"max_steps": 30, "learning_rate": 0.02})
    watcher = Watcher()
    result = trained(bench_for(recipe), recipe, tmp_path / "run", watcher)
    assert result.steps == 30
    assert watcher.seen[-1].nats_per_token < 0.7 * watcher.seen[0].nats_per_token
    assert watcher.seen[-1].seconds_left == 0
    per_epoch = sum(len(row.token_ids) for row in ROWS)
    assert result.tokens == 12 * per_epoch  # 30 steps of 4 rows are 12 epochs of 10
    assert result.label_tokens == 12 * sum(row.label_count for row in ROWS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/nats_per_token" in line] == list(range(1, 31))


@pytest.mark.parametrize(
    ("optimizer", "data_type"),
    [
        ("adamw", "nf4"),
        ("adamw_8bit", "nf4"),
        ("paged_adamw_8bit", "nf4"),
        ("paged_adamw_8bit", "none"),
        ("paged_adamw_8bit", "gptq_int4"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    optimizer: str, data_type: str, llama_folder: Path, tmp_path: Path
) -> None:
    # Rank 32: A of the widest layer has 4,096 values, so that 8-bit optimizers hold it in 8 bits.
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        lora={"rank": 32, "dropout": 0.1},
        quantization={"data_type": data_type},
        training={"max_steps": 6, "optimizer": optimizer, "validate_every_steps": 1},
    )
    bench = bench_for(recipe)
    whole = trained(bench, recipe, tmp_path / "whole")
    stopping = Watcher(at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        trained(bench, recipe, tmp_path / "parts", stopping)
    torch.manual_seed(99)  # whatever happened in between must not matter
    again = Watcher()
    parts = trained(bench, recipe, tmp_path / "parts", again)
    assert parts.resumed_at == (3,)
    assert "step 3 of 6" in again.notes[0]
    assert_same_adapter(whole.folder, parts.folder)
    assert [point[:2] for point in whole.curve] == [point[:2] for point in parts.curve]


def test_training_after_an_evaluation_is_training_bit_for_bit(llama_folder: Path, tmp_path: Path) -> None:
    often = recipe_for(llama_folder, tmp_path, training={"max_steps": 4, "validate_every_steps": 1})
    never = recipe_for(llama_folder, tmp_path, training={"max_steps": 4})
    bench = bench_for(often)
    with_evaluations = trained(bench, often, tmp_path / "often")
    without = trained(bench, never, tmp_path / "never")
    assert_same_adapter(with_evaluations.folder, without.folder)


def test_gradient_checkpointing_changes_no_bit(llama_folder: Path, tmp_path: Path) -> None:
    plain = recipe_for(llama_folder, tmp_path, lora={"dropout": 0.1})
    saving = recipe_for(llama_folder, tmp_path, lora={"dropout": 0.1}, training={"checkpointing": "full"})
    bench = bench_for(plain)
    one = trained(bench, plain, tmp_path / "plain")
    other = trained(bench, saving, tmp_path / "saving")
    assert_same_adapter(one.folder, other.folder)


def test_the_base_is_not_trained(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path)
    bench = bench_for(recipe)
    model = bench.adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
    adapters = factors_of(model)
    train.train(model, recipe, inputs_for(tmp_path / "run"))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(adapters[name].lora_b, found.lora_b) for name, found in factors_of(model).items())


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_rows(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path)
    model = bench_for(recipe).adapted()

    def spoil() -> None:
        with torch.no_grad():
            model.get_parameter(next(name for name, _ in model.named_parameters() if "lora_A" in name)).fill_(math.nan)

    with pytest.raises(TrainingError, match=r"step 2 of 4.*not a finite number.*rows \d+ \('prompt'\)"):
        train.train(model, recipe, inputs_for(tmp_path / "run", Watcher(at_step={1: spoil})))


def test_checkpoints_of_another_recipe_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path)
    bench = bench_for(recipe)
    trained(bench, recipe, tmp_path / "run")
    other = replace(inputs_for(tmp_path / "run"), recipe_key="other")
    with pytest.raises(RunFolderError, match="other settings or rows"):
        train.train(bench.adapted(), recipe, other)


def test_eval_mode_is_what_training_leaves(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path)
    model: nn.Module = bench_for(recipe).adapted()
    train.train(model, recipe, inputs_for(tmp_path / "run"))
    assert not model.training
