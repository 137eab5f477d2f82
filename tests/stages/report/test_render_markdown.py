import re
from typing import get_args

import pytest

from qlora_trainer.pages.blocks import Block
from qlora_trainer.pages.page import Page
from qlora_trainer.pages.render_markdown import escape, fenced, render, render_markdown
from qlora_trainer.records import RunReport
from qlora_trainer.stages.report import Measurements, Notes
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.page import lay_out


@pytest.fixture(scope="module")
def page(report: RunReport, measurements: Measurements, notes: Notes) -> Page:
    return lay_out(Shown(report, measurements, notes))


def test_the_sentence_and_every_section_are_there(page: Page) -> None:
    text = render_markdown(page)
    assert text.startswith("# quickstart: below the bar\n\n**Serve this file:** compressed_tensors_w8a16. The smallest")
    assert "\n\nStoring the model in 4 bits cost 0.046 nats per token;" in text
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        "Loss at every stage",
        "Exports",
        "Sample outputs",
        "Training",
        "Data",
        "Quantized base",
        "How each file was made",
        "What survived of the learned delta",
        "Promised and measured",
        "What the figures mean",
        "Environment and recipe",
    ]


def test_every_row_of_a_table_has_as_many_cells_as_its_heading(page: Page) -> None:
    for block in render_markdown(page).split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("| "):
            assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(re.findall(r"\|", lines[0]))}


def test_figures_stand_flush_right_and_words_flush_left(page: Page) -> None:
    rules = [line for line in render_markdown(page).splitlines() if line.startswith("| ---")]
    assert rules[0].startswith("| --- | ---: | ---: |")
    assert rules[0].endswith("| --- |")


def test_markup_in_a_sample_stays_text(page: Page) -> None:
    text = render_markdown(page)
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert r"&lt;script&gt;alert('run')&lt;/script&gt; \| \`rm\` \*\*all\*\*" in outside


def test_words_that_differ_are_marked_and_answers_that_do_not_are_short(page: Page) -> None:
    text = render_markdown(page)
    assert '<del>, "not\\_from": "savings"</del>' in text.replace("not_from", "not\\_from")
    assert "| merged_16bit | ✓ same as adapter_unmerged |" in text


def test_hidden_characters_are_spelt_out() -> None:
    assert escape("a\x00\u202eb") == r"a\\x00\\u202eb"
    assert "\x1b" not in fenced("\x1b[31m")


def test_every_kind_of_block_is_rendered() -> None:
    for kind in get_args(Block):
        assert render.dispatch(kind) is not render.dispatch(object), kind
    with pytest.raises(NotImplementedError, match="int"):
        render(1)


def test_lines_of_a_text_stay_within_their_cell() -> None:
    assert escape("one\ntwo | three") == r"one ⏎ two \| three"


def test_an_underscore_is_escaped_only_where_it_could_be_markup() -> None:
    assert escape("base_16bit _so_") == r"base_16bit \_so\_"


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    assert fenced("a\n````\nb") == "`````text\na\n````\nb\n`````"


def test_trained_tokens_of_the_example_are_told_apart(page: Page) -> None:
    assert '<|assistant|>\n⟦{"intent": "alarm", "time": "07:00", "day": "tomorrow"}<|end|>⟧' in render_markdown(page)
