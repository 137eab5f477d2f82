import re
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.errors import BaseModelError
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.integer_linear import IntegerLinear, load, with_integer_layers
from qlora_trainer.runtime.weight_files import read_tensors


def rounded(bits: int, shape: tuple[int, int] = (6, 16), group: int = 8) -> IntegerWeight:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(bits))
    return round_to_nearest(weight, GridSpec(bits, group, "none", torch.float16))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integers_come_back_as_the_reals_of_their_grid(bits: int) -> None:
    weight = rounded(bits)
    assert torch.equal(IntegerLinear(weight).dequantized(torch.float32), weight.dequantized())


def test_an_odd_number_of_inputs_is_held_a_byte_each() -> None:
    weight = rounded(4, (3, 7), group=7)
    layer = IntegerLinear(weight)
    assert layer.qweight.nbytes == 3 * 7
    assert torch.equal(layer.dequantized(torch.float32), weight.dequantized())


def test_four_bits_take_half_a_byte_and_eight_bits_a_whole_one() -> None:
    scales = 6 * 2 * 2
    assert IntegerLinear(rounded(4)).stored_bytes == 6 * 16 // 2 + scales
    assert IntegerLinear(rounded(8)).stored_bytes == 6 * 16 + scales


def test_it_computes_what_the_dense_layer_of_its_reals_does() -> None:
    weight, bias, x = rounded(4), torch.randn(6), torch.randn(2, 5, 16)
    assert torch.equal(IntegerLinear(weight, bias)(x), nn.functional.linear(x, weight.dequantized(), bias))


def test_nothing_of_it_is_trained() -> None:
    layer = IntegerLinear(rounded(4), torch.zeros(6))
    assert not [name for name, parameter in layer.named_parameters() if parameter.requires_grad]


def test_a_zero_point_is_refused() -> None:
    weight = round_to_nearest(torch.rand(6, 16), GridSpec(4, 8, "zero_point", torch.float16))
    with pytest.raises(ValueError, match="zero point cannot be held"):
        IntegerLinear(weight)


def test_scales_that_the_type_does_not_hold_are_refused() -> None:
    weight = round_to_nearest(torch.randn(6, 16), GridSpec(4, 8, "none", torch.float32))
    with pytest.raises(ValueError, match=re.escape("no numbers of torch.float16")):
        IntegerLinear(weight)


def test_a_model_with_integer_layers_answers_as_the_one_of_their_reals(llama_folder: Path) -> None:
    dense = runner.load(llama_folder, dtype=torch.float32)
    matrices = {
        name: round_to_nearest(module.weight.detach(), GridSpec(4, 8, "none", torch.float16))
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad():
        for name, weight in matrices.items():
            dense.get_parameter(f"{name}.weight").copy_(weight.dequantized())
        wanted = dense(input_ids=ids).logits
        model = with_integer_layers(runner.load(llama_folder, dtype=torch.float32), matrices)
        assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_the_compute_type_give_the_exact_product_rounded_once(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    rounded_weight = round_to_nearest(weight, GridSpec(bits, 32, "none", torch.bfloat16))
    layer = IntegerLinear(rounded_weight, scale_dtype=torch.bfloat16, dtype=dtype)
    assert torch.equal(layer.dequantized(dtype), rounded_weight.dequantized().to(dtype))
    assert torch.equal(layer.weight, layer.dequantized(dtype))


def integers_in(folder: Path) -> dict[str, torch.Tensor | IntegerWeight]:
    """Every tensor of a model, integers in place of all matrices of linear layers."""
    spec = GridSpec(4, 32, "none", torch.bfloat16)
    return {
        name: round_to_nearest(weight, spec) if name.endswith("_proj.weight") else weight
        for name, weight in read_tensors(folder)
    }


@pytest.mark.parametrize("base", ["llama_folder", "tied_llama_folder"])
def test_a_loaded_model_is_the_one_of_its_reals_and_frozen(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    given = integers_in(folder)
    model = load(folder, given.items(), dtype=torch.float32, scale_dtype=torch.bfloat16)
    reals = {name: each.dequantized() if isinstance(each, IntegerWeight) else each for name, each in given.items()}
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad():
        wanted = runner.from_weights(folder, reals.items(), dtype=torch.float32)(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, wanted)
    assert not model.training
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(isinstance(module, IntegerLinear) for module in model.modules()) == 14


def test_a_model_that_lacks_weights_is_refused_with_all_that_is_missing(llama_folder: Path) -> None:
    given = integers_in(llama_folder)
    del given["model.norm.weight"], given["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(BaseModelError) as caught:
        load(llama_folder, given.items(), dtype=torch.float32, scale_dtype=torch.bfloat16)
    assert str(caught.value).splitlines()[1:] == [
        "  model.layers.0.self_attn.q_proj.weight: missing",
        "  model.norm.weight: missing",
    ]


def test_a_matrix_of_another_shape_is_refused_by_name(llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is no linear layer of shape \(6, 16\)"):
        with_integer_layers(model, {"model.layers.0.self_attn.q_proj": rounded(4)})
