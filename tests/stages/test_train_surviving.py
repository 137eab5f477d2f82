"""What a training survives: damaged checkpoints, signals at any moment, a disk that fills."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.errors import Interrupted, RunFolderError
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import TrainedAdapter
from qlora_trainer.runtime import checkpoint, tracking
from qlora_trainer.stages import train
from qlora_trainer.stages.train import TrainingInputs, saving
from tests.stages.test_train import Watcher, assert_same_adapter, inputs_for
from tests.stages.workbench import Bench, bench_for, recipe_for

FILES = ["adapter.safetensors", "optimizer.pt", "random.pt", "progress.json", "checksums.json"]
SETTINGS = {"max_steps": 6, "checkpoint_every_steps": 2, "validate_every_steps": 3, "keep_checkpoints": 3}


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def recipe(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return recipe_for(
        llama_folder, tmp_path_factory.mktemp("recipe"), lora={"rank": 32, "dropout": 0.1}, training=SETTINGS
    )


@pytest.fixture(scope="module")
def bench(recipe: Recipe) -> Bench:
    return bench_for(recipe)


def trained(bench: Bench, recipe: Recipe, inputs: TrainingInputs) -> TrainedAdapter:
    torch.manual_seed(1)
    return train.train(bench.adapted(), recipe, inputs)


@pytest.fixture(scope="module")
def whole(bench: Bench, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainedAdapter:
    """The run that nothing disturbed."""
    return trained(bench, recipe, inputs_for(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def stopped(bench: Bench, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after step 5, with checkpoints of steps 2, 4 and 5. Not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted, match="SIGINT after step 5 of 6"):
        trained(bench, recipe, inputs_for(folder, Watcher(at_step={5: interrupt})))
    return folder


@pytest.fixture
def parts(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "parts"))


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if kind == "cut" else content)
    if kind == "missing":
        path.unlink()


def metric_lines(folder: Path) -> list[tuple[int, list[str]]]:
    return [
        (line["step"], sorted(name for name in line if name != "step"))
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


# Damaged checkpoints


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_said_aloud_and_the_run_ends_with_the_same_bits(
    kind: str, file: str, bench: Bench, recipe: Recipe, whole: TrainedAdapter, parts: Path
) -> None:
    damage(parts / "checkpoints" / "step-000005" / file, kind)
    watcher = Watcher()
    result = trained(bench, recipe, inputs_for(parts, watcher))
    assert_same_adapter(whole.folder, result.folder)
    assert result.resumed_at == (4,)
    ((step, what),) = result.damaged_checkpoints
    assert step == 4
    assert f"step-000005 is damaged ({'checksums.json' if file == 'checksums.json' else 'checksums'}" in what
    assert file in what
    assert watcher.notes[0].startswith(what)
    assert "step 4" in watcher.notes[0]
    assert metric_lines(parts) == metric_lines(whole.folder.parent)


def test_two_damaged_checkpoints_are_both_told(
    bench: Bench, recipe: Recipe, whole: TrainedAdapter, parts: Path
) -> None:
    for step in (4, 5):
        damage(parts / "checkpoints" / f"step-{step:06d}" / "optimizer.pt", "cut")
    watcher = Watcher()
    result = trained(bench, recipe, inputs_for(parts, watcher))
    assert result.resumed_at == (2,)
    assert [what[:11] for _, what in result.damaged_checkpoints] == ["step-000005", "step-000004"]
    assert_same_adapter(whole.folder, result.folder)


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(bench: Bench, recipe: Recipe, parts: Path) -> None:
    for place in (parts / "checkpoints").iterdir():
        damage(place / "adapter.safetensors", "flipped")
    before = sorted((parts / "checkpoints").rglob("*"))
    with pytest.raises(RunFolderError, match=r"none of its 3 checkpoints is whole: step-000005.*delete that folder"):
        trained(bench, recipe, inputs_for(parts))
    assert sorted((parts / "checkpoints").rglob("*")) == before


def test_a_state_of_another_optimizer_is_refused(bench: Bench, recipe: Recipe, parts: Path) -> None:
    """Such as that of a paged optimizer on a CUDA device, on a machine without one."""
    step, state, _ = checkpoint.latest(parts / "checkpoints") or pytest.fail("no checkpoint")
    other = {**state.progress, "optimizer": "AdamW32bit"}
    checkpoint.save(parts / "checkpoints", step, replace(state, progress=other), keep=1)
    with pytest.raises(RunFolderError, match=r"that of AdamW32bit, and this machine trains with AdamW\b"):
        trained(bench, recipe, inputs_for(parts))


def test_tensors_of_other_names_or_shapes_are_refused(bench: Bench, recipe: Recipe, parts: Path) -> None:
    step, state, _ = checkpoint.latest(parts / "checkpoints") or pytest.fail("no checkpoint")
    adapter = {f"renamed.{name}": tensor for name, tensor in state.adapter.items()}
    checkpoint.save(parts / "checkpoints", step, replace(state, adapter=adapter), keep=1)
    with pytest.raises(RunFolderError, match=r"56 adapter tensors are named or shaped otherwise"):
        trained(bench, recipe, inputs_for(parts))


def test_a_whole_checkpoint_that_this_torch_cannot_read_says_which_version_wrote_it(
    bench: Bench, recipe: Recipe, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("version 99 is not supported")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(RunFolderError, match=r"cannot read it: version 99.*Go on with the version that wrote it"):
        trained(bench, recipe, inputs_for(parts))


# Signals


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_while_validating_is_heeded_at_once_and_the_validation_is_taken_by_the_resumed_run(
    step: int, bench: Bench, recipe: Recipe, whole: TrainedAdapter, tmp_path: Path
) -> None:
    reached: list[int] = []

    def validate(model: nn.Module) -> float:
        reached.append(len(reached) + 1)
        if len(reached) == step // 3:
            interrupt()
            pytest.fail("the validation went on")
        return inputs_for(tmp_path / "unused").validate(model)

    with pytest.raises(Interrupted, match=f"SIGINT after step {step} of 6; the state is saved"):
        trained(bench, recipe, replace(inputs_for(tmp_path / "parts"), validate=validate))
    assert (tmp_path / "parts" / "checkpoints" / f"step-{step:06d}").is_dir()
    result = trained(bench, recipe, inputs_for(tmp_path / "parts"))
    assert_same_adapter(whole.folder, result.folder)
    assert [point[:2] for point in result.curve] == [point[:2] for point in whole.curve]
    assert result.final_nats_per_token == whole.final_nats_per_token
    assert metric_lines(tmp_path / "parts") == metric_lines(whole.folder.parent)


def test_a_validation_that_was_logged_but_not_saved_is_not_there_twice(
    bench: Bench, recipe: Recipe, whole: TrainedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it validates step 3, killed after the resumed run has told of that validation, resumed again."""
    calls = iter(range(9))

    def validate(model: nn.Module) -> float:
        if next(calls) == 0:
            interrupt()
        return inputs_for(tmp_path / "unused").validate(model)

    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        trained(bench, recipe, replace(inputs_for(folder), validate=validate))

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving.Saving, "lack_of_room", die)  # what comes next after the validation
        with pytest.raises(KeyboardInterrupt):
            trained(bench, recipe, inputs_for(folder))
    assert (3, ["validation/nats_per_token"]) in metric_lines(folder)
    result = trained(bench, recipe, inputs_for(folder))
    assert metric_lines(folder) == metric_lines(whole.folder.parent)
    assert_same_adapter(whole.folder, result.folder)


