"""Where tensors live, how many threads and processes work on them, and where chance comes from."""

import os
import random
from dataclasses import dataclass
from typing import Final, Self

import numpy
import torch
from torch import Tensor, distributed

from qlora_trainer.runtime.memory import PeakMemory, available_bytes, resident_bytes

KERNEL_CACHES: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Kernels that oneDNN, and torch on top of it, keep for matrix products in bfloat16 on a CPU, one for each shape.

They keep 1,024 unless told otherwise, of a third to half a megabyte each, and packed rows bring new shapes with every
micro-batch: 16 steps on gsm8k (embedded base, NF4, bfloat16) ended at 1,403 MiB resident, with 256 kernels at 1,001,
with 128 at 774; the speed was the same (1,796, 1,905 and 1,917 label tokens a second on two cores)."""
for _name, _kernels in KERNEL_CACHES.items():
    # Read at the first product, so it is early enough here; who sets them otherwise is obeyed.
    os.environ.setdefault(_name, _kernels)


def choose_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(count: int | None) -> int:
    """Sets how many threads one tensor operation may use and gives the number in effect.

    Args:
        count: None keeps torch's own choice, one per physical core unless ``OMP_NUM_THREADS`` says otherwise.
    """
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators, those of every CUDA device included.

    Args:
        seed: any count; numpy takes only its lower 32 bits.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def reset_peak_allocated(device: torch.device) -> None:
    """Starts a new window for ``peak_allocated_bytes``; on a CPU there is nothing to reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_allocated_bytes(device: torch.device) -> int | None:
    """Most bytes of CUDA memory that tensors held at once; None on a CPU, where ``memory.PeakMemory`` measures."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes of CUDA memory that tensors hold now; None on a CPU, where ``memory.resident_bytes`` measures."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked to do; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def usable_bytes(device: torch.device) -> int:
    """Memory that this process can hold at most: what it holds now, and what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return resident_bytes() + available_bytes()


class PeakOfDevice:
    """Most memory held between ``with PeakOfDevice(device) as peak:`` and ``peak.bytes()``.

    Reserved by torch's allocator on CUDA, which is what another program cannot have; resident on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident = PeakMemory()

    def bytes(self) -> int:
        """Largest value so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self._resident.peak_bytes()

    def __enter__(self) -> Self:
        reset_peak_allocated(self._device)
        self._resident.reset()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resident.stop()


@dataclass(frozen=True)
class World:
    """The processes that train together; one where torch.distributed was not started.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Self:
        """The world this process belongs to, as torch.distributed tells it."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(rank=distributed.get_rank(), size=distributed.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that all share."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Changes ``tensor`` to its sum over all processes and gives it back; one process leaves it as it is."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor
