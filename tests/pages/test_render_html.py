from qlora_trainer.pages.blocks import Facts, Grid, Section
from qlora_trainer.pages.page import Answer, Page
from qlora_trainer.pages.render_html import render_html
from qlora_trainer.pages.render_markdown import render_markdown
from qlora_trainer.pages.tables import Cell, Column, Table


def page(table: Table) -> Page:
    taken = Answer("Take this", "one", "Because.", "good", Facts(()), ())
    return Page("name", "done", "good", "A sentence.", (), taken, Facts(()), (Section("rows", "Rows", (Grid(table),)),))


def table(marked: frozenset[int]) -> Table:
    return Table(
        (Column("Name", is_number=False), Column("Figure")), ((Cell("a"), Cell("1")), (Cell("b"), Cell("2"))), marked
    )


def test_a_marked_row_has_a_class_and_no_other_row_has() -> None:
    html = render_html(page(table(frozenset({1}))))
    assert html.count('<tr class="marked">') == 1
    assert html.index('<tr class="marked">') > html.index(">a<")
    assert '<tr class="marked">' not in render_html(page(table(frozenset())))


def test_both_renderings_show_the_same_cells() -> None:
    made = page(table(frozenset({0})))
    assert "| a | 1 |\n| b | 2 |" in render_markdown(made)
    for text in ("A sentence.", ">a<", ">2<", "Because."):
        assert text in render_html(made)
