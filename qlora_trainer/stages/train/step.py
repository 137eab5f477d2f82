"""One optimizer step over an accumulated batch, the loss weighted by label tokens.

The mean is taken once, over all label tokens of the step: every split of the same rows into
micro-batches (and processes) gives the same gradient up to rounding. Averaging micro-batch means, as
trainers did for years, weights a token by how short its neighbours are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.data.batches import Batch
from qlora_trainer.runners.causal_lm import LossPath
from qlora_trainer.runtime.device import World
from qlora_trainer.stages.train.recovery import MicroBatchTooLargeError, is_lack_of_memory
from qlora_trainer.stages.train.watchdog import require_sound


@dataclass(frozen=True)
class StepResult:
    """What one step saw.

    Attributes:
        nats: summed loss over its label tokens, float32 scalar on the model's device.
        label_tokens: tokens that the loss was taken on.
        gradient_norm: before clipping.
    """

    nats: Tensor
    label_tokens: int
    gradient_norm: float


def optimizer_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    path: LossPath,
    max_gradient_norm: float,
    world: World,
    name_rows: Callable[[Sequence[int]], str],
) -> StepResult:
    """Accumulates gradients over ``batches``, clips them and steps; changes model and optimizer.

    Args:
        model: the adapted model, in training mode.
        batches: the step's micro-batches, or this process's share of them.
        optimizer: of the adapter's parameters.
        path: how this model's loss is taken.
        max_gradient_norm: gradients are scaled down to it.
        world: processes that share the step.
        name_rows: row indexes to words, for messages.

    Raises:
        UnsoundStepError: loss or gradients are not finite, or all gradients are zero; nothing was stepped, gradients
            are left. Names the rows.
        MicroBatchTooLargeError: a batch does not fit into memory; nothing was stepped, gradients are left.
    """
    device = next(model.parameters()).device
    label_tokens = sum(batch.label_tokens for batch in batches)
    share = 1 / world.sum_(torch.tensor(float(label_tokens), device=device))
    losses = [summed_gradients(model, batch, share, path) for batch in batches]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is not None:
            world.sum_(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(trained, max_gradient_norm)
    # The one wait for the device in a step.
    require_sound(batches, losses, norm, name_rows)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        nats=torch.stack(losses).sum(),
        label_tokens=label_tokens,
        gradient_norm=float(norm),
    )


def summed_gradients(model: nn.Module, batch: Batch, share: Tensor, path: LossPath) -> Tensor:
    """Adds the batch's gradients to those that are there and gives its summed loss, detached."""
    try:
        return _both_passes(model, batch, share, path)
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
    # Raised after the block, so that the first error, and with it the failed pass, is let go.
    raise MicroBatchTooLargeError(batch.row_indexes, reason)


def _both_passes(model: nn.Module, batch: Batch, share: Tensor, path: LossPath) -> Tensor:
    # The backward pass too: it computes checkpointed layers again, which must attend as they did.
    with path.attending(model, is_packed=batch.boundaries is not None):
        nats = path.summed_nats(model, batch.token_ids, batch.labels, boundaries=batch.boundaries)
        torch.autograd.backward(nats * share)
    return nats.detach()
