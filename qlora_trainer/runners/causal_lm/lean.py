"""Norms and gated feed-forward parts of a model replaced by ones that keep less for the backward pass.

A replacement is made only where it was shown, on the spot and on this model's own weights, to compute what the
module computes; whatever an architecture does otherwise stays as it is. Parameters keep their names. Without gradients
the module's own code runs, so that a model is measured by what it will be served with, to the bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.lean_layers import gated_product, rms_norm

PROBE_ROWS = 3
EPS_NAMES = ("variance_epsilon", "eps")
GATED_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
FUSED_PARTS = ("gate_up_proj", "down_proj", "activation_fn")
"""Gate and up as halves of one layer's outputs (Phi-3, GLM)."""


class LeanNorm(nn.Module):
    """Root-mean-square norm with a frozen weight; ``offset`` 1 for Gemma's ``1 + w``."""

    def __init__(self, original: nn.Module, *, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset
        self.original_forward = original.forward

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last axis of ``x``."""
        if not torch.is_grad_enabled():
            plain: Tensor = self.original_forward(x)
            return plain
        weight = self.weight if self.offset == 0 else self.weight + self.offset
        return rms_norm(x, weight, eps=self.eps)


class LeanGatedPart(nn.Module):
    """``down(activation(gate(x)) * up(x))`` with the children of the module it stands for."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.original_forward = original.forward
        self.is_fused = "gate_up_proj" in dict(original.named_children())

    def forward(self, x: Tensor) -> Tensor:
        """What the feed-forward part gives for ``x``."""
        if not torch.is_grad_enabled():
            plain: Tensor = self.original_forward(x)
            return plain
        parts: Any = self
        if self.is_fused:
            gate, up = parts.gate_up_proj(x).chunk(2, dim=-1)
            product = gated_product(gate, up, parts.activation_fn)
        else:
            product = gated_product(parts.gate_proj(x), parts.up_proj(x), parts.act_fn)
        output: Tensor = parts.down_proj(product)
        return output


def make_lean(model: nn.Module, dtype: torch.dtype) -> int:
    """Changes the model's norms and gated parts where that was shown to change nothing; gives how many it changed.

    Args:
        model: frozen but for adapters, in evaluation mode, on its device.
        dtype: of its activations.
    """
    found = [(name, lean) for name, module in model.named_modules() if (lean := _lean(module, dtype)) is not None]
    for name, lean in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, lean)
    return len(found)


def _lean(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """The module's replacement; None where there is none that computes the same."""
    for make in (_lean_norm, _lean_gated_part):
        lean = make(module, dtype)
        if lean is not None:
            return lean.train(module.training)
    return None


def _lean_norm(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    parameters = dict(module.named_parameters(recurse=False))
    eps = next((vars(module)[name] for name in EPS_NAMES if name in vars(module)), None)
    if set(parameters) != {"weight"} or parameters["weight"].ndim != 1 or not isinstance(eps, float):
        return None
    weight = parameters["weight"]
    if weight.requires_grad:
        return None
    for offset in (0.0, 1.0):
        lean = LeanNorm(module, weight=weight, eps=eps, offset=offset)
        if _computes_the_same(module, lean, width=len(weight), dtype=dtype):
            return lean
    return None


def _lean_gated_part(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    children = dict(module.named_children())
    if set(children) not in (set(GATED_PARTS), set(FUSED_PARTS)):
        return None
    lean = LeanGatedPart(module).train(module.training)
    gate: Any = children.get("gate_proj", children.get("gate_up_proj"))
    return lean if _computes_the_same(module, lean, width=int(gate.in_features), dtype=dtype) else None


@torch.enable_grad()
def _computes_the_same(one: nn.Module, other: nn.Module, *, width: int, dtype: torch.dtype) -> bool:
    """Whether both give the same for a few random inputs, up to a few roundings of their type."""
    generator = torch.Generator().manual_seed(0)
    device = next(other.parameters()).device
    probe = torch.randn(1, PROBE_ROWS, width, generator=generator).to(device, dtype)
    wanted, found = one(probe), other(probe)
    tolerance = 4 * torch.finfo(dtype).eps
    wanted, found = wanted.detach(), found.detach()
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
    )
