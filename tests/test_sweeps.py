"""A W&B sweep drives --set: what wandb's own agent would call, given to our command line; no network."""

import json
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
from qlora_trainer.recipe_file import shipped_folder, trial_overrides

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
