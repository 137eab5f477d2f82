from pathlib import Path

from qlora_trainer.recipe import SHAPING_SECTIONS, Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages.report import Measurements, RowsInBrief, make


def made(measurements: Measurements, root: Path, **ladder: float) -> RunReport:
    recipe = Recipe.model_validate(
        {
            "run": {"name": "quickstart"},
            "base_model": {"path": "base"},
            "data": {"train": "rows.jsonl", "validation_rows": 4, "test_rows": 6},
            "training": {"max_steps": 5},
            "evaluation": {"bootstrap_resamples": 100},
            "ladder": ladder,
        }
    )
    with RunFolder.open(root, recipe.model_dump(mode="json"), shaping=SHAPING_SECTIONS) as folder:
        return make(recipe, measurements, folder=folder, seconds=1.0, rows=RowsInBrief((), (), ()))


def test_files_are_held_to_the_bars_of_the_recipe(tmp_path: Path, measurements: Measurements) -> None:
    assert made(measurements, tmp_path / "run").status == "below_bar"
    assert made(measurements, tmp_path / "run", bar_int4=0.9).status == "complete"


def test_the_report_lies_in_the_run_folder_with_its_recipe(tmp_path: Path, measurements: Measurements) -> None:
    report = made(measurements, tmp_path / "run")
    assert "name: quickstart" in report.recipe
    assert '"status": "below_bar"' in (tmp_path / "run/report.json").read_text("utf-8")
