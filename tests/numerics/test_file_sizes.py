"""Predicted bytes on the disk, against files."""

from pathlib import Path
from typing import get_args

import pytest

from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.numerics.file_sizes import disk, export_bytes
from qlora_trainer.numerics.stored_bytes import adapter_tensor_sizes
from qlora_trainer.numerics.training_load import TrainingLoad
from qlora_trainer.recipe import ExportFormat
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.runtime.weight_headers import read_headers
from tests.numerics.shapes import SMALL


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 128), (8, None)])
def test_an_export_is_predicted_up_to_the_width_of_its_scales(
    wide_llama_folder: Path, bits: int, group_size: int | None
) -> None:
    weight_format = CompressedTensors(bits=bits, group_size=group_size)
    linears = {name for name in read_headers(wide_llama_folder) if name.split(".")[-2] in SMALL.linears}
    stored = 0
    for name, tensor in read_tensors(wide_llama_folder):
        parts = weight_format.encode(tensor.float()).values() if name in linears else [tensor]
        stored += sum(part.numel() * part.element_size() for part in parts)
    predicted = export_bytes(SMALL, weight_format.name, adapter_bytes=0)
    # Scales may be float32 or bfloat16; weight_shape is two int64 per matrix.
    assert stored == pytest.approx(predicted, rel=0.05)


def test_a_16_bit_export_is_predicted_to_the_byte(wide_llama_folder: Path) -> None:
    stored = sum(info.bytes for info in read_headers(wide_llama_folder).values())
    assert export_bytes(SMALL, "merged_16bit", adapter_bytes=0) == stored


def test_the_disk_holds_one_checkpoint_more_than_is_kept() -> None:
    load = TrainingLoad(rank=8, optimizer="adamw")
    adapter = 4 * sum(adapter_tensor_sizes(SMALL, load))
    need = disk(SMALL, load, keep_checkpoints=2, merged_bytes=4, formats=["peft_adapter"])
    assert need.items["checkpoints"] == 3 * 3 * adapter
    assert need.items["adapter"] == need.items["export peft_adapter"] == adapter
    assert need.items["merged model"] == 4 * SMALL.parameters


def test_every_format_of_the_recipe_has_a_size() -> None:
    need = disk(SMALL, TrainingLoad(), keep_checkpoints=1, merged_bytes=2, formats=get_args(ExportFormat))
    assert all(need.items[f"export {name}"] > 0 for name in get_args(ExportFormat))
