import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.model_folder import read_model, write_model
from qlora_trainer.formats.weight_format import IntegerFormat
from qlora_trainer.numerics.affine import Grid
from qlora_trainer.numerics.distortion import sqnr_db
from qlora_trainer.numerics.integer_weight import IntegerWeight, round_to_nearest
from qlora_trainer.numerics.loss import kl_to
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.bnb import stored_bits
from tests.models import linear_names, quantized_copy, random_token_ids
from tests.oracles import affine as oracle

W4A16_G32, W4A16_G64, W4A16_G128 = CompressedTensors(4, 32), CompressedTensors(4, 64), CompressedTensors(4, 128)
W8A16 = CompressedTensors(8, None)
W8A8 = CompressedTensors(8, None, activation_bits=8)
PACKED = [W4A16_G32, W4A16_G64, W4A16_G128, W8A16]
FORMATS = [*PACKED, W8A8]
RAISED = frozenset({"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"})
MIXED = CompressedTensors(4, 64, raised=RAISED)
EPS = torch.finfo(torch.float32).eps


def label(weight_format: object) -> str:
    assert isinstance(weight_format, CompressedTensors)
    return weight_format.name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_token_ids()).logits
    return found


def kl(wanted: Tensor, found: Tensor) -> float:
    return kl_to(torch.log_softmax(wanted.float(), dim=-1), found).mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_format", [*PACKED, MIXED], ids=["g32", "g64", "g128", "w8", "mixed"])
