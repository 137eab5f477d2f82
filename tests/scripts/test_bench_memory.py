"""What scripts/bench_memory.py says of its cases: which were fitted to, which are held out, and how near each is."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_memory.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fitted_cases_are_cases_and_most_are_held_out(bench: ModuleType) -> None:
    assert set(bench.FITTED) < set(bench.CASES)
    assert len(bench.CASES) - len(bench.FITTED) >= 12


def test_the_largest_error_of_held_out_cases_leaves_the_fitted_ones_out(bench: ModuleType) -> None:
    cases = {"none": {"error": -0.09}, "Qwen3": {"error": 0.02}, "dropout": {"error": -0.03}}
    assert bench.errors(cases) == {"largest_error": 0.09, "largest_error_held_out": 0.03}
    assert [found["is_held_out"] for found in cases.values()] == [False, True, True]


def test_every_case_is_a_recipe_whose_peak_can_be_predicted(bench: ModuleType) -> None:
    for name, case in bench.CASES.items():
        recipe = bench.recipe_of(case, Path("none"))
        shape = bench.ModelShape.from_config({**bench.MODEL, **case.get("model", {})})
        rows = tuple(bench.EncodedRow((1,) * recipe.data.window, (1,) * recipe.data.window, (), "", "") for _ in "12")
        assert bench.predicted_for(case, recipe, shape, rows, "cpu").total > 2**29, name
