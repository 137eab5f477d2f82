"""Norm and gated product give what autograd gives, and keep their inputs alone."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_trainer.numerics.lean_layers import gated_product, rms_norm

EPS = 1e-5


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_the_norm_is_the_models_own(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(4, 6, 64)).to(dtype).requires_grad_(), torch.rand(64).to(dtype)
    upstream = torch.randn(4, 6, 64).to(dtype)
    found, wanted = rms_norm(x, weight, eps=EPS), plain_norm(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    mine, theirs = (torch.autograd.grad(output, x, upstream)[0] for output in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert mine.float().norm() > 0


def test_a_row_of_zeros_has_a_norm_and_a_gradient() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    output = rms_norm(x, torch.ones(8), eps=EPS)
    (gradient,) = torch.autograd.grad(output, x, torch.ones(1, 8))
    assert output.abs().max() == 0
    torch.testing.assert_close(gradient, torch.full((1, 8), EPS**-0.5))


@pytest.mark.parametrize("activation", [functional.silu, functional.gelu, torch.relu], ids=["silu", "gelu", "relu"])
def test_the_gated_product_is_exact(activation: object) -> None:
    assert callable(activation)
    torch.manual_seed(0)
    gate, up, upstream = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    found, wanted = gated_product(gate, up, activation), activation(gate) * up
    assert torch.equal(found, wanted)
    pairs = (torch.autograd.grad(output, (gate, up), upstream.detach()) for output in (found, wanted))
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


def test_inputs_alone_are_kept() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.ones(8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        normed = rms_norm(x, weight, eps=EPS)
        gated_product(normed, x, functional.silu)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(5, 1), (5, 8), (5, 8), (5, 8), (8,)]
