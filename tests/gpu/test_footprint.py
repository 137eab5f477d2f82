"""Predicted bytes beside what torch's CUDA allocator handed out, by the cases of scripts/bench_memory.py."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_memory.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["none", "selective", "full", "float32", "vocabulary 128,256, untied"])
def test_the_prediction_is_within_a_tenth_of_what_the_allocator_handed_out(name: str, tmp_path: Path) -> None:
    """``max_memory_allocated`` counts tensors; context, segments and unified memory are predicted apart."""
    bench = script()
    bench.prepare(bench.CASES[name], tmp_path)
    found = bench.measure(bench.CASES[name], tmp_path)
    assert found["device"] == "cuda"
    assert abs(found["error"]) <= bench.TOLERANCE
