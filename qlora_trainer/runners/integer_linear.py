"""A frozen linear layer that holds integers and scales and dequantizes them at each use.

What GPTQ or rounding to nearest leaves, in a model that runs: four bits take half a byte a weight in memory, and the
float matrix exists only while it is multiplied.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_trainer.numerics.integer_weight import IntegerWeight
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.device import choose_device

NIBBLE_ZERO = 8
"""Added to a signed code of at most four bits, so that it is stored without a sign."""


class IntegerLinear(nn.Module):
    """``x W^T + b`` with W on a symmetric grid; nothing of it is trained.

    Args:
        weight: codes of shape ``(out_features, in_features)`` and their scales.
        bias: shape ``(out_features,)``; None = none.
        scale_dtype: type that scales are held in.
        dtype: of ``weight``: what the model computes in.

    Raises:
        ValueError: the grid has a zero point, or a scale is no number of ``scale_dtype``.
    """

    qweight: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None = None,
        *,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if bool((weight.grid.zero_point != 0).any()):
            raise ValueError("integers with a zero point cannot be held here; round on a symmetric grid")
        scale = weight.grid.scale.to(scale_dtype)
        if not torch.equal(scale.float(), weight.grid.scale.float()):
            raise ValueError(f"scales of this grid are no numbers of {scale_dtype}; round with such scales")
        self.dtype = dtype
        self.out_features, self.in_features = weight.codes.shape
        self.bits = weight.grid.bits
        self.is_packed = self.bits <= 4 and self.in_features % 2 == 0
        self.register_buffer("qweight", _packed(weight.codes) if self.is_packed else weight.codes)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W in a float type, shape ``(out_features, in_features)``, made anew.

        The product of integer and scale is exact in float32, and rounded once to a narrower type. Where the scales are
        of that type, its own product is rounded alike, and no float32 matrix is made.
        """
        work = dtype if self.scale.dtype == dtype else torch.float32
        weight = torch.empty(self.out_features, self.in_features, dtype=work, device=self.scale.device)
        if self.is_packed:
            weight[:, 0::2] = self.qweight & 15
            weight[:, 1::2] = self.qweight >> 4
            weight.sub_(NIBBLE_ZERO)
        else:
            weight.copy_(self.qweight)
        groups = weight.view(self.out_features, self.scale.shape[1], -1)
        return groups.mul_(self.scale.to(work).unsqueeze(-1)).view_as(weight).to(dtype)

    @property
    def weight(self) -> Tensor:
        """W as the model multiplies by it, made anew: what libraries look for, as DoRA does for its norms."""
        return self.dequantized(self.dtype)

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
        device = model.get_submodule(name).get_parameter("weight").device
        _insert(model, name, weight, scale_dtype=torch.float16).to(device)
    return model


def load(
    folder: Path,
    weights: Iterable[tuple[str, Tensor | IntegerWeight]],
    *,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model whose matrices come as integers, in evaluation mode, frozen; none of them is ever dense as a whole.

    Args:
        folder: its config.json is read, its weights are not.
        weights: every tensor of the model by checkpoint name, integers where a layer is to hold them.
        dtype: of every other weight.
        scale_dtype: type that scales are held in.
        trust_remote_code: run code that comes with the model.

    Raises:
        BaseModelError: weights are missing or of another shape.
        ValueError: integers have another shape than their layer, or cannot be held; names the layer.
    """
    model = runner.skeleton(folder, trust_remote_code=trust_remote_code, buffers_for=dtype)
    expected = model.state_dict()
    given: dict[str, Tensor] = {}
    for name, weight in weights:
        if isinstance(weight, IntegerWeight):
            _insert(model, name.removesuffix(".weight"), weight, scale_dtype=scale_dtype)
            expected.pop(name)
        else:
            given[name] = weight.to(dtype) if weight.is_floating_point() else weight
    runner.take_weights(model, expected, given, where=folder)
    return model.requires_grad_(requires_grad=False).to(choose_device()).eval()


def _insert(model: nn.Module, name: str, weight: IntegerWeight, *, scale_dtype: torch.dtype) -> IntegerLinear:
    """Puts integers into the place of a dense layer, whose bias stays."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear) or layer.weight.shape != weight.codes.shape:
        raise ValueError(f"{name} is no linear layer of shape {tuple(weight.codes.shape)}")
    parent, _, child = name.rpartition(".")
    bias = None if layer.bias is None else layer.bias.detach()
    try:
        made = IntegerLinear(weight, bias, scale_dtype=scale_dtype, dtype=layer.weight.dtype).train(layer.training)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    setattr(model.get_submodule(parent), child, made)
    return made


def _packed(codes: Tensor) -> Tensor:
    """Two signed codes of at most four bits in each byte, the even column in the low half."""
    unsigned = (codes + NIBBLE_ZERO).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
