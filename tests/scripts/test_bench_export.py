"""The export benchmark's plan and its table; the measuring itself is tested where its parts are."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.chdir(REPOSITORY)
    sys.modules.pop("bench_export", None)
    import bench_export  # noqa: PLC0415 - a script, found only now

    return bench_export


def row(method: str, kept: float | None, above: float) -> dict[str, Any]:
    return {
        "grid": "int8",
        "method": method,
        "merged_into": "original",
        "nats_per_token": 1.0,
        "above_trained": above,
        "gain_kept": kept,
        "interval": None,
        "kl_to_trained": 0.5,
        "top1_agreement": 0.25,
        "seconds": 3.0,
    }


def test_every_case_is_a_recipe_that_can_be_read(bench: ModuleType) -> None:
    from bench_export_cell import recipe_of  # noqa: PLC0415 - a script, found only now

    for case, values in bench.CASES.items():
        for size, rate in values["rates"].items():
            recipe = recipe_of(values, bench.SHARED, rate=rate, name=f"{case}-{size}", seed=2)
            assert (recipe.training.learning_rate, recipe.run.seed, recipe.export.formats) == (rate, 2, ())


def test_the_table_shows_means_over_seeds(bench: ModuleType) -> None:
    cells = [
        {
            "case": "quickstart",
            "size": "small",
            "seed": seed,
            "delta_share": 0.01,
            "trained_nats": 2.0,
            "rows": [row("GPTQ", 0.9 + 0.1 * seed, 0.001 * seed), row("nearest", None, 0.5)],
        }
        for seed in range(2)
    ]
    text = bench.summary(cells)
    assert "quickstart, small delta (1.0 % of the weights), trained 2.0000 nats/token" in text
    gptq, nearest = text.splitlines()[-2:]
    assert "95.0 % kept" in gptq
    assert "+0.50 mnats" in gptq
    assert "no gain to keep" in nearest


def test_cells_of_the_same_settings_are_kept_wherever_they_were_measured(bench: ModuleType) -> None:
    cells = [{"case": case, "size": "small", "seed": 1} for case in ("stories260k_e2e", "quickstart")]
    result = {**bench.described(cells), "shared": {**bench.SHARED, "run": {"folder": "/elsewhere"}}}
    assert [cell["case"] for cell in bench.in_order(bench.known_cells(result))] == ["quickstart", "stories260k_e2e"]
    result["cases"] = {**bench.CASES, "quickstart": {"recipe": "another.yaml"}}
    assert list(bench.known_cells(result)) == [("stories260k_e2e", "small", 1)]
    assert bench.known_cells({**result, "shared": {}}) == bench.known_cells({}) == {}
