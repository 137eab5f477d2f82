import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.peft_adapter import factors_of, quiet_peft
from qlora_trainer.numerics.distortion import sqnr_db
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime import bnb
from tests.models import quantized_copy, random_token_ids
from tests.oracles import nf4 as oracle

# isort: split
from peft import LoraConfig, get_peft_model

FOUR_BIT: list[Literal["nf4", "fp4"]] = ["nf4", "fp4"]
EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_trip(weight: Tensor, data_type: bnb.DataType, *, double_quant: bool = True) -> Tensor:
    tensors = bnb.quantize_weight(weight, data_type=data_type, double_quant=double_quant, dtype=torch.float32)
    return bnb.dequantize_weight(tensors, data_type=data_type)


def code_book(data_type: Literal["nf4", "fp4"]) -> Tensor:
    return oracle.nf4_code_book() if data_type == "nf4" else oracle.fp4_code_book()


def recorded(tensors: dict[str, Tensor]) -> dict[str, object]:
    """The settings that a 4-bit checkpoint carries beside its numbers."""
    (packed,) = [part for name, part in tensors.items() if ".quant_state." in name]
    settings: dict[str, object] = json.loads(bytes(packed.tolist()))
    return settings


@pytest.mark.parametrize("data_type", FOUR_BIT)
def test_code_book_is_the_one_of_the_paper(data_type: Literal["nf4", "fp4"]) -> None:
    tensors = bnb.quantize_weight(normal(8, 64), data_type=data_type, double_quant=True, dtype=torch.float32)
    # bitsandbytes computed both books in float32: off by at most two roundings.
    torch.testing.assert_close(tensors["weight.quant_map"].double(), code_book(data_type), rtol=0, atol=2 * EPS)
    dynamic = oracle.dynamic_code_book()
    torch.testing.assert_close(tensors["weight.nested_quant_map"].double(), dynamic, rtol=2 * EPS, atol=0)


def test_nf4_codes_equal_those_of_the_paper_bit_for_bit() -> None:
    weight = normal(256, 256)
    tensors = bnb.quantize_weight(weight, data_type="nf4", double_quant=True, dtype=torch.float32)
    expected = oracle.quantize(weight, oracle.nf4_code_book(), double_quant=True)
    assert torch.equal(tensors["weight"], oracle.packed(expected.codes))


@pytest.mark.parametrize("data_type", FOUR_BIT)
def test_without_double_quantization_weights_equal_those_of_the_paper(data_type: Literal["nf4", "fp4"]) -> None:
    weight = normal(256, 256)
    restored = round_trip(weight, data_type, double_quant=False)
    book = code_book(data_type)
    expected = oracle.dequantize(oracle.quantize(weight, book, double_quant=False), book, weight.shape)
    # The code book is off by at most two roundings (above), which absmax multiplies; the product rounds once more.
    largest = weight.abs().max().item()
    torch.testing.assert_close(restored.double(), expected, rtol=EPS, atol=2 * EPS * largest)


