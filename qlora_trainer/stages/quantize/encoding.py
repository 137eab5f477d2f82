"""A base's weights on their way into their format, one matrix at a time, and what that does to each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qlora_trainer.formats.model_folder import Stored
from qlora_trainer.formats.peft_adapter import Factors
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.numerics.distortion import max_error, relative_error, sqnr_db
from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.numerics.low_rank import delta_weight, principal_factors
from qlora_trainer.recipe import Lora
from qlora_trainer.records import LayerDistortion, LinearLayers
from qlora_trainer.runtime.bnb import stored_bits
from qlora_trainer.runtime.progress import counted
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.runtime.weight_headers import read_headers

Weights = Iterable[tuple[str, Tensor]]


class RoundBase(Protocol):
    """Integers chosen block by block on calibration rows, which another stage knows how to do."""

    def __call__(self, weights: Weights, spec: GridSpec, workplace: Path) -> Iterator[tuple[str, Stored]]:
        """The same tensors in the same order, integers in place of the matrices that are quantized.

        Args:
            weights: every tensor of the base by checkpoint name.
            spec: the grids that integers lie on.
            workplace: an existing folder for what is only needed on the way.

        Raises:
            RecipeError: too few calibration rows, or a layer that cannot be rounded.
        """


@dataclass(frozen=True)
class Calibrated:
    """How integers are chosen where they follow from rows as well as from weights.

    Attributes:
        key: of the rows and of the settings.
        round_base: chooses them.
    """

    key: str
    round_base: RoundBase


class Encoding:
    """Prepares and meters the weights as they stream from the base into ``write_model``."""

    def __init__(self, weight_format: WeightFormat, lora: Lora, layers: LinearLayers) -> None:
        self.weight_format = weight_format
        self.lora = lora
        self.adapted = frozenset(layers.adapted)
        self.distortions: list[LayerDistortion] = []
        self.factors: dict[str, Factors] = {}
        self.bits = 0
        # Of the tensor that is about to be written; rounding hands integers on, and they are measured against it.
        self._original: Tensor | None = None

    def stream(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors; with PiSSA, adapted weights without their principal part."""
        tensors = read_tensors(folder, check_finite=True)
        for name, tensor in counted(tensors, "quantizing", unit="tensors", total=len(read_headers(folder))):
            module = name.removesuffix(".weight")
            self._original = tensor
            if self.lora.init == "pissa" and module in self.adapted and name.endswith(".weight"):
                factors = self._start_at(module, tensor)
                self._original = tensor.float() - delta_weight(factors.lora_a, factors.lora_b, scale=self.lora.scale)
            yield name, self._original

    def measure(self, module: str, _weight: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Takes the distortion of one stored matrix; with LoftQ, factors of what was lost."""
        assert self._original is not None
        original, restored = self._original.float(), self.weight_format.decode(parts).float()
        if self.lora.init == "loftq" and module in self.adapted:
            self._start_at(module, original - restored)
        bits = stored_bits(parts)
        self.bits += bits
        self.distortions.append(
            LayerDistortion(
                name=module,
                shape=(original.shape[0], original.shape[1]),
                sqnr_db=sqnr_db(original, restored),
                relative_error=relative_error(original, restored),
                max_error=max_error(original, restored),
                bits_per_parameter=bits / original.numel(),
            )
        )

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits over parameters, of the matrices that were measured."""
        return self.bits / sum(layer.shape[0] * layer.shape[1] for layer in self.distortions)

    def _start_at(self, module: str, weight: Tensor) -> Factors:
        lora_a, lora_b = principal_factors(weight, self.lora.rank, scale=self.lora.scale)
        self.factors[module] = Factors(lora_a=lora_a, lora_b=lora_b)
        return self.factors[module]
