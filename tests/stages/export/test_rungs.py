"""What each rung owes: never worse than rounding to nearest where it looks, and exactly what its formula says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_trainer.errors import RecipeError
from qlora_trainer.export_formats import rungs_of
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.recipe import Ladder, Rounding
from qlora_trainer.stages.export import ExportInputs, Shelf, Way
from qlora_trainer.stages.export.blockwise import Bench, RoundedBlock, round_blocks, trained_ends
from qlora_trainer.stages.export.end_to_end import kl_and_gradients
from qlora_trainer.stages.export.raising import kl_shares, worst_layers
from qlora_trainer.stages.export.rounded import RoundedModel
from qlora_trainer.stages.export.tuning import ScaleTuning

# Three bits: errors large enough to be told apart on a tiny model.
SPEC = GridSpec(bits=3, granularity=32, scale_dtype=torch.bfloat16)
FINE = GridSpec(bits=8, granularity=32)


@pytest.fixture(scope="module")
def shelf(inputs: ExportInputs, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    quick = replace(inputs, rounding=Rounding(scale_epochs=4, learned_steps=40, scale_learning_rate=2e-3))
    return Shelf(tmp_path_factory.mktemp("shelf"), quick)


def nearest(inputs: ExportInputs, folder: Path, spec: GridSpec = SPEC) -> RoundedModel:
    folder.mkdir()
    model = RoundedModel(folder)
    bench = Bench(inputs)
    round_blocks(
        bench,
        "dequantized",
        spec,
        lambda work: RoundedBlock(
            {module: round_to_nearest(work.merged[f"{module}.weight"], spec) for module in work.linears}
        ),
        model,
    )
    return model


def mean_kl(inputs: ExportInputs, rounded: RoundedModel, into: str = "dequantized") -> float:
    """Mean KL to the trained function over the calibration batches."""
    bench = Bench(inputs)
    ends = trained_ends(bench)

    def weights_of(name: str) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        merged = bench.weights_of(name, "original" if into == "original" else "dequantized")
        matrices = {f"{module}.weight": weight.dequantized() for module, weight in rounded.block(name).items()}
        leaf = torch.zeros(1, requires_grad=True)
        first = next(iter(matrices))
        return {**merged, **rounded.plain(name), **matrices, first: matrices[first] + leaf}, (leaf,)

    values = [
        kl_and_gradients(bench, ends, batch, weights_of=weights_of, on_gradients=lambda *_: None)
        for batch in range(len(bench.batches))
    ]
    return sum(values) / len(values)


def test_eight_bits_are_the_trained_function(inputs: ExportInputs, tmp_path: Path) -> None:
    """Streams, teacher and student are wired right: steps 32 times finer give a thousandth of three bits' KL."""
    assert mean_kl(inputs, nearest(inputs, tmp_path / "fine", FINE)) < 5e-4


@pytest.mark.parametrize("rung", [1, 2, 3, 4])
def test_every_rung_is_nearer_to_the_trained_function_than_rounding_to_nearest(
    rung: int, shelf: Shelf, tmp_path: Path
) -> None:
    rounded = shelf.rounded(Way(rung, "dequantized"), SPEC)
    assert rounded is not None
    assert mean_kl(shelf.inputs, rounded) < 0.9 * mean_kl(shelf.inputs, nearest(shelf.inputs, tmp_path / "nearest"))


def test_tuned_scales_improve_on_the_rounding_they_start_from(shelf: Shelf) -> None:
    before, after = shelf.rounded(Way(1, "original"), SPEC), shelf.rounded(Way(2, "original"), SPEC)
    assert before is not None
    assert after is not None
    assert mean_kl(shelf.inputs, after, "original") < mean_kl(shelf.inputs, before, "original")
    for name in before.blocks():
        for module, weight in after.block(name).items():
            first = before.block(name)[module]
            assert torch.equal(weight.codes, first.codes), "tuning changes no integer"
            assert torch.equal(weight.grid.scale, weight.grid.scale.bfloat16().float()), "scales are what is stored"
            assert not torch.equal(weight.grid.scale, first.grid.scale)


def test_tuning_without_a_rate_changes_nothing(shelf: Shelf, tmp_path: Path) -> None:
    source = shelf.rounded(Way(1, "dequantized"), SPEC)
    assert source is not None
    state, target = tmp_path / "state", tmp_path / "target"
    state.mkdir()
    target.mkdir()
    tuning = ScaleTuning(Bench(shelf.inputs), "dequantized", SPEC, source, state)
    tuning.step(0, 0.0)
    tuning.write(RoundedModel(target))
    for (module, weight), (same, tuned) in zip(source.matrices(), RoundedModel(target).matrices(), strict=True):
        assert module == same
        assert torch.equal(weight.dequantized(), tuned.dequantized())


