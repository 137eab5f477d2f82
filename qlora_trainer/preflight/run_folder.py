"""Whether the folder that a recipe names is free for it. Reads only; ``runtime.run_folder`` claims the folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from qlora_trainer.errors import RunFolderError
from qlora_trainer.recipe import Recipe
from qlora_trainer.runtime.run_folder import RunFolder

SHAPING_SECTIONS = ("run.seed", "base_model", "quantization", "lora", "data", "training")
"""Recipe sections that make the trained adapter what it is; a run's folder belongs to one choice of them."""


def require_own_folder(recipe: Recipe) -> None:
    """Refuses a folder that holds results of another recipe, as the run itself would.

    Raises:
        RunFolderError: tells each setting that differs, with both values.
    """
    folder = RunFolder(Path(recipe.run.folder) / recipe.run.name)
    has_results = any(folder.stages.glob("*.json")) or any(folder.checkpoints.glob("step-*"))
    if not has_results or not folder.recipe_yaml.is_file():
        return
    try:
        former = yaml.safe_load(folder.recipe_text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{folder.recipe_yaml} is damaged. Give this recipe another run.name, or delete {folder.root}"
        ) from error
    was, now = (dict(_shaping(tree)) for tree in (former, recipe.model_dump(mode="json")))
    differing = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if differing:
        lines = [f"  {key}: {was.get(key)!r} there, {now.get(key)!r} now" for key in differing]
        mend = "Give this recipe another run.name, or delete that folder"
        raise RunFolderError("\n".join([f"{folder.root} holds results of another recipe. {mend}", *lines]))


def _shaping(recipe: Mapping[str, Mapping[str, object] | None]) -> Iterator[tuple[str, object]]:
    """The settings below ``SHAPING_SECTIONS``, by dotted key."""
    for section, settings in recipe.items():
        for name, value in (settings or {}).items():
            if section in SHAPING_SECTIONS or f"{section}.{name}" in SHAPING_SECTIONS:
                yield f"{section}.{name}", value
