"""ZeroQuant's layer-by-layer distillation: a quantized block learns to answer as its 16-bit original.

arXiv 2206.01861, section 4.2: for block k the loss is the squared difference between the outputs of the original
and of the quantized block, both given the original model's hidden states, so that only one block is trained at a time
and labels are not needed. Weights are rounded in groups and inputs token by token while training, with
straight-through gradients.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.dynamic import rounded_tokens, straight_through
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.stages.compare.walking import BlockInView


def distilled_block(
    block: BlockInView, spec: GridSpec, *, activation_bits: int, steps: int, seed: int
) -> tuple[dict[str, Tensor], float, float]:
    """A block's matrices after distillation, not rounded yet.

    Adam with a rate of one mean quantization step over ``steps``, falling linearly, so that a weight can travel
    half a step. The weights of least loss over all calibration rows are kept, looked at once a pass over the batches,
    those before training among them: distillation never makes a block worse on its calibration rows.

    Args:
        block: with calibration rows.
        spec: grids of the weights.
        activation_bits: of the inputs of its layers.
        steps: optimizer steps, one batch each.
        seed: of the order of batches.

    Returns:
        The matrices by checkpoint name, float32; and the mean squared error of the block's output without and with
        distillation.
    """
    names = [f"{module}.weight" for module in block.linears]
    masters = {name: block.weights[name].clone().requires_grad_() for name in names}
    rates = [float(round_to_nearest(block.weights[name], spec).grid.scale.mean()) / max(steps, 1) for name in names]
    groups = [{"params": [masters[name]], "lr": rate} for name, rate in zip(names, rates, strict=True)]
    optimizer, draw = torch.optim.Adam(groups), random.Random(f"{seed}/{block.name}")
    with torch.no_grad():
        wanted = [block.call(block.weights, hidden, number) for number, hidden in enumerate(block.hidden)]
    with rounded_inputs(block, activation_bits):
        first = least = _whole_loss(block, masters, wanted, spec)
        best = {name: master.detach().clone() for name, master in masters.items()}
        for step in range(1, steps + 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - (step - 1) / steps)
            optimizer.zero_grad()
            with torch.enable_grad():
                torch.autograd.backward(_loss(block, masters, wanted, draw.randrange(len(wanted)), spec))
            optimizer.step()
            if step % len(wanted) == 0 or step == steps:
                loss = _whole_loss(block, masters, wanted, spec)
                if loss < least:
                    least, best = loss, {name: master.detach().clone() for name, master in masters.items()}
    return best, first, least


@contextmanager
def rounded_inputs(block: BlockInView, bits: int) -> Iterator[None]:
    """Rounds the inputs of a block's quantized layers token by token for a while; gradients pass straight through."""

    def rounded(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (straight_through(args[0], rounded_tokens(args[0].detach(), bits=bits)), *args[1:])

    layers = [block.module.get_submodule(module.removeprefix(f"{block.name}.")) for module in block.linears]
    handles = [layer.register_forward_pre_hook(rounded) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(
    block: BlockInView, masters: Mapping[str, Tensor], wanted: Sequence[Tensor], number: int, spec: GridSpec
) -> Tensor:
    rounded = {
        name: straight_through(master, round_to_nearest(master.detach(), spec).dequantized())
        for name, master in masters.items()
    }
    given = block.call({**block.weights, **rounded}, block.hidden[number], number)
    real = block.batches[number].real
    return torch.nn.functional.mse_loss(given[real], wanted[number][real])


@torch.no_grad()
def _whole_loss(block: BlockInView, masters: Mapping[str, Tensor], wanted: Sequence[Tensor], spec: GridSpec) -> float:
    """The loss over all calibration rows, each real token weighing the same."""
    tokens = [int(batch.real.sum()) for batch in block.batches]
    losses = [float(_loss(block, masters, wanted, number, spec)) for number in range(len(tokens))]
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
