"""Memory and disk of this process and this machine, in bytes, without torch.

Memory on a CUDA device is not known here: ``runtime.device`` asks torch for it.

What glibc keeps of freed memory is predicted (``numerics.device_overhead``), not prevented. Eight layers of a 135M
Llama, 4 x 512 tokens, two idle cores, checkpointing none: a step takes 1.9 s and its resident peak is 1,024 to 1,061
MiB, of which 888 to 891 would be there if every freed block went back at once. Mappings of their own for blocks above a
fixed size (``M_MMAP_THRESHOLD``) do that, at a price: 64 KiB 891 MiB and 3.5 s, 1 MiB 908 and 3.2 s, 4 MiB 1,010 and
2.3 s, 2 MiB on huge pages 919 and 3.0 s. ``malloc_trim`` between the two passes changed nothing (1,021 to 1,044 MiB);
why was not looked into. So allocation stays as the system has it.
"""

import ctypes
import shutil
import sys
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import psutil

CLEAR_REFS = Path("/proc/self/clear_refs")
PROCESS_STATUS = Path("/proc/self/status")
CONTROL_GROUP = Path("/sys/fs/cgroup")
SAMPLING_SECONDS = 0.05


def resident_bytes() -> int:
    """Resident memory of this process now; pages of mapped files count as long as they are mapped."""
    return int(psutil.Process().memory_info().rss)


def total_bytes(control_group: Path = CONTROL_GROUP) -> int:
    """Memory that this process may use at most: the machine's, or its container's limit where that is smaller."""
    limit = _number(control_group / "memory.max")
    machine = int(psutil.virtual_memory().total)
    return machine if limit is None else min(machine, limit)


def available_bytes(control_group: Path = CONTROL_GROUP) -> int:
    """Memory that can still be taken without swapping, within the container's limit.

    The kernel's file cache counts as available: it gives way when memory is asked for.
    """
    machine = int(psutil.virtual_memory().available)
    limit, used = _number(control_group / "memory.max"), _number(control_group / "memory.current")
    if limit is None or used is None:
        return machine
    return max(0, min(machine, limit - used + _file_cache_bytes(control_group)))


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk that holds ``path``, or would hold it once it is written."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def release_freed() -> None:
    """Gives freed memory back to the system, where the C library can (``malloc_trim`` of glibc); else does nothing.

    glibc keeps freed pieces of up to 32 MiB for itself. Where tensors that stay and tensors that go are made in turns,
    as when matrices are encoded one by one, the holes between those that stay are seldom filled again: quantizing a
    checkpoint of 300 MB, whose live tensors were never more than 135 MB, took 890 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Releasing:
    """Calls ``release_freed`` once for so many bytes of work, because each time costs the faults of fresh pages.

    Args:
        every: bytes.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._since = 0

    def worked_on(self, size: int) -> None:
        """Counts bytes."""
        self._since += size
        if self._since >= self.every:
            self._since = 0
            release_freed()


def _number(file: Path) -> int | None:
    """The number in a control file; None where there is no such file, or no limit (``max``)."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_cache_bytes(control_group: Path) -> int:
    """Cached file pages of the container that the kernel can drop at once; 0 where it does not say."""
    try:
        lines = (control_group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    figures = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(figures.get("inactive_file", 0))


class PeakMemory:
    """Largest resident memory since ``reset``, also as ``with PeakMemory() as meter:``.

    On Linux the kernel's own high-water mark is read, so that no peak is too short to be seen. Elsewhere a
    thread samples every 50 ms. Meters may overlap: each sees the largest value of its own window.
    """

    # The kernel keeps one mark for the whole process, and a reset wipes it out for every meter. So each
    # reset first lets the other meters take note of the mark.
    _sharing_the_mark: ClassVar["weakref.WeakSet[PeakMemory]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._noted = 0
        self._sampler: _Sampler | None = None
        self._is_open = False
        self.reset()

    def reset(self) -> None:
        """Starts the window anew: from here on only what is resident now, or later, counts."""
        self.stop()
        for meter in self._sharing_the_mark:
            meter._noted = max(meter._noted, _high_water_bytes())
        self._noted = 0
        self._is_open = True
        if _reset_high_water():
            self._sharing_the_mark.add(self)
        else:
            self._sampler = _Sampler()
            weakref.finalize(self, self._sampler.stop)

    def peak_bytes(self) -> int:
        """Largest resident memory between ``reset`` and now, or ``stop``."""
        if not self._is_open:
            return self._noted
        seen = self._sampler.peak_bytes() if self._sampler else _high_water_bytes()
        return max(self._noted, seen)

    def stop(self) -> None:
        """Ends the window; ``peak_bytes`` keeps its value."""
        self._noted = self.peak_bytes()
        self._is_open = False
        self._sharing_the_mark.discard(self)
        if self._sampler:
            self._sampler.stop()
            self._sampler = None

    def __enter__(self) -> Self:
        self.reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Sampler:
    """A thread that keeps the largest resident memory it has seen."""

    def __init__(self) -> None:
        self._largest = resident_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()

    def peak_bytes(self) -> int:
        self._largest = max(self._largest, resident_bytes())
        return self._largest

    def stop(self) -> None:
        self._stopped.set()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLING_SECONDS):
            self.peak_bytes()


def _reset_high_water() -> bool:
    """Sets the kernel's high-water mark to what is resident now; False where that cannot be done or read."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return _high_water_bytes() > 0


def _high_water_bytes() -> int:
    """The kernel's high-water mark (VmHWM, given in KiB); 0 where it is not told."""
    try:
        lines = PROCESS_STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
