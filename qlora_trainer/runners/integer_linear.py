"""A frozen linear layer that holds integers and scales and dequantizes them at each use.

What GPTQ or rounding to nearest leaves, in a model that runs: four bits take half a byte a weight in memory, and the
float matrix exists only while it is multiplied.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_trainer.numerics.affine import Grid, dequantize
from qlora_trainer.numerics.integer_weight import IntegerWeight

NIBBLE_ZERO = 8
"""Added to a signed code of at most four bits, so that it is stored without a sign."""


class IntegerLinear(nn.Module):
    """``x W^T + b`` with W on a symmetric grid; nothing of it is trained.

    Args:
        weight: codes of shape ``(out_features, in_features)`` and their scales.
        bias: shape ``(out_features,)``; None = none.
        scale_dtype: type that scales are held in.

    Raises:
        ValueError: the grid has a zero point, or a scale is no number of ``scale_dtype``.
    """

    qweight: Tensor
    scale: Tensor

    def __init__(
        self, weight: IntegerWeight, bias: Tensor | None = None, *, scale_dtype: torch.dtype = torch.float16
    ) -> None:
        super().__init__()
        if bool((weight.grid.zero_point != 0).any()):
            raise ValueError("integers with a zero point cannot be held here; round on a symmetric grid")
        scale = weight.grid.scale.to(scale_dtype)
        if not torch.equal(scale.float(), weight.grid.scale.float()):
            raise ValueError(f"scales of this grid are no numbers of {scale_dtype}; round with such scales")
        self.out_features, self.in_features = weight.codes.shape
        self.bits = weight.grid.bits
        self.is_packed = self.bits <= 4 and self.in_features % 2 == 0
        self.register_buffer("qweight", _packed(weight.codes) if self.is_packed else weight.codes)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W in a float type, shape ``(out_features, in_features)``, made anew."""
        codes = _unpacked(self.qweight) if self.is_packed else self.qweight
        scale = self.scale.float()
        return dequantize(codes, Grid(scale, torch.zeros_like(scale), self.bits)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` in the type of ``x``."""
        return functional.linear(x, self.dequantized(x.dtype), self.bias)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the integers and scales in memory."""
        return self.qweight.nbytes + self.scale.nbytes


def with_integer_layers(model: nn.Module, matrices: Mapping[str, IntegerWeight]) -> nn.Module:
    """Changes a dense model so that the named linear layers hold integers, and gives it back.

    Args:
        model: on the device that it runs on.
        matrices: by module name.

    Raises:
        ValueError: a matrix has another shape than its layer, or cannot be held; names the layer.
    """
    for name, weight in matrices.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != weight.codes.shape:
            raise ValueError(f"{name} is no linear layer of shape {tuple(weight.codes.shape)}")
        parent, _, child = name.rpartition(".")
        try:
            made = IntegerLinear(weight, None if layer.bias is None else layer.bias.detach())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        setattr(model.get_submodule(parent), child, made.to(layer.weight.device).train(layer.training))
    return model


def _packed(codes: Tensor) -> Tensor:
    """Two signed codes of at most four bits in each byte, the even column in the low half."""
    unsigned = (codes + NIBBLE_ZERO).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def _unpacked(packed: Tensor) -> Tensor:
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(start_dim=1)
    return halves.to(torch.int8) - NIBBLE_ZERO
