"""Bytes that no tensor of a run accounts for: libraries, the CUDA context, workspaces, and what allocators round up."""

from collections.abc import Mapping
from typing import Literal

from qlora_trainer.numerics.training_load import Checkpointing, TrainingLoad

MIB = 2**20
LIBRARIES_BYTES = 615 * MIB
"""Interpreter, torch, transformers, peft and bitsandbytes, imported and used, and what the heap holds about them.

On a CPU 404 MiB are resident once all are imported, and 441 where scipy is installed too, which transformers imports
where it finds it. After a first step 460 are resident without that step's tensors (no scipy); the rest is fitted to
the peaks of the cases that ``scripts/bench_memory.py`` lists as such."""
CUDA_CONTEXT_BYTES = 512 * MIB
"""Kernels, stacks and heaps of the driver on the device. 300 to 550 MiB by card and driver; torch does not count it."""
CUBLAS_WORKSPACE_BYTES = 32 * MIB
"""What torch takes for cuBLAS: 8,320 KiB, and 32 MiB on Hopper cards (``CUBLAS_WORKSPACE_CONFIG``, notes of torch on
CUDA semantics; ``parseChosenWorkspaceSize`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp``)."""
CUDA_BLOCK_BYTES = 512
"""torch's caching allocator rounds every tensor up to this (``kMinBlockSize``, c10/cuda/CUDACachingAllocator)."""
CUDA_SEGMENT_BYTES = 2 * MIB
"""It takes memory for tensors up to 1 MiB in pieces of this size, and rounds pieces above 10 MiB up to it."""
CUDA_RESERVED_SHARE = 0.05
"""Share of what a step allocates that lies in segments too small for the next tensor. An allowance, not measured."""
CPU_HEAP_LAYERS: Mapping[Checkpointing, float] = {"none": 0.0, "selective": 1.0, "full": 2.0}
"""Freed memory that the C library keeps, in layers at work. Fitted to the peaks of the cases that
``scripts/bench_memory.py`` lists as such, not derived; see ``runtime.memory`` for what was tried against it."""

KEPT_BY_ALLOCATOR = "freed, kept by the allocator"
OUTSIDE_ALLOCATOR = ("libraries", "CUDA context", KEPT_BY_ALLOCATOR)
"""Items that ``torch.cuda.max_memory_allocated`` does not see."""


def fixed_overhead(device: Literal["cpu", "cuda"]) -> dict[str, int]:
    """What is there before the first weight."""
    if device == "cpu":
        return {"libraries": LIBRARIES_BYTES}
    return {"CUDA context": CUDA_CONTEXT_BYTES, "cuBLAS workspace": CUBLAS_WORKSPACE_BYTES}


def kept_by_allocator(load: TrainingLoad, *, of_a_step: int, of_layer_at_work: int, tensors: int) -> int:
    """Freed bytes that the allocator holds at the peak.

    Args:
        load: says where.
        of_a_step: bytes that one step allocates and frees.
        of_layer_at_work: those that belong to the layer whose backward pass runs.
        tensors: that stay; on a GPU each is rounded up to a block, on average by half of one.
    """
    if load.device == "cpu":
        return int(CPU_HEAP_LAYERS[load.checkpointing] * of_layer_at_work)
    return int(CUDA_RESERVED_SHARE * of_a_step) + CUDA_SEGMENT_BYTES + tensors * CUDA_BLOCK_BYTES // 2