@pytest.mark.parametrize("at", ["write_tensors", "write_text", "sha256_of_files"])
def test_a_second_ctrl_c_while_the_state_is_saved_ends_at_once_and_harms_nothing(
    at: str, bench: Bench, recipe: Recipe, whole: TrainedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former: Callable[..., object] = getattr(checkpoint, at)

    def impatient(*args: object, **kwargs: object) -> object:
        done = former(*args, **kwargs)
        interrupt()
        return done

    def first(watcher_step: int = 5) -> None:
        monkeypatch.setattr(checkpoint, at, impatient)
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        trained(bench, recipe, inputs_for(tmp_path / "parts", Watcher(at_step={5: first})))
    monkeypatch.undo()
    assert [place.name for place in sorted((tmp_path / "parts" / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    result = trained(bench, recipe, inputs_for(tmp_path / "parts"))
    assert result.resumed_at == (4,)
    assert_same_adapter(whole.folder, result.folder)


# Disk


def full_after(step: int, watched: Watcher, free: int) -> Callable[[Path], int]:
    """A disk that has plenty of room, and ``free`` bytes once the step was logged."""
    return lambda _: free if watched.seen and watched.seen[-1].step >= step else 2**40


def test_a_disk_nearly_full_stops_the_run_with_its_newest_state_saved(
    bench: Bench, recipe: Recipe, whole: TrainedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher()
    with monkeypatch.context() as patch:
        patch.setattr(saving, "free_disk_bytes", full_after(3, watcher, 16 * 2**20))
        with pytest.raises(RunFolderError, match=r"step 3 of 6, before a write.*16.0 MiB free.*The state of step 3 is"):
            trained(bench, recipe, inputs_for(tmp_path / "parts", watcher))
    result = trained(bench, recipe, inputs_for(tmp_path / "parts"))
    assert result.resumed_at == (3,)
    assert_same_adapter(whole.folder, result.folder)


def test_where_not_even_that_fits_nothing_is_written_and_the_saved_step_is_named(
    bench: Bench, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher()
    monkeypatch.setattr(saving, "free_disk_bytes", full_after(5, watcher, 1000))
    with pytest.raises(RunFolderError, match=r"after step 5 of 6.*The state of step 4 is saved. Make room"):
        trained(bench, recipe, inputs_for(tmp_path, watcher))
    assert [place.name for place in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_a_disk_without_room_is_told_after_the_first_step_and_not_after_a_hundred(
    bench: Bench, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "free_disk_bytes", lambda _: 1000)
    with pytest.raises(RunFolderError, match=r"after step 1 of 6.*The state of step 0 is saved"):
        trained(bench, recipe, inputs_for(tmp_path))


def test_the_size_of_a_checkpoint_is_foreseen(stopped: Path) -> None:
    found = checkpoint.latest(stopped / "checkpoints") or pytest.fail("no checkpoint")
    real = sum(path.stat().st_size for path in (stopped / "checkpoints" / "step-000005").iterdir())
    # Two-sided: what is not a tensor takes at most the bytes that are added for it.
    assert real <= checkpoint.size_on_disk(found.state) <= real + checkpoint.OVERHEAD_BYTES


def test_metrics_are_on_the_disk_before_the_state_that_refers_to_them(
    bench: Bench, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, save = tracking.Tracker.flush, checkpoint.save

    def flushed(tracker: tracking.Tracker) -> int:
        order.append("metrics")
        return flush(tracker)

    def saved(*args: object, **kwargs: object) -> Path:
        order.append("state")
        return save(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(tracking.Tracker, "flush", flushed)
    monkeypatch.setattr(checkpoint, "save", saved)
    trained(bench, recipe, inputs_for(tmp_path))
    assert order == ["metrics", "state"] * 3
