"""Listings of a page or a docstring, and the means to run them in little time."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qlora_trainer
from qlora_trainer.recipe import Recipe

FENCED = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^ +(?:\$ )?|^|`)(qlora-trainer [^`\n]*)", re.MULTILINE)
BRIEFLY = (
    "run.threads=1",
    "data.train_rows=64",
    "data.validation_rows=4",
    "data.test_rows=4",
    "data.window=512",
    "evaluation.samples=1",
    "training.max_steps=3",
    "training.warmup_steps=0",
    "evaluation.metrics=[]",
    "evaluation.max_new_tokens=4",
    "merge.into=dequantized",
    "export.formats=[peft_adapter, merged_16bit]",
    "tracking.wandb=off",
)


def python_listings(page: str) -> list[str]:
    """Code of every fenced Python block."""
    return FENCED.findall(page)


def commands(page: str) -> list[str]:
    """Every command line of the program, without the remark behind it."""
    return [re.split(r"\s+#", found)[0].strip() for found in COMMAND.findall(page)]


def run_listing(code: str, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a listing at the repository's root and gives what it printed; its runs are short, on a tiny base.

    Args:
        code: of the listing.
        folder: where runs go.
        base: of the model that they start from.
        monkeypatch: undoes the changes.
    """
    load: Callable[..., Recipe] = qlora_trainer.load_recipe

    def load_briefly(path: str, overrides: tuple[str, ...] = ()) -> Recipe:
        asked = load(path, overrides)
        assert asked.run.name
        place = (
            f"base_model.path={base}",
            f"run.folder={folder / 'runs'}",
            f"quantization.cache_folder={folder / 'bases'}",
        )
        return load(path, (*place, *BRIEFLY))

    printed: list[str] = []
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    monkeypatch.setattr(qlora_trainer, "load_recipe", load_briefly, raising=False)
    names: dict[str, Any] = {"print": lambda *parts, sep=" ": printed.append(sep.join(map(str, parts)))}
    exec(code, names)
    return "\n".join(printed)
