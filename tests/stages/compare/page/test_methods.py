from dataclasses import replace

from qlora_trainer.pages.blocks import Chart, Grid
from qlora_trainer.records import Recommendation
from qlora_trainer.stages.compare.page.methods import explained, methods, methods_table
from tests.stages.compare.compared import COMPARISON


def cells(name: str) -> dict[str, tuple[str, str]]:
    table = methods_table(COMPARISON)
    row = next(row for row in table.rows if row[0].text == name)
    return {column.title: (cell.text, cell.note) for column, cell in zip(table.columns, row, strict=True)}


def test_a_row_holds_every_figure_and_brackets_those_that_are_not_its_own() -> None:
    assert cells("gptq_int4") == {
        "Method": ("gptq_int4", "recommended, on the front"),
        "Bits": ("W4A16", ""),
        "Loss, nats per token": ("1.2346", "1.1000 to 1.3000"),
        "Above 16 bit": ("+0.0100", "+0.0090 to +0.0110"),
        "Exact match": ("50.0 %", "40.0 to 60.0"),
        "BLEU": ("12.5", "11.0 to 14.0"),
        "KL to 16 bit, nats": ("0.0050", ""),
        "Size": ("3.00 MiB", "38 %"),
        "Peak memory": ("(120 MiB)", ""),
        "Prefill tokens/s": ("(2,000)", ""),
        "Decode tokens/s": ("(100)", ""),
        "Quantizing": ("1.2 s", ""),
    }
    assert cells("nf4")["Decode tokens/s"] == ("100", "")


def test_16_bit_is_compared_with_nothing() -> None:
    base = cells("16bit")
    assert {base[title][0] for title in ("Above 16 bit", "KL to 16 bit, nats", "Quantizing")} == {"—"}


def test_what_adds_more_than_the_recipe_allows_says_so() -> None:
    assert cells("rtn_int4")["Method"][1] == "adds too much"
    assert cells("nf4")["Method"][1] == "on the front, adds too much"
    assert cells("rtn_int8")["Method"][1] == "on the front"


def test_the_recommended_row_stands_out_and_it_alone() -> None:
    table = methods_table(COMPARISON)
    assert [table.rows[number][0].text for number in table.marked] == ["gptq_int4"]


def test_where_nothing_meets_the_bounds_no_row_stands_out_and_what_is_too_large_says_so() -> None:
    advice = Recommendation("rtn_int8", "words", is_within_bounds=False)
    table = methods_table(replace(COMPARISON, recommendation=advice, settings={"most_mib": 2.75}))
    assert table.marked == frozenset()
    notes = {row[0].text: row[0].note for row in table.rows}
    assert notes["rtn_int8"] == "of least loss, on the front, too large"
    assert notes["nf4"] == "on the front"


def test_figures_that_were_not_measured_are_dashes() -> None:
    rows = tuple(replace(row, decode_tokens_per_second=None, peak_bytes=None, kl=None) for row in COMPARISON.rows)
    table = methods_table(replace(COMPARISON, rows=rows))
    titles = [column.title for column in table.columns]
    for title in ("Decode tokens/s", "Peak memory", "KL to 16 bit, nats"):
        assert {row[titles.index(title)].text for row in table.rows} == {"—"}


def test_without_task_metrics_perplexity_takes_their_place() -> None:
    rows = tuple(replace(row, metrics={}) for row in COMPARISON.rows)
    table = methods_table(replace(COMPARISON, rows=rows))
    place = [column.title for column in table.columns].index("Perplexity")
    # exp(1.2246), and of the ends of its interval.
    assert (table.rows[0][place].text, table.rows[0][place].note) == ("3.403", "3.004 to 3.669")


def test_a_metric_that_one_row_lacks_is_a_dash_there() -> None:
    rows = (COMPARISON.rows[0], replace(COMPARISON.rows[1], metrics=None))
    table = methods_table(replace(COMPARISON, rows=rows))
    place = [column.title for column in table.columns].index("BLEU")
    assert [row[place].text for row in table.rows] == ["12.5", "—"]


def test_the_section_draws_and_lists() -> None:
    section = methods(COMPARISON)
    assert [type(block) for block in section.blocks if isinstance(block, Chart | Grid)] == [Chart, Grid]
    (chart,) = (block for block in section.blocks if isinstance(block, Chart))
    assert chart.caption.endswith("Dashed: what the recipe allows.")


def test_each_method_is_explained_with_what_it_left_in_16_bit() -> None:
    (grid,) = (block for block in explained(COMPARISON).blocks if isinstance(block, Grid))
    told = {row[0].text: [cell.text for cell in row[1:]] for row in grid.table.rows}
    assert told["gptq_int4"] == ["gptq_int4 in words", "—", "mlp.down_proj of block 0"]
    assert told["smoothquant_w8a8"] == ["smoothquant_w8a8 in words", "alpha 0.5 at 12 of 12 norms", "none"]
    assert set(told) == {row.method for row in COMPARISON.rows if row.failed is None} - {"16bit"}
