"""The shipped recipes: each can be read, says what it gave, and promises nothing that the report does not measure."""

from pathlib import Path

import pytest

from qlora_trainer import recipe_file
from qlora_trainer.preflight import check

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
# Recipes for public models were not run; ``test_public_recipes`` holds what they promise.
MEASURED = [path for path in RECIPES if not path.stem.endswith("gb")]
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
each_measured = pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)


def test_the_issue_asked_for_three_at_least() -> None:
    assert len(MEASURED) >= 3


@each_recipe
def test_a_recipe_begins_with_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


@each_recipe
def test_a_recipe_without_figures_says_first_that_it_was_not_run(path: Path) -> None:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    assert (recipe_file.load(path, []).expected is None) == ("Not run: " in first)


@each_measured
def test_a_recipe_carries_what_it_gave(path: Path) -> None:
    expected = recipe_file.load(path, []).expected
    assert expected is not None
    assert {"base_16bit", "quantized_base", "adapter_unmerged"} <= set(expected.nats_per_token)
    assert expected.nats_per_token["adapter_unmerged"] < expected.nats_per_token["quantized_base"]


@each_recipe
def test_a_recipe_names_itself_like_its_file(path: Path) -> None:
    assert path.stem.startswith(recipe_file.load(path, []).run.name)


def test_the_quickstart_needs_nothing_but_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    recipe = recipe_file.load(REPOSITORY / "recipes" / "quickstart.yaml", ["run.name=never-run"])
    found = check(recipe)
    assert found.problems == ()
    assert any(trained for _, trained in found.example)


@pytest.mark.real
@each_measured
def test_a_recipe_can_be_run_where_the_shared_data_is(
    path: Path, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = check(recipe_file.load(path, ["run.name=never-run"]))
    assert found.problems == ()
