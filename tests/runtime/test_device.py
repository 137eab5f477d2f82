import os
import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import distributed

from qlora_trainer.runtime import device
from qlora_trainer.runtime.device import World


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7])
def test_the_same_seed_gives_the_same_chance(seed):
    device.seed_everything(seed)
    first = draws()
    device.seed_everything(seed)
    assert draws() == first
    assert draws() != first


def test_threads_are_set_and_none_keeps_them():
    before = torch.get_num_threads()
    try:
        assert device.set_threads(3) == torch.get_num_threads() == 3
        assert device.set_threads(None) == 3
    finally:
        torch.set_num_threads(before)


def test_the_device_is_a_cuda_one_only_where_there_is_one():
    assert (device.choose_device().type == "cuda") == torch.cuda.is_available()


def test_a_cpu_allocates_nothing_on_a_device():
    cpu = torch.device("cpu")
    device.reset_peak_allocated(cpu)
    assert device.peak_allocated_bytes(cpu) is None
    assert device.allocated_bytes(cpu) is None


@pytest.mark.gpu
def test_the_peak_on_a_cuda_device_holds_a_freed_tensor():
    cuda = torch.device("cuda")
    device.reset_peak_allocated(cuda)
    before = device.allocated_bytes(cuda)
    block = torch.zeros(2**20, device=cuda)
    del block
    assert device.allocated_bytes(cuda) == before
    assert device.peak_allocated_bytes(cuda) == before + 4 * 2**20


def test_one_process_is_the_main_one_and_its_sum_is_itself():
    world = World.current()
    tensor = torch.tensor([1.0, 2.0])
    assert (world, world.is_main) == (World(rank=0, size=1), True)
    assert world.sum_(tensor) is tensor
    assert torch.equal(tensor, torch.tensor([1.0, 2.0]))


def test_the_world_is_what_torch_distributed_tells(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    assert (World.current(), World.current().is_main) == (World(rank=1, size=2), False)


PROCESS = """
import sys, torch
from torch import distributed
from qlora_trainer.runtime.device import World
distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
world = World.current()
assert world == World(rank=int(sys.argv[2]), size=2)
assert world.sum_(torch.tensor([1.0 + world.rank])).item() == 3.0
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_sum_over_both(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "rendezvous")]
    children = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]


def test_products_of_ever_new_shapes_do_not_fill_the_memory() -> None:
    # A process of its own: the caches are made with their size at a process's first product.
    program = """
import torch
from qlora_trainer.runtime import device
from qlora_trainer.runtime.memory import resident_bytes
weight = torch.ones(768, 256, dtype=torch.bfloat16)
def multiply(sizes):
    for size in sizes:
        torch.ones(size, 768, dtype=torch.bfloat16) @ weight
    return resident_bytes()
before = multiply(range(500, 800))
print((multiply(range(800, 1100)) - before) / 2**20)
"""
    clean = {name: value for name, value in os.environ.items() if name not in device.KERNEL_CACHES}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    # 300 more shapes: a few MiB with a bound, 100 and more without, where the processor multiplies bfloat16.
    assert float(done.stdout) < 40
