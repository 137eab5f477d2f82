from dataclasses import replace

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report import Measurements
from qlora_trainer.stages.report.tables import (
    Cell,
    Table,
    expected_table,
    exports_table,
    gap_table,
    layers_table,
)


def column(table: Table, title: str) -> list[Cell]:
    index = [heading.title for heading in table.columns].index(title)
    return [row[index] for row in table.rows]


def test_every_row_of_every_table_has_a_cell_for_each_heading(report: RunReport, measurements: Measurements) -> None:
    tables = (
        gap_table(report),
        exports_table(report),
        expected_table(report.expected),
        layers_table(measurements.quantized.layers),
    )
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_the_gap_table_shows_each_loss_with_its_interval(report: RunReport) -> None:
    cells = column(gap_table(report), "Loss, nats per token")
    assert cells[0].text == "3.1020"
    assert cells[0].note == f"{report.stages[0].interval[0]:.4f} to {report.stages[0].interval[1]:.4f}"


def test_the_gap_table_marks_only_files_as_verified(report: RunReport) -> None:
    first, *rest = report.exports
    failed = replace(report, exports=(replace(first, verified=False), *rest))
    marks = [cell.text for cell in column(gap_table(failed), "Verified")]
    assert marks == ["—"] * 4 + ["✗ not verified"] + ["✓ verified"] * 5


def test_a_metric_that_a_stage_lacks_is_a_dash(report: RunReport) -> None:
    first, *rest = report.stages
    cells = column(gap_table(replace(report, stages=(replace(first, metrics={}), *rest))), "Exact match")
    assert cells[0] == Cell("—")
    assert cells[2] == Cell("81.2 %", "77.2 to 85.2")


def test_generation_speed_is_shown_where_something_was_generated(report: RunReport) -> None:
    first, *rest = report.stages
    silent = replace(first, generated_tokens_per_second=None)
    cells = column(gap_table(replace(report, stages=(silent, *rest))), "Tokens/s")
    assert [cells[0].note, cells[1].note] == ["", "148 generated"]


def test_the_recommended_file_is_marked_in_the_table_of_exports(report: RunReport) -> None:
    marked = [cell.text for cell in column(exports_table(report), "Format") if cell.note == "recommended"]
    assert marked == ["compressed_tensors_w8a16"]


def test_the_status_of_each_file_tells_faithful_and_good_apart(report: RunReport) -> None:
    first, *rest = report.exports
    failed = replace(report, exports=(replace(first, verified=False), *rest))
    cells = column(exports_table(failed), "Status")
    assert [cell.text for cell in cells] == [
        "✗ not verified",
        *["✓ meets the bar"] * 3,
        "▼ below the bar",
        "✓ meets the bar",
    ]
    assert [cell.tone for cell in cells] == ["bad", "good", "good", "good", "warn", "good"]
    # An adapter has no bar to meet.
    assert column(exports_table(report), "Status")[0] == Cell("✓ verified", "in transformers", tone="good")


def test_bar_method_rung_and_merge_base_stand_in_the_table_of_exports(report: RunReport) -> None:
    table = exports_table(report)
    assert [cell.text for cell in column(table, "Bar")] == ["—", "98 %", "99.5 %", "98 %", "98 %", "99.5 %"]
    made = column(table, "Made by")
    assert made[0] == Cell("—")
    assert made[1] == Cell("rounded by its library", "rung 0, dequantized base")
    assert made[5] == Cell("round to nearest", "rung 0, dequantized base")
    assert made[4] == Cell("quantization-aware merging + tuned scales", "rung 4, original base")


def test_a_file_without_attempts_is_told_by_its_rung(report: RunReport) -> None:
    bare = tuple(replace(export, attempts=(), merged_into=None) for export in report.exports)
    made = column(exports_table(replace(report, exports=bare)), "Made by")
    assert made[3] == Cell("GPTQ + tuned scales", "rung 2")


def test_the_loss_above_the_trained_model_has_its_sign_and_interval(report: RunReport) -> None:
    cell = column(exports_table(report), "Loss above trained")[1]
    assert cell.text == "+0.0321"
    assert cell.note == "+0.0303 to +0.0334"


def test_layers_stand_from_the_most_distorted_on(measurements: Measurements) -> None:
    layers = measurements.quantized.layers
    lossless = replace(layers[0], name="zero", sqnr_db=float("inf"))
    figures = [cell.text for cell in column(layers_table((lossless, *layers[:2])), "SQNR, dB")]
    assert figures == ["20.61", "20.61", "nothing lost"]
    names = [cell.text for cell in column(layers_table(layers), "Layer")]
    assert names[0] == "model.layers.5.mlp.down_proj"
    assert len(names) == 5


def test_size_and_speed_stand_beside_the_quality_of_each_file(report: RunReport) -> None:
    table = exports_table(report)
    assert column(table, "Size")[5] == Cell("10.2 MiB", "56 % of the base")
    assert column(table, "Tokens/s")[5] == Cell("5,210", "148 generated")
