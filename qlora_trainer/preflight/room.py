"""What the machine has free, and whether a prediction fits into it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_trainer.numerics.footprint import KEPT_BY_ALLOCATOR, Footprint
from qlora_trainer.runtime.memory import available_bytes

NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
GPU_PLACE = "memory of the GPU"
GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """Predicted bytes beside what is free.

    Attributes:
        purpose: what needs them, such as ``training``.
        needed: item by item.
        free_bytes: what is there.
        place: of what, such as ``memory of this machine``.
    """

    purpose: str
    needed: Footprint
    free_bytes: int
    place: str

    @property
    def is_tight(self) -> bool:
        """Whether the prediction is above what is free."""
        return self.needed.total > self.free_bytes

    @property
    def is_short(self) -> bool:
        """Whether not even the least that is needed fits: the prediction without what the allocator may keep."""
        return self.needed.total - self.needed.items.get(KEPT_BY_ALLOCATOR, 0) > self.free_bytes

    def __str__(self) -> str:
        """``training needs about 12.30 GiB, 8.00 GiB of the memory of this machine are free``."""
        return (
            f"{self.purpose} needs about {self.needed.total / GIB:.2f} GiB, and {self.free_bytes / GIB:.2f} GiB "
            f"are free ({self.place})"
        )


@dataclass(frozen=True)
class Memory:
    """Free memory of the device that a run would use."""

    device: Literal["cpu", "cuda"]
    free_bytes: int
    place: str


def free_memory() -> Memory:
    """Memory of the first NVIDIA GPU where the driver knows one, else of this machine.

    torch would tell as well, but takes seconds to import.
    """
    free = _free_gpu_bytes() if NVIDIA_DEVICES.is_dir() else None
    if free is not None:
        return Memory("cuda", free, GPU_PLACE)
    return Memory("cpu", available_bytes(), "memory of this machine")


def _free_gpu_bytes() -> int | None:
    """Free bytes as ``nvidia-smi`` tells them, in MiB; None where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return int(answer) * 2**20 if answer.isdigit() else None
