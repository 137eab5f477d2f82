"""A student of few bits with LoRA factors under its rounding: what LLM-QAT trains.

A layer computes ``Q_a(x) Q_w(W + s B A)^T`` with token-wise Q_a and channel-wise Q_w, gradients straight through both.
W stays frozen and only A and B are trained, so that optimizer state is that of an adapter; A is random and B zero at
first (arXiv 2106.09685), so that training begins at rounding to nearest.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.dynamic import rounded_tokens, straight_through
from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.numerics.low_rank import merged_weight
from qlora_trainer.numerics.merging import quantized_merged_product


class StudentLinear(nn.Module):
    """A linear layer of few bits whose rounding is trained through.

    Args:
        base: the 16-bit layer; frozen.
        rank: r of the factors, cut to the layer's smaller side.
        scale: s before B A.
        spec: grids of the weight.
        activation_bits: of the inputs; 16 leaves them.
        generator: of A.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        spec: GridSpec,
        activation_bits: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        outputs, inputs = base.weight.shape
        rank = min(rank, outputs, inputs)
        first = (torch.rand(rank, inputs, generator=generator) * 2 - 1) / inputs**0.5
        self.lora_a = nn.Parameter(first.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank, device=base.weight.device))
        self.scale, self.spec, self.activation_bits = scale, spec, activation_bits

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape ``(.., in_features)`` to ``(.., out_features)``."""
        rounded = straight_through(inputs, rounded_tokens(inputs.detach(), bits=self.activation_bits))
        product = quantized_merged_product(
            rounded, self.weight, self.lora_a, self.lora_b, scale=self.scale, spec=self.spec
        )
        return product if self.bias is None else product + self.bias

    def merged(self) -> Tensor:
        """``W + s B A`` in float32, not rounded yet."""
        with torch.no_grad():
            return merged_weight(self.weight, self.lora_a, self.lora_b, scale=self.scale)


def as_student(
    model: nn.Module,
    modules: Collection[str],
    *,
    rank: int,
    scale: float,
    spec: GridSpec,
    activation_bits: int,
    seed: int,
) -> dict[str, StudentLinear]:
    """Changes a dense model into a student: its named layers become ``StudentLinear``; gives them by name.

    Args:
        model: frozen by this.
        modules: names of its linear layers.
        rank: of the factors.
        scale: of the factors.
        spec: grids of the weights.
        activation_bits: of the layers' inputs.
        seed: of A's values.
    """
    model.requires_grad_(requires_grad=False)
    generator, layers = torch.Generator().manual_seed(seed), dict[str, StudentLinear]()
    for module in modules:
        parent, _, name = module.rpartition(".")
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        layers[module] = StudentLinear(
            linear, rank=rank, scale=scale, spec=spec, activation_bits=activation_bits, generator=generator
        )
        setattr(model.get_submodule(parent), name, layers[module])
    return layers
