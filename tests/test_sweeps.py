"""A W&B sweep drives --set: what wandb's own agent would call, given to our command line; no network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from qlora_trainer import pipeline
from qlora_trainer.cli.app import make_app
from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe_file import dump, load, shipped_folder, trial_overrides
from tests.runtime.wandb_server import API_KEY, serving
from tests.test_pipeline import recipe_for

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "recipes" / "sweeps" / "quickstart.yaml"


def called_by_agent(sweep: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """The command line of one trial, put together as ``wandb_agent.Agent._command_run`` does."""
    filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    filled |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        words += filled[word[2:-1]] if word.startswith("${") else [word]
    return words


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, str]]:
    """Recipes and last stages that the pipeline is asked for, in a process as wandb's agent makes it."""
    asked: list[tuple[Recipe, str]] = []

    def run(recipe: Recipe, *, until: str, **_: object) -> None:
        asked.append((recipe, until))

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setenv("WANDB_RUN_ID", "1e234567")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc123")
    monkeypatch.chdir(ROOT)
    return asked


def test_the_shipped_sweep_sets_what_it_names(trial: list[tuple[Recipe, str]]) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    # 0.00001 is written 1e-05 by Python, which a recipe would take for text.
    words = called_by_agent(sweep, {"training.learning_rate": 0.00001, "lora.rank": 8})
    assert words[:4] == ["/usr/bin/env", "qlora-trainer", "sweep", "recipes/quickstart.yaml"]
    answer = CliRunner().invoke(make_app(), words[2:])
    assert answer.exit_code == 0, answer.output
    ((recipe, until),) = trial
    assert until == "evaluate"
    assert (recipe.training.learning_rate, recipe.lora.rank) == (1e-5, 8)
    assert recipe.run.name == "quickstart-1e234567"
    tracking = recipe.tracking
    assert (tracking.run_id, tracking.group, tracking.wandb) == ("1e234567", "sweep-abc123", "online")


def test_the_shipped_sweep_names_settings_and_a_metric_that_exist() -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    for path in sweep["parameters"]:
        section, key = path.split(".")
        assert key in Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    assert sweep["metric"]["name"] == "validation/nats_per_token"
    assert SWEEP.parent.parent == shipped_folder()


def test_settings_given_beside_the_trial_stay(trial: list[tuple[Recipe, str]]) -> None:
    settings = ["--set", "tracking.group=mine", "--set", "tracking.wandb=offline", "--set", "run.name=other"]
    words = ["sweep", "recipes/quickstart.yaml", '{"lora": {"rank": 4}}', *settings, "--until", "train"]
    answer = CliRunner().invoke(make_app(), words)
    assert answer.exit_code == 0, answer.output
    ((recipe, until),) = trial
    assert (until, recipe.lora.rank, recipe.run.name) == ("train", 4, "other-1e234567")
    assert (recipe.tracking.group, recipe.tracking.wandb) == ("mine", "offline")


def test_a_sweep_verb_outside_of_a_sweep_is_refused(trial: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID")
    answer = CliRunner().invoke(make_app(), ["sweep", "recipes/quickstart.yaml", "{}"])
    assert answer.exit_code == RecipeError.exit_code
    assert "is called by `wandb agent`" in answer.output


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1.0e-05"),
        (3, "3"),
        (True, "true"),
        (None, "null"),
        ("off", "'off'"),
        ("2e-4", "2e-4"),
        (["q_proj", "v_proj"], "[q_proj, v_proj]"),
    ],
)
def test_values_keep_their_types(value: object, text: str) -> None:
    (override,) = trial_overrides(json.dumps({"section.key": value}))
    assert override == f"section.key={text}"


@pytest.mark.parametrize("text", ["training.max_steps=3", "[1]", ""])
def test_a_trial_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"Give '\$\{args_json\}' there"):
        trial_overrides(text)


def test_the_agents_answer_is_read_from_its_own_code() -> None:
    assert SimpleNamespace(**create_sweep_command_args({"args": {"a.b": {"value": 1}}})).args_json == ['{"a.b": 1}']


# wandb's own `wandb sweep` and `wandb agent`, against a stand-in for its server.


def called(folder: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of wandb on a machine where `qlora-trainer` is installed, in ``folder``."""
    program = folder / "bin" / "qlora-trainer"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qlora_trainer "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= dict.fromkeys(
        ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), str(folder / "home")
    )
    environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": API_KEY, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{program.parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "wandb", *words]
    return subprocess.run(
        command, cwd=folder, check=False, capture_output=True, text=True, timeout=240, env=environment
    )


@pytest.mark.slow
def test_wandbs_agent_carries_out_the_trials_of_the_shipped_sweep(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, training={"max_steps": 4}, evaluation={"generation_rows": 1})
    (tmp_path / "mine.yaml").write_text(dump(recipe), encoding="utf-8")
    sweep = SWEEP.read_text(encoding="utf-8").replace("recipes/quickstart.yaml\n  - $", "mine.yaml\n  - $")
    assert "mine.yaml" in sweep
    (tmp_path / "sweep.yaml").write_text(sweep, encoding="utf-8")
    with serving() as server:
        made = called(tmp_path, server.url, "sweep", "--project", "project", "sweep.yaml")
        assert "wandb agent me/project/sweep1" in made.stderr, made.stderr
        server.sweeps["sweep1"].trials = {
            "trial1": {"training.learning_rate": 1e-05, "lora.rank": 4},
            "trial2": {"training.learning_rate": 0.01, "lora.rank": 8},
        }
        done = called(tmp_path, server.url, "agent", "me/project/sweep1")
    assert done.returncode == 0, done.stderr
    assert server.sweeps["sweep1"].trials == {}
    assert set(server.runs) == {"trial1", "trial2"}
    for trial, rate, rank in (("trial1", 1e-5, 4), ("trial2", 0.01, 8)):
        carried_out = load(tmp_path / "runs" / f"tiny-{trial}" / "recipe.yaml")
        assert (carried_out.training.learning_rate, carried_out.lora.rank) == (rate, rank)
        assert carried_out.tracking.group == "sweep-sweep1"
        told = server.runs[trial]
        assert told.sweep == "sweep1"
        # The metric that the sweep is steered by.
        assert any("validation/nats_per_token" in row for row in told.history)
