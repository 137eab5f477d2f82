"""Bytes of quantized weights, their constants, adapters and optimizer state, against the paper's figures."""

from typing import Any

import pytest

from qlora_trainer.numerics import stored_bytes
from qlora_trainer.numerics.training_load import TrainingLoad
from tests.numerics.shapes import LLAMA_65B, SMALL


@pytest.mark.parametrize(
    ("double_quant", "bits"),
    # QLoRA, section 3: 32 / 64 = 0.5 bit, and 8 / 64 + 32 / (64 * 256) = 0.127 bit.
    [(False, 0.5), (True, 8 / 64 + 32 / (64 * 256))],
)
def test_constants_take_the_bits_that_the_paper_says(double_quant: bool, bits: float) -> None:
    size = stored_bytes.quantization_constant_bytes(LLAMA_65B, TrainingLoad(double_quant=double_quant))
    assert 8 * size / LLAMA_65B.linear_parameters == pytest.approx(bits, rel=1e-6)


def test_a_base_takes_the_bytes_of_its_type() -> None:
    linear = LLAMA_65B.linear_parameters

    def bytes_of(**asked: Any) -> int:
        load = TrainingLoad(**asked)
        return stored_bytes.base_weight_bytes(LLAMA_65B, load) + stored_bytes.quantization_constant_bytes(
            LLAMA_65B, load
        )

    assert bytes_of(data_type="none") == 2 * linear
    assert bytes_of(data_type="none", compute_bytes=4) == 4 * linear
    # 4 bits, and 16 for each group.
    assert bytes_of(data_type="gptq_int4", group_size=64) == linear // 2 + linear // 32
    assert bytes_of(data_type="gptq_int4", group_size=128) == linear // 2 + linear // 64


def test_optimizer_state_is_eight_bytes_in_float32_and_two_in_8_bit() -> None:
    sizes = [64 * 4096] * 10
    assert stored_bytes.optimizer_state_bytes(sizes, has_8bit_state=False) == 8 * sum(sizes)
    per_value = stored_bytes.optimizer_state_bytes(sizes, has_8bit_state=True) / sum(sizes)
    assert per_value == pytest.approx(2 + 2 * 4 / 256)


def test_small_tensors_keep_float32_state_under_an_8_bit_optimizer() -> None:
    assert stored_bytes.optimizer_state_bytes([4095], has_8bit_state=True) == 8 * 4095
    assert stored_bytes.optimizer_state_bytes([4096], has_8bit_state=True) < 3 * 4096


def test_named_target_modules_need_less_than_all() -> None:
    some = TrainingLoad(target_modules=("q_proj", "v_proj"))
    all_sizes = stored_bytes.adapter_tensor_sizes(SMALL, TrainingLoad())
    assert stored_bytes.adapter_tensor_sizes(SMALL, some) == [16 * 128, 16 * 128, 16 * 128, 16 * 64] * 2
    assert len(all_sizes) == 2 * 7 * 2
