"""The machine and the package versions that a run's figures were measured with, without importing any of them."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_trainer.runtime.memory import total_bytes

PACKAGES = (
    "qlora-trainer",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "compressed-tensors",
    "safetensors",
    "numpy",
)
PROCESSOR_INFO = Path("/proc/cpuinfo")
NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


def describe_environment() -> dict[str, str]:
    """Hardware, system and versions, for people: nothing is computed from these texts."""
    return {
        "processor": _processor(PROCESSOR_INFO),
        "cores": str(os.cpu_count()),
        "memory": f"{total_bytes() / 2**30:.1f} GiB",
        "gpu": ", ".join(_gpus(NVIDIA_DEVICES)) or "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Packages, hardware and system parts that differ, each as ``torch: 2.12.0 -> 2.13.0``."""
    return tuple(f"{name}: {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor(info: Path) -> str:
    """The processor's name as Linux tells it, else as Python does."""
    names = _values(info, "model name") if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _gpus(devices: Path) -> list[str]:
    """Names of the GPUs that NVIDIA's driver tells of, one for each device."""
    return [name for file in sorted(devices.glob("*/information")) for name in _values(file, "Model")]


def _values(file: Path, key: str) -> list[str]:
    """Values of the ``key : value`` lines of a file of the kernel."""
    pairs = (line.partition(":") for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key]
