import doctest
from dataclasses import replace
from xml.etree.ElementTree import fromstring

from qlora_trainer.pages.blocks import Chart, Facts, Fold, Grid
from qlora_trainer.records import LayerOutliers
from qlora_trainer.stages.compare.page import outliers as module
from qlora_trainer.stages.compare.page.outliers import outliers, outliers_table
from tests.stages.compare.compared import COMPARISON

MANY = tuple(LayerOutliers(f"model.layers.{block}.mlp.up_proj", 1.0 + block, 2.0, 0.0, (), 50) for block in range(24))


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(module).failed == 0


def test_the_facts_name_the_worst_layer_and_the_systematic_dimensions() -> None:
    (facts,) = (block for block in outliers(COMPARISON).blocks if isinstance(block, Facts))
    assert [(fact.name, fact.value) for fact in facts.rows] == [
        ("Largest input", "61.5"),
        ("Layers with outlier dimensions", "1 of 2"),
        ("Systematic dimensions", "11, 40"),
        ("Calibration tokens", "100"),
    ]


def test_every_layer_has_a_cell_and_those_with_outlier_dimensions_are_outlined() -> None:
    (chart,) = (block for block in outliers(COMPARISON).blocks if isinstance(block, Chart))
    cells = {str(cell.get("aria-label")): str(cell.get("class")) for cell in fromstring(chart.svg).iter("rect")}
    assert len(cells) == 2
    first, second = cells
    assert first.startswith("model.layers.0.mlp.down_proj: largest input 61.5; outlier dimensions: 0, 1, 2, 3, ")
    assert first.endswith(" and 28 more")
    assert second == "model.layers.1.mlp.down_proj: largest input 3.00; outlier dimensions: none"
    assert [css.split()[-1] for css in cells.values()] == ["outlined", "h0"]


def test_the_keys_are_magnitudes_and_not_their_logarithms() -> None:
    (chart,) = (block for block in outliers(COMPARISON).blocks if isinstance(block, Chart))
    assert [key.text for key in chart.keys] == ["3.0", "8.2", "22", "62"]


def test_a_layer_that_reads_only_zeros_has_a_colour_too() -> None:
    silent = replace(COMPARISON, outliers=(replace(MANY[0], magnitude=0.0), MANY[1]))
    assert any(isinstance(block, Chart) for block in outliers(silent).blocks)


def test_an_infinite_spread_is_a_dash() -> None:
    first, second = outliers_table(COMPARISON.outliers).rows
    assert [cell.text for cell in first][:4] == ["model.layers.0.mlp.down_proj", "61.5", "—", "25.0 %"]
    assert second[2].text == "1.50 x"


def test_the_ten_worst_are_shown_and_all_of_them_when_asked_for() -> None:
    blocks = outliers(replace(COMPARISON, outliers=MANY)).blocks
    (worst,) = (block for block in blocks if isinstance(block, Grid))
    (fold,) = (block for block in blocks if isinstance(block, Fold))
    assert [row[1].text for row in worst.table.rows] == [f"{size:.1f}" for size in range(24, 14, -1)]
    assert fold.title == "All 24 layers as a table"


def test_without_calibration_there_is_no_section() -> None:
    assert outliers(replace(COMPARISON, outliers=())).blocks == ()
