import pytest
import torch

from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages.compare import quantized
from qlora_trainer.stages.compare.llm_qat import train_student
from tests.models import random_token_ids
from tests.stages.compare.conftest import MakeInputs

SPEC = GridSpec(4, "channel", "none", torch.float16)
FEW = {"qat_rows": 32, "qat_tokens": 16, "qat_steps": 60, "qat_learning_rate": 5e-3}


def test_training_brings_the_student_nearer_to_its_teacher(make_inputs: MakeInputs) -> None:
    found = train_student(make_inputs(**FEW), SPEC, activation_bits=8, kv_bits=4)
    assert 0 < found.kl_after < 0.9 * found.kl_before


def test_factors_that_do_not_help_are_not_kept(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(**{**FEW, "qat_steps": 3, "qat_learning_rate": 0.9})
    found = train_student(inputs, SPEC, activation_bits=8, kv_bits=8)
    assert found.kl_after <= found.kl_before
    if found.kl_after == found.kl_before:
        model = runner.load(inputs.folder, dtype=torch.float32)
        for name, matrix in found.matrices.items():
            assert torch.equal(matrix, model.get_parameter(name))


@pytest.mark.parametrize("bits", ["w8a8kv8", "w4a8kv8", "w4a8kv4"])
def test_the_model_is_the_student_with_its_cache(bits: str, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(**{**FEW, "qat_steps": 4})
    made = quantized(f"llm_qat_{bits}", inputs)  # type: ignore[arg-type]
    assert made.note.startswith("KL on self-written text")
    # Two layers, keys and values, two heads of 16 features, a float16 scale.
    assert made.note.endswith(f"cache of {4 * (4 * int(bits[-1]) + 2)} bytes a token in place of 256")
    token_ids = random_token_ids()
    with torch.no_grad():
        output = made.model(input_ids=token_ids)
        assert output.past_key_values.bits == int(bits[-1])
        exact = runner.load(inputs.folder, dtype=torch.float32)(input_ids=token_ids).logits
    lost = float((output.logits - exact).norm() / exact.norm())
    assert 0 < lost < (0.1 if bits == "w8a8kv8" else 0.8)


def test_the_same_seed_gives_the_same_matrices(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(**{**FEW, "qat_steps": 5})
    first, again = (train_student(inputs, SPEC, activation_bits=8, kv_bits=8).matrices for _ in range(2))
    assert all(torch.equal(matrix, again[name]) for name, matrix in first.items())
