"""Merging and exporting hold one block, whatever the number of blocks: live tensor bytes of 2 and of 6 blocks.

Counted are the storages that live, at every operation of torch, so that nothing of the machine's allocator is in it.
Real checkpoints and resident memory: ``scripts/bench_streaming.py``. Rung 4 is left out: it trains a dense model, and
holds it as training does.
"""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.recipe import Rounding
from qlora_trainer.runtime.weight_files import write_shards
from qlora_trainer.stages import export, merge
from qlora_trainer.stages.export import ExportInputs, Shelf, Way
from qlora_trainer.stages.export.blockwise import Bench, BlockAtWork, RoundedBlock, round_blocks
from qlora_trainer.stages.export.rounded import RoundedModel
from qlora_trainer.stages.export.tuning import ScaleTuning
from qlora_trainer.stages.merge import MergeSource
from tests.models import tiny_llama, tiny_llama_weights
from tests.stages.workbench import bench_for, export_inputs, recipe_for, shake

HIDDEN = 64
SPEC = GridSpec(bits=4, granularity=32, scale_dtype=torch.bfloat16)
FEW, MANY = 2, 6
ROWS = 16


class Trained(NamedTuple):
    """A tiny trained model."""

    inputs: ExportInputs
    source: MergeSource


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that any operation has seen and that still live, at most.

    A storage that is read from a file is seen when something is first computed from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, found)):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self._note(each.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def llama_of(folder: Path, blocks: int) -> Path:
    """A tiny Llama with so many blocks, each like one of the two of ``tiny_llama``."""
    tiny_llama(folder, hidden_size=HIDDEN)
    weights = tiny_llama_weights(hidden_size=HIDDEN)
    tensors = {name: weight for name, weight in weights.items() if ".layers." not in name}
    for index in range(blocks):
        own = f"model.layers.{index % 2}."
        tensors |= {
            f"model.layers.{index}.{name.removeprefix(own)}": weight.clone()
            for name, weight in weights.items()
            if name.startswith(own)
        }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    def of(blocks: int) -> Trained:
        folder = tmp_path_factory.mktemp(f"blocks-{blocks}")
        # All rows in one batch: its hidden states behind a block are larger than what may grow.
        calibration = {"rows": ROWS, "batch_size": ROWS}
        base = llama_of(folder / "base", blocks)
        bench = bench_for(recipe_for(base, folder, calibration=calibration, lora={"rank": 2}))
        adapter = bench.written_adapter(shake(bench.adapted()), folder / "adapter")
        source = bench.merge_source(adapter)
        quick = Rounding(scale_epochs=1, learned_steps=2)
        return Trained(replace(export_inputs(bench, adapter, folder, rows=ROWS), rounding=quick), source)

    return {blocks: of(blocks) for blocks in (FEW, MANY)}


def merged(model: Trained, folder: Path) -> None:
    merge.merge(model.source, folder / "merged", data_type="bfloat16")


def merged_original(model: Trained, folder: Path) -> None:
    merge.merge(model.source.with_base("original"), folder / "merged", data_type="bfloat16")


def rounded(rung: int) -> Callable[[Trained, Path], None]:
    def make(model: Trained, folder: Path) -> None:
        shelf = Shelf(folder / "shelf", model.inputs)
        found = shelf.rounded(Way(rung, "original"), SPEC)
        export.write("compressed_tensors_w4a16_g32", folder / "file", model.inputs, into="original", rounded=found)

    return make


def tuned(model: Trained, folder: Path) -> None:
    """Scales of matrices that were rounded to nearest, because GPTQ's columns are many operations."""
    nearest, target, state = (folder / name for name in ("nearest", "target", "state"))
    for each in (nearest, target, state):
        each.mkdir()
    bench = Bench(model.inputs, folder)
    round_blocks(bench, "original", SPEC, to_nearest, RoundedModel(nearest))
    tuning = ScaleTuning(bench, "original", SPEC, RoundedModel(nearest), state)
    tuning.run(model.inputs.rounding)
    tuning.write(RoundedModel(target))


def to_nearest(work: BlockAtWork) -> RoundedBlock:
    return RoundedBlock({module: round_to_nearest(work.merged[f"{module}.weight"], SPEC) for module in work.linears})


def awq(model: Trained, folder: Path) -> None:
    rounded(1)(model._replace(inputs=replace(model.inputs, rounding=Rounding(method="awq"))), folder)


def worst_layers(model: Trained, folder: Path) -> None:
    Shelf(folder / "shelf", model.inputs).worst_layers(Way(0, "dequantized"), SPEC)


def as_gguf(model: Trained, folder: Path) -> None:
    export.write("gguf_q8_0", folder / "file", model.inputs, into="dequantized")


def without_one_kind_of_layer(model: Trained, folder: Path) -> None:
    """A file whose format leaves adapted layers alone."""
    layers = model.inputs.layers
    fewer = {name: shape for name, shape in layers.quantized.items() if not name.endswith("down_proj")}
    inputs = replace(model.inputs, layers=replace(layers, quantized=fewer))
    export.write("compressed_tensors_w4a16_g32", folder / "file", inputs, into="dequantized")


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(merged, id="merge"),
        pytest.param(merged_original, id="merge_original"),
        pytest.param(rounded(0), id="rung_0"),
        pytest.param(rounded(1), id="rung_1"),
        pytest.param(tuned, id="tuned_scales"),
        pytest.param(rounded(3), id="rung_3"),
        pytest.param(awq, id="awq"),
        pytest.param(worst_layers, id="worst_layers"),
        pytest.param(as_gguf, id="gguf"),
        pytest.param(without_one_kind_of_layer, id="layers_left_alone"),
    ],
)
def test_memory_does_not_grow_with_the_number_of_blocks(
    work: Callable[[Trained, Path], None],
    trained: dict[int, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For each further block there stay its adapter and its norms.

    Its matrices at 4 bits are more than that here, and so are the hidden states behind it.
    """
    # Real shards hold several tiny models.
    monkeypatch.setitem(write_shards.__kwdefaults__, "max_shard_bytes", 2**16)
    peaks = {}
    for blocks, model in trained.items():
        folder = tmp_path / str(blocks)
        folder.mkdir()
        with LiveBytes() as meter:
            work(model, folder)
        peaks[blocks] = meter.peak
    inputs = trained[FEW].inputs
    codes = sum(rows * columns for rows, columns in inputs.layers.quantized.values()) // FEW
    factors = [*inputs.factors.lora_a.values(), *inputs.factors.lora_b.values()]
    stays = sum(factor.nbytes for factor in factors) // FEW + 2 * HIDDEN * 4
    assert stays < codes / 2
    assert peaks[FEW] > 4 * codes, "whole matrices in float32 were counted"
    assert (peaks[MANY] - peaks[FEW]) / (MANY - FEW) <= stays


def test_what_is_kept_is_counted_until_it_is_let_go() -> None:
    kept = []
    with LiveBytes() as meter:
        for _ in range(4):
            kept.append(torch.zeros(1000) + 1)
        assert meter.live == 4 * 4000
        kept.clear()
        assert meter.live == 0
    assert meter.peak == 5 * 4000
