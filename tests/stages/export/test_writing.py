from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import VerificationError
from qlora_trainer.export_formats import FACTS
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.recipe import ExportFormat
from qlora_trainer.stages import evaluate, export
from qlora_trainer.stages.export import ExportInputs, Opened, WrittenExport
from tests.models import PAD_ID
from tests.stages.workbench import random_rows

ROWS = random_rows(6)
IN_TRANSFORMERS = [
    name
    for name in get_args(ExportFormat)
    if FACTS[name].runtime == "transformers" and FACTS[name].package is None and FACTS[name].kind != "adapter"
]


def written_as(name: ExportFormat, folder: Path, inputs: ExportInputs) -> WrittenExport:
    return export.write(name, folder, inputs, into="dequantized")


def verdict_on(written: WrittenExport, inputs: ExportInputs) -> Any:
    """Judged by the mean KL between the runtime and the weights as our own reader decodes them."""
    reference = export.reference_model(written, inputs)
    assert reference is not None
    teacher = evaluate.teach(reference, ROWS, tokens=50, batch_size=4, pad_id=PAD_ID)
    opened = export.open_in_runtime(written, inputs)
    found = evaluate.fidelity(opened.model, teacher, ROWS, batch_size=4, pad_id=PAD_ID)
    return export.judge(written, opened, inputs.data, difference=found.kl_to_trained, tokens=found.tokens, rung=0)


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_the_runtime_agrees_with_the_weights_as_written(
    name: ExportFormat, inputs: ExportInputs, tmp_path: Path
) -> None:
    verdict = verdict_on(written_as(name, tmp_path / name, inputs), inputs)
    assert verdict.verified, verdict.verification
    assert verdict.sha256.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert verdict.bytes > 0


def test_a_file_whose_scales_were_changed_is_not_verified(inputs: ExportInputs, tmp_path: Path) -> None:
    written = written_as("compressed_tensors_w4a16_g64", tmp_path / "file", inputs)
    reference = export.reference_model(written, inputs)
    assert reference is not None
    teacher = evaluate.teach(reference, ROWS, tokens=50, batch_size=4, pad_id=PAD_ID)
    path = written.folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("down_proj.weight_scale"))
    tensors[name] = tensors[name] * 1.25
    save_file(tensors, path, metadata={"format": "pt"})
    opened = export.open_in_runtime(written, inputs)
    found = evaluate.fidelity(opened.model, teacher, ROWS, batch_size=4, pad_id=PAD_ID).kl_to_trained
    verdict = export.judge(written, opened, inputs.data, difference=found, tokens=50, rung=0)
    assert not verdict.verified
    assert "outside the tolerance" in verdict.verification


def test_a_file_without_its_runtime_is_not_verified_and_says_how_to_install_it(
    inputs: ExportInputs, tmp_path: Path
) -> None:
    written = written_as("gptq_w4_g64", tmp_path / "file", inputs)
    opened = export.open_in_runtime(written, inputs)
    assert opened.runtime == "none"
    verdict = export.judge(written, opened, inputs.data, difference=0.0, tokens=50, rung=0)
    assert not verdict.verified
    assert "pip install gptqmodel optimum" in verdict.verification


def test_the_adapter_export_is_the_trained_adapter(inputs: ExportInputs, tmp_path: Path) -> None:
    written = written_as("peft_adapter", tmp_path / "adapter", inputs)
    file = "adapter_model.safetensors"
    assert (written.folder / file).read_bytes() == (inputs.adapter / file).read_bytes()
    assert export.reference_model(written, inputs) is None
    assert written.merged_into is None


