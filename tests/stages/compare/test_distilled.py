import pytest
import torch

from qlora_trainer.numerics.dynamic import rounded_tokens
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.stages.compare.distilled import distilled_block, rounded_inputs
from qlora_trainer.stages.compare.walking import BlockInView, walk
from tests.stages.compare.conftest import MakeInputs

SPEC = GridSpec(4, 32, "none", torch.float16)


@pytest.fixture
def block(make_inputs: MakeInputs) -> BlockInView:
    return next(iter(walk(make_inputs())))


def error(block: BlockInView, weights: dict[str, torch.Tensor]) -> float:
    """Mean squared difference of the quantized block's output from the original's, over real tokens."""
    rounded = {name: round_to_nearest(weight, SPEC).dequantized() for name, weight in weights.items()}
    with torch.no_grad(), rounded_inputs(block, 8):
        given = [
            block.call({**block.weights, **rounded}, hidden, n)[block.batches[n].real]
            for n, hidden in enumerate(block.hidden)
        ]
    with torch.no_grad():
        wanted = [block.call(block.weights, hidden, n)[block.batches[n].real] for n, hidden in enumerate(block.hidden)]
    return (torch.cat(given) - torch.cat(wanted)).square().mean().item()


def test_distillation_lowers_the_block_s_output_error_as_it_says(block: BlockInView) -> None:
    original = {f"{module}.weight": block.weights[f"{module}.weight"] for module in block.linears}
    matrices, before, after = distilled_block(block, SPEC, activation_bits=8, steps=60, seed=0)
    assert before == pytest.approx(error(block, original), rel=1e-5)
    assert after == pytest.approx(error(block, matrices), rel=1e-5)
    assert after < 0.9 * before
    assert not any(matrix.requires_grad for matrix in matrices.values())


def test_without_a_step_nothing_changes(block: BlockInView) -> None:
    matrices, before, after = distilled_block(block, SPEC, activation_bits=8, steps=0, seed=0)
    assert before == after
    for name, matrix in matrices.items():
        assert torch.equal(matrix, block.weights[name])


def test_inputs_are_rounded_only_for_a_while(block: BlockInView) -> None:
    plain = block.call(block.weights, block.hidden[0], 0)
    with rounded_inputs(block, 4):
        rounded = block.call(block.weights, block.hidden[0], 0)
    assert not torch.allclose(rounded, plain, rtol=1e-3)
    assert torch.equal(block.call(block.weights, block.hidden[0], 0), plain)
    first = block.inputs[block.linears[0]]
    assert not torch.equal(rounded_tokens(first, bits=4), first)
