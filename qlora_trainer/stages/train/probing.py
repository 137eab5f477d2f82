"""What both passes over one micro-batch take, found out by doing them: seconds and peak memory.

Nothing of it stays: gradients are let go, random generators go back to where they stood, no optimizer is there yet. A
training that follows takes the same steps to the same bits as one that was told the numbers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora_trainer.data.batches import Batch
from qlora_trainer.recipe import Checkpointing
from qlora_trainer.runners.causal_lm import LossPath, set_checkpointing
from qlora_trainer.runtime import checkpoint
from qlora_trainer.runtime.device import PeakOfDevice, synchronize
from qlora_trainer.stages.train.recovery import MicroBatchTooLargeError, is_lack_of_memory, release_memory
from qlora_trainer.stages.train.step import summed_gradients

PASSES = 2
"""The second is timed, and finds the gradients of the first, as every micro-batch of a step but the first does."""


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        tokens: of the micro-batch; padding counts, because the passes work on it.
        seconds: of forward and backward pass.
        peak_bytes: resident (CPU) or reserved (CUDA).
    """

    tokens: int
    seconds: float
    peak_bytes: int


def probe(model: nn.Module, batch: Batch, path: LossPath, checkpointing: Checkpointing) -> Probe | None:
    """Both passes over ``batch``; None where they run out of memory. Leaves the model without checkpointing.

    Args:
        model: the adapted model.
        batch: the longest micro-batch of the training.
        path: how this model's loss is taken.
        checkpointing: the policy to try.
    """
    device = next(model.parameters()).device
    share = torch.tensor(1 / max(1, batch.label_tokens), device=device)
    with leaving_no_trace(model), PeakOfDevice(device) as peak:
        set_checkpointing(model, checkpointing)
        model.train()
        try:
            for _ in range(PASSES):
                began = time.perf_counter()
                summed_gradients(model, batch, share, path)
                synchronize(device)
        except MicroBatchTooLargeError:
            return None
        return Probe(batch.tokens, time.perf_counter() - began, peak.bytes())


def evaluation_fits(model: nn.Module, evaluate: Callable[[nn.Module], object]) -> bool:
    """Whether the largest evaluation batch goes through without running out of memory."""
    with leaving_no_trace(model), torch.no_grad():
        try:
            evaluate(model)
        except (MemoryError, RuntimeError) as error:
            if not is_lack_of_memory(error):
                raise
            return False
        return True


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Afterwards there are no gradients, and chance and memory are as they were."""
    random = checkpoint.capture_random()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        set_checkpointing(model, "none")
        model.eval()
        checkpoint.restore_random(random)
        release_memory(next(model.parameters()).device)
