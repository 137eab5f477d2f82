import torch

from qlora_trainer.numerics.dynamic import rounded_tokens
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages.compare.student import as_student
from tests.models import random_token_ids
from tests.stages.compare.conftest import MakeInputs

SPEC = GridSpec(4, "channel", "none", torch.float16)


def test_a_fresh_student_is_rounding_to_nearest_of_weights_and_tokens(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    student = runner.load(inputs.folder, dtype=torch.float32)
    layers = as_student(student, inputs.layers.quantized, rank=4, scale=2.0, spec=SPEC, activation_bits=8, seed=0)
    plain = runner.load(inputs.folder, dtype=torch.float32)
    with torch.no_grad():
        for module in inputs.layers.quantized:
            weight = plain.get_submodule(module).get_parameter("weight")
            weight.copy_(round_to_nearest(weight, SPEC).dequantized())
    runner.with_dynamic_activations(plain, inputs.layers.quantized)
    token_ids = random_token_ids()
    with torch.no_grad():
        found, expected = student(input_ids=token_ids).logits, plain(input_ids=token_ids).logits
    # The scale of a token is 2 max / 255 here and max / 127.5 there: a value at a tie may take the other integer.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert set(layers) == set(inputs.layers.quantized)


def test_only_the_factors_are_trained_and_all_of_them_get_a_gradient(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    student = runner.load(inputs.folder, dtype=torch.float32)
    layers = as_student(student, inputs.layers.quantized, rank=4, scale=2.0, spec=SPEC, activation_bits=8, seed=0)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {f"{module}.lora_{factor}" for module in layers for factor in "ab"}
    student(input_ids=random_token_ids()).logits.square().mean().backward()
    for layer in layers.values():
        assert layer.lora_b.grad is not None
        assert layer.lora_b.grad.abs().max() > 0
        assert torch.equal(layer.merged(), layer.weight.float())


def test_the_layer_is_the_product_of_rounded_tokens_and_rounded_sum(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    student = runner.load(inputs.folder, dtype=torch.float32)
    layer = next(
        iter(
            as_student(
                student, inputs.layers.quantized, rank=4, scale=2.0, spec=SPEC, activation_bits=4, seed=0
            ).values()
        )
    )
    with torch.no_grad():
        layer.lora_b.normal_(std=0.1)
        values = torch.randn(2, 5, layer.weight.shape[1])
        rounded = round_to_nearest(layer.weight + 2.0 * layer.lora_b @ layer.lora_a, SPEC).dequantized()
        expected = rounded_tokens(values, bits=4) @ rounded.T
        torch.testing.assert_close(layer(values), expected, rtol=1e-5, atol=1e-5)
