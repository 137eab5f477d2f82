from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import BaseModelError, RecipeError
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.recipe import CompareMethod
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages.compare import CompareInputs, open_16bit, outlier_report, quantized, spec_of, treated_layers
from qlora_trainer.stages.compare.quantizing import stored_bytes
from tests.models import random_token_ids, tiny_llama
from tests.stages.compare.conftest import MakeInputs, Rows, calibration

OWN: tuple[CompareMethod, ...] = (
    "rtn_int8",
    "rtn_int4",
    "obq_int4",
    "nf4",
    "fp4",
    "llm_int8",
    "rtn_w8a8",
    "smoothquant_w8a8",
    "zeroquant_w8a8",
    "zeroquant_w4a8",
)


def few() -> list[Rows]:
    """One batch."""
    return calibration(1)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=random_token_ids(seed=5), use_cache=False).logits
    return output.float()


def lost(method: CompareMethod, inputs: CompareInputs) -> float:
    """Squared error of the logits over their energy."""
    wanted = logits(open_16bit(inputs).model)
    given = logits(quantized(method, inputs).model)
    return ((given - wanted).square().sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("method", OWN)
def test_every_method_gives_a_model_near_the_16bit_one_that_is_not_the_same(
    method: CompareMethod, make_inputs: MakeInputs
) -> None:
    found = lost(method, make_inputs())
    # Random weights in two blocks: 4 bits lost 0.099 (OBQ) to 0.169 (FP4), 8 bits 0.0005 to 0.0014.
    bounds = (0.05, 0.2) if spec_of(method, make_inputs().settings).bits == 4 else (1e-4, 0.002)
    assert bounds[0] < found < bounds[1]


def test_outliers_cost_much_untreated_and_little_with_smoothing_or_decomposition(
    make_inputs: MakeInputs, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "outliers", dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        start = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            # The same function with one dimension eighty times larger, as outlier features of large models are.
            weights[f"{start}.{norm}.weight"][11] *= 80
            for reader in readers:
                weights[f"{start}.{reader}.weight"][:, 11] /= 80
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    inputs = make_inputs(folder)
    untreated, smoothed, decomposed = (lost(name, inputs) for name in ("rtn_w8a8", "smoothquant_w8a8", "llm_int8"))
    # 0.26 of the logits' energy untreated. The decomposition gives back 0.04: it takes the outliers' weights, eighty
    # times smaller than their rows here, from the same int8 rows.
    assert smoothed < 0.1 * untreated
    assert decomposed < 0.25 * untreated
    layers, systematic = outlier_report(inputs)
    assert systematic == (11,)
    by_name = {each.layer: each for each in layers}
    assert by_name["model.layers.0.self_attn.q_proj"].dimensions == (11,)
    assert by_name["model.layers.0.self_attn.q_proj"].spread > 20
    assert by_name["model.layers.0.self_attn.q_proj"].token_share > 0.9
    assert by_name["model.layers.0.self_attn.o_proj"].dimensions == ()


def test_weights_rounded_to_nearest_are_those_in_the_model(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    model, weights = quantized("rtn_int4", inputs).model, load_file(inputs.folder / "model.safetensors")
    for module in inputs.layers.quantized:
        expected = round_to_nearest(weights[f"{module}.weight"], GridSpec(4, 32, "none", torch.float16)).dequantized()
        assert torch.equal(model.get_submodule(module).weight, expected)


def test_activations_are_rounded_where_the_name_says_so(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    weights_only, both = quantized("rtn_int8", inputs).model, quantized("rtn_w8a8", inputs).model
    for module in inputs.layers.quantized:
        assert torch.equal(weights_only.get_submodule(module).weight, both.get_submodule(module).weight)
    assert not torch.equal(logits(weights_only), logits(both))


def test_bytes_are_those_of_packed_integers_and_scales(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    sizes = [rows * columns for rows, columns in inputs.layers.quantized.values()]
    rows = sum(rows for rows, _ in inputs.layers.quantized.values())
    whole = open_16bit(inputs).bytes
    rest = whole - 2 * sum(sizes)
    # The file holds bfloat16 throughout.
    assert whole == sum(tensor.nbytes for tensor in load_file(inputs.folder / "model.safetensors").values())
    assert quantized("rtn_int8", inputs).bytes == rest + sum(sizes) + 2 * rows
    assert quantized("rtn_int4", inputs).bytes == rest + sum(sizes) // 2 + 2 * sum(sizes) // 32
    # The file's header comes on top, some hundred bytes a tensor.
    assert 0 < quantized("llm_int8", inputs).bytes - (rest + sum(sizes) + 4 * rows) < 6000
    assert stored_bytes(inputs.folder, inputs.layers, None) == rest


def test_groups_that_do_not_divide_are_refused_by_name_or_left_in_16_bit(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(group_size=128)
    with pytest.raises(
        ValueError, match=r"groups of 128 do not divide the 64 inputs of 12 layers: model.layers.0.+8, 16"
    ):
        quantized("rtn_int4", inputs)
    assert quantized("rtn_int8", inputs).layers_16bit == ()
    allowed = make_inputs(group_size=128, allow_16bit_layers=True)
    made = quantized("rtn_int4", allowed)
    assert len(made.layers_16bit) == 12
    assert set(treated_layers("rtn_int4", allowed.layers, allowed.settings).quantized) == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    weights = load_file(inputs.folder / "model.safetensors")
    name = made.layers_16bit[0]
    assert torch.equal(made.model.get_submodule(name).weight, weights[f"{name}.weight"].float())


@pytest.mark.parametrize("method", OWN)
def test_zero_rows_and_constant_layers_give_no_nan(
    method: CompareMethod, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "zeros")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][:7] = 0
    weights["model.layers.0.self_attn.v_proj.weight"][:] = 0
    weights["model.layers.1.self_attn.k_proj.weight"][:] = 0.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.isfinite(logits(quantized(method, make_inputs(folder)).model)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rtn_int8", "smoothquant_w8a8", "nf4"])
def test_weights_that_are_not_finite_are_refused(
    method: CompareMethod, value: float, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, BaseModelError), match=r"not finite|NaN"):
        quantized(method, make_inputs(folder))


def test_methods_that_calibrate_refuse_to_work_without_rows(make_inputs: MakeInputs) -> None:
    def nothing() -> list[object]:
        raise RecipeError("calibration.rows: 128 asked for, but there are 3 training rows")

    inputs = replace(make_inputs(), calibration=nothing)  # type: ignore[arg-type]
    for method in ("smoothquant_w8a8", "zeroquant_w4a8", "obq_int4"):
        with pytest.raises(RecipeError, match="there are 3 training rows"):
            quantized(method, inputs)  # type: ignore[arg-type]


def test_block_methods_are_asked_for_with_their_grids(make_inputs: MakeInputs) -> None:
    asked = []

    def round_blockwise(method: CompareMethod, spec: GridSpec, layers: object) -> Iterator[tuple[str, torch.Tensor]]:
        asked.append((method, spec.bits, spec.granularity))
        return iter(load_file(inputs.folder / "model.safetensors").items())

    inputs = replace(make_inputs(), round_blockwise=round_blockwise)  # type: ignore[arg-type]
    made = quantized("gptq_int4", inputs)
    assert asked == [("gptq_int4", 4, 32)]
    same = runner.load(inputs.folder, dtype=torch.float32)
    assert torch.equal(logits(made.model), logits(same))


@pytest.mark.real
@pytest.mark.parametrize("method", [*OWN, "rtn_w4a8kv4"])
def test_a_ternary_model_with_rows_of_zeros_gives_no_nan(
    method: CompareMethod, shared_folder: Path, make_inputs: MakeInputs
) -> None:
    inputs = replace(make_inputs(shared_folder / "models/bitllama-3M"), calibration=few)  # type: ignore[arg-type]
    if method == "obq_int4":
        name = next(iter(inputs.layers.quantized))
        # One layer: all 56 would take minutes.
        inputs = replace(inputs, layers=replace(inputs.layers, quantized={name: inputs.layers.quantized[name]}))
    weights = load_file(inputs.folder / "model.safetensors")
    assert sum(int((weights[f"{name}.weight"].abs().amax(dim=1) == 0).sum()) for name in inputs.layers.quantized) > 0
    assert torch.isfinite(logits(quantized(method, inputs).model)).all()
