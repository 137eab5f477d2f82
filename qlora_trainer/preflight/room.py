"""What the machine has free, and whether a prediction fits into it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_trainer.errors import RecipeError
from qlora_trainer.numerics.footprint import Footprint
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
        """Whether not even the least that is needed fits: what can be paged out or given back left aside."""
        return self.needed.needed_on_device > self.free_bytes

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


def planned_memory(device: Literal["cpu", "cuda"] | None, size: int | None) -> Memory:
    """What is free here; where another device or size is given, that of a machine which is not at hand.

    Args:
        device: None = the one that a run would use.
        size: bytes; None = what that device has free here.

    Raises:
        RecipeError: a GPU is planned for, there is none, and no size is given.
    """
    here = free_memory()
    wanted = device or here.device
    if size is not None:
        return Memory(wanted, size, f"given with --memory, {'a GPU' if wanted == 'cuda' else 'a CPU'}")
    if wanted == "cpu" and here.device == "cuda":
        return Memory("cpu", available_bytes(), "memory of this machine")
    if wanted != here.device:
        raise RecipeError("there is no NVIDIA GPU here to plan for. Say how much memory it has: --memory 24GiB")
    return here


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
