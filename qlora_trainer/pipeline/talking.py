"""Which model of a run speaks: its base, the trained function, or any file that it wrote."""

from pathlib import Path

from qlora_trainer.errors import RunFolderError
from qlora_trainer.pipeline.quantizing import quantized_again
from qlora_trainer.recipe import Recipe
from qlora_trainer.runtime.device import set_threads
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.serving import ADAPTER, GGUF_ADAPTER, models_of
from qlora_trainer.stages import base_model
from qlora_trainer.stages.converse import Sampling, Speaker, Voice, open_voice

__all__ = ["Sampling", "Voice", "talk"]


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
    return open_voice(
        _speaker(name, recipe, folder, trust_remote_code=trust_remote_code),
        recipe.data,
        compute_dtype=recipe.quantization.compute_dtype,
        threads=recipe.run.threads,
        trust_remote_code=trust_remote_code,
    )


def _speaker(name: str, recipe: Recipe, folder: RunFolder, *, trust_remote_code: bool) -> Speaker:
    """The files behind a name of ``models_of``."""
    base = base_model.resolve(recipe.base_model, trust_remote_code=trust_remote_code)
    if name == GGUF_ADAPTER:
        raise RunFolderError(f"{name} speaks only on top of a GGUF file of the base. Talk to trained: the same adapter")
    if name == "base":
        return Speaker(name, base.folder, base.folder)
    if name == "merged":
        return Speaker(name, folder.merged, base.folder)
    if name in ("quantized", "trained", ADAPTER):
        adapter = {"trained": folder.adapter, ADAPTER: folder.exports / ADAPTER}.get(name)
        quantized = quantized_again(recipe, base, trust_remote_code=trust_remote_code)
        return Speaker(name, quantized.folder, base.folder, adapter)
    export = folder.exports / name
    return Speaker(name, next(iter(sorted(export.glob("*.gguf"))), export), base.folder)