def test_a_minimum_grid_can_be_tuned(shelf: Shelf) -> None:
    spec = GridSpec(bits=3, granularity=32, offset="minimum", scale_dtype=torch.float16)
    before, after = shelf.rounded(Way(1, "dequantized"), spec), shelf.rounded(Way(2, "dequantized"), spec)
    assert before is not None
    assert after is not None
    assert mean_kl(shelf.inputs, after) < mean_kl(shelf.inputs, before)


def test_awq_scales_what_is_salient_and_keeps_the_function(inputs: ExportInputs, tmp_path: Path) -> None:
    chosen = replace(inputs, rounding=Rounding(method="awq"))
    fine = Shelf(tmp_path / "fine", chosen).rounded(Way(1, "dequantized"), FINE)
    assert fine is not None
    assert mean_kl(inputs, fine) < 5e-4
    coarse = Shelf(tmp_path / "coarse", chosen).rounded(Way(1, "dequantized"), SPEC)
    assert coarse is not None
    assert any(coarse.plain(name) for name in coarse.blocks()), "a norm took the inverse of some scale"
    assert mean_kl(inputs, coarse) < mean_kl(inputs, nearest(inputs, tmp_path / "nearest"))


def test_awq_matrices_are_unscaled_for_the_dead_zone_meter(inputs: ExportInputs, tmp_path: Path) -> None:
    chosen = replace(inputs, rounding=Rounding(method="awq"))
    model = Shelf(tmp_path, chosen).rounded(Way(1, "dequantized"), FINE)
    assert model is not None
    merged = dict(inputs.weights("dequantized"))
    for block in model.blocks():
        for module, weight in model.block(block).items():
            found = model.unscaled(block, module, weight.dequantized())
            wanted = merged[f"{module}.weight"]
            assert (found - wanted).norm() < 0.02 * wanted.norm(), module


def test_a_finished_rounding_is_not_made_again(shelf: Shelf) -> None:
    way = Way(2, "dequantized")
    first = shelf.rounded(way, SPEC)
    assert first is not None
    times = {file.name: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    again = Shelf(shelf.folder, shelf.inputs).rounded(way, SPEC)
    assert again is not None
    assert {file.name: file.stat().st_mtime_ns for file in again.folder.iterdir()} == times


def test_the_shares_of_single_layers_add_up_to_twice_the_kl(inputs: ExportInputs, tmp_path: Path) -> None:
    """Exactly so where KL is quadratic in the errors; eight bits are near enough for a few per cent."""
    spec = GridSpec(bits=6, granularity=32, scale_dtype=torch.float32)
    rounded = nearest(inputs, tmp_path / "rounded", spec)
    shares = kl_shares(Bench(inputs), "dequantized", spec, rounded)
    assert shares.keys() == set(inputs.layers.quantized)
    assert sum(shares.values()) == pytest.approx(2 * mean_kl(inputs, rounded), rel=0.1)


def test_the_worst_layers_fit_into_the_share_of_the_recipe(inputs: ExportInputs, tmp_path: Path) -> None:
    chosen = replace(inputs, rounding=Rounding(raised_share=0.3))
    worst = worst_layers(Bench(chosen), "dequantized", SPEC, None)
    sizes = {module: rows * columns for module, (rows, columns) in inputs.layers.quantized.items()}
    assert 0 < sum(sizes[module] for module in worst) <= 0.3 * sum(sizes.values())


def test_layers_that_one_kernel_computes_are_raised_together(inputs: ExportInputs) -> None:
    worst = worst_layers(Bench(replace(inputs, rounding=Rounding(raised_share=0.9))), "dequantized", SPEC, None)
    for layer in range(2):
        start = f"model.layers.{layer}"
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            members = {module for module in worst if module.startswith(start) and module.rpartition(".")[2] in fused}
            assert len(members) in {0, len(fused)}


def test_more_calibration_rows_than_there_are_is_an_error(inputs: ExportInputs) -> None:
    short = replace(inputs, calibration=inputs.calibration.model_copy(update={"rows": 1000}))
    with pytest.raises(RecipeError, match=r"calibration\.rows: 1000 asked for, but there are 24 training rows"):
        Bench(short)


def test_the_rungs_of_a_format_are_those_that_it_can_climb() -> None:
    ladder = Ladder(last_rung=5)
    assert rungs_of("compressed_tensors_w4a16_g64", ladder, has_magnitudes=False) == (0, 1, 2, 3, 4, 5)
    assert rungs_of("compressed_tensors_w4a16_g64", ladder, has_magnitudes=True) == (0, 1, 2, 3, 5)
    assert rungs_of("gptq_w4_g64", ladder, has_magnitudes=False) == (0, 1, 2, 3, 4)
    assert rungs_of("compressed_tensors_w8a16", ladder, has_magnitudes=False) == (0, 1, 2, 3, 4)
    assert rungs_of("bitsandbytes_nf4", ladder, has_magnitudes=False) == (0,)
    assert rungs_of("gguf_q4_k_m", ladder, has_magnitudes=False) == (0,)
    only_nearest = Ladder(last_rung=0, start_rung_int4=0)
    assert rungs_of("gguf_q4_0", only_nearest, has_magnitudes=False) == (0,)
