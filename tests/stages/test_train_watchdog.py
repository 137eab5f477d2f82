"""The watchdog: what it sees, that it names the rows, that skipping is counted and exact, that healthy runs pass."""

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.errors import Interrupted, TrainingError
from qlora_trainer.recipe import Recipe, Watchdog
from qlora_trainer.records import TrainedAdapter
from qlora_trainer.runtime.weight_files import read_file
from qlora_trainer.stages import train
from qlora_trainer.stages.train import TrainingInputs
from qlora_trainer.stages.train.progress import LossHistory, Progress
from qlora_trainer.stages.train.watchdog import Alarm, watch
from tests.stages.test_train import ROWS, Watcher, assert_same_adapter, inputs_for
from tests.stages.workbench import Bench, bench_for, recipe_for

PLACED = tuple(replace(row, place=f"train.jsonl:{number}") for number, row in enumerate(ROWS, start=1))


@dataclass
class Spoiler:
    """Multiplies the last hidden states of chosen training passes, or their gradient.

    Attributes:
        factor: what to multiply with.
        passes: which training passes, from 1.
        is_loss: strikes the states, and so the loss, and not their gradient alone.
    """

    factor: float
    passes: Sequence[int]
    is_loss: bool = False
    count: int = 0

    def put_into(self, model: nn.Module) -> nn.Module:
        last = [module for name, module in model.named_modules() if name.endswith(".norm")][-1]
        last.register_forward_hook(self._strike)
        return model

    def _strike(self, module: nn.Module, arguments: tuple[Tensor, ...], hidden: Tensor) -> Tensor | None:
        if not hidden.requires_grad:
            return None
        self.count += 1
        if self.count not in self.passes:
            return None
        if self.is_loss:
            return hidden * self.factor
        struck = hidden.clone()
        struck.register_hook(lambda gradient: gradient * self.factor)
        return struck


def guarded(base: Path, folder: Path, *, watchdog: dict[str, object], **training: object) -> Recipe:
    settings = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 6, **training}
    return recipe_for(base, folder, lora={"rank": 32, "dropout": 0.1}, training=settings, watchdog=watchdog)


def trained(bench: Bench, recipe: Recipe, inputs: TrainingInputs, spoiler: Spoiler | None = None) -> TrainedAdapter:
    torch.manual_seed(1)
    model: nn.Module = bench.adapted()
    return train.train(spoiler.put_into(model) if spoiler else model, recipe, inputs)


KINDS = {
    "non_finite": [Spoiler(math.nan, [3]), Spoiler(math.inf, [3]), Spoiler(math.nan, [3], is_loss=True)],
    "zero_gradients": [Spoiler(0.0, [3])],
}
each_fault = pytest.mark.parametrize(
    ("fault", "spoiler"), [(fault, each) for fault, spoilers in KINDS.items() for each in spoilers], ids=str
)


@each_fault
def test_a_bad_step_stops_the_run_names_its_rows_and_saves_what_was_before_it(
    fault: str, spoiler: Spoiler, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={})
    rows = r"training rows train\.jsonl:\d+ \('prompt'\), .*The state of step 2 is saved"
    with pytest.raises(TrainingError, match=rf"(?s)step 3 of 6: .*{rows}.*watchdog\.{fault}: skip"):
        trained(bench_for(recipe), recipe, inputs_for(tmp_path / "run", rows=PLACED), replace(spoiler))
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


@each_fault
def test_a_skipped_step_changes_nothing_and_is_told_and_counted(
    fault: str, spoiler: Spoiler, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={fault: "skip"}, log_every_steps=2, checkpoint_every_steps=1)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"keep_checkpoints": 9})})
    watcher = Watcher()
    result = trained(bench_for(recipe), recipe, inputs_for(tmp_path, watcher, PLACED), replace(spoiler))
    ((step, why),) = result.skipped_steps
    assert step == 3
    assert "train.jsonl:" in why
    assert watcher.notes == [f"step 3 of 6 is skipped: {why}"]
    assert result.steps == 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if "train/skipped_steps" in line]
    assert skipped == {"step": 3, "train/skipped_steps": 1, "train/skipped_because": why}
    # Its loss and its tokens count nowhere; the record of steps 3 and 4 tells of step 4 alone.
    assert [line["step"] for line in lines if "train/nats_per_token" in line] == [2, 4, 6]
    assert all(math.isfinite(line["train/nats_per_token"]) for line in lines if "train/nats_per_token" in line)
    # No bit of adapter and optimizer is another than before the step.
    saved = {name: state_of(tmp_path / "checkpoints" / f"step-{name:06d}") for name in (2, 3, 4)}
    assert all(torch.equal(saved[2][name], saved[3][name]) for name in saved[2])
    assert not any(torch.equal(saved[3][name], saved[4][name]) for name in saved[3])


