"""The page as a reader's browser shows it: nothing is refused, everything is drawn, keys and narrow screens work."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report import Measurements, Notes, write
from tests.browser import CONTRAST, HOSTILE, IN_BROWSER, Browser

pytestmark = IN_BROWSER
CURVES = "document.querySelector('svg[data-curves]')"
READOUT = "document.querySelector('.controls output').textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, report: RunReport, measurements: Measurements, notes: Notes) -> Path:
    folder = tmp_path_factory.mktemp("run")
    logged = {"train/gradient_norm": tuple((step, 1.0 + step / 400) for step in range(10, 401, 10))}
    write(folder, report, measurements=measurements, notes=replace(notes, logged=logged))
    return folder / "report.html"


def test_every_chart_is_drawn_and_none_is_empty(browser: Browser, page: Path) -> None:
    browser.open(page)
    sizes = browser.value(
        "[...document.querySelectorAll('figure svg[role]')].map(svg => [svg.getBoundingClientRect().width, "
        "svg.getBoundingClientRect().height, svg.querySelectorAll('rect, circle, polyline').length])"
    )
    assert len(sizes) == 5
    assert all(width > 800 and height > 50 and marks > 10 for width, height, marks in sizes)


def test_the_answer_is_seen_without_scrolling(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, height=800)
    assert browser.value("document.querySelector('.serve').getBoundingClientRect().bottom") < 800
    browser.open(page, width=390, height=844)
    assert browser.value("document.querySelector('.serve .facts').getBoundingClientRect().bottom") < 844


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_only_tables_and_charts_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll, pre') && "
    assert browser.value(f"{wide} each.getBoundingClientRect().right > {width}).map(each => each.outerHTML)") == []


def test_on_a_wide_screen_every_table_is_seen_whole(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    hidden = "[...document.querySelectorAll('.scroll')].filter((each) => each.scrollWidth > each.clientWidth)"
    assert browser.value(f"{hidden}.map((each) => each.ariaLabel).join()") == ""


def test_a_long_name_is_broken_behind_an_underscore(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    names = "[...document.querySelectorAll('.answer h4')].map((each) => each.innerHTML)"
    assert "compressed_<wbr>tensors_<wbr>" in str(browser.value(f"{names}.join()"))


def test_light_and_dark_follow_the_system_and_the_button(browser: Browser, page: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.value(paper)
    browser.open(page, dark=True)
    dark = browser.value(paper)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
    browser.value("document.querySelector('.theme').click()")
    assert browser.value(paper) == light


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_its_ground(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    contrast = browser.value(CONTRAST)
    # The largest there is, black on white, is 21.
    assert 4.5 <= contrast <= 21


def test_the_curves_are_read_step_by_step_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value(f"{CURVES}.focus()")
    browser.press("ArrowRight")
    assert browser.value(READOUT).startswith("step 0: training rows 3.13, validation rows 3.14")
    browser.press("ArrowRight")
    assert browser.value(READOUT) == "step 10: training rows 2.012, gradient norm 1.025"
    browser.press("End")
    assert browser.value(READOUT).startswith("step 400: ")


def test_the_curves_are_zoomed_moved_and_shown_whole_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    whole = browser.value(f"{CURVES}.querySelector('.curve').getAttribute('points')")
    browser.value(f"{CURVES}.focus()")
    browser.press("+")
    assert browser.value(f"{CURVES}.dataset.shown") == "100.0 to 300.0"
    browser.press("PageDown")
    assert browser.value(f"{CURVES}.dataset.shown") == "150.0 to 350.0"
    labels = browser.value(f"[...{CURVES}.querySelectorAll('.steps text')].map(text => text.textContent)")
    assert labels == ["150", "200", "250", "300", "350"]
    browser.press("0")
    assert browser.value(f"{CURVES}.dataset.shown") == "0.0 to 400.0"
    again = browser.value(f"{CURVES}.querySelector('.curve').getAttribute('points')")
    numbers = [[float(number) for number in text.replace(",", " ").split()] for text in (whole, again)]
    # Python and the script draw the same; Python rounds pixels to a tenth.
    assert numbers[1] == pytest.approx(numbers[0], abs=0.051)


def test_a_part_of_the_curves_is_chosen_with_the_mouse(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value(f"{CURVES}.scrollIntoView()")
    left, top, width = browser.value(f"(box => [box.left, box.top, box.width])({CURVES}.getBoundingClientRect())")
    browser.drag((left + width * 0.3, top + 100), (left + width * 0.6, top + 120))
    low, high = (float(end) for end in browser.value(f"{CURVES}.dataset.shown").split(" to "))
    # Steps 0 to 400 stand from 5.4 % to 98.6 % of the width.
    assert (low, high) == pytest.approx((105.5, 234.3), abs=3)


def test_a_heat_map_is_read_cell_by_cell_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value("document.querySelector('#quantized svg[data-cells]').focus()")
    told = "document.querySelector('#quantized .readout').textContent"
    browser.press("ArrowRight")
    assert browser.value(told).startswith("model.layers.0.self_attn.q_proj: relative error 9.32 %")
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    assert browser.value(told).startswith("model.layers.1.mlp.up_proj: ")


def test_everything_that_does_something_is_reached_by_tab_and_has_a_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.value("document.activeElement.className") == "theme"
    nameless = (
        "[...document.querySelectorAll('button, a, summary, [tabindex]')].filter(each => "
        "!(each.textContent.trim() || each.getAttribute('aria-label'))).length"
    )
    assert browser.value(nameless) == 0


def test_a_printed_page_shows_what_is_folded_and_no_buttons(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value("dispatchEvent(new Event('beforeprint'))")
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.value("[...document.querySelectorAll('details')].every(each => each.open)")
    hidden = "[...document.querySelectorAll('button, nav')].every(each => getComputedStyle(each).display === 'none')"
    assert browser.value(hidden)


def test_hostile_text_runs_nothing_and_asks_for_nothing(
    browser: Browser, tmp_path: Path, report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    evaluations = tuple(
        replace(each, samples=tuple(replace(sample, prompt=HOSTILE, output=HOSTILE) for sample in each.samples))
        for each in measurements.evaluations
    )
    layers = tuple(replace(layer, name=f"{HOSTILE}.0.{HOSTILE}") for layer in measurements.quantized.layers)
    odd = replace(measurements, evaluations=evaluations, quantized=replace(measurements.quantized, layers=layers))
    exports = tuple(replace(export, path=HOSTILE, verification=HOSTILE) for export in report.exports)
    marked = replace(notes, name=HOSTILE, audit=(HOSTILE,), example=((HOSTILE, True),))
    write(tmp_path, replace(report, exports=exports, sentence=HOSTILE), measurements=odd, notes=marked)
    browser.open(tmp_path / "report.html")
    assert browser.value("document.title").endswith("\\u202e\\x00\\x1b[31m: below the bar")
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.querySelectorAll('script').length") == 1


def test_markup_that_slipped_through_could_still_not_run(browser: Browser, page: Path, tmp_path: Path) -> None:
    html = page.read_text("utf-8").replace("</main>", "<script>document.title = 'run'</script></main>")
    (tmp_path / "slipped.html").write_text(html, encoding="utf-8")
    browser.open(tmp_path / "slipped.html")
    assert browser.value("document.title") == "quickstart: below the bar"
    # The browser tells of what the policy forbade, and only of that.
    assert len(browser.complaints) == 1
    assert "Content Security Policy" in browser.complaints.pop()


def test_without_its_script_the_page_still_shows_every_chart(browser: Browser, page: Path, tmp_path: Path) -> None:
    start, _, rest = page.read_text("utf-8").partition("<script>")
    (tmp_path / "plain.html").write_text(start + rest.partition("</script>")[2], encoding="utf-8")
    browser.open(tmp_path / "plain.html")
    assert browser.value("document.querySelectorAll('figure svg[role]').length") == 5
    assert browser.value("document.querySelectorAll('.curve').length") == 3
    assert browser.value("document.querySelectorAll('button').length") == 0
