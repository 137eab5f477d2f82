"""A pass that did not fit into memory: what tells so, and how many rows the next try takes.

The step is repeated on the same rows with the same random numbers, fewer rows at a time. Nothing of the failed try
may be alive by then: an exception keeps the frames it went through, and these keep the graph.
"""

import gc

import torch

from qlora_trainer.runtime.memory import release_freed

MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class MicroBatchTooLargeError(Exception):
    """The passes over a micro-batch ran out of memory; nothing was stepped, gradients may be half summed.

    Attributes:
        row_indexes: of the micro-batch.
        reason: what the allocator said.
    """

    def __init__(self, row_indexes: tuple[int, ...], reason: str) -> None:
        super().__init__(reason)
        self.row_indexes, self.reason = row_indexes, reason


def is_lack_of_memory(error: Exception) -> bool:
    """Whether torch, numpy or Python could not allocate, on a CUDA device or on the CPU.

    On the CPU, torch has no class of its own for it, so the message decides.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def smaller_micro_batch(rows: int, *, batch_size: int) -> int | None:
    """The most rows, at most half of ``rows``, that divide the batch evenly; None where ``rows`` is 1.

    Args:
        rows: of the micro-batch that did not fit.
        batch_size: rows of an optimizer step, which stay as many.
    """
    return next((fewer for fewer in range(rows // 2, 0, -1) if batch_size % fewer == 0), None)


def release_memory(device: torch.device) -> None:
    """Gives what the failed try has left behind back to the device or the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    release_freed()
