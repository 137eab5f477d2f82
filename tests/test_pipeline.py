"""The whole way on a tiny model: what a run leaves, what a second run repeats, what it refuses."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qlora_trainer import pipeline
from qlora_trainer.errors import DataError, Interrupted, RecipeError, RunFolderError
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.progress import TrainingProgress

FORMATS = (
    "peft_adapter",
    "merged_16bit",
    "bitsandbytes_nf4",
    "bitsandbytes_int8",
    "compressed_tensors_w4a16_g32",
    "compressed_tensors_w8a16",
)


@dataclass
class Watcher:
    """Keeps which stages were carried out and which were read back."""

    stop_at_step: int | None = None
    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)

    def stage_started(self, name: str) -> None: ...

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        (self.reused if reused else self.done).append(name)

    def training(self, progress: TrainingProgress) -> None:
        if progress.step == self.stop_at_step:
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, text: str) -> None: ...


def write_rows(path: Path, count: int, *, first: int = 0) -> str:
    rows = [
        {"prompt": f"Remind me at {number}", "completion": f'{{"at": {number}}}'}
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_for(base: Path, folder: Path, **sections: dict[str, object]) -> Recipe:
    values: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "folder": str(folder / "runs"), "threads": 1},
        "base_model": {"path": str(base)},
        "quantization": {"cache_folder": str(folder / "quantized"), "compute_dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {
            "train": write_rows(folder / "train.jsonl", 40),
            "validation": write_rows(folder / "validation.jsonl", 6, first=100),
            "test": write_rows(folder / "test.jsonl", 12, first=200),
        },
        "training": {
            "learning_rate": 0.01,
            "max_steps": 20,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "log_every_steps": 1,
            "checkpoint_every_steps": 10,
        },
        "evaluation": {"metrics": ["exact_match"], "generation_rows": 4, "max_new_tokens": 8, "kl_tokens": 50},
        "merge": {"data_type": "float32"},
        "export": {"formats": FORMATS},
    }
    for name, updates in sections.items():
        values[name] = {**values.get(name, {}), **updates}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def finished(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, RunReport]:
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_for(llama_folder, folder)
    report = pipeline.run(recipe)
    assert report is not None
    return folder / "runs" / "tiny", recipe, report


def test_a_run_ends_with_a_report_of_every_stage_all_verified(finished: tuple[Path, Recipe, RunReport]) -> None:
    root, _, report = finished
    names = [stage.name for stage in report.stages]
    assert names[:4] == ["base_16bit", "quantized_base", "adapter_unmerged", "merged_16bit"]
    assert {export.format for export in report.exports} == set(FORMATS)
    assert all(export.verified for export in report.exports), [export.verification for export in report.exports]
    assert report.status == "complete"
    assert json.loads((root / "report.json").read_text())["status"] == "complete"
    for name in ("report.md", "report.html", "recipe.yaml", "environment.json", "metrics.jsonl"):
        assert (root / name).stat().st_size > 0


def test_training_wins_and_faithful_files_keep_it(finished: tuple[Path, Recipe, RunReport]) -> None:
    _, _, report = finished
    assert report.gap.learned_nats > 0.5
    kept = {export.format: export.gain_kept for export in report.exports}
    for exact in ("peft_adapter", "merged_16bit", "compressed_tensors_w8a16"):
        assert kept[exact] == pytest.approx(1.0, abs=0.01)
    # Rounding to four bits loses something here, but far from everything.
    assert 0.3 < (kept["compressed_tensors_w4a16_g32"] or 0) < 1.05


def test_a_second_run_repeats_nothing(finished: tuple[Path, Recipe, RunReport]) -> None:
    _, recipe, report = finished
    watcher = Watcher()
    again = pipeline.run(recipe, observer=watcher)
    assert watcher.done == []
    assert again is not None
    assert (again.stages, again.exports) == (report.stages, report.exports)
    # Seconds of all parts of the run, not of this one; only looking into the cache of quantized bases is timed anew.
    assert again.seconds == pytest.approx(report.seconds, abs=1.0)
    assert again.seconds > 1.0


def test_another_export_is_added_without_training_again(finished: tuple[Path, Recipe, RunReport]) -> None:
    _, recipe, _ = finished
    more = recipe.model_copy(
        update={"export": recipe.export.model_copy(update={"formats": (*FORMATS, "compressed_tensors_w4a16_g64")})}
    )
    watcher = Watcher()
    report = pipeline.run(more, observer=watcher)
    assert watcher.done == ["export compressed_tensors_w4a16_g64"]
    assert report is not None
    assert report.exports[-1].verified


def test_a_recipe_that_trains_otherwise_is_refused_with_the_differences(
    finished: tuple[Path, Recipe, RunReport],
) -> None:
    _, recipe, _ = finished
    other = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 8})})
    with pytest.raises(RunFolderError, match=r"lora\.rank: 4 there, 8 now"):
        pipeline.run(other)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_losses(
    finished: tuple[Path, Recipe, RunReport], llama_folder: Path, tmp_path: Path
) -> None:
    _, _, whole = finished
    recipe = recipe_for(llama_folder, tmp_path)
    with pytest.raises(Interrupted, match="after step 7 of 20"):
        pipeline.run(recipe, observer=Watcher(stop_at_step=7))
    report = pipeline.run(recipe)
    assert report is not None
    assert [stage.nats_per_token for stage in report.stages] == [stage.nats_per_token for stage in whole.stages]


def test_until_ends_after_the_named_stage(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, training={"max_steps": 2})
    watcher = Watcher()
    assert pipeline.run(recipe, until="quantize", observer=watcher) is None
    assert watcher.done == ["quantize"]
    assert pipeline.run(recipe, until="train", observer=watcher) is None
    assert watcher.done[-1] == "train"
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "runs" / "tiny" / "merged").exists()


def test_a_format_that_does_not_fit_is_refused_before_training(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, export={"formats": ("compressed_tensors_w4a16_g128",)})
    with pytest.raises(RecipeError, match=r"multiples of 128.*w4a16_g64 fits"):
        pipeline.run(recipe)
    assert not (tmp_path / "runs").exists()


def test_unknown_target_modules_are_refused_with_a_suggestion(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, lora={"target_modules": ("q_porj", "v_proj")})
    with pytest.raises(RecipeError, match="Did you mean 'q_proj'"):
        pipeline.run(recipe)


def test_rows_without_a_trainable_token_are_fatal(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, data={"window": 3})
    with pytest.raises(DataError, match="window"):
        pipeline.run(recipe)


@pytest.mark.parametrize(
    ("data_type", "lora", "into"),
    [
        ("int8", {}, "dequantized"),
        ("fp4", {"use_rslora": True}, "original"),
        ("nf4", {"init": "loftq"}, "dequantized"),
        ("nf4", {"init": "pissa"}, "original"),
        ("nf4", {"use_dora": True, "target_modules": ("q_proj", "down_proj")}, "dequantized"),
    ],
)
def test_every_kind_of_base_and_adapter_goes_the_whole_way(
    data_type: str, lora: dict[str, object], into: str, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        quantization={"data_type": data_type},
        lora=lora,
        training={"max_steps": 3},
        merge={"into": into},
        export={"formats": ("peft_adapter", "compressed_tensors_w8a16")},
    )
    report = pipeline.run(recipe)
    assert report is not None
    assert all(export.verified for export in report.exports), [export.verification for export in report.exports]
    config = json.loads((tmp_path / "runs/tiny/exports/peft_adapter/adapter_config.json").read_text())
    base = Path(config["base_model_name_or_path"])
    if lora.get("init") == "pissa":
        assert base.parent == tmp_path / "quantized"
    else:
        assert base == llama_folder
