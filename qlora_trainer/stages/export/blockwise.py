"""The trained function and the file to be, side by side, one decoder block at a time.

Two streams of hidden states run through the model: one through the weights of the trained function (the dequantized
base with the unmerged adapter), one through the matrices rounded so far. A rounding method sees one block with both
streams before it, gives the block's rounded matrices, and both streams move on. In memory are the embeddings, one
block, and the hidden states of the calibration rows.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlora_trainer.export_formats import MergeBase
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.runners.blocks import BlockwiseModel, Start
from qlora_trainer.runtime.device import choose_device
from qlora_trainer.runtime.progress import counted
from qlora_trainer.stages.export.calibration import CalibrationBatch, calibration_batches
from qlora_trainer.stages.export.inputs import ExportInputs
from qlora_trainer.stages.export.rounded import OUTSIDE, RoundedModel

_NUMBERED = re.compile(r"(.+?\.\d+)\.")
"""The first numbered part of a name, such as ``model.layers.3``."""


@dataclass(frozen=True)
class BlockAtWork:
    """One decoder block between the two streams.

    Attributes:
        name: of the block, such as ``model.layers.3``.
        linears: its modules that are rounded.
        trained: weights of the trained function by checkpoint name.
        merged: weights to be rounded by checkpoint name; the matrices of ``linears`` in float32.
        batches: calibration rows.
        before_trained: hidden states before the block, of the trained function, one tensor a batch.
        before_rounded: hidden states before the block, of the file.
        call: the block as a function of weights (checkpoint names), hidden states and the batch's number.
        module: the block itself, for what listens to its layers.
    """

    name: str
    linears: tuple[str, ...]
    trained: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    batches: Sequence[CalibrationBatch]
    before_trained: Sequence[Tensor]
    before_rounded: Sequence[Tensor]
    call: Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
    module: nn.Module

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights to be rounded with other matrices, given by module, in place of some."""
        return {**self.merged, **{f"{module}.weight": tensor for module, tensor in matrices.items()}}


@dataclass(frozen=True)
class RoundedBlock:
    """What a method makes of a block.

    Attributes:
        matrices: rounded, by module.
        plain: other tensors that it changed, by checkpoint name.
        columns: factors that a matrix's columns were multiplied by before rounding, by module.
        rows: factors that a matrix's rows were divided by before rounding, by module.
    """

    matrices: Mapping[str, IntegerWeight]
    plain: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


BlockMethod = Callable[[BlockAtWork], RoundedBlock]


