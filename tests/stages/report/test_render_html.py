import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args

import pytest

from qlora_trainer.pages.blocks import Block
from qlora_trainer.pages.render_html import FOLDER, render_html, together
from qlora_trainer.pages.svg import STEPS
from qlora_trainer.records import RunReport
from qlora_trainer.stages.report import Measurements, Notes
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.page import lay_out

WITHOUT_LINES = {"svg", "title", "code", "pre", "script", "style"}
"""Elements whose text is no prose of the page's: it breaks no lines, or stands as it was given."""
VOID = {"wbr", "meta", "br", "img", "link", "input", "hr"}
EVIL = '"></script></style></title></pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}'


class Outline(HTMLParser):
    """Every element with its attributes, and whether each was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.prose: list[str] = []
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
        if WITHOUT_LINES.isdisjoint(self.open):
            self.prose.append(data)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    return parser


def render(report: RunReport, measurements: Measurements, notes: Notes) -> str:
    return render_html(lay_out(Shown(report, measurements, notes)))


@pytest.fixture(scope="module")
def html(report: RunReport, measurements: Measurements, notes: Notes) -> str:
    return render(report, measurements, notes)


def test_every_element_is_closed_in_order(html: str) -> None:
    assert outline(html).open == []


def test_no_line_is_broken_between_a_number_and_its_unit(html: str) -> None:
    prose = outline(html).prose
    assert any("97.37\u00a0% (97.32 to 97.41\u00a0%)" in text for text in prose)
    assert any("\u00a0MiB" in text for text in prose)
    assert [text for text in prose if re.search(r"\d (?:%|[KMG]iB)", text)] == []


def test_the_page_asks_nothing_of_the_network(html: str) -> None:
    elements = outline(html).elements
    assert {tag for tag, _ in elements}.isdisjoint({"link", "img", "iframe", "object", "embed", "form", "base"})
    targets = {attributes.get(name) for _, attributes in elements for name in ("src", "href", "srcset", "data")}
    assert all(str(target).startswith("#") for target in targets - {None})
    assert re.search(r"url\(|@import|@font-face|fetch\(|XMLHttpRequest|WebSocket", html) is None


def test_only_the_one_script_and_the_one_style_sheet_are_allowed_by_their_hashes(html: str) -> None:
    elements = outline(html).elements
    assert [tag for tag, _ in elements].count("script") == [tag for tag, _ in elements].count("style") == 1
    policy = next(attributes for tag, attributes in elements if attributes.get("http-equiv"))["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    for name in ("script", "style"):
        text = html.split(f"<{name}>")[1].split(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{name}-src") == f"'sha256-{digest}'"
    assert set(rules.values()) == {"'none'"}
    assert not any("style" in attributes for _, attributes in elements)


def test_every_link_within_the_page_has_its_target(html: str) -> None:
    elements = outline(html).elements
    targets = {attributes["href"] for tag, attributes in elements if tag == "a"}
    assert targets == {f"#{attributes['id']}" for tag, attributes in elements if tag == "section"}


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
    evil_notes = replace(notes, name=EVIL, audit=(EVIL,), example=((EVIL, True),))
    found = outline(render(evil_report, evil, evil_notes))
    tags = [tag for tag, _ in found.elements]
    assert (tags.count("script"), tags.count("img")) == (1, 0)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert found.texts.count(EVIL) > 40


def test_sentence_status_and_figures_are_shown(html: str, report: RunReport) -> None:
    texts = outline(html).texts
    assert together(report.sentence) in texts
    assert {"below the bar", "98.9 %", "✓ verified", "✓ meets the bar", "▼ below the bar", "6.13 MiB"} <= set(texts)
    assert '<span class="status warn">below the bar</span>' in html


def test_trained_tokens_of_the_example_are_marked(html: str) -> None:
    assert "<mark>{&#34;intent&#34;: &#34;alarm&#34;" in html
    assert html.count("<mark>") == 1


def test_only_the_recommended_file_is_unfolded(html: str) -> None:
    unfolded = [attributes for tag, attributes in outline(html).elements if tag == "details" and "open" in attributes]
    assert len(unfolded) == 1


def test_sections_without_content_are_left_out(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    bare = replace(report, exports=(), choice=None, expected=())
    silent = replace(
        measurements, merged=None, evaluations=tuple(replace(stage, samples=()) for stage in measurements.evaluations)
    )
    html = render(bare, silent, replace(notes, audit=(), example=()))
    ids = {attributes["id"] for tag, attributes in outline(html).elements if tag == "section"}
    assert ids == {"loss", "training", "quantized", "terms", "environment"}


def test_a_failed_run_shows_its_warnings(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    failed = replace(report, status="failed", warnings=("first", "second"))
    assert "<li>first</li><li>second</li>" in render(failed, measurements, notes)


def test_every_attempt_and_why_the_climb_ended_is_shown(html: str) -> None:
    texts = outline(html).texts
    assert {"GPTQ + tuned scales", "quantization-aware merging + tuned scales", "96.6 to 96.8", "✓ shipped"} <= set(
        texts
    )
    assert "Why it ended there: rung 4 is the last that the recipe allows." in texts
    assert any("0.0032 less than with the original base (0.1431)" in text for text in texts)


def test_every_cell_of_the_map_tells_its_layer_and_share(html: str, report: RunReport) -> None:
    cells = [
        attributes for tag, attributes in outline(html).elements if "survived" in str(attributes.get("aria-label"))
    ]
    cells = [cell for cell in cells if cell.get("role") == "img" and "%" in str(cell["aria-label"])]
    assert len(cells) == sum(len(export.survived) for export in report.exports)
    assert "bitsandbytes_nf4, model.layers.5.mlp.down_proj: 11.6 % survived" in {cell["aria-label"] for cell in cells}


def test_each_strength_of_the_map_has_its_rule_in_the_style_sheet(html: str) -> None:
    strengths = [float(found) for found in re.findall(r"\.h\d { fill-opacity: ([\d.]+); }", html)]
    assert len(strengths) == STEPS
    assert strengths == sorted(strengths)


HIDDEN = "\x00\x1b[2J\u202e\u2066\ufeff\ud800"


def test_hidden_characters_reach_the_page_only_spelt_out(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    evaluations = tuple(
        replace(each, samples=tuple(replace(sample, output=HIDDEN, prompt=HIDDEN) for sample in each.samples))
        for each in measurements.evaluations
    )
    odd = replace(measurements, evaluations=evaluations)
    html = render(replace(report, sentence=HIDDEN), odd, replace(notes, audit=(HIDDEN,), example=((HIDDEN, True),)))
    assert not any(character in html for character in HIDDEN if not character.isprintable())
    assert html.count(r"\x00\x1b[2J\u202e\u2066\ufeff\ud800") > 20


def test_a_huge_output_does_not_make_a_huge_page(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    first, *rest = measurements.evaluations
    huge = replace(first, samples=(replace(first.samples[0], output="<b>" * 3_000_000), *first.samples[1:]))
    html = render(report, replace(measurements, evaluations=(huge, *rest)), notes)
    assert len(html) < 2_000_000
    assert "8,900,000 more characters are not shown here" in html


def test_every_kind_of_block_has_its_template() -> None:
    kinds = {kind.kind for kind in get_args(Block)}
    assert {path.name.removesuffix(".html.j2") for path in (FOLDER / "blocks").iterdir()} == kinds


def test_every_chart_has_a_name_for_those_who_do_not_see_it(html: str) -> None:
    charts = [a for tag, a in outline(html).elements if tag == "svg" and a.get("role")]
    assert len(charts) == 5
    assert all(chart["aria-label"] for chart in charts)
