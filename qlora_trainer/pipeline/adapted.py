"""The frozen base with adapters, loaded once and only if some stage needs it."""

import gc
from pathlib import Path

from torch import nn

from qlora_trainer.pipeline.ground import Ground
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import QuantizedModel
from qlora_trainer.stages import adapt, quantize


class AdaptedModel:
    """Holds the model between the stages that train and measure it."""

    def __init__(self, recipe: Recipe, ground: Ground, quantized: QuantizedModel, *, trust_remote_code: bool) -> None:
        self.recipe, self.ground, self.quantized = recipe, ground, quantized
        self.trust_remote_code = trust_remote_code
        self._model: nn.Module | None = None
        self._holds: Path | None = None

    def fresh(self) -> nn.Module:
        """The model as training starts from it."""
        if self._model is None or self._holds is not None:
            self.forget()
            settings, layers = self.recipe.quantization, self.ground.layers
            base = quantize.open_base(self.quantized, settings, layers=layers, trust_remote_code=self.trust_remote_code)
            self._model = adapt.insert(
                base,
                self.recipe.lora,
                layers=layers,
                compute_dtype=settings.compute_dtype,
                seed=self.recipe.run.seed,
                initial=self.quantized.initial_factors,
            )
        return self._model

    def trained(self, adapter: Path) -> nn.Module:
        """The model with the trained adapter of that folder in it."""
        if self._model is None or self._holds != adapter:
            model = self.fresh()
            adapt.load_adapter(model, adapter)
            self._holds = adapter
            return model
        return self._model

    def became_trained(self, adapter: Path) -> None:
        """Notes that the model in memory was trained in place to what ``adapter`` holds."""
        self._holds = adapter

    def forget(self) -> None:
        """Lets go of the model, so that its memory is free for the next one."""
        self._model, self._holds = None, None
        gc.collect()