def state_of(place: Path) -> dict[str, Tensor]:
    """Adapter and moments of a checkpoint by name; the rate and the count of steps change with every step."""
    moments = torch.load(place / "optimizer.pt", weights_only=True)["state"]
    named = {f"{number}.{name}": state[name] for number, state in moments.items() for name in ("exp_avg", "exp_avg_sq")}
    return {**read_file(place / "adapter.safetensors"), **named}


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_run_resumed_around_a_skipped_step_ends_with_the_same_bits(
    stop_at: int, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={"non_finite": "skip"}, optimizer="adamw_8bit")
    bench = bench_for(recipe)
    whole = trained(bench, recipe, inputs_for(tmp_path / "whole"), Spoiler(math.nan, [3]))
    stopping = Watcher(at_step={stop_at: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    first = Spoiler(math.nan, [3])
    with pytest.raises(Interrupted):
        trained(bench, recipe, inputs_for(tmp_path / "parts", stopping), first)
    parts = trained(bench, recipe, inputs_for(tmp_path / "parts"), Spoiler(math.nan, [3 - stop_at]))
    assert_same_adapter(whole.folder, parts.folder)
    assert parts.skipped_steps == whole.skipped_steps
    assert [step for step, _ in parts.skipped_steps] == [3]


def test_a_run_that_stopped_goes_on_once_the_recipe_says_skip(llama_folder: Path, tmp_path: Path) -> None:
    strict = guarded(llama_folder, tmp_path, watchdog={})
    lenient = guarded(llama_folder, tmp_path, watchdog={"non_finite": "skip"})
    bench = bench_for(strict)
    with pytest.raises(TrainingError):
        trained(bench, strict, inputs_for(tmp_path / "parts"), Spoiler(math.nan, [3]))
    parts = trained(bench, lenient, inputs_for(tmp_path / "parts"), Spoiler(math.nan, [1]))
    whole = trained(bench, lenient, inputs_for(tmp_path / "whole"), Spoiler(math.nan, [3]))
    assert parts.resumed_at == (2,)
    assert_same_adapter(whole.folder, parts.folder)


def test_too_many_skips_in_a_row_stop_the_run(llama_folder: Path, tmp_path: Path) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={"non_finite": "skip", "skips_in_a_row": 2})
    apart = trained(bench_for(recipe), recipe, inputs_for(tmp_path / "apart"), Spoiler(math.nan, [1, 2, 4, 5]))
    assert [step for step, _ in apart.skipped_steps] == [1, 2, 4, 5]
    with pytest.raises(TrainingError, match=r"step 4 of 6: .*and 2 steps before it were skipped") as told:
        trained(bench_for(recipe), recipe, inputs_for(tmp_path / "run"), Spoiler(math.nan, [2, 3, 4]))
    assert "watchdog.non_finite" not in str(told.value)


@pytest.mark.parametrize(
    ("spoilt_at", "told"),
    [
        (1, r"step 2 of 6: the loss is not a finite number.*The state of step 0 is saved"),
        (2, r"step 2 of 6: the adapter holds values that are not finite.*The state of step 0 is saved"),
    ],
)
def test_a_spoilt_adapter_is_never_saved(spoilt_at: int, told: str, llama_folder: Path, tmp_path: Path) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={})
    model = bench_for(recipe).adapted()

    def spoil() -> None:
        with torch.no_grad():
            model.get_parameter(next(name for name, _ in model.named_parameters() if "lora_A" in name)).fill_(math.nan)

    with pytest.raises(TrainingError, match=told):
        train.train(model, recipe, inputs_for(tmp_path / "run", Watcher(at_step={spoilt_at: spoil})))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_adapter_that_is_not_connected_stops_the_first_step(llama_folder: Path, tmp_path: Path) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={})
    with pytest.raises(TrainingError, match=r"step 1 of 6: every gradient is exactly zero.*lora\.target_modules"):
        trained(bench_for(recipe), recipe, inputs_for(tmp_path), Spoiler(0.0, range(1, 9)))


def test_a_validation_that_is_not_a_number_is_told(llama_folder: Path, tmp_path: Path) -> None:
    recipe = guarded(llama_folder, tmp_path, watchdog={}, max_steps=1)
    watcher = Watcher()
    inputs = replace(inputs_for(tmp_path, watcher), validate=lambda _: math.nan)
    assert trained(bench_for(recipe), recipe, inputs).incidents == ((1, "the validation loss is nan"),)
    assert watcher.notes == ["step 1 of 1: the validation loss is nan"]


