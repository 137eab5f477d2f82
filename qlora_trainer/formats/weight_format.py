"""What every format of quantized weights can do: encode one matrix, decode it again, describe itself.

A format knows nothing of models or folders. ``encode`` and ``decode`` are inverse up to rounding, and
``decode`` gives the weight *as the runtime's forward uses it*; that is what verification relies on.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight


class WeightFormat(Protocol):
    """One way to store the matrices of a model's linear layers."""

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe."""

    @property
    def bits(self) -> int:
        """Bits of a quantized weight, constants not counted; 16 where nothing is quantized."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for ``weight``, by suffix.

        Args:
            weight: float32, shape ``(out_features, in_features)``; not changed.

        Returns:
            Tensors keyed by what follows the module's name and a dot in the checkpoint (``weight``,
            ``weight_packed``, ``weight.absmax``, ...).

        Raises:
            ValueError: the format cannot hold this shape, or a value is not finite; names the shape and the mend.
        """

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Float weight of shape ``(out_features, in_features)`` that the runtime's forward multiplies by.

        Args:
            tensors: what ``encode`` gave, or the same read back from a file.
        """

    def config(self, ignored: Sequence[str]) -> dict[str, object] | None:
        """The ``quantization_config`` of config.json, or None where there is none.

        Args:
            ignored: names of linear modules that are not quantized, such as ``lm_head``.
        """

    def of(self, module: str) -> "WeightFormat":
        """The format of one module's matrix: another one where a file stores some layers with more bits."""


class IntegerFormat(WeightFormat, Protocol):
    """A format of integers on an affine grid: it packs what any rounding method chose.

    ``encode`` is ``pack`` of the nearest integers.
    """

    @property
    def spec(self) -> GridSpec:
        """The grids that it holds."""

    def pack(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """The tensors that stand for integers on a grid of ``spec``, by suffix; ``decode`` gives their reals.

        Raises:
            ValueError: the format cannot hold this shape or grid; names it and the mend.
        """

    def of(self, module: str) -> "IntegerFormat":
        """As in ``WeightFormat``."""


class UnpackedFormat(IntegerFormat, Protocol):
    """A format of integers that also gives them back, for a model that computes with them."""

    def unpack(self, tensors: Mapping[str, Tensor]) -> IntegerWeight:
        """The integers and their grid that ``pack`` was given; arguments as for ``decode``."""

    def of(self, module: str) -> "UnpackedFormat":
        """As in ``WeightFormat``."""
