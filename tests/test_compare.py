"""``compare`` on a tiny model: what it leaves, what a second time repeats, what it survives and refuses."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qlora_trainer import pipeline
from qlora_trainer.cli.app import make_app
from qlora_trainer.errors import BaseModelError, Interrupted
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Comparison
from qlora_trainer.stages import compare as stage
from tests.models import tiny_llama
from tests.test_pipeline import Watcher, recipe_for

METHODS = (
    "rtn_int8",
    "rtn_int4",
    "gptq_int4",
    "awq_int4",
    "autoround_int4",
    "nf4",
    "rtn_w8a8",
    "smoothquant_w8a8",
    "zeroquant_w4a8",
)


@dataclass(frozen=True)
class Made:
    root: Path
    recipe: Recipe
    found: Comparison


def base_recipe(base: Path, folder: Path, **compare: object) -> Recipe:
    settings: dict[str, object] = {
        "model": "base",
        "methods": METHODS,
        "group_size": 32,
        "distillation_steps": 4,
        **compare,
    }
    return recipe_for(base, folder, compare=settings)


@pytest.fixture(scope="module")
def made(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("compared")
    recipe = base_recipe(llama_folder, folder)
    return Made(folder / "runs" / "tiny", recipe, pipeline.compare(recipe))


def test_every_method_has_a_row_of_figures_on_the_same_test_rows(made: Made) -> None:
    assert [row.method for row in made.found.rows] == ["16bit", *METHODS]
    for row in made.found.rows:
        assert row.failed is None
        assert row.nats_per_token is not None
        assert row.nats_per_token.interval[0] <= row.nats_per_token.value <= row.nats_per_token.interval[1]
        assert row.metrics is not None
        assert set(row.metrics) == {"exact_match"}
        assert row.bytes is not None
        assert row.bytes > 0
        assert row.decode_tokens_per_second is not None
        assert row.decode_tokens_per_second > 0
    assert made.found.test_rows == 12
    assert made.found.recommendation.method in {row.method for row in made.found.rows}


def test_int8_is_nearer_to_16_bit_than_int4_and_gptq_than_nearest(made: Made) -> None:
    kl = {row.method: row.kl or 0.0 for row in made.found.rows}
    assert kl["16bit"] == 0
    assert 0 < kl["rtn_int8"] < kl["gptq_int4"] < kl["rtn_int4"]
    sizes = {row.method: row.bytes or 0 for row in made.found.rows}
    assert sizes["rtn_int4"] < sizes["rtn_int8"] < sizes["16bit"]


def test_all_files_stand_in_the_run_folder_and_nothing_else_is_left(made: Made, tmp_path: Path) -> None:
    found = json.loads((made.root / "compare.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["16bit", *METHODS]
    assert not (made.root / ".compare").exists()
    stage.write_pages(stage.read(made.root / "compare.json"), tmp_path)
    for name in ("compare.md", "compare.html"):
        assert (made.root / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_was_asked_for_and_where_it_ran_are_kept_with_the_figures(made: Made) -> None:
    assert made.found.settings["group_size"] == 32
    assert made.found.recipe_text == (made.root / "recipe.yaml").read_text()
    assert {"processor", "torch"} <= set(made.found.environment)
    assert made.found.command == f"qlora-trainer compare {made.root / 'recipe.yaml'}"


def test_a_second_time_everything_is_read_back(made: Made) -> None:
    watcher = Watcher()
    again = pipeline.compare(made.recipe, observer=watcher)
    assert watcher.done == []
    assert set(watcher.reused) == {f"compare {name}" for name in ("16bit", *METHODS, "outliers")}
    assert again == made.found


def test_another_preference_measures_nothing_anew(made: Made) -> None:
    values = made.recipe.model_dump()
    values["compare"] |= {"prefer": "quality", "methods": METHODS[:2]}
    watcher = Watcher()
    again = pipeline.compare(Recipe.model_validate(values), observer=watcher)
    assert watcher.done == []
    assert [row.method for row in again.rows] == ["16bit", "rtn_int8", "rtn_int4"]


def test_a_method_that_fails_is_a_row_with_its_reason_and_the_others_go_on(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = base_recipe(llama_folder, tmp_path, methods=("rtn_int8", "rtn_int4", "gptq_int4"), group_size=48)
    real = stage.quantized

    def short_of_memory(method: str, inputs: stage.CompareInputs) -> stage.QuantizedSubject:
        if method == "rtn_int8":
            raise MemoryError
        return real(method, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "quantized", short_of_memory)
    found = pipeline.compare(recipe)
    reasons = {row.method: row.failed or "" for row in found.rows}
    assert reasons["16bit"] == ""
    assert reasons["rtn_int8"].startswith("out of memory")
    assert "groups of 48 do not divide the 64, 128 inputs of 14 layers" in reasons["rtn_int4"]
    assert found.recommendation.method == "16bit"
    assert found.recommendation.is_within_bounds
    monkeypatch.undo()
    watcher = Watcher()
    again = pipeline.compare(recipe, observer=watcher)
    assert "compare rtn_int8" in watcher.done
    assert again.rows[1].failed is None


def test_an_interruption_ends_the_comparison_and_keeps_what_was_measured(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = base_recipe(llama_folder, tmp_path, methods=("rtn_int8", "rtn_int4"))
    real = stage.quantized

    def interrupted(method: str, inputs: stage.CompareInputs) -> stage.QuantizedSubject:
        if method == "rtn_int4":
            raise Interrupted("stopped")
        return real(method, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "quantized", interrupted)
    with pytest.raises(Interrupted):
        pipeline.compare(recipe)
    monkeypatch.undo()
    watcher = Watcher()
    pipeline.compare(recipe, observer=watcher)
    assert "compare rtn_int8" in watcher.reused
    assert "compare rtn_int4" in watcher.done


def test_too_little_calibration_data_fails_only_what_calibrates(llama_folder: Path, tmp_path: Path) -> None:
    recipe = base_recipe(llama_folder, tmp_path, methods=("rtn_int8", "gptq_int4", "smoothquant_w8a8"))
    values = recipe.model_dump()
    values["calibration"]["rows"] = 500
    found = pipeline.compare(Recipe.model_validate(values))
    assert [row.failed is None for row in found.rows] == [True, True, False, False]
    assert "calibration.rows: 500 asked for, but there are 40 training rows" in (found.rows[2].failed or "")
    assert found.outliers == ()


def test_a_16_bit_model_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="finite"):
        pipeline.compare(base_recipe(folder, tmp_path, methods=("rtn_int8",)))


def test_the_trained_model_is_made_first(llama_folder: Path, tmp_path: Path) -> None:
    recipe = base_recipe(llama_folder, tmp_path, model="trained", methods=("rtn_int8",))
    watcher = Watcher()
    found = pipeline.compare(recipe, observer=watcher)
    assert watcher.done.index("merge") < watcher.done.index("compare 16bit")
    base = pipeline.compare(base_recipe(llama_folder, tmp_path, methods=("rtn_int8",)))
    assert found.rows[0].nats_per_token is not None
    assert base.rows[0].nats_per_token is not None
    assert found.rows[0].nats_per_token.value < base.rows[0].nats_per_token.value - 0.5


def test_the_command_shows_the_table_and_the_recommendation(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(made.recipe.model_dump(mode="json", exclude_none=True)))
    answer = CliRunner().invoke(make_app(), ["compare", str(path)])
    assert answer.exit_code == 0, answer.output
    assert "smoothquant_w8a8" in answer.output
    assert f"Recommended: {made.found.recommendation.method}" in answer.output
    assert f"Page: {made.root / 'compare.html'}" in answer.output
    assert stage.read(made.root / "compare.json").command == f"qlora-trainer compare {path}"


def test_work_within_a_comparison_is_told_while_it_goes_on(llama_folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    pipeline.compare(base_recipe(llama_folder, tmp_path, methods=("rtn_int8",)), observer=watcher)
    assert {"scoring", "generating"} <= watcher.worked


def test_an_unknown_method_is_refused_with_the_one_that_was_meant(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(made.recipe.model_dump(mode="json", exclude_none=True)))
    answer = CliRunner().invoke(make_app(), ["compare", str(path), "--set", "compare.methods=[gtpq_int4]"])
    assert answer.exit_code == 2
    assert "gptq_int4" in answer.stderr
