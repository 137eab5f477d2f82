"""The files behind the names of a run's models, and those models opened: for whoever talks to them or asks them."""

from functools import cached_property

from torch import nn

from qlora_trainer.errors import RunFolderError
from qlora_trainer.pipeline.quantizing import quantized_again
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint, QuantizedModel
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.serving import ADAPTER, GGUF_ADAPTER
from qlora_trainer.stages import base_model, dataset
from qlora_trainer.stages.opening import ModelFiles, open_model


class ModelsOnDisk:
    """Models of one run, by the names of ``serving.models_of``.

    Args:
        recipe: whose run it is.
        folder: of the run.
        trust_remote_code: allow Python code that comes with the base.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, *, trust_remote_code: bool) -> None:
        self.recipe, self.folder, self.trust_remote_code = recipe, folder, trust_remote_code

    @cached_property
    def base(self) -> BaseCheckpoint:
        """The 16-bit base, with the recipe's chat template where it has one."""
        found = base_model.resolve(self.recipe.base_model, trust_remote_code=self.trust_remote_code)
        return dataset.with_chat_template(found, self.recipe.data)

    @cached_property
    def quantized(self) -> QuantizedModel:
        """The quantized base: from the cache, or made again where that was deleted."""
        return quantized_again(self.recipe, self.base, trust_remote_code=self.trust_remote_code)

    def files(self, name: str) -> ModelFiles:
        """What a name stands for.

        Raises:
            RunFolderError: it is an adapter for llama.cpp, which needs a GGUF file of the base beneath it.
        """
        if name == GGUF_ADAPTER:
            raise RunFolderError(
                f"{name} runs only on top of a GGUF file of the base. Take trained (adapter_unmerged): the same adapter"
            )
        if name == "base":
            return ModelFiles(self.base.folder)
        if name == "merged":
            return ModelFiles(self.folder.merged)
        if name in ("quantized", "trained", ADAPTER):
            adapter = {"trained": self.folder.adapter, ADAPTER: self.folder.exports / ADAPTER}.get(name)
            return ModelFiles(self.quantized.folder, adapter)
        export = self.folder.exports / name
        return ModelFiles(next(iter(sorted(export.glob("*.gguf"))), export))

    def open(self, files: ModelFiles, *, window: int) -> nn.Module:
        """The model in its runtime, see ``stages.opening``."""
        return open_model(
            files,
            compute_dtype=self.recipe.quantization.compute_dtype,
            window=window,
            threads=self.recipe.run.threads,
            trust_remote_code=self.trust_remote_code,
        )
