from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.numerics.affine import Granularity
from qlora_trainer.numerics.integer_weight import GridSpec, Offset, round_to_nearest
from qlora_trainer.numerics.low_rank import merged_weight
from qlora_trainer.numerics.merging import quantized_merged_product

OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")
OUTPUTS, INPUTS, RANK, SCALE = 12, 32, 3, 0.7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors() -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B."""
    lora_a, lora_b = 0.3 * normal(RANK, INPUTS, seed=1), 0.3 * normal(OUTPUTS, RANK, seed=2)
    return normal(OUTPUTS, INPUTS), lora_a.requires_grad_(), lora_b.requires_grad_()


def straight_through(inputs: Tensor, base: Tensor, lora_a: Tensor, lora_b: Tensor, spec: GridSpec) -> Tensor:
    merged = base + SCALE * (lora_b @ lora_a)
    rounded = round_to_nearest(merged.detach(), spec).dequantized()
    return inputs @ (merged + (rounded - merged).detach()).T


@pytest.mark.parametrize("granularity", ["channel", 8])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("leading", [(9,), (2, 5)])
def test_product_and_gradients_are_those_of_straight_through_autograd(
    leading: tuple[int, ...], bits: int, offset: Offset, granularity: Granularity
) -> None:
    spec = GridSpec(bits, granularity, offset, torch.float16)
    base, lora_a, lora_b = factors()
    inputs, passed = normal(*leading, INPUTS, seed=3).requires_grad_(), normal(*leading, OUTPUTS, seed=4)
    found = quantized_merged_product(inputs, base, lora_a, lora_b, scale=SCALE, spec=spec)
    expected = straight_through(inputs, base, lora_a, lora_b, spec)
    # float32 sums of at most 320 products of ordinary size, in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = (inputs, lora_a, lora_b)
    for one, other in zip(
        torch.autograd.grad(found, leaves, passed), torch.autograd.grad(expected, leaves, passed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_weight_is_the_one_that_is_exported(offset: Offset) -> None:
    spec = GridSpec(4, 8, offset, torch.float16)
    base, lora_a, lora_b = factors()
    exported = round_to_nearest(merged_weight(base, lora_a, lora_b, scale=SCALE).detach(), spec).dequantized()
    # Each output of a unit input is one weight.
    found = quantized_merged_product(torch.eye(INPUTS), base, lora_a, lora_b, scale=SCALE, spec=spec)
    assert torch.equal(found.T, exported)


class Products(TorchDispatchMode):
    """Records the shapes that matrix products give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = func(*args, **(kwargs or {}))
        if isinstance(given, Tensor) and any(name in str(func) for name in ("mm", "matmul", "outer", "einsum")):
            self.shapes.append(tuple(given.shape))
        return given


def products_of_backward(outputs: Tensor, leaves: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    with Products() as products:
        torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))
    return products.shapes


def test_the_dense_gradient_is_never_formed() -> None:
    spec = GridSpec(4, 8)
    base, lora_a, lora_b = factors()
    inputs = normal(9, INPUTS, seed=3).requires_grad_()
    leaves = (inputs, lora_a, lora_b)
    dense = {(OUTPUTS, INPUTS), (INPUTS, OUTPUTS)}
    found = quantized_merged_product(inputs, base, lora_a, lora_b, scale=SCALE, spec=spec)
    assert sorted(products_of_backward(found, leaves)) == sorted(
        [(9, INPUTS), (9, RANK), (RANK, INPUTS), (9, RANK), (OUTPUTS, RANK)]
    )
    # The meter does see it where autograd forms it.
    assert dense & set(products_of_backward(straight_through(inputs, base, lora_a, lora_b, spec), leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_leave_the_factors_wide(dtype: torch.dtype) -> None:
    spec = GridSpec(4, 8)
    base, lora_a, lora_b = factors()
    inputs = normal(9, INPUTS, seed=3).to(dtype).requires_grad_()
    found = quantized_merged_product(inputs, base.to(dtype), lora_a, lora_b, scale=SCALE, spec=spec)
    gradients = torch.autograd.grad(found, (inputs, lora_a, lora_b), torch.ones_like(found))
    assert found.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]


def test_frozen_inputs_take_no_gradient() -> None:
    base, lora_a, lora_b = factors()
    found = quantized_merged_product(normal(9, INPUTS), base, lora_a, lora_b, scale=SCALE, spec=GridSpec(4, 8))
    assert (OUTPUTS, INPUTS) not in products_of_backward(found, (lora_a, lora_b))


def test_training_through_the_merge_lowers_the_loss_of_the_file() -> None:
    spec = GridSpec(3, 16)
    base, lora_a, lora_b = factors()
    inputs = normal(100, INPUTS, seed=5)
    wanted = inputs @ (base + 0.5 * normal(OUTPUTS, 1, seed=6) @ normal(1, INPUTS, seed=7)).T
    optimizer = torch.optim.Adam([lora_a, lora_b], lr=0.02)
    errors = []
    for _ in range(100):
        outputs = quantized_merged_product(inputs, base, lora_a, lora_b, scale=SCALE, spec=spec)
        loss = (outputs - wanted).square().mean()
        errors.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


def test_what_cannot_be_merged_or_rounded_is_refused() -> None:
    base, lora_a, lora_b = factors()
    inputs = normal(9, INPUTS)
    with pytest.raises(ValueError, match="groups of 5 do not divide"):
        quantized_merged_product(inputs, base, lora_a, lora_b, scale=SCALE, spec=GridSpec(4, 5))
    with pytest.raises(ValueError, match="the factors give"):
        quantized_merged_product(inputs, base[:4], lora_a, lora_b, scale=SCALE, spec=GridSpec(4, 8))
