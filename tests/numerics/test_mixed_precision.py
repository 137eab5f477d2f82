"""Held against bitsandbytes' own int8 product, which on a CPU is carried out exactly and rounded to float16."""

import bitsandbytes
import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.gptq import layer_error
from qlora_trainer.numerics.mixed_precision import (
    Int8Weight,
    mixed_precision_matmul,
    outlier_inputs,
    vectorwise,
)
from qlora_trainer.runtime import bnb
from tests.oracles import nf4 as oracle

HALF_EPS = torch.finfo(torch.float16).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def with_outliers(tokens: int = 10, inputs: int = 64) -> Tensor:
    """Two inputs are beyond 6.0 in every token, as outlier features of large models are; the others stay below."""
    activations = normal(tokens, inputs).clamp(-4, 4)
    activations[:, 7] = 9.0 + normal(tokens)
    activations[:, 40] = -20.0 + normal(tokens, seed=1)
    return activations


def library(activations: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """bitsandbytes' ``MatMul8bitLt``, the forward of its inference on every device."""
    state = bitsandbytes.MatmulLtState()
    tensors = bnb.quantize_weight(weight, data_type="int8", double_quant=False, dtype=torch.float16)
    state.CB, state.SCB = tensors["weight"], tensors["SCB"]
    state.threshold, state.has_fp16_weights, state.is_training = threshold, False, False
    output: Tensor = bitsandbytes.matmul(activations, state.CB, state=state, threshold=threshold)
    return output


def test_rows_are_quantized_as_the_paper_and_the_library_do() -> None:
    weight = normal(48, 64)
    weight[3] = 0
    found = vectorwise(weight)
    codes, absmax = oracle.int8_rows(weight.float())
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.absmax, absmax)
    library_codes = bnb.quantize_weight(weight, data_type="int8", double_quant=False, dtype=torch.float16)
    assert (found.codes.int() - library_codes["weight"].int()).abs().max() <= 1
    assert (found.codes != library_codes["weight"]).float().mean() < 1e-3


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_product_is_the_library_s(threshold: float) -> None:
    weight, activations = normal(48, 64), with_outliers() if threshold else normal(10, 64)
    tensors = bnb.quantize_weight(weight, data_type="int8", double_quant=False, dtype=torch.float16)
    ours = mixed_precision_matmul(activations, Int8Weight(tensors["weight"], tensors["SCB"]), threshold=threshold)
    theirs = library(activations, weight, threshold).float()
    # The library adds the outliers' part, up to 100 here, to the rest in float16.
    torch.testing.assert_close(ours, theirs, rtol=4 * HALF_EPS, atol=4 * HALF_EPS * theirs.abs().max().item())
    assert not torch.equal(ours, activations.float() @ weight.float().T)


def test_without_outliers_the_product_is_that_of_integers() -> None:
    weight, activations = vectorwise(normal(6, 16)), normal(4, 16)
    rows = vectorwise(activations)
    expected = rows.dequantized().double() @ weight.dequantized().double().T
    assert not outlier_inputs(activations).any()
    found = mixed_precision_matmul(activations, weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_outliers_pass_in_full_precision() -> None:
    weight, activations = normal(48, 64), torch.zeros(10, 64)
    activations[:, [7, 40]] = with_outliers()[:, [7, 40]].float()
    exact = mixed_precision_matmul(activations, vectorwise(weight), original=weight)
    torch.testing.assert_close(exact, activations @ weight.float().T, rtol=1e-6, atol=1e-4)
    stored = mixed_precision_matmul(activations, vectorwise(weight))
    torch.testing.assert_close(stored, activations @ vectorwise(weight).dequantized().T, rtol=1e-6, atol=1e-4)


def test_the_decomposition_loses_far_less_than_int8_alone_where_there_are_outliers() -> None:
    weight, activations = normal(256, 256), with_outliers(64, 256)
    wanted = activations.float() @ weight.float().T
    lost = [
        (mixed_precision_matmul(activations, vectorwise(weight), threshold=threshold) - wanted).norm() / wanted.norm()
        for threshold in (6.0, 0.0)
    ]
    # Six seeds of the weight gave ratios of 3.34 to 3.46.
    assert 3 < lost[1] / lost[0] < 4


def test_an_outlier_is_a_value_of_6_or_more_in_any_token() -> None:
    activations = torch.zeros(3, 4)
    activations[1, 0], activations[2, 2], activations[0, 3] = 6.0, -7.0, 5.99
    assert outlier_inputs(activations).tolist() == [True, False, True, False]
    assert outlier_inputs(activations, 5.0).tolist() == [True, False, True, True]


def test_zero_rows_and_zero_tokens_stay_zero() -> None:
    weight, activations = normal(4, 8), normal(3, 8)
    weight[1], activations[2] = 0, 0
    found = mixed_precision_matmul(activations, vectorwise(weight))
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 1], torch.zeros(3))
    assert torch.equal(found[2], torch.zeros(4))


def test_weights_error_is_that_of_eight_bits() -> None:
    weight = normal(256, 256).float()
    # Ten seeds gave 4.78e-5 to 4.95e-5: rounding to 127 steps of the absmax of 256 normal values.
    assert layer_error(weight, vectorwise(weight).dequantized(), torch.eye(256)) == pytest.approx(4.85e-5, rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    weight = vectorwise(normal(4, 8))
    with pytest.raises(ValueError, match=r"\(3, 9\) activations do not fit a weight of \(4, 8\)"):
        mixed_precision_matmul(normal(3, 9), weight)
    with pytest.raises(ValueError, match="1 of 8 values are NaN or infinite"):
        vectorwise(torch.tensor([[float("inf")] + [0.0] * 7]))
    with pytest.raises(ValueError, match="want a matrix"):
        vectorwise(torch.ones(4))
