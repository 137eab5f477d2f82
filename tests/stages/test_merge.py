from pathlib import Path

import pytest
import torch

from qlora_trainer.numerics.low_rank import delta_weight
from qlora_trainer.recipe import Recipe
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages import merge, quantize
from tests.stages.workbench import Bench, bench_for, logits_of, recipe_for, shake

FLOAT32_MERGE = {"data_type": "float32"}


def source_of(bench: Bench, adapter: Path, recipe: Recipe | None = None) -> merge.MergeSource:
    return merge.merge_source(
        recipe or bench.recipe,
        base=bench.base,
        quantized=bench.quantized,
        weight_format=quantize.weight_format_of(bench.recipe.quantization),
        layers=bench.layers,
        adapter=adapter,
    )


@pytest.mark.parametrize("data_type", ["none", "gptq_int4"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merging_into_what_16_bit_and_gptq_training_saw_gives_the_trained_function(
    lora: dict[str, object], compute_dtype: str, data_type: str, tied_llama_folder: Path, tmp_path: Path
) -> None:
    quantization = {"data_type": data_type, "compute_dtype": compute_dtype}
    bench = bench_for(recipe_for(tied_llama_folder, tmp_path, lora=lora, quantization=quantization))
    model = shake(bench.adapted())
    trained = logits_of(model)
    source = source_of(bench, bench.written_adapter(model, tmp_path / "adapter")).with_base("dequantized")
    merged = merge.merge(source, tmp_path / "merged", data_type="float32")
    found = logits_of(runner.load(merged.folder, dtype=getattr(torch, compute_dtype)))
    # float32: the order of sums. bfloat16: the sum is rounded once more, at a spread of the logits of about 1.
    assert (found - trained).abs().max() < (2e-4 if compute_dtype == "float32" else 0.15)
    assert (found - trained).norm() < (1e-4 if compute_dtype == "float32" else 2e-2) * trained.norm()
    assert (logits_of(bench.adapted()) - trained).abs().max() > 0.1


def test_merging_into_the_original_of_a_gptq_base_leaves_its_integers_out(llama_folder: Path, tmp_path: Path) -> None:
    quantization = {"data_type": "gptq_int4"}
    bench = bench_for(recipe_for(llama_folder, tmp_path, merge={"into": "original"}, quantization=quantization))
    source = source_of(bench, bench.written_adapter(shake(bench.adapted()), tmp_path / "adapter"))
    merged, originals = dict(source.weights()), dict(runner.load(llama_folder, dtype=torch.float32).state_dict())
    for module, factors in source.factors.items():
        delta = delta_weight(factors.lora_a, factors.lora_b, scale=source.scale)
        assert torch.allclose(merged[f"{module}.weight"], originals[f"{module}.weight"] + delta, atol=1e-6)


@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"init": "pissa"}, {"init": "loftq"}])
@pytest.mark.parametrize("base", ["llama_folder", "tied_llama_folder"])
def test_merging_into_the_dequantized_base_gives_the_trained_function(
    base: str, lora: dict[str, object], data_type: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_for(
        request.getfixturevalue(base), tmp_path, lora=lora, quantization={"data_type": data_type}, merge=FLOAT32_MERGE
    )
    bench = bench_for(recipe)
    model = shake(bench.adapted())
    trained = logits_of(model)
    adapter = bench.written_adapter(model, tmp_path / "adapter")
    merged = merge.merge(source_of(bench, adapter), tmp_path / "merged", data_type="float32")
    difference = (logits_of(runner.load(merged.folder, dtype=torch.float32)) - trained).abs().max()
    # float32 throughout: what differs is the order of sums. A lost delta would differ by more than 0.1.
    assert difference < 2e-4
    assert (logits_of(bench.adapted()) - trained).abs().max() > 0.1


def test_merging_into_the_original_adds_the_delta_to_the_16_bit_weights(llama_folder: Path, tmp_path: Path) -> None:
    bench = bench_for(recipe_for(llama_folder, tmp_path, merge={"into": "original", **FLOAT32_MERGE}))
    model = shake(bench.adapted())
    source = source_of(bench, bench.written_adapter(model, tmp_path / "adapter"))
    merged = dict(source.weights())
    originals = dict(runner.load(llama_folder, dtype=torch.float32).state_dict())
    for module, factors in source.factors.items():
        delta = delta_weight(factors.lora_a, factors.lora_b, scale=source.scale)
        assert torch.allclose(merged[f"{module}.weight"], originals[f"{module}.weight"] + delta, atol=1e-6)
    assert torch.equal(merged["model.norm.weight"].float(), originals["model.norm.weight"])


def test_an_untrained_pissa_adapter_merged_into_the_original_is_the_original(
    llama_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(llama_folder, tmp_path, lora={"init": "pissa"}, merge={"into": "original", **FLOAT32_MERGE})
    bench = bench_for(recipe)
    source = source_of(bench, bench.written_adapter(bench.adapted(), tmp_path / "adapter"))
    originals = runner.load(llama_folder, dtype=torch.float32).state_dict()
    for name, tensor in source.weights():
        assert torch.allclose(tensor.float(), originals[name], atol=1e-5), name


def test_a_tiny_delta_is_mostly_lost_in_bfloat16_and_the_meter_says_so(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, quantization={"compute_dtype": "bfloat16"})
    bench = bench_for(recipe)
    adapter = bench.written_adapter(shake(bench.adapted(), size=1e-3), tmp_path / "adapter")
    source = source_of(bench, adapter)
    in_bfloat16 = merge.merge(source, tmp_path / "half", data_type="bfloat16").survived
    in_float32 = merge.merge(source, tmp_path / "full", data_type="float32").survived
    assert min(in_float32.values()) > 0.999
    assert max(in_bfloat16.values()) < 0.9


def test_the_merged_folder_is_tied_where_the_base_is(tied_llama_folder: Path, tmp_path: Path) -> None:
    bench = bench_for(recipe_for(tied_llama_folder, tmp_path))
    adapter = bench.written_adapter(shake(bench.adapted()), tmp_path / "adapter")
    merged = merge.merge(source_of(bench, adapter), tmp_path / "merged", data_type="bfloat16")
    model = runner.load(merged.folder, dtype=torch.float32)
    names = dict(model.named_parameters())
    assert "lm_head.weight" not in names
    assert (merged.folder / "tokenizer.json").read_bytes() == (tied_llama_folder / "tokenizer.json").read_bytes()
