from dataclasses import replace

from qlora_trainer.pages.tables import Cell
from qlora_trainer.records import ExportFigures, RunReport
from qlora_trainer.stages.report import Measurements, Table
from qlora_trainer.stages.report.making import attempts_table, makings, merge_base_in_words, survived_table


def by_format(report: RunReport, name: str) -> ExportFigures:
    return next(export for export in report.exports if export.format == name)


def column(table: Table, title: str) -> list[Cell]:
    index = [heading.title for heading in table.columns].index(title)
    return [row[index] for row in table.rows]


def test_only_files_of_which_there_is_something_to_tell_are_told_of(report: RunReport) -> None:
    assert [making.format for making in makings(report.exports)] == [
        "compressed_tensors_w4a16_g32",
        "compressed_tensors_w4a16_g128",
        "compressed_tensors_w8a16",
    ]


def test_every_attempt_has_its_row_with_every_figure(report: RunReport) -> None:
    table = attempts_table(by_format(report, "compressed_tensors_w4a16_g32").attempts)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [cell.text for cell in column(table, "Rung")] == ["0", "2", "2"]
    assert [cell.text for cell in column(table, "Merged into")] == ["dequantized", "dequantized", "original"]
    assert column(table, "Gain kept")[1] == Cell("99.4 %", "99.3 to 99.5")
    assert [cell.text for cell in column(table, "Meets the bar")] == ["✗ no", "✓ yes", "✓ yes"]
    assert [cell.text for cell in column(table, "Shipped")] == ["—", "✓ shipped", "—"]
    assert table.rows[0][-4:-2] == (Cell("6.11 MiB"), Cell("12.5 s"))


def test_a_file_that_was_shipped_below_the_bar_is_not_praised(report: RunReport) -> None:
    table = attempts_table(by_format(report, "compressed_tensors_w4a16_g128").attempts)
    assert column(table, "Shipped") == [Cell("—"), Cell("shipped", "below the bar", tone="warn")]


def test_an_attempt_without_a_gain_shows_the_loss_difference_instead(report: RunReport) -> None:
    attempt = by_format(report, "compressed_tensors_w8a16").attempts[0]
    table = attempts_table((replace(attempt, gain_kept=None, interval=(-0.0003, 0.0021)),))
    assert column(table, "Gain kept") == [Cell("—", "loss -0.0003 to +0.0021 above trained")]


def test_a_file_without_a_gain_is_said_to_be_judged_by_its_distance(report: RunReport) -> None:
    export = by_format(report, "compressed_tensors_w8a16")
    (told,) = makings((export,))
    assert told.asked == "Asked for: 99.5 % of what training won, at the lower end of the interval."
    (told,) = makings((replace(export, gain_kept=None, interval=None),))
    assert told.asked.startswith("Training won too little to divide by")
    (told,) = makings((replace(export, bar=None),))
    assert told.asked == ""


def test_layers_that_were_treated_otherwise_are_listed(report: RunReport) -> None:
    plain = by_format(report, "bitsandbytes_nf4")
    (told,) = makings((replace(plain, layers_16bit=("a", "b"), layers_raised=("c",)),))
    assert told.remarks == (
        "With more bits than the rest: c.",
        "Left in 16 bit, as the format cannot hold them: a, b.",
    )
    assert told.attempts.rows == ()


def test_the_reason_for_the_end_is_one_sentence_whether_or_not_it_ends_with_a_stop(report: RunReport) -> None:
    export = by_format(report, "compressed_tensors_w8a16")
    for reason in ("rung 0 meets the bar", "rung 0 meets the bar."):
        (told,) = makings((replace(export, why_ended=reason),))
        assert told.remarks == ("Why it ended there: rung 0 meets the bar.",)


def test_the_meter_is_told_by_its_range_and_by_the_layers_that_lost_most(report: RunReport) -> None:
    table = survived_table(report.exports)
    names = [cell.text for cell in column(table, "Format")]
    assert "peft_adapter" not in names
    row = table.rows[names.index("bitsandbytes_nf4")]
    # Layer k of 18 kept 1 - 0.052 k.
    assert [cell.text for cell in row[2:6]] == ["18", "11.6 %", "55.8 %", "100.0 %"]
    assert row[6].text.startswith("model.layers.5.mlp.down_proj 11.6 %, model.layers.5.mlp.up_proj 16.8 %")
    assert row[6].text.count(" %") == 5


def test_layers_that_lost_nothing_are_not_named(report: RunReport) -> None:
    export = replace(report.exports[1], survived={"a": 1.01, "b": 0.996, "c": 0.99})
    assert survived_table((export,)).rows[0][-1].text == "c 99.0 %"
    assert survived_table((replace(export, survived={"a": 1.01}),)).rows[0][-1].text == "—"


def test_the_better_merge_base_is_named_with_the_difference(measurements: Measurements) -> None:
    assert measurements.merged is not None
    text = merge_base_in_words(measurements.merged)
    assert text == (
        "The merged 16-bit file is the dequantized base with the adapter in it: 0.1399 nats per token on the "
        "validation rows, 0.0032 less than with the original base (0.1431)."
    )
    worse = replace(measurements.merged, into="original")
    assert "0.0032 more than with the dequantized base (0.1399)" in merge_base_in_words(worse)


def test_a_base_that_was_the_only_one_is_compared_with_none(measurements: Measurements) -> None:
    assert measurements.merged is not None
    for tried in ({}, {"dequantized": 0.14}):
        alone = replace(measurements.merged, validation_nats=tried)
        assert merge_base_in_words(alone).endswith("with the adapter in it; no other base was tried.")
    assert merge_base_in_words(None) == ""
