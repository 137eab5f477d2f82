"""Which model of a run speaks: its base, the trained function, or any file that it wrote."""

from pathlib import Path

from qlora_trainer.pipeline.run_models import ModelsOnDisk
from qlora_trainer.recipe import Recipe
from qlora_trainer.runtime.device import set_threads
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.serving import models_of
from qlora_trainer.stages import base_model
from qlora_trainer.stages.converse import Sampling, TextTokenizer, Voice, steps_of

__all__ = ["Sampling", "Voice", "talk"]

GGUF_WINDOW = 4096
"""Tokens of a conversation with a GGUF file at most, where training saw no longer rows: llama.cpp makes room for all
of them at once, for a model of 8 billion parameters half a gigabyte."""


def talk(recipe: Recipe, at: str | None = None, *, trust_remote_code: bool = False) -> Voice:
    """A model of a finished run, ready to answer.

    Args:
        recipe: whose run it is. Nothing is carried out, but the base is quantized again where that was deleted.
        at: ``base``, ``quantized``, ``trained``, ``merged`` or the name of an export, as in report.json or shorter;
            None = the file that the report recommends.
        trust_remote_code: allow code that comes with the model.

    Raises:
        RunFolderError: the run has no such model; names those it has.
        TrainerError: the model cannot be opened.
    """
    set_threads(recipe.run.threads)
    folder = RunFolder(Path(recipe.run.folder) / recipe.run.name)
    name = models_of(folder, recipe).named(at)
    models = ModelsOnDisk(recipe, folder, trust_remote_code=trust_remote_code)
    files, longest = models.files(name), base_model.longest_row(models.base)
    room = max(GGUF_WINDOW, recipe.data.window)
    window = min(longest or room, room) if files.runtime == "llama_cpp" else longest
    model = models.open(files, window=window or room)
    return Voice(name, recipe.data, TextTokenizer.load(models.base.folder), window, steps_of(model))
