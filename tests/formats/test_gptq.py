import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.formats.gptq import Gptq
from qlora_trainer.formats.model_folder import read_model, write_model
from qlora_trainer.formats.weight_format import IntegerFormat
from qlora_trainer.numerics.affine import Grid
from qlora_trainer.numerics.distortion import sqnr_db
from qlora_trainer.numerics.integer_weight import IntegerWeight, round_to_nearest
from qlora_trainer.numerics.loss import kl_to
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.bnb import stored_bits
from tests.models import linear_names, quantized_copy, random_token_ids
from tests.oracles import gptq_layout as oracle

W4_G32, W4_G64, W4_G128, W4 = Gptq(4, 32), Gptq(4, 64), Gptq(4, 128), Gptq(4, None)
W8, W8_G32, W8_G64, W8_G128 = Gptq(8, None), Gptq(8, 32), Gptq(8, 64), Gptq(8, 128)
FORMATS = [W4_G32, W4_G64, W4_G128, W4, W8, W8_G32, W8_G64, W8_G128]
each_format = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda weight_format: weight_format.name)

READER = Path(__file__).with_name("gptq_reader.py")
READERS_PYTHON = Path(__file__).resolve().parents[2] / ".venv-gptq" / "bin" / "python"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_integers(weight_format: Gptq, outputs: int, inputs: int) -> IntegerWeight:
    """Every integer of the type, on scales that float16 holds."""
    generator = torch.Generator().manual_seed(0)
    half = 2 ** (weight_format.bits - 1)
    codes = torch.randint(-half, half, (outputs, inputs), generator=generator).to(torch.int8)
    groups = 1 if weight_format.group_size is None else inputs // weight_format.group_size
    scale = (0.01 + torch.rand(outputs, groups, generator=generator)).half().float()
    return IntegerWeight(codes, Grid(scale, torch.zeros(outputs, groups, dtype=torch.int32), weight_format.bits))


# --- packing


