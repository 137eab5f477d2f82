"""The 16-bit model block by block, with the inputs of every linear layer: what methods calibrate on.

In memory are the embeddings, one block, the hidden states of the calibration rows and one block's layer inputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlora_trainer.runners.blocks import BlockwiseModel, Start, inputs_of
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.runtime.weight_headers import read_headers
from qlora_trainer.stages.compare.inputs import Batch, CompareInputs

MOST_TOKENS: Final = 16_384
"""Calibration tokens whose layer inputs are held at a time."""


@dataclass(frozen=True)
class BlockInView:
    """One decoder block of the 16-bit model, in memory.

    Attributes:
        name: such as ``model.layers.3``.
        linears: its layers that are quantized.
        weights: by checkpoint name, float32.
        batches: calibration rows.
        hidden: hidden states before the block, one tensor a batch.
        call: the block as a function of weights (checkpoint names), hidden states and the batch's number.
        module: the block itself, for what listens to its layers.
    """

    name: str
    linears: tuple[str, ...]
    weights: Mapping[str, Tensor]
    batches: Sequence[Batch]
    hidden: Sequence[Tensor]
    call: Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
    module: nn.Module

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What each layer reads at real tokens, float32, shape ``(tokens, in_features)``, by module.

        Of more than ``MOST_TOKENS`` calibration tokens every second (third, ..) is taken: the inputs of all layers of a
        7B model's block take 0.14 MiB a token.

        Raises:
            ValueError: a layer that is not called once in a forward pass, as experts are.
        """
        seen_all: dict[str, list[Tensor]] = {module: [] for module in self.linears}
        stride = max(1, math.ceil(sum(int(batch.real.sum()) for batch in self.batches) / MOST_TOKENS))
        with torch.no_grad(), inputs_of(self.module, self.name, self.linears) as seen:
            for number, batch in enumerate(self.batches):
                self.call(self.weights, self.hidden[number], number)
                for module, tensors in seen.items():
                    if len(tensors) != 1:
                        raise ValueError(
                            f"{module} is called {len(tensors)} times in a forward pass; calibration needs layers that "
                            "are called once"
                        )
                    seen_all[module].append(tensors[0][batch.real][::stride].float())
                    tensors.clear()
        return {module: torch.cat(tensors) for module, tensors in seen_all.items()}

    @cached_property
    def readers_by_norm(self) -> dict[str, tuple[str, ...]]:
        """Layers that read a norm's output, by the norm's module name; layers fed by anything else are in none."""
        norms: dict[int, str] = {}
        handles = [
            module.register_forward_hook(lambda _m, _i, output, name=name: norms.update({output.data_ptr(): name}))
            for name, module in self.module.named_modules()
            if _is_norm(module)
        ]
        found: dict[str, tuple[str, ...]] = {}
        try:
            with torch.no_grad(), inputs_of(self.module, self.name, self.linears) as seen:
                self.call(self.weights, self.hidden[0], 0)
                for linear, tensors in seen.items():
                    norm = norms.get(tensors[0].data_ptr())
                    if norm is not None:
                        place = f"{self.name}.{norm}"
                        found[place] = (*found.get(place, ()), linear)
        finally:
            for handle in handles:
                handle.remove()
        return found


def walk(inputs: CompareInputs) -> Iterator[BlockInView]:
    """Each block in order; hidden states move on through the 16-bit weights.

    Raises:
        BaseModelError: the architecture cannot be run block by block.
        RecipeError: too few calibration rows.
    """
    batches = inputs.calibration()
    rest = ((name, tensor) for name, tensor in read_tensors(inputs.folder))
    model = BlockwiseModel(inputs.folder, rest, dtype=torch.float32, trust_remote_code=inputs.trust_remote_code)
    starts = [model.start(batch.token_ids) for batch in batches]
    hidden = [start.hidden for start in starts]
    names = list(read_headers(inputs.folder))
    for index, block in enumerate(model.block_names):
        own = [name for name in names if model.block_of(name) == block]
        weights = {name: tensor.float() for name, tensor in read_tensors(inputs.folder, own)}
        linears = tuple(module for module in inputs.layers.quantized if model.block_of(module) == block)
        with model.block(index, weights) as module:
            call = _caller(model, index, module, starts)
            yield BlockInView(block, linears, weights, batches, hidden, call, module)
            with torch.no_grad():
                hidden = [call(weights, each, number) for number, each in enumerate(hidden)]


def _caller(
    model: BlockwiseModel, index: int, module: nn.Module, starts: Sequence[Start]
) -> Callable[[Mapping[str, Tensor], Tensor, int], Tensor]:
    prefix = f"{model.block_names[index]}."

    def call(weights: Mapping[str, Tensor], hidden: Tensor, batch: int) -> Tensor:
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}

        def block(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, own, args, kwargs)

        return model.run(block, index, hidden, starts[batch])

    return call


def _is_norm(module: nn.Module) -> bool:
    """A module with a vector of weights and no module inside: a scale for each input, whatever its class is called."""
    weight = vars(module)["_parameters"].get("weight")
    return weight is not None and weight.ndim == 1 and not list(module.children())
