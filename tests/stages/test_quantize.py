from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import BaseModelError
from qlora_trainer.formats.peft_adapter import read
from qlora_trainer.numerics.low_rank import delta_weight
from qlora_trainer.records import QuantizedModel
from qlora_trainer.runners import transformers as runner
from tests.models import tiny_llama
from tests.stages.workbench import Bench, bench_for, logits_of, quantize_again, recipe_for


def test_a_quantized_base_is_reused_and_its_record_survives(llama_folder: Path, tmp_path: Path) -> None:
    bench = bench_for(recipe_for(llama_folder, tmp_path))
    again = quantize_again(bench.base, bench.recipe.quantization, bench.recipe.lora, bench.layers)
    assert not bench.quantized.reused
    assert again.reused
    assert again.layers == bench.quantized.layers
    assert again.folder == bench.quantized.folder


@pytest.mark.parametrize("change", [{"data_type": "fp4"}, {"double_quant": False}, {"compute_dtype": "bfloat16"}])
def test_other_settings_have_another_folder(llama_folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    first = bench_for(recipe_for(llama_folder, tmp_path))
    other = recipe_for(llama_folder, tmp_path, quantization=change)
    changed = quantize_again(first.base, other.quantization, other.lora, first.layers)
    assert not changed.reused
    assert changed.folder != first.quantized.folder


def test_every_linear_layer_is_measured_and_nf4_loses_about_a_tenth(llama_folder: Path, tmp_path: Path) -> None:
    quantized = bench_for(recipe_for(llama_folder, tmp_path)).quantized
    assert len(quantized.layers) == 14
    for layer in quantized.layers:
        # 20.7 dB for normal weights in blocks of 64 (tests/formats measures it); these matrices are small, so spread.
        assert layer.sqnr_db == pytest.approx(20.7, abs=0.6)
        assert layer.relative_error == pytest.approx(10 ** (-layer.sqnr_db / 20), rel=1e-3)
        assert 0 < layer.max_error < 1


def test_int8_loses_far_less_than_nf4(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, quantization={"data_type": "int8"})
    quantized = bench_for(recipe).quantized
    assert all(38 < layer.sqnr_db < 48 for layer in quantized.layers)
    assert 8 < quantized.bits_per_parameter < 9


def test_a_layer_without_loss_keeps_its_infinite_sqnr_through_the_cache(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    bench = bench_for(recipe_for(base, tmp_path))
    again = quantize_again(bench.base, bench.recipe.quantization, bench.recipe.lora, bench.layers)
    assert again.reused
    assert _layer(again, "model.layers.0.self_attn.q_proj") == float("inf")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        bench_for(recipe_for(base, tmp_path))
    assert not list((tmp_path / "quantized").glob("nf4-*"))


def test_loftq_starts_nearer_to_the_base_than_quantization_left_it(llama_folder: Path, tmp_path: Path) -> None:
    plain = bench_for(recipe_for(llama_folder, tmp_path))
    loftq = bench_for(recipe_for(llama_folder, tmp_path, lora={"init": "loftq", "rank": 16}))
    base = logits_of(runner.load(llama_folder, dtype=torch.float32))
    lost = (logits_of(plain.adapted()) - base).norm()
    left = (logits_of(loftq.adapted()) - base).norm()
    assert left < 0.8 * lost


def test_pissa_residual_and_factors_make_up_the_base(llama_folder: Path, tmp_path: Path) -> None:
    bench = bench_for(recipe_for(llama_folder, tmp_path, lora={"init": "pissa"}))
    folder = bench.quantized.initial_factors
    assert folder is not None
    factors, settings = read(folder)
    base = load_file(llama_folder / "model.safetensors")
    for module, parts in factors.items():
        weight = base[f"{module}.weight"].float()
        delta = delta_weight(parts.lora_a, parts.lora_b, scale=settings.scale)
        spectrum = torch.linalg.svdvals(weight)
        expected = spectrum[: bench.recipe.lora.rank].square().sum().sqrt()
        assert torch.linalg.svdvals(delta).square().sum().sqrt() == pytest.approx(float(expected), rel=1e-4)
        assert torch.linalg.matrix_norm(weight - delta, 2) == pytest.approx(float(spectrum[4]), rel=1e-3)


def _layer(quantized: QuantizedModel, name: str) -> float:
    return next(layer.sqnr_db for layer in quantized.layers if layer.name == name)


def test_a_fresh_adapter_changes_nothing(llama_folder: Path, tmp_path: Path) -> None:
    bench: Bench = bench_for(recipe_for(llama_folder, tmp_path))
    plain = runner.load(bench.quantized.folder, dtype=torch.float32)
    assert torch.equal(logits_of(bench.adapted()), logits_of(plain))