def test_a_folder_loaded_by_transformers_equals_our_decoding_bit_for_bit(
    weight_format: CompressedTensors, dtype: torch.dtype, wide_llama_folder: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(wide_llama_folder, tmp_path / "model", weight_format, dtype=torch.bfloat16)
    linears = linear_names(runner.skeleton(folder).state_dict())
    reference = runner.from_weights(folder, read_model(folder, weight_format, linear_modules=linears), dtype=dtype)
    found = logits(runner.load(folder, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, logits(reference))
    assert not torch.equal(found, logits(runner.load(wide_llama_folder, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_w8a8_folder_rounds_inputs_as_the_reference_does_bit_for_bit(
    dtype: torch.dtype, wide_llama_folder: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(wide_llama_folder, tmp_path / "model", W8A8, dtype=torch.bfloat16)
    linears = linear_names(runner.skeleton(folder).state_dict())
    reference = runner.from_weights(folder, read_model(folder, W8A8, linear_modules=linears), dtype=dtype)
    found, with_float_inputs = logits(runner.load(folder, dtype=dtype)), logits(reference)
    assert torch.equal(found, logits(runner.with_dynamic_activations(reference, linears)))
    # Measured: 3.3e-4 (float32, float16) and 4.6e-4 (bfloat16) nats; 0 would mean that inputs were not rounded.
    assert 1e-4 < kl(found, with_float_inputs) < 1e-3


def test_a_file_stores_raised_modules_as_w8a16_and_the_rest_as_it_says(wide_llama_folder: Path, tmp_path: Path) -> None:
    folders = {
        weight_format: quantized_copy(wide_llama_folder, tmp_path / name, weight_format, dtype=torch.bfloat16)
        for name, weight_format in {"mixed": MIXED, "w4": W4A16_G64, "w8": W8A16}.items()
    }
    mixed, w4, w8 = (load_file(folder / "model.safetensors") for folder in folders.values())
    for name, part in mixed.items():
        module = name.rpartition(".")[0]
        assert torch.equal(part, (w8 if module in RAISED else w4)[name])
    assert sum(part.numel() for part in mixed.values()) > sum(part.numel() for part in w4.values())


def test_raised_modules_are_loaded_without_a_word(
    wide_llama_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = quantized_copy(wide_llama_folder, tmp_path / "model", MIXED, dtype=torch.bfloat16)
    runner.load(folder, dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


@pytest.mark.parametrize("weight_format", [W4A16_G64, W8A8, MIXED], ids=["w4", "w8a8", "mixed"])
def test_layers_left_in_16_bit_are_loaded_as_they_are(
    weight_format: CompressedTensors, wide_llama_folder: Path, tmp_path: Path
) -> None:
    left = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    weights = load_file(wide_llama_folder / "model.safetensors")
    linears = [name for name in linear_names(weights) if name not in left]
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(
        folder,
        weights.items(),
        weight_format,
        linear_modules=linears,
        like=wide_llama_folder,
        rest_dtype=torch.bfloat16,
        ignored=["lm_head", *left],
    )
    reference = runner.from_weights(
        folder, read_model(folder, weight_format, linear_modules=linears), dtype=torch.bfloat16
    )
    if weight_format.activation_bits == 8:
        runner.with_dynamic_activations(reference, linears)
    model = runner.load(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(reference))
    assert all(torch.equal(model.get_parameter(f"{name}.weight"), weights[f"{name}.weight"]) for name in left)


def test_tied_embeddings_and_biases_survive(tied_llama_folder: Path, tmp_path: Path) -> None:
    folder = quantized_copy(tied_llama_folder, tmp_path / "model", W8A16, dtype=torch.bfloat16)
    linears = linear_names(runner.skeleton(folder).state_dict())
    reference = runner.from_weights(folder, read_model(folder, W8A16, linear_modules=linears), dtype=torch.bfloat16)
    assert torch.equal(logits(runner.load(folder, dtype=torch.bfloat16)), logits(reference))


@pytest.mark.parametrize("weight_format", PACKED, ids=label)
def test_the_library_packs_the_same_words_from_the_same_scales(weight_format: CompressedTensors) -> None:
    weight = normal(16, 256)
    ours = weight_format.encode(weight)
    scheme = QuantizationConfig.model_validate(weight_format.config([])).config_groups["group_0"]
    theirs = PackedQuantizationCompressor.compress(
        {"weight": weight, "weight_scale": ours["weight_scale"].float()}, scheme
    )
    assert torch.equal(ours["weight_packed"], theirs["weight_packed"])
    assert torch.equal(ours["weight_shape"], theirs["weight_shape"])


def test_the_library_stores_the_same_int8_weights_from_the_same_scales() -> None:
    weight = normal(16, 256)
    ours = W8A8.encode(weight)
    scheme = QuantizationConfig.model_validate(W8A8.config([])).config_groups["group_0"]
    theirs = IntQuantizationCompressor.compress(
        {"weight": weight, "weight_scale": ours["weight_scale"].float()}, scheme
    )
    assert list(ours) == ["weight", "weight_scale"]
    assert (ours["weight"].dtype, ours["weight"].shape) == (torch.int8, (16, 256))
    assert torch.equal(ours["weight"], theirs["weight"])


@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_decoding_is_the_nearest_integer_times_the_stored_scale(weight_format: CompressedTensors) -> None:
    weight = normal(4, 128)
    tensors = weight_format.encode(weight)
    group = weight_format.group_size or 128
    restored = weight_format.decode(tensors).reshape(-1, group)
    for values, back, scale in zip(weight.reshape(-1, group), restored, tensors["weight_scale"].flatten(), strict=True):
        limit = values.abs().max().item()
        exact, _ = oracle.scale_and_zero_point(-limit, limit, weight_format.bits)
        # bfloat16 keeps 8 bits: half a unit of the last one is 2**-9 of the value.
        assert scale.item() == pytest.approx(exact, rel=2**-8)
        step = scale.item()
        codes = [oracle.quantize(value, step, 0, weight_format.bits) for value in values.tolist()]
        assert back.tolist() == [oracle.dequantize(code, step, 0) for code in codes]


# Means of 20 seeds, 1024 x 1024 standard normal, scales in bfloat16; standard deviations 0.009, 0.012, 0.015 and (both
# of 8 bits) 0.032 dB; torch 2.13, CPU. Better would mean that nothing was quantized.
@pytest.mark.parametrize(
    ("weight_format", "decibels", "within"),
    [
        (W4A16_G32, 20.473, 0.05),
        (W4A16_G64, 19.767, 0.06),
        (W4A16_G128, 19.117, 0.08),
        (W8A16, 42.117, 0.2),
        (W8A8, 42.117, 0.2),
    ],
)
def test_as_much_of_a_normal_weight_is_kept_as_measured(
    weight_format: CompressedTensors, decibels: float, within: float
) -> None:
    weight = normal(1024, 1024)
    restored = weight_format.decode(weight_format.encode(weight))
    assert sqnr_db(weight, restored) == pytest.approx(decibels, abs=within)


@pytest.mark.parametrize(
    ("weight_format", "bits"), [(W4A16_G32, 4.5), (W4A16_G64, 4.25), (W4A16_G128, 4.125), (W8A16, 8 + 16 / 512)]
)
def test_files_hold_the_bits_of_integers_and_scales(weight_format: CompressedTensors, bits: float) -> None:
    weight = normal(128, 512)
    shape_bits = 128  # two int64
    assert stored_bits(weight_format.encode(weight)) == bits * weight.numel() + shape_bits


@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_all_zero_rows_stay_zero(weight_format: CompressedTensors) -> None:
    weight = normal(4, 128)
    weight[2] = 0
    restored = weight_format.decode(weight_format.encode(weight))
    assert torch.equal(restored[2], torch.zeros(128))
    assert torch.isfinite(restored).all()
    assert (restored[0] != 0).any()


def test_int8_files_hold_a_byte_a_weight_and_a_scale_an_output() -> None:
    assert stored_bits(W8A8.encode(normal(128, 512))) == 8 * 128 * 512 + 16 * 128


@pytest.mark.parametrize("weight_format", [W8A16, W8A8], ids=label)
def test_one_scale_an_output_fits_any_shape(weight_format: CompressedTensors) -> None:
    weight = normal(5, 173)
    restored = weight_format.decode(weight_format.encode(weight))
    assert restored.shape == weight.shape
    assert (restored - weight).abs().max() < weight.abs().max() / 127


@pytest.mark.parametrize(("inputs", "fitting"), [(172, "none"), (96, "32"), (320, "32, 64")])
def test_groups_that_do_not_divide_are_refused_with_those_that_do(inputs: int, fitting: str) -> None:
    with pytest.raises(
        ValueError, match=rf"groups of 128 .* \(4, {inputs}\); group sizes that do: {fitting}\. .*w8a16"
    ):
        W4A16_G128.encode(normal(4, inputs))


@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_values_that_are_not_finite_are_refused(weight_format: CompressedTensors) -> None:
    weight = normal(2, 128)
    weight[1, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        weight_format.encode(weight)


@pytest.mark.parametrize("group_size", [0, 16, 48, 256])
def test_a_group_size_that_kernels_do_not_know_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"one of \(32, 64, 128\) or None .*, got {group_size}"):
        CompressedTensors(4, group_size)


def test_combinations_that_no_file_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8-bit activations need 8-bit weights .*, got 4 bits and group_size None"):
        CompressedTensors(4, None, activation_bits=8)
    with pytest.raises(ValueError, match=r"8-bit activations need .*, got 8 bits and group_size 64"):
        CompressedTensors(8, 64, activation_bits=8)
    with pytest.raises(ValueError, match="raised modules are stored in 8 bits, as all of compressed_tensors_w8a16 are"):
        CompressedTensors(8, None, raised=RAISED)


def test_grids_of_another_kind_are_refused() -> None:
    weight = round_to_nearest(normal(4, 128), W4A16_G32.spec)
    grid = weight.grid
    with pytest.raises(ValueError, match=r"shape \(4, 4\) is none of compressed_tensors_w4a16_g64, .* \(4, 2\) here"):
        W4A16_G64.pack(weight)
    with pytest.raises(ValueError, match=r"4 bits .* is none of compressed_tensors_w8a8, which has 8 bits"):
        W8A8.pack(weight)
    with pytest.raises(ValueError, match="compressed_tensors_w4a16_g32 is symmetric"):
        W4A16_G32.pack(IntegerWeight(weight.codes, Grid(grid.scale, grid.zero_point + 1, 4)))
    with pytest.raises(ValueError, match="bfloat16 does not hold the scales exactly"):
        W4A16_G32.pack(IntegerWeight(weight.codes, Grid(grid.scale * 1.0001, grid.zero_point, 4)))


@pytest.mark.parametrize("weight_format", [*FORMATS, MIXED], ids=lambda it: f"{it.name}-{len(it.raised)}")
def test_a_format_describes_itself_in_json(weight_format: CompressedTensors) -> None:
    described = weight_format.config(["lm_head"])
    assert json.loads(json.dumps(described)) == described
    packing = "int-quantized" if weight_format is W8A8 else "pack-quantized"
    assert (described["quant_method"], described["format"]) == ("compressed-tensors", packing)
    assert described["ignore"] == ["lm_head"]


def test_the_schemes_are_the_librarys_own_of_that_name() -> None:
    for weight_format, name in ((W8A8, "W8A8"), (W4A16_G128, "W4A16")):
        ours = QuantizationConfig.model_validate(weight_format.config([])).config_groups["group_0"]
        theirs = QuantizationConfig(config_groups={name: ["Linear"]}).config_groups[name]
        assert (ours.weights, ours.input_activations) == (theirs.weights, theirs.input_activations)


def test_raised_modules_are_named_before_the_rest() -> None:
    groups = QuantizationConfig.model_validate(MIXED.config([])).config_groups
    assert [(name, group.targets, group.weights.num_bits) for name, group in sorted(groups.items())] == [
        ("group_0", sorted(RAISED), 8),
        ("group_1", ["Linear"], 4),
    ]
    assert {module: MIXED.of(module).name for module in (*sorted(RAISED), "model.layers.0.mlp.up_proj")} == {
        "model.layers.0.mlp.down_proj": "compressed_tensors_w8a16",
        "model.layers.1.self_attn.v_proj": "compressed_tensors_w8a16",
        "model.layers.0.mlp.up_proj": "compressed_tensors_w4a16_g64",
    }
    assert MIXED.name == "compressed_tensors_w4a16_g64"


def test_names_and_bits_are_those_of_the_recipe() -> None:
    formats: list[IntegerFormat] = list(FORMATS)
    assert [weight_format.name for weight_format in formats] == [
        "compressed_tensors_w4a16_g32",
        "compressed_tensors_w4a16_g64",
        "compressed_tensors_w4a16_g128",
        "compressed_tensors_w8a16",
        "compressed_tensors_w8a8",
    ]
    assert [weight_format.bits for weight_format in formats] == [4, 4, 4, 8, 8]