# On the way to a rate of 0.2 the loss falls from 6.4 to 3.2 in seven steps and is back at 6.7 after fifteen.
@pytest.mark.parametrize("action", ["stop", "warn"])
def test_a_training_that_diverges_is_seen(action: str, llama_folder: Path, tmp_path: Path) -> None:
    watchdog: dict[str, object] = {"divergence": action, "divergence_steps": 3, "divergence_factor": 1.1}
    # Weights as large as these may give gradients that overflow, which is not what this test is about.
    watchdog |= {"non_finite": "skip", "skips_in_a_row": 30}
    settings = {"max_steps": 30, "warmup_steps": 20, "schedule": "constant", "checkpoint_every_steps": 100}
    settings |= {"learning_rate": 0.2, "max_gradient_norm": 1e9}
    recipe = guarded(llama_folder, tmp_path, watchdog=watchdog, **settings)
    calm = guarded(llama_folder, tmp_path, watchdog=watchdog, **{**settings, "learning_rate": 0.01})
    bench = bench_for(recipe)
    assert trained(bench, calm, inputs_for(tmp_path / "calm")).incidents == ()
    watcher = Watcher()
    told = r"the loss diverges: the median of the last 3 steps is \d+\.\d+ nats/token, and was \d+\.\d+ at its lowest"
    if action == "stop":
        with pytest.raises(TrainingError, match=rf"{told}.*Lower training\.learning_rate"):
            trained(bench, recipe, inputs_for(tmp_path / "run", watcher))
        assert not (tmp_path / "run" / "checkpoints").exists()
    else:
        result = trained(bench, recipe, inputs_for(tmp_path / "run", watcher))
        assert result.steps == 30
        assert result.incidents
        assert all("the loss diverges" in text for _, text in result.incidents)
        assert {text for _, text in result.incidents} <= {note.split(": ", 1)[1] for note in watcher.notes}


# The losses alone


def alarms(losses: Sequence[float], **settings: object) -> list[tuple[int, Alarm]]:
    history, watchdog = LossHistory(), Watchdog.model_validate(settings)
    found = [(step, watch(history, nats, watchdog)) for step, nats in enumerate(losses, start=1)]
    return [(step, alarm) for step, alarm in found if alarm is not None]


def falling(steps: int = 200, noise: float = 0.3) -> list[float]:
    """A loss that falls from 4 to 0.05 nats with noise in proportion to it."""
    generator = torch.Generator().manual_seed(0)
    wobble = torch.randn(steps, generator=generator).mul(noise).exp().tolist()
    return [(0.05 + 3.95 * math.exp(-8 * step / steps)) * each for step, each in enumerate(wobble)]


def test_a_healthy_loss_raises_no_alarm() -> None:
    assert alarms(falling()) == []
    # One batch in ten is ten times worse: no running median is moved by that.
    assert alarms([10 * nats if step % 10 == 9 else nats for step, nats in enumerate(falling())]) == []


@pytest.mark.parametrize(("rise", "is_seen"), [(0.4, False), (0.6, False), (0.7, True), (5.0, True)])
def test_divergence_is_more_than_half_as_much_again_and_half_a_nat(rise: float, is_seen: bool) -> None:
    # Falls to 0.1: the threshold is 1.5 x 0.1 + 0.5 = 0.65.
    assert bool(alarms([2.0] * 20 + [0.1] * 40 + [rise] * 40)) is is_seen


def test_divergence_is_told_once_while_it_lasts_and_again_after_it_has_passed() -> None:
    high, low = [6.0] * 30, [1.0] * 30
    told = alarms([*low, *high, *high, *low, *high])
    # The median of 20 is above the threshold with the tenth high loss: half of 1.0 and 6.0.
    assert [step for step, _ in told] == [40, 130]
    assert all(alarm.action == "stop" for _, alarm in told)


def test_a_loss_of_exactly_zero_is_stuck_after_as_many_steps_as_the_recipe_says() -> None:
    told = alarms([1.0, *[0.0] * 19, 1e-30, *[0.0] * 25], zero_loss="warn")
    assert [(step, alarm.action) for step, alarm in told] == [(41, "warn")]
    assert "exactly zero for 20 steps" in told[0][1].text


def test_what_is_remembered_goes_through_a_checkpoint(tmp_path: Path) -> None:
    whole, watchdog = LossHistory(), Watchdog()
    losses = [1.0] * 30 + [6.0] * 30
    for nats in losses:
        watch(whole, nats, watchdog)
    progress = Progress(recipe_key="key")
    for nats in losses:
        progress = Progress.from_json(json.loads(json.dumps(progress.to_json())))
        watch(progress.losses, nats, watchdog)
    assert progress.losses == whole
    assert whole.is_diverged
