"""Bytes that no tensor of a run accounts for: libraries, the CUDA context, workspaces, and what allocators round up."""

from typing import Literal

MIB = 2**20
LIBRARIES_BYTES = 530 * MIB
"""Interpreter, torch, transformers, peft and bitsandbytes, imported and used.

On a CPU 404 MiB are resident once all are imported, and 441 where scipy is installed too, which transformers imports
where it finds it. After a step 530 are resident beside that step's tensors (scipy installed; every freed block given
back, ``MALLOC_MMAP_THRESHOLD_=65536``: 530, 529 and 492 in the cases none, full and float32 of
``scripts/bench_memory.py``)."""
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
CPU_HEAP_OF_CHUNK = 2.5
CPU_HEAP_OF_KEPT = 0.14
"""Freed memory that the C library keeps: a multiple of the loss's chunk, whose blocks and those of the layers do not
fill each other's holes, and a share of what is kept for the backward pass. Fitted by least squares to the peaks of the
cases that ``scripts/bench_memory.py`` lists as such, not derived; see ``runtime.memory`` for what was tried against
it."""

KEPT_BY_ALLOCATOR = "freed, kept by the allocator"
OUTSIDE_ALLOCATOR = ("libraries", "CUDA context", KEPT_BY_ALLOCATOR)
"""Items that ``torch.cuda.max_memory_allocated`` does not see."""


def fixed_overhead(device: Literal["cpu", "cuda"]) -> dict[str, int]:
    """What is there before the first weight."""
    if device == "cpu":
        return {"libraries": LIBRARIES_BYTES}
    return {"CUDA context": CUDA_CONTEXT_BYTES, "cuBLAS workspace": CUBLAS_WORKSPACE_BYTES}


def kept_by_allocator(
    device: Literal["cpu", "cuda"], *, of_a_step: int, kept: int = 0, of_chunk: int = 0, tensors: int = 0
) -> int:
    """Freed bytes that the allocator holds at the peak.

    Args:
        device: where.
        of_a_step: bytes that one step allocates and frees.
        kept: those that wait for the backward pass.
        of_chunk: those that one chunk of the loss takes.
        tensors: that stay; on a GPU each is rounded up to a block, on average by half of one.
    """
    if device == "cpu":
        return int(CPU_HEAP_OF_CHUNK * of_chunk + CPU_HEAP_OF_KEPT * kept)
    return int(CUDA_RESERVED_SHARE * of_a_step) + CUDA_SEGMENT_BYTES + tensors * CUDA_BLOCK_BYTES // 2
