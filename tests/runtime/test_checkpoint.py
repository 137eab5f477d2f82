import random
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime import bnb, checkpoint
from qlora_trainer.runtime.checkpoint import CheckpointState, capture_random, latest, restore_random, save

OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Training:
    """A small training with dropout: weights of 8192 values, which 8-bit optimizers quantize, and a bias."""

    def __init__(self, optimizer_name, device="cpu"):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.2), nn.Linear(128, 1)).to(device)
        self.optimizer = bnb.make_optimizer(
            optimizer_name, self.model.parameters(), learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.01
        )

    def steps(self, count):
        for _ in range(count):
            rows = torch.randn(8, 64).to(next(self.model.parameters()).device)
            self.optimizer.zero_grad()
            self.model(rows).square().mean().backward()
            self.optimizer.step()
        return self

    def state(self, **progress):
        adapter = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return CheckpointState(adapter, self.optimizer.state_dict(), capture_random(), progress)

    def restore(self, state):
        self.model.load_state_dict(state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        restore_random(state.random)
        return self


def flat_tensors(tree, prefix=""):
    """All tensors of nested mappings and lists, by their path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: tensor for key, value in items for path, tensor in flat_tensors(value, f"{prefix}/{key}").items()}


def assert_equal_bits(left, right):
    left, right = flat_tensors(left), flat_tensors(right)
    assert left.keys() == right.keys()
    assert left
    assert all(torch.equal(left[path], right[path]) for path in left)
    assert all(left[path].dtype == right[path].dtype for path in left)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_goes_on_to_the_same_bits(tmp_path, name, device):
    whole = Training(name, device).steps(5)
    save(tmp_path, 5, whole.state(), keep=1)
    whole.steps(5)
    step, state, _ = latest(tmp_path)
    resumed = Training(name, device).restore(state).steps(5)
    assert step == 5
    assert_equal_bits(resumed.model.state_dict(), whole.model.state_dict())
    assert_equal_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_test_above_sees_a_lost_part(tmp_path, name):
    whole = Training(name).steps(5)
    save(tmp_path, 5, whole.state(), keep=1)
    whole.steps(5)
    _, state, _ = latest(tmp_path)
    forgetful = Training(name)
    forgetful.model.load_state_dict(state.adapter)
    restore_random(state.random)
    forgetful.steps(5)
    assert not torch.equal(forgetful.model[0].weight, whole.model[0].weight)


def test_eight_bit_state_is_saved_in_eight_bits(tmp_path):
    save(tmp_path, 1, Training("adamw_8bit").steps(1).state(), keep=1)
    _, state, _ = latest(tmp_path)
    tensors = flat_tensors(state.optimizer)
    assert {"state1", "state2", "absmax1", "qmap1"} <= {path.split("/")[-1] for path in tensors}
    assert sum(tensor.dtype == torch.uint8 and tensor.shape == (128, 64) for tensor in tensors.values()) == 2


def test_what_was_saved_is_read_back(tmp_path):
    state = Training("adamw").steps(1).state(curve=[[1, 0.1, None]], seconds=1 / 3)
    save(tmp_path, 120, state, keep=1)
    step, back, _ = latest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000120"]
    assert (step, back.progress) == (120, {"curve": [[1, 0.1, None]], "seconds": 1 / 3})
    assert_equal_bits(back.adapter, state.adapter)
    assert_equal_bits(back.optimizer, state.optimizer)
    assert back.random["python"] == state.random["python"]


def draws():
    return random.random(), random.gauss(), float(numpy.random.standard_normal()), float(torch.rand(()))


def test_restored_generators_draw_the_same():
    draws()  # leaves half of a pair of normal draws in Python's and numpy's generators
    state = capture_random()
    first = draws()
    restore_random(state)
    assert draws() == first
    assert draws() != first


def test_there_is_no_checkpoint_in_an_empty_or_missing_folder(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


@pytest.fixture(scope="module")
def small_state():
    return Training("adamw").steps(1).state(step=0)


@pytest.fixture
def three(tmp_path, small_state):
    for step in (1, 2, 30):
        save(tmp_path, step, small_state, keep=3)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_the_one_with_the_most_steps(three):
    assert latest(three)[0] == 30


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_only_the_newest_are_kept(three, small_state, keep):
    save(three, 100, small_state, keep=keep)
    assert names(three) == ["step-000001", "step-000002", "step-000030", "step-000100"][-keep:]


def test_a_process_killed_while_it_removes_leaves_nothing_that_looks_like_a_checkpoint(three, small_state, monkeypatch):
    def die(place, *_args, **_kwargs):
        next(place.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        save(three, 9, small_state, keep=1)
    monkeypatch.undo()
    assert [place.name for place in three.glob("step-*")] == ["step-000009"]
    save(three, 10, small_state, keep=1)
    assert [place.name for place in three.iterdir()] == ["step-000010"]


def test_keeping_none_is_refused(tmp_path, small_state):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        save(tmp_path, 1, small_state, keep=0)


@pytest.mark.parametrize(
    "file", ["adapter.safetensors", "optimizer.pt", "random.pt", "progress.json", "checksums.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(three, caplog, file, damage):
    path = three / "step-000030" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "missing":
        path.unlink()
    assert latest(three)[0] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-000030 is damaged" in caplog.text
    assert file in caplog.text


def test_going_on_from_an_earlier_state_removes_the_damaged_later_one(three, small_state):
    (three / "step-000030" / "optimizer.pt").write_bytes(b"")
    save(three, 10, small_state, keep=1)
    assert names(three) == ["step-000010"]


def test_a_checkpoint_of_the_same_step_is_replaced(three, small_state):
    changed = CheckpointState(small_state.adapter, small_state.optimizer, small_state.random, {"step": "new"})
    save(three, 30, changed, keep=3)
    assert latest(three)[1].progress == {"step": "new"}


def test_a_removed_checkpoint_may_still_be_in_use(three):
    _, state, _ = latest(three)
    shutil.rmtree(three)
    assert all(torch.isfinite(tensor).all() for tensor in state.adapter.values())


def test_a_full_disk_leaves_the_older_checkpoints(three, small_state, monkeypatch):
    write_object = checkpoint._write_object

    def write_to_full_disk(path, content):
        path.symlink_to("/dev/full")
        write_object(path, content)

    monkeypatch.setattr(checkpoint, "_write_object", write_to_full_disk)
    with pytest.raises(RunFolderError, match=r"step-000040: cannot be written: No space left.*Make room"):
        save(three, 40, small_state, keep=1)
    assert names(three) == ["step-000001", "step-000002", "step-000030"]
    assert latest(three)[0] == 30


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from qlora_trainer.runtime import checkpoint
written = torch.save
def save_some_and_die(content, file):
    written(content, file)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_some_and_die
state = checkpoint.CheckpointState({"a": torch.ones(3)}, {}, checkpoint.capture_random(), {})
checkpoint.save(Path(sys.argv[1]), int(sys.argv[2]), state, keep=1)
"""


def test_a_process_killed_while_saving_leaves_the_previous_checkpoints(three, small_state):
    child = subprocess.run([sys.executable, "-c", KILLED, str(three), "40"], check=False)
    assert child.returncode == -signal.SIGKILL
    assert ".step-000040.partial" in names(three)
    found, state, _ = latest(three)
    assert found == 30
    assert_equal_bits(state.adapter, small_state.adapter)
    save(three, 40, small_state, keep=1)
    assert names(three) == ["step-000040"]
