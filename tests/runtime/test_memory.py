import mmap
import os
import subprocess
import sys
import threading
import time

import pytest

from qlora_trainer.runtime import memory
from qlora_trainer.runtime.memory import PeakMemory

MIB = 2**20
BLOCK = 64 * MIB
PAGE = 4096
# What the interpreter, other test threads and the counters of a CPU (batched by the kernel) may add or hide.
SLACK = 8 * MIB


@pytest.fixture(params=["kernel", "sampler"])
def any_meter(request, monkeypatch, tmp_path):
    if request.param == "sampler":
        monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    with PeakMemory() as meter:
        assert (meter._sampler is not None) == (request.param == "sampler")
        yield meter


def touch(size: int) -> mmap.mmap:
    """Resident memory that goes when the object goes. Not from malloc, which may give what an earlier test left it."""
    block = mmap.mmap(-1, size)
    for offset in range(0, size, PAGE):
        block[offset] = 1
    return block


def test_a_freed_block_stays_in_the_peak(any_meter):
    before = memory.resident_bytes()
    any_meter.reset()
    block = touch(BLOCK)
    time.sleep(3 * memory.SAMPLING_SECONDS)
    del block
    assert before + BLOCK - SLACK < any_meter.peak_bytes() < before + BLOCK + SLACK
    assert memory.resident_bytes() < before + SLACK


def test_a_reset_forgets_what_was_before(any_meter):
    block = touch(BLOCK)
    del block
    any_meter.reset()
    assert any_meter.peak_bytes() < memory.resident_bytes() + SLACK


def test_a_stopped_meter_keeps_its_value(any_meter):
    any_meter.stop()
    peak = any_meter.peak_bytes()
    block = touch(BLOCK)
    assert any_meter.peak_bytes() == peak
    del block


def test_the_kernel_sees_a_peak_that_is_too_short_for_a_sampler():
    with PeakMemory() as meter:
        before = memory.resident_bytes()
        block = touch(BLOCK)
        del block
    assert meter.peak_bytes() > before + BLOCK - SLACK


def test_an_inner_meter_does_not_hide_the_peak_from_the_outer_one():
    with PeakMemory() as outer:
        before = memory.resident_bytes()
        block = touch(BLOCK)
        del block
        with PeakMemory() as inner:
            pass
    assert outer.peak_bytes() > before + BLOCK - SLACK
    assert inner.peak_bytes() < before + SLACK


def test_a_forgotten_meter_stops_its_thread(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    meter = PeakMemory()
    thread = next(thread for thread in threading.enumerate() if thread.name == "peak-memory")
    del meter
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_container_limit_bounds_the_memory(tmp_path):
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{70 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {50 * MIB}\ninactive_file {20 * MIB}\n")
    assert memory.total_bytes(tmp_path) == 100 * MIB
    assert memory.available_bytes(tmp_path) == 50 * MIB


def test_a_container_without_a_limit_has_the_whole_machine(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total_bytes(tmp_path) == memory.total_bytes(tmp_path / "absent") > memory.resident_bytes()
    assert 0 < memory.available_bytes(tmp_path) <= memory.total_bytes(tmp_path)


def test_free_disk_is_told_for_a_path_that_is_not_there_yet(tmp_path):
    here = memory.free_disk_bytes(tmp_path)
    assert memory.free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(here, abs=64 * MIB)
    assert here > 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_memory_between_pieces_that_stay_goes_back_to_the_system():
    """128 MiB of holes; in a process of its own, with an allocator told to keep what is freed."""
    program = """
import torch
from qlora_trainer.runtime.memory import release_freed, resident_bytes
kept, holes = [], []
for _ in range(32):
    holes.append(torch.ones(2**20))
    kept.append(torch.ones(2**10))
holes.clear()
before = resident_bytes()
release_freed()
print(before - resident_bytes())
"""
    kept = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=kept)
    assert int(done.stdout) > 100 * MIB


def test_memory_is_released_once_for_so_much_work(monkeypatch):
    times = []
    monkeypatch.setattr(memory, "release_freed", lambda: times.append(1))
    releasing = memory.Releasing(every=10)
    for expected in (0, 0, 1, 1, 1, 2):
        releasing.worked_on(4)
        assert len(times) == expected
