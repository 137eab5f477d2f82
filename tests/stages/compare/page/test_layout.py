import re
from dataclasses import replace

import pytest

from qlora_trainer.pages.blocks import Bullets, Section
from qlora_trainer.pages.page import Page
from qlora_trainer.pages.render_html import render_html
from qlora_trainer.pages.render_markdown import render_markdown
from qlora_trainer.records import Comparison, Recommendation
from qlora_trainer.stages.compare.page import lay_out
from tests.stages.compare.compared import BASE, COMPARISON

EVIL = '"></script></style><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }} | `rm` **all**'


def section(page: Page, name: str) -> Section:
    return next(section for section in page.sections if section.name == name)


def test_the_recommendation_stands_first_and_everything_that_was_asked_for_has_a_section() -> None:
    page = lay_out(COMPARISON)
    assert (page.name, page.status, page.tone) == ("tiny", "gptq_int4 recommended", "good")
    assert [each.name for each in page.sections] == [
        "methods",
        "failed",
        "explained",
        "outliers",
        "terms",
        "settings",
        "environment",
    ]
    text = render_markdown(page)
    first = r"**Take this method:** gptq_int4. The smallest \[of three\] that meet the bounds."
    assert text.splitlines()[:5] == [
        "# tiny: gptq_int4 recommended",
        "",
        "- **Warning:** Not measured: awq_int4. The reasons stand below.",
        "",
        first,
    ]


def test_a_method_that_failed_is_listed_with_its_reason_and_has_no_row() -> None:
    text = render_markdown(lay_out(COMPARISON))
    assert r"- awq_int4: a \| b &lt;script&gt; \*bold\*" in text
    assert "| awq_int4 |" not in text


def test_where_nothing_failed_there_is_neither_warning_nor_section() -> None:
    page = lay_out(replace(COMPARISON, rows=COMPARISON.rows[:-1]))
    assert page.warnings == ()
    assert "failed" not in {each.name for each in page.sections}
    assert not any(isinstance(block, Bullets) for each in page.sections for block in each.blocks)


def test_where_no_method_meets_the_bounds_the_page_says_so() -> None:
    advice = Recommendation("rtn_int8", "no method meets the recipe's bounds (..)", is_within_bounds=False)
    page = lay_out(replace(COMPARISON, recommendation=advice))
    assert (page.status, page.tone, page.answer.commands) == ("nothing fits", "warn", ())
    assert page.answer.question == "No method meets the recipe's bounds; the nearest"


@pytest.mark.parametrize(
    "comparison",
    [
        replace(COMPARISON, outliers=(), systematic=()),
        replace(COMPARISON, rows=(BASE,), recommendation=Recommendation("16bit", "nothing else was measured")),
        replace(COMPARISON, settings={}, recipe_text="", environment={}, command=""),
        replace(COMPARISON, rows=tuple(replace(row, metrics={}) for row in COMPARISON.rows)),
    ],
    ids=["no outliers", "16 bit alone", "no settings", "no metrics"],
)
def test_what_is_missing_leaves_a_whole_page(comparison: Comparison) -> None:
    page = lay_out(comparison)
    assert all(section.blocks for section in page.sections)
    assert render_markdown(page).startswith("# tiny: ")
    assert render_html(page).rstrip().endswith("</html>")


def test_hostile_text_stays_text() -> None:
    rows = tuple(
        replace(row, note=EVIL, what=EVIL, layers_16bit=(EVIL,), failed=EVIL if row.failed else None)
        for row in COMPARISON.rows
    )
    layers = tuple(replace(layer, layer=f"{EVIL}.0.{EVIL}") for layer in COMPARISON.outliers)
    odd = replace(
        COMPARISON,
        recipe=EVIL,
        rows=rows,
        outliers=layers,
        recommendation=replace(COMPARISON.recommendation, why=EVIL),
        settings={EVIL: EVIL},
        environment={EVIL: EVIL},
        command=EVIL,
        recipe_text=EVIL,
    )
    html = render_html(lay_out(odd))
    assert html.count("<script") == 1
    assert "<img" not in html
    assert "{{ 7 * 7 }}" in html
    outside_of_code = re.sub(r"^(`{3,}).*?^\1$", "", render_markdown(lay_out(odd)), flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_of_code
    assert outside_of_code.count("&lt;script&gt;") > 10
