"""Predicted memory: against the paper's figures, and its laws."""

from dataclasses import replace

import pytest

from qlora_trainer.numerics.device_overhead import CUDA_CONTEXT_BYTES
from qlora_trainer.numerics.footprint import PAGED, scoring_memory, training_memory
from qlora_trainer.numerics.stored_bytes import adapter_tensor_sizes
from qlora_trainer.numerics.training_load import POLICIES, TrainingLoad
from tests.numerics.shapes import LLAMA_65B, SMALL

# Against the paper.


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_65b_parameters_train_in_less_than_48_gb_and_more_than_their_weights(optimizer: str) -> None:
    """QLoRA, abstract: a 65B parameter model on one 48 GB GPU. Rank 64, rows of 512 tokens."""
    need = training_memory(LLAMA_65B, TrainingLoad(rank=64, optimizer=optimizer, device="cuda"))
    weights = ("quantized weights", "quantization constants", "embeddings, norms, head")
    assert sum(need.items[name] for name in weights) < need.needed_on_device < 48e9
    # 4.127 bits for each of 64.8B linear parameters and 16 for the rest come to 34.5 GB.
    assert sum(need.items[name] for name in weights) == pytest.approx(34.46e9, rel=0.001)


def test_16_bit_weights_alone_would_not_fit_where_qlora_does() -> None:
    scoring = scoring_memory(LLAMA_65B, compute_bytes=2, rows=1, row_tokens=512)
    assert scoring.items["16-bit weights"] > 2 * 48e9


# Laws.


def test_a_base_that_is_not_quantized_is_held_and_never_dequantized() -> None:
    need = training_memory(SMALL, TrainingLoad(data_type="none"))
    assert need.items["base weights"] == 2 * SMALL.linear_parameters
    assert need.items["quantization constants"] == need.items["dequantized weights"] == 0
    assert "quantized weights" not in need.items


def test_a_gptq_base_is_dequantized_from_halves_of_bytes() -> None:
    nf4, gptq = (training_memory(SMALL, TrainingLoad(data_type=kind)).items for kind in ("nf4", "gptq_int4"))
    largest = max(rows * columns for rows, columns in SMALL.linears.values())
    assert gptq["dequantized weights"] - nf4["dequantized weights"] == largest // 2
    assert gptq["quantized weights"] == nf4["quantized weights"]


@pytest.mark.parametrize(
    ("change", "item"),
    [
        ({"tokens": 1024}, "kept for the backward pass"),
        ({"checkpointing": "none"}, "kept for the backward pass"),
        ({"has_dropout": True, "checkpointing": "none"}, "kept for the backward pass"),
        ({"rank": 32}, "adapters (float32)"),
        ({"use_dora": True}, "dequantized weights"),
        ({"optimizer": "adamw"}, "optimizer state"),
        ({"data_type": "int8"}, "quantized weights"),
        ({"double_quant": False}, "quantization constants"),
        ({"compute_bytes": 4}, "embeddings, norms, head"),
    ],
)
def test_what_asks_for_more_is_predicted_to_need_more(change: dict[str, object], item: str) -> None:
    load = TrainingLoad()
    less, more = (training_memory(LLAMA_65B, asked) for asked in (load, replace(load, **change)))
    assert more.items[item] > less.items[item]
    assert more.total > less.total


def test_each_policy_needs_less_than_the_one_before_it() -> None:
    totals = [training_memory(LLAMA_65B, TrainingLoad(checkpointing=policy)).total for policy in POLICIES]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_gradients_wait_for_the_next_micro_batch_only_where_there_is_one() -> None:
    several, one = (training_memory(LLAMA_65B, TrainingLoad(accumulates=each, tokens=4096)) for each in (True, False))
    gradients = 4 * sum(adapter_tensor_sizes(LLAMA_65B, TrainingLoad()))
    assert several.items["gradients (float32)"] == gradients
    assert one.items["gradients (float32)"] == 0


def test_gradients_that_outweigh_the_passes_are_the_peak() -> None:
    load = TrainingLoad(accumulates=False, tokens=8, label_tokens=8, rank=256)
    need = training_memory(LLAMA_65B, load)
    assert need.items["gradients (float32)"] == 4 * sum(adapter_tensor_sizes(LLAMA_65B, load))
    assert need.items["kept for the backward pass"] == 0


def test_paged_state_can_leave_the_gpu_and_a_processor_has_no_pages() -> None:
    on_gpu, on_cpu = (training_memory(SMALL, TrainingLoad(device=device)) for device in ("cuda", "cpu"))
    assert on_gpu.total - on_gpu.needed_on_device >= on_gpu.items[PAGED] > 0
    assert PAGED not in on_cpu.items
    assert on_cpu.items["optimizer state"] == on_gpu.items[PAGED]


def test_what_the_allocator_of_torch_shows_leaves_out_context_and_paged_state() -> None:
    need = training_memory(SMALL, TrainingLoad(device="cuda"))
    assert need.allocated < need.total - CUDA_CONTEXT_BYTES - need.items[PAGED]
