"""The state of a training between two steps, on disk: enough to go on to the same bits.

    checkpoints/step-000120/  adapter.safetensors  optimizer.pt  random.pt  progress.json  checksums.json

A checkpoint is there whole or not at all, and is read only where its checksums agree.
What the adapter belongs to and what the progress means is not known here.
"""

import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, TypedDict

import numpy
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime.atomic import sha256_of_files, write_text, writing_folder
from qlora_trainer.runtime.weight_files import write_tensors

logger = logging.getLogger(__name__)

ADAPTER, OPTIMIZER, RANDOM, PROGRESS = "adapter.safetensors", "optimizer.pt", "random.pt", "progress.json"
CHECKSUMS = "checksums.json"
OVERHEAD_BYTES = 64 * 1024
"""Headers, checksums and the CPU's generators: 25 KiB in a checkpoint of two tensors."""


class RandomState(TypedDict):
    """Where the generators stand: Python's, numpy's, torch's for the CPU and for each CUDA device."""

    python: tuple[object, ...]
    numpy: dict[str, object]
    torch: Tensor
    cuda: list[Tensor]


@dataclass(frozen=True)
class CheckpointState:
    """Everything that the steps to come depend on.

    Attributes:
        adapter: trained tensors by name.
        optimizer: the optimizer's ``state_dict``.
        random: where the random generators stand.
        progress: counters and curve as values of JSON.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, object]
    random: RandomState
    progress: dict[str, object]


class FoundCheckpoint(NamedTuple):
    """A checkpoint that was read back.

    Attributes:
        step: optimizer steps done.
        state: on the CPU.
        damaged: a sentence for each newer checkpoint that was passed over: which, and what is wrong with it.
    """

    step: int
    state: CheckpointState
    damaged: tuple[str, ...]


def capture_random() -> RandomState:
    """Where all random generators of this process stand now."""
    state = numpy.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        # torch.load with weights_only reads no numpy arrays.
        "numpy": {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random(state: RandomState) -> None:
    """Puts all random generators of this process where they stood.

    A machine with another number of CUDA devices gets the states of those devices that both have.
    """
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)


def save(folder: Path, step: int, state: CheckpointState, *, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the newest ``keep``, and gives its folder.

    Checkpoints of later steps are removed too: only damaged ones can be there, which ``latest`` passed over. So are
    half-written ones, which a killed process has left.

    Args:
        folder: holds the checkpoints of a run.
        step: optimizer steps done.
        state: to be saved; tensors may be on any device.
        keep: at least 1.

    Raises:
        ValueError: ``keep`` is less than 1.
        RunFolderError: the disk is full or the folder cannot be written; older checkpoints are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    place = folder / f"step-{step:06d}"
    with writing_folder(place) as partial:
        write_tensors(partial / ADAPTER, state.adapter)
        _write_object(partial / OPTIMIZER, state.optimizer)
        _write_object(partial / RANDOM, state.random)
        write_text(partial / PROGRESS, json.dumps(state.progress))
        write_text(partial / CHECKSUMS, json.dumps(sha256_of_files(partial), indent=2) + "\n")
    kept = [saved for saved, _ in _newest_first(folder) if saved <= step][:keep]
    _remove_half_written(folder)
    for saved, old in _newest_first(folder):
        if saved not in kept:
            # Renamed first: a process that is killed while it removes leaves nothing that looks like a checkpoint.
            old.rename(folder / f".{old.name}.partial")
    _remove_half_written(folder)
    return place


def _remove_half_written(folder: Path) -> None:
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)


def latest(folder: Path) -> FoundCheckpoint | None:
    """The newest whole checkpoint; None where there is no checkpoint at all.

    Damaged ones are passed over with a warning, so that the run goes on from the one before them.

    Raises:
        RunFolderError: there are checkpoints and all are damaged, or a whole one cannot be read by this torch.
    """
    damaged: list[str] = []
    for step, place in _newest_first(folder):
        problem = _damage(place)
        if problem is None:
            return FoundCheckpoint(step, _read(place), tuple(damaged))
        damaged.append(f"{place.name} is damaged ({problem})")
        logger.warning("%s is damaged and passed over: %s", place, problem)
    if damaged:
        # A process that is killed leaves no damaged checkpoint: it is a disk or a copy that failed, and whoever runs
        # this may have another copy. Beginning anew would write over the rest of what was trained.
        raise RunFolderError(
            f"{folder}: none of its {len(damaged)} checkpoints is whole: {'; '.join(damaged)}. Put them back from a "
            "copy, or delete that folder to train from the beginning."
        )
    return None


def size_on_disk(state: CheckpointState) -> int:
    """Bytes that a checkpoint takes, a little more than less."""
    tensors = [*state.adapter.values(), *_tensors_in(state.optimizer), *state.random["cuda"]]
    return sum(tensor.nbytes for tensor in tensors) + len(json.dumps(state.progress)) + OVERHEAD_BYTES


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, whole or damaged; those being written have other names."""
    places = [(place.name.removeprefix("step-"), place) for place in folder.glob("step-*")]
    return sorted(((int(number), place) for number, place in places if number.isdigit()), reverse=True)


def _damage(place: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None where each is as it was written."""
    try:
        wanted = TypeAdapter(dict[str, str]).validate_json((place / CHECKSUMS).read_bytes())
    except (OSError, ValidationError):
        return f"{CHECKSUMS} is missing or damaged"
    try:
        found = sha256_of_files(place)
    except OSError as error:
        return f"it cannot be read: {error}"
    wrong = [name for name in (ADAPTER, OPTIMIZER, RANDOM, PROGRESS) if wanted.get(name, "") != found.get(name)]
    return f"{CHECKSUMS} does not agree with {', '.join(wrong)}" if wrong else None


def _read(place: Path) -> CheckpointState:
    """A checkpoint whose checksums agree."""
    try:
        # Read into memory rather than mapped: rotation may remove the file while its tensors are in use.
        return CheckpointState(
            adapter=load((place / ADAPTER).read_bytes()),
            optimizer=torch.load(place / OPTIMIZER, map_location="cpu", weights_only=True),
            random=torch.load(place / RANDOM, map_location="cpu", weights_only=True),
            progress=json.loads((place / PROGRESS).read_bytes()),
        )
    except (RuntimeError, UnpicklingError, SafetensorError, ValueError) as error:
        raise RunFolderError(
            f"{place} is as it was written, but torch {torch.__version__} cannot read it: {error}. Go on with the "
            "version that wrote it (environment.json names it), or give the run another run.name."
        ) from error


def _tensors_in(tree: object) -> Iterator[Tensor]:
    """All tensors of nested mappings and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors_in(value)


def _write_object(path: Path, content: Mapping[str, object]) -> None:
    """``torch.save`` that tells of a full disk as the system does, and not as an error of its own."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
