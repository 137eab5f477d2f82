"""A step that does not fit into memory is repeated with fewer rows at a time; the lack of memory is injected."""

import json
import math
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.errors import Interrupted, TrainingError
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import TrainedAdapter
from qlora_trainer.stages import train
from qlora_trainer.stages.train.recovery import is_lack_of_memory, smaller_micro_batch
from tests.stages.test_train import ROWS, Watcher, assert_same_adapter, inputs_for
from tests.stages.workbench import Bench, bench_for, recipe_for

LONGEST = max(len(row.token_ids) for row in ROWS)
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
LACKS = (torch.OutOfMemoryError(CUDA_MESSAGE), RuntimeError(CPU_MESSAGE), MemoryError())


@dataclass
class Memory:
    """Room for ``limit`` rows at a time, once ``plenty`` passes of training are done.

    Attributes:
        passes: rows of each training pass that was begun; packed: as many of the longest row as have its tokens.
        left_over: for each failed pass, whether its hidden state was still alive when the next one began.
    """

    limit: int
    plenty: int = 0
    error: Exception = field(default_factory=lambda: torch.OutOfMemoryError(CUDA_MESSAGE))
    passes: list[int] = field(default_factory=list)
    left_over: list[bool] = field(default_factory=list)
    failed: Callable[[], Tensor | None] | None = None

    def put_into(self, model: nn.Module) -> nn.Module:
        """The model, whose last layer now asks for memory."""
        embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        embedding.register_forward_pre_hook(self._begin)
        last = [module for name, module in model.named_modules() if name.endswith(".norm")][-1]
        last.register_forward_pre_hook(self._take)
        return model

    def _begin(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if module.training:
            token_ids = arguments[0]
            self.passes.append(max(len(token_ids), math.ceil(token_ids.numel() / LONGEST)))
            if self.failed is not None:
                self.left_over.append(self.failed() is not None)
                self.failed = None

    def _take(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if module.training and self.passes[-1] > self.limit and len(self.passes) > self.plenty:
            self.failed = weakref.ref(arguments[0])
            raise type(self.error)(*self.error.args)  # a new one: an error keeps the frames it went through


def trained(
    bench: Bench, recipe: Recipe, folder: Path, *, memory: Memory | None = None, watcher: Watcher | None = None
) -> TrainedAdapter:
    torch.manual_seed(1)
    model: nn.Module = bench.adapted()
    return train.train(memory.put_into(model) if memory else model, recipe, inputs_for(folder, watcher))


def split_recipe(
    base: Path,
    folder: Path,
    micro: int,
    *,
    dropout: float = 0.0,
    optimizer: str = "adamw",
    batching: str = "packed",
) -> Recipe:
    """A recipe of four rows in a step, ``micro`` at a time; rank 32 gives 8-bit optimizers something to round."""
    settings = {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": 4 // micro,
        "optimizer": optimizer,
        "batching": batching,
    }
    return recipe_for(base, folder, lora={"rank": 32, "dropout": dropout}, training=settings)


@pytest.mark.parametrize(("batching", "plenty"), [("packed", 0), ("padded", 0), ("padded", 1)])
@pytest.mark.parametrize(("dropout", "optimizer"), [(0.0, "adamw"), (0.1, "adamw_8bit")])
def test_a_step_that_does_not_fit_is_that_of_a_smaller_micro_batch_bit_for_bit(
    plenty: int, optimizer: str, dropout: float, batching: str, llama_folder: Path, tmp_path: Path
) -> None:
    large = split_recipe(llama_folder, tmp_path, 2, dropout=dropout, optimizer=optimizer, batching=batching)
    small = split_recipe(llama_folder, tmp_path, 1, dropout=dropout, optimizer=optimizer, batching=batching)
    bench = bench_for(large)
    wanted = trained(bench, small, tmp_path / "small")
    memory = Memory(limit=1, plenty=plenty)  # with plenty of 1, gradients of half the step are already there
    found = trained(bench, large, tmp_path / "large", memory=memory)
    if batching == "padded":
        assert memory.passes == [2] * (plenty + 1) + [1] * 16
    failed = max(number for number, rows in enumerate(memory.passes) if rows > 1)
    assert failed >= plenty
    assert memory.passes[failed + 1 :].count(1) >= 4 * 3  # four steps, whose rows fill three packs or four
    assert_same_adapter(wanted.folder, found.folder)
    assert found.curve == wanted.curve
    assert found.smaller_micro_batches == ((1, 1),)
    assert (found.tokens, found.label_tokens) == (wanted.tokens, wanted.label_tokens)


@pytest.mark.parametrize("error", LACKS, ids=["cuda", "cpu", "python"])
def test_every_lack_of_memory_is_known_and_said_aloud(error: Exception, llama_folder: Path, tmp_path: Path) -> None:
    recipe = split_recipe(llama_folder, tmp_path, 4)
    watcher = Watcher()
    result = trained(bench_for(recipe), recipe, tmp_path / "run", memory=Memory(limit=1, error=error), watcher=watcher)
    assert result.smaller_micro_batches == ((1, 1),)
    assert "step 1 of 4: 4 rows at a time do not fit into memory" in watcher.notes[0]
    assert "with 1 at a time. A step still has 4 rows" in watcher.notes[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/micro_batch_size"] for line in lines if "train/micro_batch_size" in line] == [2, 1]


def test_nothing_of_the_failed_pass_is_alive_when_the_step_is_repeated(llama_folder: Path, tmp_path: Path) -> None:
    recipe = split_recipe(llama_folder, tmp_path, 4)
    memory = Memory(limit=1)
    trained(bench_for(recipe), recipe, tmp_path / "run", memory=memory)
    assert memory.left_over == [False, False]


def test_a_resumed_run_keeps_the_smaller_micro_batch_and_the_same_bits(llama_folder: Path, tmp_path: Path) -> None:
    recipe = split_recipe(llama_folder, tmp_path, 2, dropout=0.1, optimizer="adamw_8bit")
    bench = bench_for(recipe)
    whole = trained(bench, recipe, tmp_path / "whole", memory=Memory(limit=1, plenty=2))
    stopping = Watcher(at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted):
        trained(bench, recipe, tmp_path / "parts", memory=Memory(limit=1, plenty=2), watcher=stopping)
    enough = Memory(limit=99)
    parts = trained(bench, recipe, tmp_path / "parts", memory=enough)
    assert enough.passes == [1] * 4
    assert_same_adapter(whole.folder, parts.folder)
    assert parts.curve == whole.curve
    assert parts.smaller_micro_batches == whole.smaller_micro_batches == ((2, 1),)


def test_a_row_that_does_not_fit_by_itself_is_named_with_its_tokens_and_the_mends(
    llama_folder: Path, tmp_path: Path
) -> None:
    recipe = split_recipe(llama_folder, tmp_path, 2)
    with pytest.raises(TrainingError) as caught:
        trained(bench_for(recipe), recipe, tmp_path / "run", memory=Memory(limit=0))
    message = str(caught.value)
    named = next(index for index in range(len(ROWS)) if f"rows {index} ('prompt')" in message)
    assert f"step 1 of 4: training rows {named} ('prompt') of up to {len(ROWS[named].token_ids)} tokens" in message
    assert CUDA_MESSAGE in message
    assert "data.window" in message
    assert "training.checkpointing: full" in message


def test_another_error_of_the_model_is_not_taken_for_a_lack_of_memory(llama_folder: Path, tmp_path: Path) -> None:
    recipe = split_recipe(llama_folder, tmp_path, 2)
    memory = Memory(limit=1, error=RuntimeError("shapes do not agree"))
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        trained(bench_for(recipe), recipe, tmp_path / "run", memory=memory)
    assert not is_lack_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("rows", "batch_size", "fewer"), [(4, 16, 2), (6, 12, 3), (3, 12, 1), (5, 10, 2), (7, 7, 1), (1, 8, None)]
)
def test_the_smaller_micro_batch_divides_the_batch(rows: int, batch_size: int, fewer: int | None) -> None:
    assert smaller_micro_batch(rows, batch_size=batch_size) == fewer
