from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import VerificationError
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.recipe import ExportFormat
from qlora_trainer.records import LinearLayers
from qlora_trainer.stages import evaluate, export, merge
from qlora_trainer.stages.export import ExportInputs
from tests.models import PAD_ID
from tests.stages.workbench import bench_for, random_rows, recipe_for, shake

ROWS = random_rows(6)


@pytest.fixture(scope="module")
def inputs(wide_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportInputs:
    folder = tmp_path_factory.mktemp("export")
    bench = bench_for(recipe_for(wide_llama_folder, folder))
    adapter = bench.written_adapter(shake(bench.adapted()), folder / "adapter")
    source = merge.merge_source(
        bench.recipe, base=bench.base, quantized=bench.quantized, layers=bench.layers, adapter=adapter
    )
    merged = merge.merge(source, folder / "merged", data_type="bfloat16")
    return ExportInputs(
        base=wide_llama_folder,
        adapter_base=bench.quantized.folder,
        adapter=adapter,
        merged=merged.folder,
        weights=source.weights,
        layers=bench.layers,
        compute_dtype="float32",
        data_type="bfloat16",
    )


def difference(written: export.WrittenExport, inputs: ExportInputs) -> float:
    """Mean KL between the runtime and the weights as our own reader decodes them."""
    reference = export.reference_model(written, inputs)
    assert reference is not None
    teacher = evaluate.teach(reference, ROWS, tokens=50, batch_size=4, pad_id=PAD_ID)
    model = export.open_in_runtime(written, inputs)
    return evaluate.fidelity(model, teacher, ROWS, batch_size=4, pad_id=PAD_ID).kl_to_trained


@pytest.mark.parametrize("name", [name for name in get_args(ExportFormat) if name != "peft_adapter"])
def test_the_runtime_agrees_with_the_weights_as_written(
    name: ExportFormat, inputs: ExportInputs, tmp_path: Path
) -> None:
    written = export.write(name, tmp_path / name, inputs)
    verdict = export.judge(written, difference=difference(written, inputs), tokens=50)
    assert verdict.verified, verdict.verification
    assert verdict.sha256.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert verdict.bytes > 0


def test_a_file_whose_scales_were_changed_is_not_verified(inputs: ExportInputs, tmp_path: Path) -> None:
    written = export.write("compressed_tensors_w4a16_g64", tmp_path / "file", inputs)
    reference = export.reference_model(written, inputs)
    assert reference is not None
    teacher = evaluate.teach(reference, ROWS, tokens=50, batch_size=4, pad_id=PAD_ID)
    path = written.folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("down_proj.weight_scale"))
    tensors[name] = tensors[name] * 1.25
    save_file(tensors, path, metadata={"format": "pt"})
    model = export.open_in_runtime(written, inputs)
    found = evaluate.fidelity(model, teacher, ROWS, batch_size=4, pad_id=PAD_ID).kl_to_trained
    verdict = export.judge(written, difference=found, tokens=50)
    assert not verdict.verified
    assert "outside the tolerance" in verdict.verification


def test_the_adapter_export_is_the_trained_adapter(inputs: ExportInputs, tmp_path: Path) -> None:
    written = export.write("peft_adapter", tmp_path / "adapter", inputs)
    file = "adapter_model.safetensors"
    assert (written.folder / file).read_bytes() == (inputs.adapter / file).read_bytes()
    assert export.reference_model(written, inputs) is None


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
        export.write("compressed_tensors_w8a16", tmp_path / "file", inputs)
    assert not (tmp_path / "file").exists()


def test_an_export_that_fails_half_way_leaves_nothing(inputs: ExportInputs, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        for count, (name, tensor) in enumerate(inputs.weights()):
            if count == 5:
                raise OSError("pulled out")
            yield name, tensor

    with pytest.raises(OSError, match="pulled out"):
        export.write("bitsandbytes_nf4", tmp_path / "file", replace(inputs, weights=broken))
    assert list(tmp_path.iterdir()) == []


def test_quantized_files_do_not_pass_through_16_bits(inputs: ExportInputs, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in inputs.weights():
            if name.removesuffix(".weight") in inputs.layers.quantized:
                seen.append(tensor.dtype)
            yield name, tensor

    export.write("compressed_tensors_w8a16", tmp_path / "file", replace(inputs, weights=watched))
    assert seen == [torch.float32] * 14


def test_unfit_layers_are_named_with_a_format_that_fits() -> None:
    layers = LinearLayers(quantized={"a.b": (8, 96), "a.c": (8, 64)}, adapted=(), ignored=())
    assert export.unfit_layers("compressed_tensors_w4a16_g32", layers) is None
    problem = export.unfit_layers("compressed_tensors_w4a16_g64", layers)
    assert problem is not None
    assert "a.b (96 inputs)" in problem
    assert "compressed_tensors_w4a16_g32 fits" in problem
    assert export.unfit_layers("compressed_tensors_w8a16", layers) is None