def test_what_does_not_read_back_is_not_kept(
    inputs: ExportInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = CompressedTensors.decode
    calls = iter(range(1000))

    def forgetful(self: CompressedTensors, tensors: dict[str, Tensor]) -> Tensor:
        weight = decode(self, tensors)
        return weight if next(calls) < len(inputs.layers.quantized) else weight + 1

    monkeypatch.setattr(CompressedTensors, "decode", forgetful)
    with pytest.raises(VerificationError, match="14 matrices read back"):
        written_as("compressed_tensors_w8a16", tmp_path / "file", inputs)
    assert not (tmp_path / "file").exists()


def test_an_export_that_fails_half_way_leaves_nothing(inputs: ExportInputs, tmp_path: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for count, item in enumerate(inputs.weights(*args, **kwargs)):
            if count == 5:
                raise OSError("pulled out")
            yield item

    with pytest.raises(OSError, match="pulled out"):
        written_as("bitsandbytes_nf4", tmp_path / "file", replace(inputs, weights=broken))
    assert list(tmp_path.iterdir()) == []


def test_quantized_files_do_not_pass_through_16_bits(inputs: ExportInputs, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def watched(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in inputs.weights(*args, **kwargs):
            if name.removesuffix(".weight") in inputs.layers.quantized:
                seen.append(tensor.dtype)
            yield name, tensor

    written_as("compressed_tensors_w8a16", tmp_path / "file", replace(inputs, weights=watched))
    assert seen == [torch.float32] * 14


def test_the_dead_zone_shows_on_the_grid_that_training_stood_on(inputs: ExportInputs, tmp_path: Path) -> None:
    """NF4 into the same NF4 grid: a small delta falls back to the old codes (QUANTIZATION, section 5: 1.5 to 31 %)."""
    small = replace(inputs, weights=_with_delta_of(inputs, share=0.01))
    same_grid = written_as("bitsandbytes_nf4", tmp_path / "nf4", small).survived
    int8 = written_as("compressed_tensors_w8a16", tmp_path / "int8", small).survived
    assert same_grid.keys() == int8.keys() == set(inputs.layers.adapted)
    assert max(same_grid.values()) < 0.5
    # int8 has steps of 1 / 127 of a row's largest weight, so on average a delta of 1 % is kept: within chance.
    assert min(int8.values()) > 0.8
    assert max(int8.values()) < 1.2


def _with_delta_of(inputs: ExportInputs, *, share: float) -> Any:
    """Streams whose learned delta is a random one of a given share of the weights' norm."""

    def weights(into: Any, wanted: Any = None, on_merged: Any = None) -> Iterator[tuple[str, Tensor]]:
        bases: dict[str, Tensor] = {}
        for name, tensor in inputs.weights(into, wanted=wanted, on_merged=lambda m, _w, base: bases.update({m: base})):
            module = name.removesuffix(".weight")
            if module not in bases:
                yield name, tensor
                continue
            base = bases.pop(module)
            noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(len(module)))
            merged = base + noise * (share * base.norm() / noise.norm())
            if on_merged is not None:
                on_merged(module, merged, base)
            yield name, merged

    return weights


def test_layers_that_a_format_cannot_hold_stay_in_16_bit_where_the_recipe_allows_it(
    inputs: ExportInputs, tmp_path: Path
) -> None:
    """On a model where only some layers have inputs in multiples of 128 the others are listed and not quantized."""
    narrow = {
        module: shape if module.endswith("down_proj") else (shape[0], 96)
        for module, shape in inputs.layers.quantized.items()
    }
    layers = replace(inputs.layers, quantized=narrow)
    held = export.layers_of("compressed_tensors_w4a16_g128", layers)
    assert all(module.endswith("down_proj") for module in held.quantized)
    assert set(held.quantized) | set(held.ignored) >= set(layers.quantized)


def test_parity_is_not_asked_of_a_runtime_that_uses_our_tokenizer(inputs: ExportInputs, tmp_path: Path) -> None:
    written = written_as("compressed_tensors_w8a16", tmp_path / "file", inputs)
    opened = export.open_in_runtime(written, inputs)
    assert isinstance(opened, Opened)
    assert opened.runtime == "transformers"
    assert opened.why_not_verified is None
