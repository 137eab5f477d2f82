"""What a frozen layer with a LoRA adapter computes with, in place of the library's own forward.

The same function, with less kept and nothing copied: the library casts the input of every adapter to float32, keeps it,
and clones the frozen layer's output.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.adapted_linear import FrozenLayer, LowRankUpdate, adapted_linear
from qlora_trainer.runners.integer_linear import IntegerLinear
from qlora_trainer.runtime import bnb

# isort: split
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear


class LeanForward:
    """Stands before a layer of peft's: parameters, names and files are peft's. Only ``forward`` differs.

    DoRA and several adapters go the library's way, and so does whatever runs without gradients: a model is measured by
    what it will be served with, to the bit.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x W^T + b + s dropout(x) A^T B^T`` in the type of ``x``."""
        layer: Any = self
        adapter = _plain_adapter(layer)
        if adapter is None or args or kwargs:
            library: Any = super()
            output: Tensor = library.forward(x, *args, **kwargs)
            return output
        update = LowRankUpdate(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        dropped = layer.lora_dropout[adapter](x)
        return adapted_linear(x, self.frozen(x.dtype), update, dropped=None if dropped is x else dropped)

    def frozen(self, dtype: torch.dtype) -> FrozenLayer:
        """The base layer, for inputs of this type."""
        raise NotImplementedError


class LeanLinear4bit(LeanForward, Linear4bit):  # type: ignore[misc]  # peft is untyped
    """A base layer in NF4 or FP4: dequantized once forward and once backward, never held."""

    def frozen(self, dtype: torch.dtype) -> FrozenLayer:
        """The 4-bit layer."""
        base = self.get_base_layer()
        return FrozenLayer(partial(bnb.dequantized, base, dtype), base.bias)


class LeanLinear8bit(LeanForward, Linear8bitLt):  # type: ignore[misc]  # peft is untyped
    """The same for LLM.int8 (arXiv 2208.07339): the library's product forward, its gradient, and nothing kept by it.

    The library keeps the input for a gradient of the weight that nobody asks for, where no checkpointing lets it go.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """LLM.int8's ``x W^T + b``, and ``s dropout(x) A^T B^T`` in the type of ``x``."""
        bnb.keep_scales(self.get_base_layer())
        return super().forward(x, *args, **kwargs)

    def frozen(self, dtype: torch.dtype) -> FrozenLayer:
        """The int8 layer."""
        base = self.get_base_layer()
        return FrozenLayer(partial(bnb.dequantized, base, dtype), base.bias, base)


class LeanIntegerLinear(LeanForward, Linear):  # type: ignore[misc]  # peft is untyped
    """The same for a base layer of integers and scales: dequantized once forward and once backward, never held."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Of a kind of layer that the library does not know, and would warn of."""
        layer: Any = module
        return layer.in_features, layer.out_features

    def frozen(self, dtype: torch.dtype) -> FrozenLayer:
        """The layer of integers."""
        base = self.get_base_layer()
        return FrozenLayer(partial(base.dequantized, dtype), base.bias)

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: the sum of integers and a trained delta is on no grid.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an adapter cannot be merged into a base of integers in place; merge it into the dequantized base and "
            "quantize again"
        )


class LeanLinear(LeanForward, Linear):  # type: ignore[misc]  # peft is untyped
    """The same for a layer that is not quantized: its weight is there already, in the type of its input."""

    def frozen(self, dtype: torch.dtype) -> FrozenLayer:
        """The layer as it is."""
        base = self.get_base_layer()
        return FrozenLayer(partial(base.weight.to, dtype), base.bias)


def _plain_adapter(layer: Any) -> str | None:
    """Name of the one adapter to apply; None where the library's forward is the one to take."""
    active = [str(name) for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or not torch.is_grad_enabled():
        return None
    return None if active[0] in layer.lora_variant else active[0]


def lean_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """Adapted layers by the class of their frozen layer, as peft's ``LoraConfig`` wants custom modules."""
    return {
        bnb.FourBitLinear: LeanLinear4bit,
        bnb.EightBitLinear: LeanLinear8bit,
        IntegerLinear: LeanIntegerLinear,
        # Last: bitsandbytes' layers are linear ones too, and the first that fits is taken.
        nn.Linear: LeanLinear,
    }
