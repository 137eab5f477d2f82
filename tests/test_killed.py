"""The command line as its user meets it: killed in the middle, stopped by Ctrl-C, run again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_trainer import recipe_file
from tests.test_pipeline import recipe_for

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "qlora_trainer", "train")


def write_recipe(base: Path, folder: Path) -> Path:
    folder.mkdir()
    training = {"max_steps": 30, "checkpoint_every_steps": 3}
    recipe = recipe_for(base, folder, training=training, lora={"rank": 32, "dropout": 0.1})
    path = folder / "recipe.yaml"
    path.write_text(recipe_file.dump(recipe), encoding="utf-8")
    return path


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(recipe: Path) -> None:
    with start(recipe) as process:
        _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told


def wait_for_step(recipe: Path, step: int) -> None:
    """Returns once metrics.jsonl tells of the step."""
    metrics = recipe.parent / "runs" / "tiny" / "metrics.jsonl"
    for _ in range(6000):
        if metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached within five minutes")


def adapter_of(recipe: Path) -> bytes:
    return (recipe.parent / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    recipe = write_recipe(llama_folder, tmp_path_factory.mktemp("whole") / "run")
    finish(recipe)
    return adapter_of(recipe)


def test_a_run_that_was_killed_ends_with_the_same_bits(undisturbed: bytes, llama_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(llama_folder, tmp_path / "run")
    for step in (4, 11):
        with start(recipe) as process:
            wait_for_step(recipe, step)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    finish(recipe)
    assert adapter_of(recipe) == undisturbed


def test_a_run_that_was_killed_while_it_wrote_a_checkpoint_ends_with_the_same_bits(
    undisturbed: bytes, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(llama_folder, tmp_path / "run")
    checkpoints = recipe.parent / "runs" / "tiny" / "checkpoints"
    with start(recipe) as process:
        wait_for_step(recipe, 7)
        for _ in range(100_000):
            if list(checkpoints.glob(".step-*.partial")):
                break
            time.sleep(0.0002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    assert list(checkpoints.glob(".step-*.partial"))
    finish(recipe)
    assert adapter_of(recipe) == undisturbed
    assert not list(checkpoints.glob(".step-*"))


def test_sigterm_outside_of_training_tidies_up_says_how_to_go_on_and_exits_130(
    undisturbed: bytes, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(llama_folder, tmp_path / "run")
    with start(recipe) as process:
        for line in process.stdout or ():
            if line.startswith("evaluate base_16bit"):
                break
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert "stopped by SIGTERM. Finished stages are kept: run the same command again" in told
    assert "Traceback" not in told
    finish(recipe)
    assert adapter_of(recipe) == undisturbed


def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(undisturbed: bytes, llama_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(llama_folder, tmp_path / "run")
    with start(recipe) as process:
        wait_for_step(recipe, 5)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, told = process.communicate(timeout=300)
    # The end of Python and of its libraries included, on a machine that has other work.
    assert time.monotonic() - began < 30
    assert process.returncode == 130, told
    assert "Traceback" not in told
    finish(recipe)
    assert adapter_of(recipe) == undisturbed


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(undisturbed: bytes, llama_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(llama_folder, tmp_path / "run")
    with start(recipe) as process:
        wait_for_step(recipe, 5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert "Run the same command again" in told
    assert "Traceback" not in told
    finish(recipe)
    assert adapter_of(recipe) == undisturbed
