"""KL to the trained function and its gradients through the whole model, a block at a time.

A pass runs forward block by block, keeping only the hidden states between blocks, and backward block by block,
recomputing each: gradient checkpointing whose weights come from disk.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qlora_trainer.numerics.loss import IGNORE_INDEX, kl_to, label_positions
from qlora_trainer.stages.export.blockwise import Bench

WeightsOf = Callable[[str], tuple[Mapping[str, Tensor], Sequence[Tensor]]]
"""Gives a block's weights by checkpoint name, and the tensors that gradients are wanted for."""

OnGradients = Callable[[str, Sequence[Tensor]], None]


def kl_and_gradients(
    bench: Bench, trained: Sequence[Tensor], batch: int, *, weights_of: WeightsOf, on_gradients: OnGradients
) -> float:
    """Mean KL(trained || file) over the label tokens of one batch, in nats, and its gradients.

    Args:
        bench: the model and the calibration rows.
        trained: hidden states of the trained function behind the last block, one tensor a batch.
        batch: number of the batch.
        weights_of: the file's weights; called twice for each block.
        on_gradients: gets a block's gradients, in the order of ``weights_of``; blocks come last to first.
    """
    names = bench.model.block_names
    between = [bench.starts[batch].hidden]
    with torch.no_grad():
        for index, name in enumerate(names):
            weights, _ = weights_of(name)
            with bench.block(index, weights) as module:
                between.append(bench.caller(index, module)(weights, between[-1], batch))
    last = between.pop().detach().requires_grad_()
    loss = _mean_kl(bench, trained[batch], last, batch)
    (gradient,) = torch.autograd.grad(loss, last)
    for index in reversed(range(len(names))):
        before = between.pop().detach().requires_grad_()
        weights, wanted = weights_of(names[index])
        with bench.block(index, {name: tensor.detach() for name, tensor in weights.items()}) as module:
            output = bench.caller(index, module)(weights, before, batch)
            gradient, *own = torch.autograd.grad(output, (before, *wanted), gradient)
        on_gradients(names[index], own)
    return float(loss.detach())


def _mean_kl(bench: Bench, trained: Tensor, last: Tensor, batch: int) -> Tensor:
    rows = bench.batches[batch]
    positions, labels = label_positions(rows.labels)
    wanted = labels != IGNORE_INDEX
    with torch.no_grad():
        teacher = bench.model.logits(trained, rows.token_ids, positions)[wanted].float()
    student = bench.model.logits(last, rows.token_ids, positions)[wanted]
    return kl_to(torch.log_softmax(teacher, dim=-1), student).mean()
