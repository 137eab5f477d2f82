"""A frozen layer and its low-rank update give the values and gradients that autograd gives, and keep less."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_trainer.numerics.adapted_linear import FrozenLayer, LowRankUpdate, adapted_linear

T, IN, OUT, R, S = 7, 12, 10, 3, 0.7


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, T, IN), torch.randn(OUT, IN), torch.randn(OUT)
    lora_a, lora_b = torch.randn(R, IN), torch.randn(OUT, R)
    leaves = (x.to(dtype).requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_())
    return leaves[0], weight.to(dtype), bias.to(dtype), leaves[1], leaves[2]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return functional.linear(x, weight, bias) + S * functional.linear(functional.linear(x, lora_a), lora_b)


def lean(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return adapted_linear(x, FrozenLayer(lambda: weight, bias), LowRankUpdate(lora_a, lora_b, S))


@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_autograd(has_bias: bool) -> None:
    x, weight, bias, lora_a, lora_b = tensors()
    used = bias if has_bias else None
    upstream = torch.randn(2, T, OUT)
    found, wanted = lean(x, weight, used, lora_a, lora_b), plain(x, weight, used, lora_a, lora_b)
    # A few float32 sums of at most a dozen terms in another order; measured 3e-7 at most.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    leaves = (x, lora_a, lora_b)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert mine.abs().sum() > 0


def test_gradients_agree_with_differences_of_values() -> None:
    x, weight, bias, lora_a, lora_b = (tensor.detach().double() for tensor in tensors())
    leaves = tuple(tensor.requires_grad_() for tensor in (x, lora_a, lora_b))
    assert torch.autograd.gradcheck(lambda x, a, b: lean(x, weight, bias, a, b), leaves)


def test_products_in_bfloat16_give_float32_gradients_of_float32_factors() -> None:
    x, weight, _, lora_a, lora_b = tensors(torch.bfloat16)
    output = lean(x, weight, None, lora_a, lora_b)
    assert output.dtype == torch.bfloat16
    of_x, of_a, of_b = torch.autograd.grad(output, (x, lora_a, lora_b), torch.ones_like(output))
    assert (of_x.dtype, of_a.dtype, of_b.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    full = plain(x.float(), weight.float(), None, lora_a, lora_b)
    (wanted,) = torch.autograd.grad(full, lora_a, torch.ones_like(full))
    # Three roundings to 8 bits in a row, over 2 T tokens; measured 0.4 %.
    assert 1e-5 < (of_a - wanted).norm() / wanted.norm() < 0.02


def test_the_weight_is_made_once_forward_and_once_backward_and_not_kept() -> None:
    x, weight, _, lora_a, lora_b = tensors()
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return weight.clone()

    output = adapted_linear(x, FrozenLayer(make), LowRankUpdate(lora_a, lora_b, S))
    assert len(made) == 1
    torch.autograd.grad(output.sum(), x)
    assert len(made) == 2


def test_only_the_input_and_rank_sized_tensors_are_kept() -> None:
    x, weight, bias, lora_a, lora_b = tensors()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lean(x, weight, bias, lora_a, lora_b)
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted([(2 * T, IN), (2 * T, R), (R, IN), (OUT, R)])


def test_a_dropped_input_gets_a_gradient_of_its_own() -> None:
    x, weight, _, lora_a, lora_b = tensors()
    dropped = (x.detach() * 0.5).requires_grad_()
    update = LowRankUpdate(lora_a, lora_b, S)
    output = adapted_linear(x, FrozenLayer(lambda: weight), update, dropped=dropped)
    of_x, of_dropped = torch.autograd.grad(output.sum(), (x, dropped))
    torch.testing.assert_close(of_x, weight.sum(0).expand_as(x))
    torch.testing.assert_close(of_dropped, (S * lora_b @ lora_a).sum(0).expand_as(x), rtol=1e-5, atol=1e-5)
