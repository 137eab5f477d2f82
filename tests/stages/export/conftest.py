"""A tiny trained model, ready to be exported."""

from pathlib import Path

import pytest

from qlora_trainer.stages.export import ExportInputs
from tests.stages.workbench import bench_for, export_inputs, recipe_for, shake


@pytest.fixture(scope="module")
def inputs(wide_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportInputs:
    folder = tmp_path_factory.mktemp("export")
    bench = bench_for(recipe_for(wide_llama_folder, folder))
    adapter = bench.written_adapter(shake(bench.adapted()), folder / "adapter")
    return export_inputs(bench, adapter, folder)
