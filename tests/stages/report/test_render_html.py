import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report import Measurements, Notes
from qlora_trainer.stages.report.heatmap import STEPS, survived_map
from qlora_trainer.stages.report.page import Page, lay_out
from qlora_trainer.stages.report.plot import stages_plot, training_plot
from qlora_trainer.stages.report.render_html import render_html

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}'


class Outline(HTMLParser):
    """Every element with its attributes, and whether each was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    return parser


def render(page: Page, report: RunReport, measurements: Measurements) -> str:
    curve = training_plot(measurements.trained.curve)
    return render_html(
        page, stages_svg=stages_plot(report.stages), training_svg=curve, survived_svg=survived_map(report.exports)
    )


@pytest.fixture(scope="module")
def page(report: RunReport, measurements: Measurements, notes: Notes) -> Page:
    return lay_out(report, measurements=measurements, notes=notes)


@pytest.fixture(scope="module")
def html(page: Page, report: RunReport, measurements: Measurements) -> str:
    return render(page, report, measurements)


def test_every_element_is_closed_in_order(html: str) -> None:
    assert outline(html).open == []


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(html: str) -> None:
    elements = outline(html).elements
    assert {tag for tag, _ in elements}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form"})
    targets = {attributes.get(name) for _, attributes in elements for name in ("src", "href", "srcset", "data")} - {
        None
    }
    assert all(str(target).startswith("#") for target in targets)
    assert re.search(r"url\(|@import|@font-face", html) is None
    policy = next(attributes for tag, attributes in elements if attributes.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_link_within_the_page_has_its_target(html: str) -> None:
    elements = outline(html).elements
    targets = {attributes["href"] for tag, attributes in elements if tag == "a"}
    assert targets == {f"#{attributes['id']}" for _, attributes in elements if "id" in attributes}


def test_no_text_from_outside_becomes_markup(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    evil_stages = tuple(replace(stage, runtime=EVIL) for stage in report.stages)
    evil_exports = tuple(
        replace(
            export,
            path=EVIL,
            verification=EVIL,
            sha256={EVIL: EVIL},
            attempts=tuple(replace(attempt, method=EVIL, merged_into=EVIL) for attempt in export.attempts),
            merged_into=EVIL,
            why_ended=EVIL,
            survived={EVIL: 0.1},
            layers_16bit=(EVIL,),
            layers_raised=(EVIL,),
        )
        for export in report.exports
    )
    evil_report = replace(
        report,
        recipe=EVIL,
        sentence=EVIL,
        stages=evil_stages,
        exports=evil_exports,
        environment={EVIL: EVIL},
        warnings=(EVIL,),
    )
    evil_samples = tuple(
        replace(evaluation, samples=tuple(replace(sample, output=EVIL) for sample in evaluation.samples))
        for evaluation in measurements.evaluations
    )
    evil = replace(measurements, evaluations=evil_samples)
    page = lay_out(evil_report, measurements=evil, notes=replace(notes, audit=(EVIL,), example=((EVIL, True),)))
    found = outline(render(page, evil_report, evil))
    assert {"script", "img"}.isdisjoint(tag for tag, _ in found.elements)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert found.texts.count(EVIL) > 40


def test_sentence_status_and_figures_are_shown(html: str, report: RunReport) -> None:
    texts = outline(html).texts
    assert report.sentence in texts
    assert {"below the bar", "98.9 %", "✓ verified", "✓ meets the bar", "▼ below the bar", "6.13 MiB"} <= set(texts)
    assert '<span class="status warn">below the bar</span>' in html


def test_trained_tokens_of_the_example_are_marked(html: str) -> None:
    assert "<mark>{&#34;intent&#34;: &#34;alarm&#34;" in html
    assert html.count("<mark>") == 2


def test_only_the_recommended_file_is_unfolded(html: str) -> None:
    unfolded = [attributes for tag, attributes in outline(html).elements if tag == "details" and "open" in attributes]
    assert len(unfolded) == 1


def test_sections_without_content_are_left_out(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    bare = replace(report, exports=(), choice=None, expected=())
    silent = replace(
        measurements, merged=None, evaluations=tuple(replace(stage, samples=()) for stage in measurements.evaluations)
    )
    page = lay_out(bare, measurements=silent, notes=replace(notes, audit=(), example=()))
    ids = {attributes["id"] for _, attributes in outline(render(page, bare, silent)).elements if "id" in attributes}
    assert ids == {"loss", "training", "quantized", "terms", "environment"}


def test_a_failed_run_shows_its_warnings(page: Page, report: RunReport, measurements: Measurements) -> None:
    failed = replace(page, status="failed", warnings=("first", "second"))
    assert "<li>first</li><li>second</li>" in render(failed, report, measurements)


def test_every_attempt_and_why_the_climb_ended_is_shown(html: str) -> None:
    texts = outline(html).texts
    assert {"GPTQ + tuned scales", "quantization-aware merging + tuned scales", "96.6 to 96.8", "✓ shipped"} <= set(
        texts
    )
    assert "Why it ended there: rung 4 is the last that the recipe allows." in texts
    assert any("0.0032 less than with the original base (0.1431)" in text for text in texts)


def test_every_cell_of_the_map_tells_its_layer_and_share(html: str, report: RunReport) -> None:
    cells = [attributes for tag, attributes in outline(html).elements if tag == "rect" and attributes.get("role")]
    assert len(cells) == sum(len(export.survived) for export in report.exports)
    assert "model.layers.5.mlp.down_proj: 11.6 % survived" in {cell["aria-label"] for cell in cells}


def test_each_strength_of_the_map_has_its_rule_in_the_style_sheet(html: str) -> None:
    strengths = [float(found) for found in re.findall(r"\.h\d { fill-opacity: ([\d.]+); }", html)]
    assert len(strengths) == STEPS
    assert strengths == sorted(strengths)
