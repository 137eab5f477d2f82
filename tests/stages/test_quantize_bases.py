"""Bases that bitsandbytes does not store: 16 bit as they are, and integers that GPTQ chose on training rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.errors import RecipeError
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.model_folder import read_integers, read_model
from qlora_trainer.formats.peft_adapter import attach
from qlora_trainer.numerics.distortion import sqnr_db
from qlora_trainer.numerics.integer_weight import IntegerWeight, round_to_nearest
from qlora_trainer.pipeline.quantizing import quantized_base
from qlora_trainer.pipeline.rounding import ModelRounding
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import QuantizedModel
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.integer_linear import IntegerLinear
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.stages import quantize
from tests.stages.workbench import Bench, bench_for, logits_of, quantize_again, recipe_for, shake, task_rows

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
each_type = pytest.mark.parametrize("dtype", TYPES)


def stored_as(
    data_type: str, base: Path, folder: Path, dtype: str = "float32", **sections: dict[str, object]
) -> Recipe:
    own = {"data_type": data_type, "compute_dtype": dtype, **sections.pop("quantization", {})}
    return recipe_for(base, folder, quantization=own, **sections)


def made_again(bench: Bench, recipe: Recipe, *, rows_seed: int = 0) -> QuantizedModel:
    return quantized_base(
        recipe,
        bench.base,
        layers=bench.layers,
        content_key="content",
        rows=lambda: task_rows(bench.base.folder, seed=rows_seed),
        trust_remote_code=False,
    )


def opened(bench: Bench) -> torch.nn.Module:
    return quantize.open_base(bench.quantized, bench.recipe.quantization, layers=bench.layers)


# 16 bit.


@each_type
@pytest.mark.parametrize("base", ["llama_folder", "tied_llama_folder"])
def test_a_16_bit_base_with_fresh_adapters_is_the_base_bit_for_bit(
    base: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    bench = bench_for(stored_as("none", folder, tmp_path, dtype))
    wanted = logits_of(runner.load(folder, dtype=TYPES[dtype]))
    assert torch.equal(logits_of(opened(bench)), wanted)
    assert torch.equal(logits_of(bench.adapted()), wanted)


def test_a_16_bit_base_is_its_own_folder_and_nothing_is_written(llama_folder: Path, tmp_path: Path) -> None:
    quantized = bench_for(stored_as("none", llama_folder, tmp_path)).quantized
    assert quantized.folder == llama_folder
    assert (quantized.bits, quantized.bits_per_parameter, quantized.layers) == (16, 16, ())
    assert not (tmp_path / "quantized").exists()


def test_pissa_on_a_16_bit_base_takes_a_part_out_and_puts_it_into_the_adapter(
    llama_folder: Path, tmp_path: Path
) -> None:
    bench = bench_for(stored_as("none", llama_folder, tmp_path, lora={"init": "pissa"}))
    wanted = logits_of(runner.load(llama_folder, dtype=torch.float32))
    assert bench.quantized.folder.parent == tmp_path / "quantized"
    # float32 throughout: what differs is the order of sums.
    assert (logits_of(bench.adapted()) - wanted).abs().max() < 2e-4
    assert (logits_of(opened(bench)) - wanted).abs().max() > 0.1


# GPTQ.


@pytest.fixture(scope="module")
def gptq(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_for(stored_as("gptq_int4", llama_folder, tmp_path_factory.mktemp("gptq")))


@each_type
@pytest.mark.parametrize("base", ["llama_folder", "tied_llama_folder"])
def test_a_gptq_base_answers_as_its_dequantized_weights_and_as_the_library_that_reads_it(
    base: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    bench = bench_for(stored_as("gptq_int4", folder, tmp_path, dtype))
    weights = read_model(bench.quantized.folder, CompressedTensors(4, 64), linear_modules=bench.layers.quantized)
    wanted = logits_of(runner.from_weights(folder, weights, dtype=TYPES[dtype]))
    assert torch.equal(logits_of(opened(bench)), wanted)
    assert torch.equal(logits_of(bench.adapted()), wanted)
    assert torch.equal(logits_of(runner.load(bench.quantized.folder, dtype=TYPES[dtype])), wanted)


def test_its_integers_are_those_that_gptq_chose(gptq: Bench, tmp_path: Path) -> None:
    stored = read_integers(gptq.quantized.folder, CompressedTensors(4, 64), linear_modules=gptq.layers.quantized)
    found = {name: weight for name, weight in stored if isinstance(weight, IntegerWeight)}
    rounding = ModelRounding(gptq.recipe, task_rows(gptq.base.folder), gptq.base.folder, trust_remote_code=False)
    chosen = rounding.rounded("gptq_int4", CompressedTensors(4, 64).spec, gptq.layers, tmp_path)
    for module, weight in chosen.matrices():
        assert torch.equal(found.pop(f"{module}.weight").codes, weight.codes)
    assert not found


def test_every_layer_is_held_as_integers_and_measured_against_the_original(gptq: Bench) -> None:
    model = opened(gptq)
    held = [module for module in model.modules() if isinstance(module, IntegerLinear)]
    assert len(held) == len(gptq.quantized.layers) == 14
    parameters = sum(rows * columns for rows, columns in gptq.layers.quantized.values())
    # Half a byte a weight, and two bytes for each 64.
    assert sum(module.stored_bytes for module in held) == parameters // 2 + 2 * parameters // 64
    weights = dict(read_tensors(gptq.base.folder))
    for layer in gptq.quantized.layers:
        weight = weights[f"{layer.name}.weight"].float()
        nearest = round_to_nearest(weight, CompressedTensors(4, 64).spec).dequantized()
        # GPTQ gives up nearness of the weights for nearness of the outputs: 0.8 to 9.7 dB here, on 16 short rows.
        assert 0 < sqnr_db(weight, nearest) - layer.sqnr_db < 12
    assert 4.25 < gptq.quantized.bits_per_parameter < 4.3


def test_a_trained_adapter_gives_the_same_on_the_base_that_the_library_reads(gptq: Bench, tmp_path: Path) -> None:
    trained = shake(gptq.adapted())
    adapter = gptq.written_adapter(trained, tmp_path / "adapter")
    stock = attach(runner.load(gptq.quantized.folder, dtype=torch.float32), adapter)
    assert torch.equal(logits_of(stock), logits_of(trained))


def test_the_same_rows_and_settings_reuse_a_gptq_base(gptq: Bench) -> None:
    again = made_again(gptq, gptq.recipe)
    assert again.reused
    assert again.layers == gptq.quantized.layers


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("calibration", {"rows": 12}),
        ("rounding", {"damping": 0.02}),
        ("rounding", {"activation_order": False}),
        ("quantization", {"group_size": 32}),
        ("run", {"seed": 1}),
    ],
)
def test_what_changes_its_integers_changes_its_key(
    section: str, settings: dict[str, object], gptq: Bench, llama_folder: Path, tmp_path: Path
) -> None:
    other = stored_as("gptq_int4", llama_folder, tmp_path, **{section: settings})
    assert made_again(gptq, other).key != gptq.quantized.key


def test_other_rows_change_its_key_and_rows_that_are_not_taken_do_not(gptq: Bench, tmp_path: Path) -> None:
    assert made_again(gptq, gptq.recipe, rows_seed=1).key != gptq.quantized.key
    more_validation = replace(task_rows(gptq.base.folder), validation=task_rows(gptq.base.folder, seed=2).train)
    again = quantized_base(
        gptq.recipe,
        gptq.base,
        layers=gptq.layers,
        content_key="content",
        rows=lambda: more_validation,
        trust_remote_code=False,
    )
    assert again.key == gptq.quantized.key


def test_too_few_rows_are_refused_and_leave_nothing(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.rows: 25 asked for, but there are 24 training rows"):
        bench_for(stored_as("gptq_int4", llama_folder, tmp_path, calibration={"rows": 25}))
    assert not (tmp_path / "quantized").exists()


def test_a_rounding_that_fails_leaves_nothing(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Tensor:
        raise RecipeError("export: no")

    monkeypatch.setattr(ModelRounding, "rounded", failing)
    with pytest.raises(RecipeError, match="no"):
        bench_for(stored_as("gptq_int4", llama_folder, tmp_path))
    assert list((tmp_path / "quantized").iterdir()) == []


def test_gptq_without_rows_is_an_error_of_the_caller(gptq: Bench) -> None:
    with pytest.raises(ValueError, match="give calibrated="):
        quantize_again(gptq.base, gptq.recipe.quantization, gptq.recipe.lora, gptq.layers)
