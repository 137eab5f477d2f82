"""KL to the trained function and its gradients through the whole model, a block at a time.

A pass runs forward block by block, keeping only the hidden states between blocks, and backward block by block,
recomputing each: gradient checkpointing whose weights come from disk, and whose hidden states wait there too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from qlora_trainer.numerics.loss import IGNORE_INDEX, kl_to, label_positions
from qlora_trainer.runtime.weight_files import read_file, write_tensors
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
    blocks = range(len(bench.model.block_names))
    hidden = bench.starts[batch].hidden
    with TemporaryDirectory(dir=bench.scratch) as folder:
        files = [Path(folder) / f"{index}.safetensors" for index in blocks]
        for index, file in zip(blocks, files, strict=True):
            write_tensors(file, {"hidden": hidden})
            hidden = _forward(bench, index, batch, hidden, weights_of)
        last = hidden.detach().requires_grad_()
        loss = _mean_kl(bench, trained[batch], last, batch)
        (gradient,) = torch.autograd.grad(loss, last)
        for index in reversed(blocks):
            before = read_file(files[index])["hidden"].to(bench.device)
            gradient, own = _backward(bench, index, batch, before, gradient, weights_of)
            on_gradients(bench.model.block_names[index], own)
    return float(loss.detach())


# Functions of their own, so that nothing of a block is in memory when the next one is read.
@torch.no_grad()
def _forward(bench: Bench, index: int, batch: int, hidden: Tensor, weights_of: WeightsOf) -> Tensor:
    weights, _ = weights_of(bench.model.block_names[index])
    with bench.block(index, weights) as module:
        return bench.caller(index, module)(weights, hidden, batch)


def _backward(
    bench: Bench, index: int, batch: int, before: Tensor, gradient: Tensor, weights_of: WeightsOf
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the hidden states before a block, and of what is wanted in it."""
    before.requires_grad_()
    weights, wanted = weights_of(bench.model.block_names[index])
    with bench.block(index, {name: tensor.detach() for name, tensor in weights.items()}) as module:
        output = bench.caller(index, module)(weights, before, batch)
        first, *own = torch.autograd.grad(output, (before, *wanted), gradient)
    return first, own


def _mean_kl(bench: Bench, trained: Tensor, last: Tensor, batch: int) -> Tensor:
    rows = bench.batches[batch]
    positions, labels = label_positions(rows.labels)
    wanted = labels != IGNORE_INDEX
    with torch.no_grad():
        teacher = bench.model.logits(trained, rows.token_ids, positions)[wanted].float()
    student = bench.model.logits(last, rows.token_ids, positions)[wanted]
    return kl_to(torch.log_softmax(teacher, dim=-1), student).mean()