class Bench:
    """A model to be rounded, block by block, and the rows to learn from.

    Args:
        inputs: what files are made from.
        scratch: an existing folder for hidden states that wait for their turn; None = the system's.
    """

    def __init__(self, inputs: ExportInputs, scratch: Path | None = None) -> None:
        self.inputs, self.scratch = inputs, scratch
        self.device = choose_device()
        # Every block holds rounded layers, so a tensor beside none of them lies outside the blocks.
        beside = {match[1] for module in inputs.layers.quantized if (match := _NUMBERED.match(module))}
        outside = inputs.weights("dequantized", wanted=lambda name: not _stands_in(name, beside))
        self.model = BlockwiseModel(
            inputs.base, outside, dtype=torch.float32, trust_remote_code=inputs.trust_remote_code, device=self.device
        )
        self.batches = calibration_batches(inputs.data, inputs.calibration, self.device)
        self.starts: list[Start] = [self.model.start(batch.token_ids) for batch in self.batches]

    def linears_of(self, block: str | None) -> tuple[str, ...]:
        """The rounded modules that stand in a block; None = in no block."""
        return tuple(module for module in self.inputs.layers.quantized if self.model.block_of(module) == block)

    def weights_of(self, block: str, into: MergeBase) -> dict[str, Tensor]:
        """A block's merged weights by checkpoint name, float32."""
        stream = self.inputs.weights(into, wanted=lambda name: self.model.block_of(name) == block)
        return {name: tensor.to(self.device, torch.float32) for name, tensor in stream}

    @contextmanager
    def block(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A block in memory with the given weights."""
        with self.model.block(index, weights) as module:
            yield module

    def caller(self, index: int, module: nn.Module) -> Callable[[Mapping[str, Tensor], Tensor, int], Tensor]:
        """A block in memory as a function of weights by checkpoint name, hidden states and the batch's number."""
        prefix = f"{self.model.block_names[index]}."

        def call(weights: Mapping[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}

            def block(*args: Any, **kwargs: Any) -> Any:
                return functional_call(module, own, args, kwargs)

            return self.model.run(block, index, hidden, self.starts[batch])

        return call


@torch.no_grad()
def round_blocks(bench: Bench, into: MergeBase, spec: GridSpec, method: BlockMethod, target: RoundedModel) -> None:
    """Rounds every matrix of the model with a method that looks at activations, and writes them as it goes.

    Matrices outside the decoder blocks are rounded to nearest.

    Args:
        bench: the model and the calibration rows.
        into: base of the merged weights that are rounded.
        spec: the format's grids, for what stands outside the blocks.
        method: rounds one block.
        target: gets the blocks.
    """
    blocks = len(bench.model.block_names)
    streams = _Streams([start.hidden for start in bench.starts], [start.hidden for start in bench.starts])
    for index in counted(range(blocks), "rounding", unit="blocks", total=blocks):
        # A function of its own, so that nothing of a block is in memory when the next one is read.
        streams = _round_block(bench, index, into, method, target, streams)
    round_outside(bench, into, spec, target)


@dataclass(frozen=True)
class _Streams:
    """Hidden states between two blocks, one tensor a batch: of the trained function, and of the file."""

    trained: list[Tensor]
    rounded: list[Tensor]


def _round_block(
    bench: Bench, index: int, into: MergeBase, method: BlockMethod, target: RoundedModel, before: _Streams
) -> _Streams:
    """Rounds and writes one block; gives the streams behind it."""
    name = bench.model.block_names[index]
    trained = bench.weights_of(name, "dequantized")
    merged = trained if into == "dequantized" else bench.weights_of(name, into)
    with bench.block(index, trained) as module:
        call = bench.caller(index, module)
        work = BlockAtWork(
            name,
            bench.linears_of(name),
            trained,
            merged,
            bench.batches,
            before.trained,
            before.rounded,
            call,
            module,
        )
        rounded = method(work)
        matrices = {key: weight.dequantized() for key, weight in rounded.matrices.items()}
        file = {**work.with_matrices(matrices), **rounded.plain}
        behind = _Streams(
            [call(trained, hidden, batch) for batch, hidden in enumerate(before.trained)],
            [call(file, hidden, batch) for batch, hidden in enumerate(before.rounded)],
        )
    target.write_block(
        name,
        {key: _on_cpu(weight) for key, weight in rounded.matrices.items()},
        plain=rounded.plain,
        columns=rounded.columns,
        rows=rounded.rows,
    )
    return behind


def round_outside(bench: Bench, into: MergeBase, spec: GridSpec, target: RoundedModel) -> None:
    """Rounds the matrices that stand in no decoder block to nearest."""
    names = {f"{module}.weight" for module in bench.linears_of(None)}
    if not names:
        return
    stream = bench.inputs.weights(into, wanted=names.__contains__)
    rounded = {name.removesuffix(".weight"): round_to_nearest(tensor, spec) for name, tensor in stream}
    target.write_block(OUTSIDE, rounded)


@torch.no_grad()
def trained_ends(bench: Bench) -> list[Tensor]:
    """Hidden states of the trained function after the last block, one tensor a batch."""
    hidden = [start.hidden for start in bench.starts]
    blocks = len(bench.model.block_names)
    for index in counted(range(blocks), "running the trained model", unit="blocks", total=blocks):
        hidden = _behind(bench, index, hidden)
    return hidden


def _behind(bench: Bench, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states of the trained function after one block; nothing of the block stays."""
    weights = bench.weights_of(bench.model.block_names[index], "dequantized")
    with bench.block(index, weights) as module:
        call = bench.caller(index, module)
        return [call(weights, each, batch) for batch, each in enumerate(hidden)]


def _stands_in(name: str, places: Collection[str]) -> bool:
    match = _NUMBERED.match(name)
    return match is not None and match[1] in places


def _on_cpu(weight: IntegerWeight) -> IntegerWeight:
    grid = weight.grid
    moved = type(grid)(grid.scale.cpu(), grid.zero_point.cpu(), grid.bits)
    return IntegerWeight(weight.codes.cpu(), moved)