def test_doubly_quantized_constants_are_those_of_the_paper_or_their_neighbours() -> None:
    weight = normal(512, 512)
    tensors = bnb.quantize_weight(weight, data_type="nf4", double_quant=True, dtype=torch.float32)
    expected = oracle.quantize(weight, oracle.nf4_code_book(), double_quant=True)
    assert expected.absmax_codes is not None
    assert expected.absmax_absmax is not None
    assert recorded(tensors)["nested_offset"] == pytest.approx(expected.offset, rel=4 * EPS)
    torch.testing.assert_close(tensors["weight.nested_absmax"].double(), expected.absmax_absmax, rtol=1e-6, atol=0)
    # The kernel looks codes up in a table, so that close to the middle between two it may take the other one:
    # 13 of 12,288 constants (three seeds of 256 x 1024 weights; bitsandbytes 0.50.2, CPU).
    apart = (tensors["weight.absmax"].int() - expected.absmax_codes.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() <= 0.005


def test_doubly_quantized_weight_is_what_its_stored_numbers_say() -> None:
    weight = normal(256, 512)
    tensors = bnb.quantize_weight(weight, data_type="nf4", double_quant=True, dtype=torch.float32)
    constants = oracle.dynamic_code_book()[tensors["weight.absmax"].long()].reshape(-1, 256)
    absmax = (constants * tensors["weight.nested_absmax"].double().unsqueeze(1)).flatten()
    absmax += float(str(recorded(tensors)["nested_offset"]))
    bytes_ = tensors["weight"].long()
    codes = torch.cat([bytes_ // 16, bytes_ % 16], dim=1).flatten()
    expected = oracle.dequantize(oracle.Blockwise(codes, absmax), oracle.nf4_code_book(), weight.shape)
    restored = bnb.dequantize_weight(tensors, data_type="nf4")
    # Four roundings of numbers up to the largest absmax: two in the code book, one in absmax, one in the product.
    torch.testing.assert_close(restored.double(), expected, rtol=0, atol=4 * EPS * weight.abs().max().item())


def test_int8_rows_equal_those_of_the_paper() -> None:
    weight = normal(64, 96).half()
    tensors = bnb.quantize_weight(weight, data_type="int8", double_quant=False, dtype=torch.float32)
    codes, absmax = oracle.int8_rows(weight.double())
    quotients = 127 * weight.double() / absmax.unsqueeze(1)
    # float32 may fall to either side of an exact tie between two integers.
    is_tie = ((quotients - quotients.floor()) - 0.5).abs() < 128 * EPS
    assert torch.equal(tensors["weight"][~is_tie], codes[~is_tie])
    assert is_tie.sum() < 10
    assert torch.equal(tensors["SCB"], absmax.float())
    expected = tensors["weight"].double() * absmax.unsqueeze(1) / 127
    # Three float32 products.
    torch.testing.assert_close(
        bnb.dequantize_weight(tensors, data_type="int8").double(), expected, rtol=3 * EPS, atol=0
    )


# Means of 20 seeds, 1024 x 1024 standard normal; standard deviation 0.006 dB in blocks of 64, 0.03 dB in rows;
# bitsandbytes 0.50.2, CPU. Better would mean that nothing was quantized.
@pytest.mark.parametrize(
    ("data_type", "double_quant", "decibels", "within"),
    [
        ("nf4", False, 20.728, 0.05),
        ("nf4", True, 20.726, 0.05),
        ("fp4", False, 18.279, 0.05),
        ("int8", False, 42.09, 0.2),
    ],
)
def test_as_much_of_a_normal_weight_is_kept_as_measured(
    data_type: bnb.DataType, double_quant: bool, decibels: float, within: float
) -> None:
    weight = normal(1024, 1024)
    restored = round_trip(weight, data_type, double_quant=double_quant)
    assert sqnr_db(weight, restored) == pytest.approx(decibels, abs=within)


def test_nf4_with_double_quantization_stores_the_bits_that_the_paper_counts() -> None:
    weight = normal(2048, 2048)
    tensors = bnb.quantize_weight(weight, data_type="nf4", double_quant=True, dtype=torch.bfloat16)
    # 4 + 8/64 + 32/(64 * 256) = 4.127 (QLoRA, section 3). The file also holds both code books and the settings:
    # 16 + 256 floats and about 170 bytes, 0.0024 bit per parameter at this size.
    bits = bnb.stored_bits(tensors) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.003)
    single = bnb.quantize_weight(weight, data_type="nf4", double_quant=False, dtype=torch.bfloat16)
    assert bnb.stored_bits(single) / weight.numel() == pytest.approx(4.5, abs=0.001)


def test_int8_stores_eight_bits_and_a_scale_per_row() -> None:
    tensors = bnb.quantize_weight(normal(64, 256), data_type="int8", double_quant=False, dtype=torch.float32)
    assert bnb.stored_bits(tensors) == 64 * 256 * 8 + 64 * 32 + 8


@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8"])
def test_all_zero_rows_stay_zero_and_change_no_other(data_type: bnb.DataType) -> None:
    weight = normal(128, 64)
    alone = round_trip(weight[64:], data_type, double_quant=False)
    weight[:64] = 0
    restored = round_trip(weight, data_type, double_quant=False)
    assert torch.equal(restored[:64], torch.zeros(64, 64))
    assert torch.equal(restored[64:], alone)


@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8"])
def test_an_all_zero_matrix_stays_zero(data_type: bnb.DataType) -> None:
    assert torch.equal(round_trip(torch.zeros(16, 96), data_type), torch.zeros(16, 96))


@pytest.mark.parametrize("data_type", FOUR_BIT)
def test_a_ternary_matrix_comes_back_exactly_although_its_constants_do_not_vary(
    data_type: Literal["nf4", "fp4"],
) -> None:
    # Every absmax is equal, so that the second quantization divides by the absmax of zeros or of mere rounding.
    weight = 0.02 * torch.randint(-1, 2, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(round_trip(weight, data_type), weight, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("shape", [(5, 172), (3, 8), (7, 65)])
@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8"])
def test_any_shape_is_held(data_type: bnb.DataType, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    restored = round_trip(weight, data_type)
    assert restored.shape == weight.shape
    # As the quantizers do on large matrices (above), with room for the chance of a small one.
    assert 12 < sqnr_db(weight, restored) < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recorded_type_is_the_one_that_was_asked_for(dtype: torch.dtype) -> None:
    tensors = bnb.quantize_weight(normal(64, 64), data_type="nf4", double_quant=True, dtype=dtype)
    assert recorded(tensors)["dtype"] == str(dtype).removeprefix("torch.")
    assert bnb.dequantize_weight(tensors, data_type="nf4").dtype == dtype


@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8"])
def test_quantizing_and_restoring_change_nothing_they_were_given(data_type: bnb.DataType) -> None:
    weight = normal(32, 64)
    before = weight.clone()
    tensors = bnb.quantize_weight(weight, data_type=data_type, double_quant=True, dtype=torch.float32)
    assert torch.equal(weight, before)
    kept = {name: part.clone() for name, part in tensors.items()}
    bnb.dequantize_weight(tensors, data_type=data_type)
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(part, kept[name]) for name, part in tensors.items())


@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(data_type: bnb.DataType, value: float) -> None:
    weight = normal(4, 64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"1 of 256 values of this \(4, 64\) matrix are not finite"):
        round_trip(weight, data_type)


def test_a_weight_beyond_float16_is_refused_by_int8_only() -> None:
    weight = normal(4, 64)
    weight[0, 0] = 70000
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        round_trip(weight, "int8")
    assert round_trip(weight, "nf4", double_quant=False)[0, 0] == 70000


@pytest.mark.parametrize("shape", [(64,), (2, 8, 8), (0, 64)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="want a matrix"):
        round_trip(torch.ones(shape), "nf4")


# --- the model that training and evaluation share


@pytest.fixture(scope="module")
def nf4_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bnb") / "nf4"
    return quantized_copy(llama_folder, folder, Bitsandbytes("nf4"), dtype=torch.bfloat16)


def adapted(folder: Path) -> nn.Module:
    model = runner.load(folder, dtype=torch.bfloat16)
    torch.manual_seed(1)
    with quiet_peft():
        peft_model: nn.Module = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=r".*_proj", task_type="CAUSAL_LM")
        )
    return peft_model


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    model.train()
    for seed in seeds:
        token_ids = random_token_ids(seed=seed)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_train_evaluate_train_equals_train_train_bit_for_bit(nf4_folder: Path) -> None:
    results = []
    for evaluates in (False, True):
        model = adapted(nf4_folder)
        optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
        train_steps(model, optimizer, range(2))
        if evaluates:
            model.eval()
            with torch.no_grad():
                model(input_ids=random_token_ids(seed=9))
        train_steps(model, optimizer, range(2, 4))
        results.append(factors_of(model))
    without, with_evaluation = results
    for module, factors in without.items():
        assert factors.lora_b.abs().max() > 0, f"{module} was not trained"
        assert torch.equal(factors.lora_a, with_evaluation[module].lora_a)
        assert torch.equal(factors.lora_b, with_evaluation[module].lora_b)


def test_guard_reaches_every_quantized_layer(nf4_folder: Path) -> None:
    layers = [module for module in adapted(nf4_folder).modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_guard_refuses_a_model_that_says_it_was_repacked(nf4_folder: Path) -> None:
    model = runner.load(nf4_folder, dtype=torch.bfloat16)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: bitsandbytes has repacked"):
        bnb.guard(model)


@pytest.mark.skipif(not has_avx512bf16(), reason="only CPUs with AVX512_BF16 repack")
def test_guard_refuses_a_model_that_was_evaluated_unguarded(nf4_folder: Path) -> None:
    model = runner.load(nf4_folder, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(input_ids=random_token_ids())
    with pytest.raises(ValueError, match="repacked"):
        bnb.guard(model)


def test_guard_gives_back_the_very_model() -> None:
    model = nn.Linear(2, 2)
    assert bnb.guard(model) is model


# --- what the library says


def test_notices_about_kernels_and_casts_are_dropped_and_other_messages_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ops = logging.getLogger("bitsandbytes.backends.cpu.ops")
    autograd = logging.getLogger("bitsandbytes.autograd._functions")
    ops.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "none")
    autograd.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", "x")
    assert caplog.messages == []
    ops.warning("something else")
    autograd.warning("something else")
    assert caplog.messages == ["something else", "something else"]


@pytest.mark.slow
def test_importing_the_door_and_then_peft_says_nothing() -> None:
    program = "import qlora_trainer.runtime.bnb; import peft"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- optimizers

NAMES: list[bnb.OptimizerName] = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


def fit(name: bnb.OptimizerName, *, steps: int = 20) -> tuple[Tensor, float, torch.optim.Optimizer]:
    """A matrix after some steps towards a target, its mean squared distance, and the optimizer."""
    target = normal(64, 64, seed=2)
    weight = nn.Parameter(normal(64, 64, seed=3))
    optimizer = bnb.make_optimizer(name, [weight], learning_rate=0.05, betas=(0.9, 0.999), weight_decay=0.01)
    for _ in range(steps):
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach(), loss.item(), optimizer


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_brings_the_loss_down(name: bnb.OptimizerName) -> None:
    _, start, _ = fit(name, steps=1)
    _, end, _ = fit(name)
    # Twenty steps of at most 0.05 each, from a distance of about 1.4 per value.
    assert 0.1 * start < end < 0.5 * start


def test_paged_optimizers_on_a_cpu_are_the_unpaged_ones_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qlora_trainer.runtime.bnb"):
        assert torch.equal(fit("paged_adamw")[0], fit("adamw")[0])
        assert torch.equal(fit("paged_adamw_8bit")[0], fit("adamw_8bit")[0])
    assert [message.split(":")[0] for message in caplog.messages] == ["paged_adamw", "paged_adamw_8bit"]


def test_8bit_state_is_8bit_from_4096_values_on() -> None:
    for rows, expected in ((63, torch.float32), (64, torch.uint8)):
        weight = nn.Parameter(normal(rows, 64))
        optimizer = bnb.make_optimizer("adamw_8bit", [weight], learning_rate=0.01, betas=(0.9, 0.999), weight_decay=0.0)
        weight.square().mean().backward()
        optimizer.step()
        assert optimizer.state[weight]["state1"].dtype == expected


def test_settings_reach_the_optimizer() -> None:
    for name in NAMES:
        optimizer = bnb.make_optimizer(
            name, [nn.Parameter(normal(2, 2))], learning_rate=0.5, betas=(0.8, 0.7), weight_decay=0.25
        )
        (group,) = optimizer.param_groups
        assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.5, (0.8, 0.7), 0.25)