@each_format
def test_integers_are_packed_as_the_layout_says(weight_format: Gptq) -> None:
    weight = random_integers(weight_format, 16, 256)
    half, bits = 2 ** (weight_format.bits - 1), weight_format.bits
    groups = weight.grid.scale.shape[1]
    tensors = weight_format.pack(weight)
    assert list(tensors) == ["qweight", "qzeros", "scales", "g_idx"]
    assert tensors["qweight"].tolist() == oracle.qweight((weight.codes.int() + half).tolist(), bits)
    assert tensors["qzeros"].tolist() == oracle.qzeros([[half] * 16] * groups, bits)
    assert tensors["scales"].tolist() == weight.grid.scale.T.tolist()
    assert tensors["g_idx"].tolist() == [place * groups // 256 for place in range(256)]
    assert [part.dtype for part in tensors.values()] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert all(part.is_contiguous() for part in tensors.values())


def test_zero_points_are_stored_less_one() -> None:
    assert set(W4.encode(normal(8, 32))["qzeros"].flatten().tolist()) == {0x77777777}
    assert set(W8.encode(normal(8, 32))["qzeros"].flatten().tolist()) == {0x7F7F7F7F}


@each_format
def test_what_was_packed_comes_back_bit_for_bit(weight_format: Gptq) -> None:
    weight = random_integers(weight_format, 24, 384)
    restored = weight_format.decode(weight_format.pack(weight))
    assert restored.dtype == torch.float32
    assert torch.equal(restored, weight.dequantized())


@each_format
def test_decoding_is_the_integer_less_the_zero_point_times_the_stored_scale(weight_format: Gptq) -> None:
    weight = random_integers(weight_format, 8, 128)
    half = 2 ** (weight_format.bits - 1)
    restored = weight_format.decode(weight_format.pack(weight))
    size = weight_format.group_size or 128
    for row in range(8):
        scales = weight.grid.scale[row].tolist()
        wanted = [
            oracle.weight(code + half, half, scales[place // size])
            for place, code in enumerate(weight.codes[row].tolist())
        ]
        assert restored[row].tolist() == wanted


@each_format
def test_encoding_packs_the_nearest_integers(weight_format: Gptq) -> None:
    weight = normal(16, 256)
    nearest = round_to_nearest(weight, weight_format.spec)
    assert torch.equal(weight_format.decode(weight_format.encode(weight)), nearest.dequantized())


# Means of 20 seeds, 1024 x 1024 standard normal; standard deviations 0.009, 0.012, 0.015 and 0.032 dB; torch 2.13, CPU.
@pytest.mark.parametrize(
    ("weight_format", "decibels", "within"),
    [(W4_G32, 20.466, 0.05), (W4_G64, 19.763, 0.06), (W4_G128, 19.116, 0.08), (W8, 42.114, 0.2)],
)
def test_as_much_of_a_normal_weight_is_kept_as_measured(weight_format: Gptq, decibels: float, within: float) -> None:
    weight = normal(1024, 1024)
    restored = weight_format.decode(weight_format.encode(weight))
    assert sqnr_db(weight, restored) == pytest.approx(decibels, abs=within)


@pytest.mark.parametrize(
    ("weight_format", "bits"), [(W4_G32, 4 + 20 / 32), (W4_G128, 4 + 20 / 128), (W8, 8 + 24 / 512)]
)
def test_files_hold_the_bits_of_integers_scales_and_zeros(weight_format: Gptq, bits: float) -> None:
    weight = normal(128, 512)
    group_index_bits = 512 * 32
    assert stored_bits(weight_format.encode(weight)) == bits * weight.numel() + group_index_bits


@each_format
def test_all_zero_rows_stay_zero(weight_format: Gptq) -> None:
    weight = normal(8, 128)
    weight[2] = 0
    restored = weight_format.decode(weight_format.encode(weight))
    assert torch.equal(restored[2], torch.zeros(128))
    assert torch.isfinite(restored).all()
    assert (restored[0] != 0).any()


# --- what cannot be held


@pytest.mark.parametrize(
    ("weight_format", "shape", "message"),
    [
        (
            W4,
            (8, 172),
            r"gptq_w4 packs 8 inputs or outputs into a word, .* shape \(8, 172\); compressed_tensors_w8a16 fits",
        ),
        (W4, (12, 128), r"packs 8 inputs or outputs into a word, .* shape \(12, 128\)"),
        (W8, (8, 130), r"gptq_w8 packs 4 inputs or outputs into a word, .* shape \(8, 130\)"),
        (
            W4_G128,
            (8, 320),
            r"groups of 128 do not divide the 320 inputs .* sizes that do: 32, 64\. .* fits every shape",
        ),
        (W4_G32, (8, 72), r"groups of 32 do not divide the 72 inputs .* sizes that do: none\."),
        (W4, (8,), r"want a matrix \(out_features, in_features\), got shape \(8,\)"),
    ],
)
def test_shapes_that_words_or_groups_do_not_divide_are_refused(
    weight_format: Gptq, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weight_format.encode(normal(*shape))


def test_w8_holds_what_its_words_divide() -> None:
    weight = normal(4, 172)
    assert (W8.decode(W8.encode(weight)) - weight).abs().max() < weight.abs().max() / 127


@each_format
def test_values_that_are_not_finite_are_refused(weight_format: Gptq) -> None:
    weight = normal(8, 128)
    weight[1, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        weight_format.encode(weight)


def test_weights_whose_scales_are_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 8 scales are beyond torch\.float16"):
        W4.encode(torch.cat([torch.full((1, 32), 1e6), torch.ones(7, 32)]))


def test_grids_of_another_kind_are_refused() -> None:
    weight = random_integers(W4_G32, 8, 128)
    with pytest.raises(
        ValueError, match=r"4 bits and scales of shape \(8, 4\) is none of gptq_w4_g64, .* \(8, 2\) here"
    ):
        W4_G64.pack(weight)
    with pytest.raises(ValueError, match=r"a grid of 4 bits .* is none of gptq_w8_g32, which has 8 bits"):
        W8_G32.pack(weight)
    with pytest.raises(ValueError, match="gptq_w4_g32 is symmetric"):
        W4_G32.pack(replace(weight, grid=replace(weight.grid, zero_point=weight.grid.zero_point + 1)))
    with pytest.raises(ValueError, match="float16 does not hold the scales exactly"):
        W4_G32.pack(replace(weight, grid=replace(weight.grid, scale=weight.grid.scale * 1.0001)))


def test_files_with_reordered_inputs_or_zero_points_of_their_own_are_refused() -> None:
    tensors = W4_G32.encode(normal(8, 128))
    with pytest.raises(ValueError, match="desc_act"):
        W4_G32.decode({**tensors, "g_idx": tensors["g_idx"].flip(0)})
    with pytest.raises(ValueError, match="qzeros are not 7 throughout"):
        W4_G32.decode({**tensors, "qzeros": tensors["qzeros"] + 1})


@pytest.mark.parametrize("group_size", [0, 16, 48, 256])
def test_a_group_size_that_kernels_do_not_know_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"one of \(32, 64, 128\) or None .*, got {group_size}"):
        Gptq(4, group_size)


# --- what it says of itself


def test_names_bits_and_grids_are_those_of_the_recipe() -> None:
    formats: list[IntegerFormat] = [W4_G32, W4_G64, W4_G128, W8]
    assert [weight_format.name for weight_format in formats] == [
        "gptq_w4_g32",
        "gptq_w4_g64",
        "gptq_w4_g128",
        "gptq_w8",
    ]
    assert [weight_format.bits for weight_format in formats] == [4, 4, 4, 8]
    assert [weight_format.spec.granularity for weight_format in formats] == [32, 64, 128, "channel"]
    assert {weight_format.spec.scale_dtype for weight_format in formats} == {torch.float16}


@each_format
def test_a_format_describes_itself_in_json(weight_format: Gptq) -> None:
    described = weight_format.config(["lm_head"])
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": weight_format.bits,
        "group_size": weight_format.group_size or -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def test_layers_left_in_16_bit_need_the_list_of_the_quantized_ones() -> None:
    ignored = ["lm_head", "model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.down_proj: .* give Gptq\(quantized=\.\.\.\)"):
        W4.config(ignored)
    described = Gptq(4, None, frozenset({"model.layers.0.mlp.up_proj"})).config(ignored)
    assert described["modules_in_block_to_quantize"] == [["model.layers.0.mlp.up_proj"]]
    assert described["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}


# --- GPTQModel


@pytest.fixture(scope="module")
def python_with_gptqmodel() -> Path:
    if not READERS_PYTHON.is_file():
        pytest.skip("needs .venv-gptq: run scripts/gptq_environment")
    return READERS_PYTHON


def read_by_gptqmodel(python: Path, cases: list[dict[str, object]], out: Path) -> list[tuple[Tensor, int]]:
    """Logits of each case, and how many layers of it are quantized."""
    ids = random_token_ids().tolist()
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, READER, json.dumps(cases), json.dumps(ids), out], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    return [(found[str(place)], int(found[f"{place}.quantized"])) for place in range(len(cases))]


def reference_logits(folder: Path, weight_format: Gptq, linears: list[str], dtype: torch.dtype) -> Tensor:
    reference = runner.from_weights(folder, read_model(folder, weight_format, linear_modules=linears), dtype=dtype)
    with torch.no_grad():
        found: Tensor = reference(input_ids=random_token_ids()).logits
    return found.float()


def kl(wanted: Tensor, found: Tensor) -> float:
    return kl_to(torch.log_softmax(wanted, dim=-1), found).mean().item()


@pytest.mark.slow
@pytest.mark.gptqmodel
def test_stock_transformers_with_gptqmodel_reads_our_files(
    python_with_gptqmodel: Path, wide_llama_folder: Path, tmp_path: Path
) -> None:
    formats = [W4_G32, W4_G64, W4_G128, W8]
    folders = [
        quantized_copy(wide_llama_folder, tmp_path / weight_format.name, weight_format, dtype=torch.float16)
        for weight_format in formats
    ]
    linears = linear_names(load_file(wide_llama_folder / "model.safetensors"))
    mixed = Gptq(4, 32, frozenset(linears[1:]))
    folders.append(mixed_copy(wide_llama_folder, tmp_path / "mixed", mixed, linears[0]))
    cases: list[dict[str, object]] = [
        {"folder": str(folder), "dtype": "float16", "bits": weight_format.bits, "backend": backend}
        for backend in ("gptq_torch", None)
        for folder, weight_format in zip(folders, [*formats, mixed], strict=True)
    ]
    found = read_by_gptqmodel(python_with_gptqmodel, cases, tmp_path / "found.safetensors")
    wanted = [
        reference_logits(folder, weight_format, own, torch.float16)
        for folder, weight_format, own in zip(folders, [*formats, mixed], [linears] * 4 + [linears[1:]], strict=True)
    ]
    assert [quantized for _, quantized in found] == [14, 14, 14, 14, 13] * 2
    # GPTQModel's dequantizing kernel multiplies by exactly what decode gives, rounded to float16.
    for logits, expected in zip([logits for logits, _ in found[:5]], wanted, strict=True):
        assert torch.equal(logits, expected)
    # Its own choice on a CPU rounds inputs and scales of 4-bit layers to bfloat16, and is the same kernel for 8 bits.
    # Measured: mean KL of 4.5e-5 to 4.8e-5 nats for the four files of 4 bits, 0 for 8 bits.
    chosen = [kl(expected, logits) for (logits, _), expected in zip(found[5:], wanted, strict=True)]
    assert chosen[3] == 0
    assert all(1e-6 < value < 1.5e-4 for place, value in enumerate(chosen) if place != 3), chosen


def mixed_copy(like: Path, folder: Path, weight_format: Gptq, left_out: str) -> Path:
    """A copy whose module ``left_out`` stays in 16 bit."""
    folder.mkdir()
    weights = load_file(like / "model.safetensors")
    write_model(
        folder,
        weights.items(),
        weight_format,
        linear_modules=[name for name in linear_names(weights) if name != left_out],
        like=like,
        rest_dtype=torch.float16,
        ignored=["lm_head", left_out],
    )
    return folder
