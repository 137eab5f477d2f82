"""A small run that was carried out to its report, for tests of what comes after."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer import pipeline
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe_file import dump
from qlora_trainer.records import RunReport


@dataclass(frozen=True)
class FinishedRun:
    """The run.

    Attributes:
        recipe: what was asked for.
        path: file of the recipe.
        root: the run's folder.
        report: what came of it.
    """

    recipe: Recipe
    path: Path
    root: Path
    report: RunReport


FORMATS: tuple[str, ...] = ("peft_adapter", "merged_16bit", "compressed_tensors_w8a16")


def carry_out(base: Path, folder: Path, formats: Sequence[str] = FORMATS) -> FinishedRun:
    """A run of eight steps on the tiny model in ``base``: an adapter, a merged model and an 8-bit file, or others."""
    rows = [{"prompt": f"Remind me at {number}", "completion": f'{{"at": {number}}}'} for number in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "run": {"name": "tiny", "folder": str(folder / "runs"), "threads": 1},
            "base_model": {"path": str(base)},
            "quantization": {"cache_folder": str(folder / "quantized"), "compute_dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8.0},
            "data": {"train": str(folder / "rows.jsonl"), "validation_rows": 6, "test_rows": 8},
            "training": {
                "learning_rate": 0.01,
                "max_steps": 8,
                "micro_batch_size": 4,
                "gradient_accumulation_steps": 1,
            },
            "evaluation": {"metrics": ["exact_match"], "generation_rows": 2, "max_new_tokens": 4, "kl_tokens": 50},
            "merge": {"data_type": "float32", "into": "dequantized"},
            "export": {"formats": tuple(formats)},
            "calibration": {"rows": 8, "batch_size": 8},
            "ladder": {"bar_int4": 0.0, "bar_int8": 0.0, "last_rung": 1},
        }
    )
    path = folder / "recipe.yaml"
    path.write_text(dump(recipe))
    report = pipeline.run(recipe)
    assert report is not None
    return FinishedRun(recipe, path, folder / "runs" / "tiny", report)
