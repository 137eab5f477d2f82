"""What a 4-bit layer with a LoRA adapter computes with, in place of the library's own forward.

The same function, with less kept and nothing copied: the library casts the input of every adapter to float32, keeps it,
and clones the frozen layer's output.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.adapted_linear import FrozenLayer, LowRankUpdate, adapted_linear
from qlora_trainer.runtime import bnb

# isort: split
from peft.tuners.lora.bnb import Linear4bit


class LeanLinear4bit(Linear4bit):  # type: ignore[misc]  # peft is untyped
    """A peft layer like any other: parameters, names and files are peft's. Only ``forward`` differs.

    DoRA and several adapters go the library's way, and so does whatever runs without gradients: a model is measured by
    what it will be served with, to the bit.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x W^T + b + s dropout(x) A^T B^T`` in the type of ``x``."""
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.get_base_layer()
        layer = FrozenLayer(lambda: bnb.dequantized(base, x.dtype), base.bias)
        update = LowRankUpdate(self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter])
        dropped = self.lora_dropout[adapter](x)
        return adapted_linear(x, layer, update, dropped=None if dropped is x else dropped)

    def _plain_adapter(self) -> str | None:
        """Name of the one adapter to apply; None where the library's forward is the one to take."""
        active = [str(name) for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or not torch.is_grad_enabled():
            return None
        return None if active[0] in self.lora_variant else active[0]


def lean_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """Adapted layers by the class of their frozen layer, as peft's ``LoraConfig`` wants custom modules."""
    return {bnb.FourBitLinear: LeanLinear4bit}
